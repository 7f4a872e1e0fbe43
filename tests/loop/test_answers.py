"""Facts about answers, against plain loops; what is masked, missing or not finite changes nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.loop.answers import MOST_DOMAINS, REPEATED_NGRAM, answer_metrics, repeated
from opd.types import Prompt, Rollout, Row, TokenScores
from tests import rooms

N = REPEATED_NGRAM


def rollout(name: str, ids, *, domain: str = "q", mask=None, end: str = "stop") -> Rollout:
    row = Row(id=name, domain=domain, prompt="x")
    written = rooms.answer(Prompt(row=row, ids=np.array([1])), ids, [0.0] * len(ids))
    kept = np.ones(len(ids), bool) if mask is None else np.array(mask, bool)
    return replace(written, id=name, mask=kept, finish_reason=end)


def scored(reverse_kl, teacher=None, student=None) -> TokenScores:
    nothing = np.full(len(reverse_kl), np.nan, np.float32)
    columns = [nothing if x is None else np.array(x, np.float32) for x in (student, teacher, reverse_kl)]
    return TokenScores(student_logprobs=columns[0], teacher_logprobs=columns[1], reverse_kl=columns[2])


# ---- repetition --------------------------------------------------------------------------------------------------


def by_hand(answers: list[list[int]]) -> list[bool]:
    marks = []
    for ids in answers:
        mark, seen = [False] * len(ids), set()
        for i in range(len(ids) - N + 1):
            if tuple(ids[i : i + N]) in seen:
                mark[i : i + N] = [True] * N
            seen.add(tuple(ids[i : i + N]))
        marks += mark
    return marks


LOOPS = st.builds(lambda head, period, times: head + period * times, *[st.lists(st.integers(0, 3), max_size=20)] * 2,
                  st.integers(0, 8))  # fmt: skip


@given(st.lists(LOOPS, min_size=1, max_size=4))
def test_repeated_is_what_a_plain_loop_finds(answers):
    flat = np.array([token for ids in answers for token in ids], np.int64)
    assert repeated(flat, np.array([len(ids) for ids in answers])).tolist() == by_hand(answers)


def test_E_8_a_loop_is_near_one_and_prose_is_near_zero():
    loop = rollout("loop", list(range(40)) * 25)
    assert answer_metrics([loop], {})["repetition"] == pytest.approx(0.96)
    prose = rollout("prose", np.random.default_rng(0).zipf(1.3, 4000).clip(max=30_000))
    assert answer_metrics([prose], {})["repetition"] < 0.05


def test_short_answers_and_the_same_answer_twice_repeat_nothing():
    short = [rollout(f"short {n}", [7] * N) for n in range(3)]
    twice = [rollout(f"twice {n}", list(range(200))) for n in range(2)]
    assert answer_metrics([*short, *twice], {})["repetition"] == 0.0


def test_repetition_is_the_share_of_the_writers_tokens():
    ids = list(range(20)) * 2
    assert answer_metrics([rollout("a", ids)], {})["repetition"] == 0.5
    assert answer_metrics([rollout("a", ids, mask=[0] * 20 + [1] * 20)], {})["repetition"] == 1.0
    assert "repetition" not in answer_metrics([rollout("a", ids, mask=[0] * 40)], {})


# ---- lengths and ends --------------------------------------------------------------------------------------------


def test_lengths_and_ends():
    made = [rollout("a", [1, 2, 3]), rollout("b", [4], end="length"), rollout("c", [5, 6]), rollout("d", [7, 8])]
    facts = answer_metrics(made, {})
    assert facts == {
        "rollouts": 4.0, "response_tokens": 8.0, "response_length": 2.0, "response_length_max": 3.0,
        "truncated": 0.25, "ended": 0.75, "repetition": 0.0,
    }  # fmt: skip


def test_end_tokens_are_those_that_were_drawn():
    made = [rollout("a", [1, 2]), rollout("cut", [1, 2], end="length"), rollout("tool", [1, 2], mask=[1, 0])]
    made += [rollout("b", [1]), rollout("unscored", [1, 2])]
    zeros = [0.0, 0.0]
    scores = {name: scored(zeros, student=[-9.0, -1.0]) for name in ("a", "cut", "tool")} | {
        "b": scored([0.0], student=[-2.0])
    }
    facts = answer_metrics(made, scores)
    assert facts["end_logprob"] == pytest.approx(-1.5)
    assert facts["end_probability"] == pytest.approx((np.exp(-1) + np.exp(-2)) / 2)


# ---- scores ------------------------------------------------------------------------------------------------------


def test_the_teachers_words_and_the_divergence_by_position():
    made = [rollout("a", [0] * 70), rollout("b", [0] * 5)]
    kl = np.arange(70.0)
    scores = {"b": scored([10.0] * 5, teacher=[-4.0] * 5), "a": scored(kl, teacher=[-2.0] * 70)}
    facts = answer_metrics(made, scores)
    teacher = [-2.0] * 70 + [-4.0] * 5
    assert facts["teacher_logprob"] == pytest.approx(np.mean(teacher))
    assert facts["teacher_spread"] == pytest.approx(np.std(teacher))
    by_position = {key.rsplit("/", 1)[1]: value for key, value in facts.items() if "position" in key}
    assert by_position == pytest.approx(
        {
            "0-3": np.mean([*kl[:4], *[10.0] * 4]),
            "4-15": np.mean([*kl[4:16], 10.0]),
            "16-63": kl[16:64].mean(),
            "64-255": kl[64:].mean(),
        }
    )
    assert not any("domain" in key for key in facts)


def test_domains_are_cleaned_joined_and_at_most_twenty():
    names = ["maths/algebra", "maths algebra", "code\n<b>", "數學"] + [f"d{n:02}" for n in range(30)]
    made = [rollout(f"r{n}", [0] * (2 if n < 4 else 1), domain=name) for n, name in enumerate(names)]
    facts = answer_metrics(made, {r.id: scored([float(n)] * len(r.response_ids)) for n, r in enumerate(made)})
    found = {key.removeprefix("reverse_kl/domain/"): v for key, v in facts.items() if "domain" in key}
    assert len(found) == MOST_DOMAINS
    assert found["maths_algebra"] == 0.5 and found["code_b_"] == 2.0 and found["數學"] == 3.0 and found["d00"] == 4.0


def test_sft_without_a_teacher_has_no_teacher_numbers():
    facts = answer_metrics([rollout("a", [1, 2])], {"a": scored([np.nan, np.nan], student=[-1.0, -1.0])})
    assert "end_logprob" in facts and not any("teacher" in key or "reverse_kl" in key for key in facts)


@given(st.integers(0, 2**32 - 1))
def test_masked_tokens_nan_and_the_order_of_answers_change_nothing(seed):
    rng = np.random.default_rng(seed)
    made, scores, garbage = [], {}, {}
    for n in range(4):
        length = int(rng.integers(1, 30))
        mask = rng.random(length) < 0.7
        made.append(rollout(f"r{n}", rng.integers(0, 9, length), domain=f"d{n % 2}", mask=mask))
        numbers = rng.normal(size=(3, length)).astype(np.float32)
        blank, noise = np.where(mask, numbers, np.nan), np.where(mask, numbers, 1e9)
        scores[f"r{n}"], garbage[f"r{n}"] = (scored(x[2], x[1], x[0]) for x in (blank, noise))
    facts = answer_metrics(made, scores)
    assert all(np.isfinite(value) for value in facts.values())
    assert answer_metrics(made, garbage) == pytest.approx(facts)
    assert answer_metrics(made[::-1], dict(reversed(scores.items()))) == pytest.approx(facts)
    kept = np.concatenate([scores[r.id].reverse_kl[r.mask] for r in made])
    if len(kept):
        buckets = [value for key, value in facts.items() if "position" in key]
        assert min(buckets) - 1e-6 <= kept.mean() <= max(buckets) + 1e-6


def test_a_million_tokens_take_no_time():
    rng = np.random.default_rng(0)
    made = [rollout(f"r{n}", rng.integers(0, 150_000, 5000)) for n in range(200)]
    scores = {r.id: scored(*rng.normal(size=(3, 5000))) for r in made}
    answer_metrics(made, scores)
    began = time.process_time()
    answer_metrics(made, scores)
    assert time.process_time() - began < 1.0  # 0.15 s on one quiet core
