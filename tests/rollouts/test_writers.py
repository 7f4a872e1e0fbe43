"""Who writes what: by lot, with the shares that were asked for, whatever else happens around it."""

from dataclasses import replace

import numpy as np
import pytest

from opd.protocols import Sampler
from opd.rollouts.writers import Part, Writers
from opd.types import Prompt, Rollout, Row, SamplingParams
from tests.rollouts.reference import assert_binomial

PARAMS = SamplingParams(max_tokens=4, samples_per_prompt=2)


class Writer:
    """Answers with its own number; `behaviour` names it."""

    def __init__(self, number: int, behaviour="student") -> None:
        self.number, self.behaviour, self.progress, self.version, self.asked = number, behaviour, None, -1, []

    def load(self, weights) -> None:
        self.version = weights.version

    def generate(self, prompts_P, params, *, tag):
        self.asked.append([p.id for p in prompts_P])
        made = []
        for p in prompts_P:
            for s in range(params.samples_per_prompt):
                made.append(_answer(p, f"{tag}/{p.id}/{s}", self))
                if self.progress is not None:
                    self.progress(len(made))
        return made


def _answer(prompt: Prompt, id: str, writer: Writer) -> Rollout:
    return Rollout(
        id=id,
        prompt=prompt,
        response_ids=np.array([writer.number]),
        behaviour_logprobs=np.zeros(1, dtype=np.float32),
        mask=np.ones(1, dtype=np.bool_),
        policy_version=writer.version,
        behaviour=writer.behaviour,
        finish_reason="stop",
    )


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(row=Row(id=f"q/{i}", domain="q", prompt="x"), ids=np.array([1])) for i in range(count)]


def _writers(*shares: float, seed: int = 0, per="prompt", **last) -> tuple[Writers, list[Writer]]:
    made = [Writer(n) for n in range(len(shares))]
    parts = [Part(w, share=share) for w, share in zip(made, shares, strict=True)]
    parts[-1] = replace(parts[-1], **last)
    return Writers(parts, seed=seed, per=per), made


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.2, 0.1), (0.02, 0.98)])
def test_over_many_steps_every_writer_gets_its_share(shares):
    writers, _ = _writers(*shares)
    asked, steps = _prompts(40), 200
    lots = np.concatenate([writers.lots(asked, tag=f"train/{step}") for step in range(steps)])
    for n, share in enumerate(shares):
        assert_binomial(int((lots == n).sum()), 40 * steps, share)


def test_prompts_and_steps_have_lots_of_their_own():
    """Neither the same prompts in all steps, nor all prompts of a step alike: pairs fall together as chance has it."""
    writers, _ = _writers(0.5, 0.5)
    lots_SP = np.array([writers.lots(_prompts(40), tag=f"train/{step}") for step in range(200)])
    assert_binomial(int((lots_SP[1:] == lots_SP[:-1]).sum()), 199 * 40, 0.5)
    assert_binomial(int((lots_SP[:, 1:] == lots_SP[:, :-1]).sum()), 200 * 39, 0.5)


def test_per_batch_a_step_has_one_writer():
    writers, _ = _writers(0.3, 0.7, per="batch")
    lots = [set(writers.lots(_prompts(6), tag=f"train/{step}")) for step in range(2000)]
    assert all(len(lot) == 1 for lot in lots)
    assert_binomial(sum(lot == {0} for lot in lots), 2000, 0.3)


def test_results_come_in_the_order_of_prompts_and_nothing_but_seed_tag_and_prompt_decides():
    writers, parts = _writers(0.5, 0.5)
    assert isinstance(writers, Sampler)
    asked = _prompts(20)
    made = writers.generate(asked, PARAMS, tag="train/3")
    assert [r.id for r in made] == [f"train/3/q/{i}/{s}" for i in range(20) for s in range(2)]
    assert {int(r.response_ids[0]) for r in made} == {0, 1}
    assert [len(p.asked) for p in parts] == [1, 1]
    who = {r.id: int(r.response_ids[0]) for r in made}
    again, _ = _writers(0.5, 0.5)  # a resumed run: no step before
    for some in (asked[::-1], asked[3:7]):
        for rollout in again.generate(some, PARAMS, tag="train/3"):
            assert who[rollout.id] == rollout.response_ids[0]
    other, _ = _writers(0.5, 0.5, seed=1)
    assert who != {r.id: int(r.response_ids[0]) for r in other.generate(asked, PARAMS, tag="train/3")}


def test_one_writer_gets_everything_and_a_writer_without_prompts_is_not_asked():
    alone, (writer,) = _writers(1.0)
    assert len(alone.generate(_prompts(50), PARAMS, tag="t")) == 100 and len(writer.asked) == 1
    batch, parts = _writers(0.5, 0.5, per="batch")
    batch.generate(_prompts(5), PARAMS, tag="t")
    assert sorted(len(p.asked) for p in parts) == [0, 1]
    assert alone.generate([], PARAMS, tag="t") == []


def test_a_writer_with_one_answer_gives_one():
    writers, _ = _writers(0.5, 0.5, one_answer=True)
    made = writers.generate(_prompts(30), PARAMS, tag="t")
    by_prompt: dict[str, list[int]] = {}
    for rollout in made:
        by_prompt.setdefault(rollout.prompt.id, []).append(int(rollout.response_ids[0]))
    assert {tuple(x) for x in by_prompt.values()} == {(0, 0), (1,)}


def test_weights_reach_every_writer_and_progress_counts_on():
    writers, parts = _writers(0.5, 0.5)
    seen: list[int] = []
    writers.progress = seen.append

    class Weights:
        version = 9

        def tensors(self):
            return {}

    writers.load(Weights())
    assert [p.version for p in parts] == [9, 9]
    writers.generate(_prompts(20), PARAMS, tag="t")
    assert seen == list(range(1, 41))
