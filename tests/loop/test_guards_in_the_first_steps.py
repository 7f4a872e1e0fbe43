"""A run that is lost in its first steps: the first step alone says what it was like, until there are enough others."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from opd.config.guards import Guards as Spec
from opd.config.loading import load_config
from opd.lab.demo.run import load_recipe
from opd.lab.worlds import sorting
from opd.loop.guards import Guards, guards_for
from opd.loop.trends import SURE
from opd.wiring.run import execute
from tests import rooms

WINDOW, LIMIT = 20, 512
HEALTHY = {
    "rollouts": 256.0, "response_tokens": 25600.0, "response_length_max": 400.0, "response_length": 100.0,
    "truncated": 0.05, "ended": 0.95, "end_probability": 0.9, "repetition": 0.02, "entropy": 0.3, "reverse_kl": 0.2,
    "loss": 0.2, "scorer/teacher/logprob": -0.8, "scorer/teacher/spread": 1.5, "policy_gap": 0.001,
    "policy_gap_max": 0.3,
}  # fmt: skip
LOST: dict[str, dict[str, float]] = {
    "length_blowup": {"response_length": 400.0},
    "truncation": {"truncated": 0.7},
    "end_slide": {"response_length": 220.0, "ended": 0.5},
    "repetition": {"repetition": 0.6},
    "entropy_collapse": {"entropy": 0.02},
    "kl_rising": {"reverse_kl": 5.0, "loss": 5.0},
}
ALL_LOST = {key: value for name in reversed(LOST) for key, value in LOST[name].items()}
EXACT = {"rollouts", "response_tokens", "response_length_max", "scorer/teacher/logprob", "scorer/teacher/spread"}


def lines(*stretches: tuple[int, dict[str, float]], seed: int = 0, noise: float = 0.05) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    steps = [HEALTHY | other for count, other in stretches for _ in range(count)]
    return [{k: v if k in EXACT else v * float(rng.lognormal(0, noise)) for k, v in step.items()} for step in steps]


def guards(spec: dict | None = None, *, window: int = WINDOW, **kwargs) -> Guards:
    made = Spec.model_validate({"window": window, **(spec or {})})
    return Guards(made, vocab_size=1000, max_tokens=LIMIT, **kwargs)


def alarms(watch: Guards, history: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    return [(end, alarm.guard) for end in range(1, len(history) + 1) for alarm in watch.look(history[:end])]


# ---- seen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, WINDOW])
@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_in_the_second_step_is_seen_when_the_window_is_full(name, window):
    history = lines((1, {}), (100, LOST[name]))
    told = alarms(guards(window=window), history)
    assert told == [(window + 1, name)]
    (alarm,) = guards(window=window).look(history[: window + 1])
    assert "in the first step" in alarm.message and f"the last {window}" in alarm.message


@pytest.mark.parametrize("name", LOST)
def test_the_first_window_alone_would_not_see_it(name):
    history = lines((2, {}), (100, LOST[name]))
    assert [guard for _, guard in alarms(guards(), history)] == [name]
    assert alarms(guards(), [{}, *history[1:]]) == []


@settings(max_examples=25)
@given(st.sampled_from(list(LOST)), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_whenever_it_comes_it_is_told_once_and_soon(name, healthy, seed):
    """Also where the beginning that it is held against changes from the first line to the first window."""
    window = 8
    history = lines((healthy, {}), (5 * window, LOST[name]), seed=seed, noise=0.01)
    told = alarms(guards(window=window), history)
    assert [guard for _, guard in told] == [name]
    assert max(healthy, window) < told[0][0] <= healthy + window + 1


def test_nobody_who_compares_speaks_before_the_window_is_full():
    history = lines((1, {}), (WINDOW, ALL_LOST))
    assert alarms(guards(), history[:WINDOW]) == []
    assert {guard for _, guard in alarms(guards(), history)} == set(LOST)


@pytest.mark.parametrize(
    ("spec", "speaks"),
    [
        ({}, True),
        ({"jump": 30.0}, False),
        ({"jump": 20.0}, True),
        ({"jump_nats": 6.0}, False),
        ({"action": "off"}, False),
    ],
)
def test_how_far_the_divergence_has_to_jump(spec, speaks):
    history = lines((1, {}), (2 * WINDOW, LOST["kl_rising"]))
    assert bool(alarms(guards({"kl_rising": spec}), history)) == speaks


def test_a_divergence_that_jumps_about_is_seen_as_well():
    """As measured at a learning rate of 0.05 with four answers a step."""
    history: list[dict[str, Any]] = [{"reverse_kl": kl, "loss": kl} for kl in (0.66, 13.03, 9.95, 8.24, 12.11, 9.53)]
    assert alarms(guards(window=4), history) == [(5, "kl_rising")]


def test_a_jump_after_the_first_window_is_seen_before_the_trend_is():
    history = lines((2 * WINDOW, {}), (2 * WINDOW, LOST["kl_rising"]))
    ((step, guard),) = alarms(guards(), history)
    assert guard == "kl_rising" and step <= 3 * WINDOW < WINDOW + Spec().kl_rising.steps


# ---- not seen where it is not there ------------------------------------------------------------------------------


def test_another_divergence_that_is_minimised_may_take_the_reverse_one_up():
    assert alarms(guards(), lines((1, {}), (50, {"reverse_kl": 5.0, "loss": 0.1}))) == []


def test_a_first_step_without_answers_to_compare_is_no_sign():
    for first in ({}, dict.fromkeys(HEALTHY), dict.fromkeys(HEALTHY, math.nan)):
        assert alarms(guards(), [first, *lines((60, ALL_LOST))]) == []


def test_answers_to_one_prompt_may_be_all_alike():
    """One prompt a step: eight answers that all ended, then four times eight that were all cut off."""
    history = lines((1, {"rollouts": 8.0, "truncated": 0.0}), (7, {"rollouts": 8.0, "truncated": 1.0}), noise=0)
    assert [guard for _, guard in alarms(guards(window=4), history)] == ["truncation"]
    assert alarms(guards(window=4, samples_per_prompt=8), history) == []
    config = rooms.config(sampling={"samples_per_prompt": 8}, guards={"window": 4})
    assert alarms(guards_for(config, 1000), history) == []


@pytest.mark.parametrize("rollouts", [{"rollouts": 2.0}, {"rollouts": None}])
def test_what_cannot_scatter_any_more_is_not_taken_for_sure(rollouts):
    """One of two answers was short by chance; those that come after it are all as long as they can be."""
    short = {"response_length": 200.0, "truncated": 0.5, "ended": 0.5}
    full = {"response_length": 512.0, "truncated": 1.0, "ended": 0.0}
    assert alarms(guards(window=4), lines((1, short | rollouts), (7, full | rollouts), noise=0)) == []


def test_an_entropy_that_was_high_once_has_not_collapsed():
    """It scatters by a factor of two; the first step is eight times the median, which is many standard deviations for
    those who do not think in factors."""
    entropies = 0.02 * np.random.default_rng(0).lognormal(0, 0.7, 2 * WINDOW)
    history = [line | {"entropy": entropy} for line, entropy in zip(lines((2 * WINDOW, {})), entropies, strict=True)]
    history[0]["entropy"] = 0.16
    assert (0.16 - np.mean(entropies[1:])) / np.std(entropies[1:], ddof=1) > SURE
    assert alarms(guards(), history) == []


def test_a_share_of_tokens_may_be_that_of_one_long_answer():
    one = {"response_tokens": 800.0, "response_length_max": 512.0}
    history = lines((1, {"repetition": 0.0} | one), (7, LOST["repetition"] | one))
    assert alarms(guards(window=4), history) == []


def test_a_probability_of_ends_is_that_of_the_answers_that_ended():
    slide = {"response_length": 300.0, "end_probability": 0.3}
    few, many = ([{"ended": share} for share in shares] for shares in ((0.03, 0.03), (0.95, 0.95)))
    for (first, later), speaks in ((many, True), (few, False)):
        history = lines((1, first), (7, later | slide), noise=0.001)
        assert ("end_slide" in {guard for _, guard in alarms(guards(window=4), history)}) == speaks


def small_batches(rng: np.random.Generator, steps: int) -> list[dict[str, float]]:
    """A healthy run with two to four answers a step, of log-normal length, a few of which loop, and a divergence that
    is taken at the drawn tokens. Its first step is the most unlucky one of ten."""
    sigma, mu, looping, history = rng.uniform(0.3, 1.2), rng.uniform(3.5, 5.5), rng.uniform(0, 0.3), []
    answers, kl, entropy = int(rng.integers(2, 5)), 0.3 * rng.lognormal(), 0.15 * rng.lognormal()
    for _ in range(steps):
        length = np.ceil(rng.lognormal(mu, sigma, answers))
        cut, length = length > LIMIT, np.minimum(length, LIMIT)
        share = length / length.sum()
        drawn = rng.lognormal(0, 0.5, answers) * kl + rng.normal(0, 2, answers) / np.sqrt(length)
        loops = rng.beta(2, 1, answers) * (rng.random(answers) < looping)
        history.append({
            "rollouts": float(answers), "response_tokens": length.sum(), "response_length": length.mean(),
            "response_length_max": length.max(), "truncated": cut.mean(), "ended": 1 - cut.mean(),
            "repetition": share @ loops, "reverse_kl": share @ drawn, "loss": share @ drawn,
            "entropy": share @ rng.lognormal(0, 0.5, answers) * entropy,
            "end_probability": rng.beta(2, 1, (~cut).sum()).mean() if (~cut).any() else math.nan,
        })  # fmt: skip
    key, sign = [("truncated", 1), ("response_length", 1), ("repetition", 1), ("reverse_kl", 1), ("entropy", -1)][
        int(rng.integers(5))
    ]
    unlucky = min(range(10), key=lambda step: sign * history[step][key])
    history[0], history[unlucky] = history[unlucky], history[0]
    return history


def test_an_unlucky_first_step_of_few_answers_is_no_alarm():
    rng = np.random.default_rng(0)
    runs = [small_batches(rng, 2 * WINDOW - 1) for _ in range(150)]
    told = [step_and_guard for run in runs for step_and_guard in alarms(guards(), run)[:1]]
    assert len(told) <= 0.02 * len(runs), told


# ---- the real thing ----------------------------------------------------------------------------------------------


def demo(folder, *, lr: float, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines and guard events of the demo's arm with four answers a step and a window of four."""
    recipe = load_recipe(folder, "full", quick=True)
    rows = [{"prompt": row["prompt"]} for row in sorting.problems("train", 4 * steps, seed=1)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe["prompts"]["per_step"] = 4
    recipe["run"] |= {"steps": steps}
    recipe["optim"] = {"lr": lr}
    recipe |= {"evals": {}, "views": {"answers": 0}, "guards": {"window": 4}}
    execute(load_config([], base=recipe).config, console=Console(file=io.StringIO()))
    read = {
        name: [json.loads(line) for line in (folder / "full" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("metrics", "events")
    }
    return read["metrics"], [event for event in read["events"] if event["kind"] == "guard"]


def test_a_learning_rate_that_is_far_too_high_is_seen_as_soon_as_the_window_is_full(tmp_path):
    history, events = demo(tmp_path, lr=0.05, steps=21)
    assert events and min(event["step"] for event in events) <= 4 + 3
    assert history[-1]["reverse_kl"] > 5 * history[0]["reverse_kl"]
    for window in (4, 10, 20):
        watch = Guards(Spec(window=window), vocab_size=20, max_tokens=10)
        assert window < alarms(watch, history)[0][0] <= window + 3
    blind_to_the_first = [{}, *history[1:]]
    assert "kl_rising" not in {guard for _, guard in alarms(guards(window=10), blind_to_the_first)}


def test_a_learning_rate_that_is_right_is_not(tmp_path):
    _, events = demo(tmp_path, lr=1e-4, steps=12)
    assert events == []
