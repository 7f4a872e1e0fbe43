"""Which of a scorer's numbers speak of which of the student's tokens, for any spans at all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.models.packing import pack
from opd.teachers.as_read import AsRead, spread
from opd.text.crossing import CrossRead
from opd.types import Spans, Want
from tests import rooms

FMT = rooms.prompt_format()
ASKED = rooms.prompts(FMT)
# Runs of (student's tokens, scorer's tokens, whether it is a span); what is none may be empty on either side.
RUNS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(True)),
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.just(False)),
    ),
    max_size=6,
)


def spans_of(runs: list[tuple[int, int, bool]], same: np.random.Generator) -> Spans:
    ours, theirs, one, number = [], [], [], 0
    for T, U, inside in runs:
        ours += [number if inside else -1] * T
        theirs += [number if inside else -1] * U
        one += [inside and T == U == 1 and bool(same.integers(2))] * T
        number += inside
    return Spans(span_T=np.array(ours, np.int64), span_U=np.array(theirs, np.int64), same_T=np.array(one, np.bool_))


class ByHand:
    """A crossing whose spans a test has made; ids count through all answers."""

    def __init__(self, spans: dict[str, Spans]) -> None:
        self.spans, self.read_of = spans, []

    def read(self, rollout) -> CrossRead:
        self.read_of.append(rollout.id)
        made = self.spans[rollout.id]
        return CrossRead(np.arange(len(made.span_U)) + 100, made)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(RUNS, min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["strict", "span", "gold", "alm"]),
)
def test_sums_over_spans_are_exact_and_rows_stand_where_the_contract_says(runs, seed, joined) -> None:
    random = np.random.default_rng(seed)
    spans = [spans_of(one, random) for one in runs]
    answers = [
        rooms.answer(
            ASKED[n % 5], [7] * len(s.span_T), [0.0] * len(s.span_T), n, mask=random.random(len(s.span_T)) < 0.8
        )
        for n, s in enumerate(spans)
    ]
    by_hand = ByHand({r.id: s for r, s in zip(answers, spans, strict=True)})
    read = AsRead(FMT, by_hand, answers)  # pyright: ignore[reportArgumentType]
    want = Want("sampled", frozenset(r.id for r in answers[: 1 + len(answers) // 2]), joined=joined)
    asked = [r.id in want.rollouts for r in answers]
    batch = SimpleNamespace(rollouts=tuple(answers))
    joint = read.joint(batch, want)  # pyright: ignore[reportArgumentType]
    starts = np.cumsum([0, *(len(s.span_T) for s in spans)])
    expected = []  # (token of the batch, answer, span)
    for n, (start, s) in enumerate(zip(starts, spans, strict=False)):
        for t, number in enumerate(s.span_T if asked[n] else ()):
            last = t + 1 == len(s.span_T) or s.span_T[t + 1] != number
            if number >= 0 and {"strict": s.same_T[t], "gold": last}.get(joined, True):
                expected.append((start + t, n, int(number)))
    assert (joint is None) == (not expected)
    if joint is None:
        return
    index_R = np.arange(starts[-1]) if joint.index_R is None else joint.index_R
    assert index_R.tolist() == [place for place, _, _ in expected]
    there = {answers[n].id for _, n, _ in expected}
    assert [r.id for r in joint.rollouts] == [r.id for r in answers if r.id in there]
    own = [s for r, s in zip(answers, spans, strict=True) if r.id in there]
    logprobs_U = torch.from_numpy(-random.random(sum(len(s.span_U) for s in own)))
    begin = dict(zip([r.id for r in joint.rollouts], np.cumsum([0, *(len(s.span_U) for s in own)]), strict=False))
    drawn_R, before_R = joint.drawn(logprobs_U), joint.before(logprobs_U)
    poisoned_U = logprobs_U.clone()
    needed = set(joint.inside_U.tolist())
    poisoned_U[[u for u in range(len(poisoned_U)) if u not in needed]] = torch.nan
    assert torch.equal(joint.drawn(poisoned_U), drawn_R)
    for row, (_, n, number) in enumerate(expected):
        s = spans[n]
        of_U = begin[answers[n].id] + np.flatnonzero(s.span_U == number)
        size = int((s.span_T == number).sum())
        assert drawn_R[row] * size == pytest.approx(float(logprobs_U[of_U].sum()), abs=1e-12)
        assert joint.at_R[row] == of_U[-1] and joint.own_R[row] == 100 + np.flatnonzero(s.span_U == number)[-1]
        assert before_R[row] == pytest.approx(float(logprobs_U[of_U[:-1]].sum()), abs=1e-12)
        tokens = answers[n].mask[s.span_T == number]
        here = sum(
            rows.trained_R[rows.span_R == number].sum()
            for r, rows in zip(joint.rollouts, joint.rows, strict=True)
            if r is answers[n]
        )
        assert here == tokens.sum()
    if joined == "gold":
        assert set(joint.earlier_U.tolist()) | set(joint.at_R.tolist()) == needed
        assert torch.equal(
            joint.before(spread(logprobs_U[joint.earlier_U], joint.earlier_U, len(logprobs_U))), before_R
        )


def test_an_answer_is_read_once_and_only_when_somebody_asks_for_it() -> None:
    """The row of another domain may lack what the scorer's context needs: it is never looked at."""
    random = np.random.default_rng(0)
    made = [rooms.answer(ASKED[n], [7, 8], [0.0, 0.0]) for n in range(2)]
    by_hand = ByHand({r.id: spans_of([(1, 2, True), (1, 1, True)], random) for r in made})
    read = AsRead(FMT, by_hand, made)  # pyright: ignore[reportArgumentType]
    spans = read.spans("far")["far"]
    assert made[1].id in spans and len(spans) == 2 and not by_hand.read_of
    want = Want("sampled", frozenset({made[0].id}), joined="span")
    for _ in range(2):
        joint = read.joint(pack(made, device=torch.device("cpu")), want)
        assert joint is not None and joint.index_R is not None and joint.index_R.tolist() == [0, 1]
        assert spans[made[0].id].span_U.tolist() == [0, 0, 1] and read.wanted(want) == made[:1]
    assert by_hand.read_of == [made[0].id]
    with pytest.raises(KeyError):
        spans["nobody"]
