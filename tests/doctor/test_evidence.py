"""The numbers of stage 4 against the same numbers made slowly, and what a few entries say beside the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.doctor.ability import Answers, auc, gain
from opd.doctor.evidence import read, student_reader
from opd.doctor.support import control_finding, divergence_findings, end_finding, reach
from opd.objectives.head import head_logits
from opd.types import ScorerRows
from tests import rooms

SETTINGS = {"chunk_tokens": 7, "temperature": 1.0, "share_prompts": True}


class Few:
    """A scorer that says less than it knows, as one that is served does."""

    def __init__(self, teacher, resolution: str, k: int = 0, missing: int = 0) -> None:
        self.name, self.resolution, self.most_entries = teacher.name, resolution, k
        self.agreement = teacher.agreement
        self._teacher, self._missing = teacher, missing

    def evidence(self, rollouts_N):
        outer, inner = self, self._teacher.evidence(rollouts_N)

        class Evidence:
            def spans(self):
                return {}

            def prepare(self, wants):
                return 0

            def release(self):
                inner.release()

            def read(self, batch, want):
                rows = inner.read(batch, replace(want, resolution="full"))
                logq_TV = torch.log_softmax(head_logits(rows.hidden_TD, rows.head) / rows.temperature, -1)
                valid_T = rows.valid_T.clone()
                valid_T[: outer._missing] = False
                drawn_T = logq_TV.gather(1, batch.token_T[:, None])[:, 0]
                made = ScorerRows(name=rows.name, valid_T=valid_T, temperature=rows.temperature, logprobs_T=drawn_T)
                if want.resolution == "sampled":
                    return made
                top = logq_TV.topk(want.top_k)
                return replace(made, entry_ids_TK=top.indices, entries_TK=top.values)

        return Evidence()


@pytest.fixture(scope="module")
def pair():
    fmt = rooms.prompt_format()
    student, teacher = rooms.causal(seed=0), rooms.teacher(rooms.causal(seed=1), fmt)
    return rooms.rollouts(student, fmt), student_reader(student, fmt, **SETTINGS), teacher


def slowly(rollouts_N, reader):
    """log-probabilities [T, V], one answer after the other."""
    from opd.models.answer_states import answer_states

    parts = []
    for r in rollouts_N:
        states = answer_states(reader.model, [reader.format.prompt_ids(r.prompt.row)], [r.response_ids], share=False)
        parts.append(torch.log_softmax(head_logits(states, reader.head_on(states.device)).double(), -1))
    return torch.cat(parts).detach().numpy()


def test_numbers_are_those_of_the_whole_distributions(pair):
    rollouts_N, reader, teacher = pair
    seen = read(rollouts_N, reader, teacher, tokens_per_micro_batch=64)
    p, q = slowly(rollouts_N, reader), slowly(rollouts_N, teacher)
    drawn = np.concatenate([r.response_ids for r in rollouts_N])
    at = np.arange(len(drawn))
    assert seen.resolution == "full" and seen.k == 16
    near = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(seen.drawn_p_T, p[at, drawn], **near)
    np.testing.assert_allclose(seen.drawn_q_T, q[at, drawn], **near)
    np.testing.assert_allclose(seen.reverse_T, (np.exp(p) * (p - q)).sum(-1), **near)
    np.testing.assert_allclose(seen.forward_T, (np.exp(q) * (q - p)).sum(-1), **near)
    np.testing.assert_allclose(seen.entropy_q_T, -(np.exp(q) * q).sum(-1), **near)
    ours, theirs = np.argsort(-p, -1)[:, :16], np.argsort(-q, -1)[:, :16]
    both = [set(a) & set(b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    np.testing.assert_allclose(seen.overlap_T, [len(s) / 16 for s in both], **near)
    np.testing.assert_allclose(seen.shared_T, [np.exp(p[t, list(s)]).sum() for t, s in enumerate(both)], **near)
    np.testing.assert_allclose(seen.outside_p_T, 1 - np.exp(p[at[:, None], theirs]).sum(-1), **near)
    np.testing.assert_allclose(seen.outside_q_T, 1 - np.exp(q[at[:, None], ours]).sum(-1), **near)
    assert (seen.first_q_T == theirs[:, 0]).all()
    assert (seen.row_T == np.repeat(np.arange(len(rollouts_N)), [len(r.response_ids) for r in rollouts_N])).all()


def test_a_few_entries_say_the_same_as_far_as_they_go(pair):
    rollouts_N, reader, teacher = pair
    whole = read(rollouts_N, reader, teacher, tokens_per_micro_batch=64)
    few = read(rollouts_N, reader, Few(teacher, "entries", k=50), tokens_per_micro_batch=64)
    assert few.resolution == "entries" and few.k == 16
    for name in ("overlap_T", "shared_T", "outside_p_T", "drawn_q_T", "first_q_T"):
        np.testing.assert_allclose(getattr(few, name), getattr(whole, name), atol=1e-5, err_msg=name)
    assert (few.reverse_T <= whole.reverse_T + 1e-6).all() and (few.reverse_T >= -1e-9).all()
    assert (
        (few.forward_T <= whole.forward_T + 1e-6).all()
        and np.isnan(few.entropy_q_T).all()
        and np.isnan(few.outside_q_T).all()
    )
    assert read(rollouts_N, reader, Few(teacher, "entries", k=5), tokens_per_micro_batch=64).k == 5


def test_X_1_a_missing_score_is_nan_and_no_number(pair):
    rollouts_N, reader, teacher = pair
    drawn = read(rollouts_N, reader, Few(teacher, "sampled", missing=3), tokens_per_micro_batch=10**6)
    assert drawn.resolution == "sampled" and np.isnan(drawn.drawn_q_T).sum() == 3
    assert np.isnan(drawn.reverse_T).all() and not np.isnan(drawn.drawn_p_T).any()
    assert np.isfinite(drawn.by_answer(drawn.drawn_q_T, len(rollouts_N))).sum() >= len(rollouts_N) - 3


def test_nothing_depends_on_micro_batches(pair):
    rollouts_N, reader, teacher = pair
    one = read(rollouts_N, reader, teacher, tokens_per_micro_batch=1)
    all_ = read(rollouts_N, reader, teacher, tokens_per_micro_batch=10**6)
    for name in ("drawn_p_T", "drawn_q_T", "reverse_T", "forward_T", "outside_q_T"):
        np.testing.assert_allclose(getattr(one, name), getattr(all_, name), rtol=1e-4, atol=1e-5)


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=8, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(pairs):
    value, right = (np.array(column) for column in zip(*pairs, strict=True))
    found = auc(value.astype(float), right.astype(bool))
    ranked = [(a > b) + 0.5 * (a == b) for a in value[right] for b in value[~right]]
    if min(right.sum(), (~right).sum()) < 4:
        assert found is None
    else:
        assert found == pytest.approx(np.mean(ranked)) and auc(-value.astype(float), right) == pytest.approx(1 - found)


def test_gain_leaves_out_what_nobody_could_grade():
    def answers(*scores: float) -> Answers:
        return Answers(rollouts_N=(), score_N=np.array(scores))

    assert gain(answers(0, 0, 1, np.nan), answers(1, 1, 1, 0)) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 3)
    assert gain(answers(np.nan, 1), answers(1, np.nan)) is None


def test_A_16_control_tokens_inside_answers_are_named(pair):
    rollouts_N, *_ = pair
    shown = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    bad = [replace(r, response_ids=np.array([9, 2, 9, 9]), mask=np.ones(4, bool)) for r in rollouts_N]
    found = control_finding("student", bad, frozenset(shown), (0,), shown, "student")
    assert found is not None and found.change == ("student.format.end_tokens=['<|im_end|>']",)
    assert control_finding("student", bad, frozenset(shown), (0, 2), shown, "student") is None


def test_A_16_another_end_of_the_teacher_is_named(pair):
    rollouts_N, reader, teacher = pair
    ended = [replace(r, finish_reason="stop") for r in rollouts_N]
    seen = read(ended, reader, teacher, tokens_per_micro_batch=10**6)
    shown = {0: "<|endoftext|>", 2: "<|im_end|>"}
    other = replace(seen, first_q_T=np.full(len(seen), 2))
    found = end_finding("teacher", ended, other, frozenset(shown), (0,), shown, "teacher")
    assert found is not None and found.asks == "mend_template" and found.figures["share"] == 1
    right = replace(seen, first_q_T=np.full(len(seen), 0))
    assert end_finding("teacher", ended, right, frozenset(shown), (0,), shown, "teacher") is None


def test_X_9_a_served_teacher_that_says_the_same_of_every_token_is_named(pair):
    rollouts_N, reader, teacher = pair
    seen = read(rollouts_N, reader, Few(teacher, "sampled"), tokens_per_micro_batch=64)
    flat = replace(seen, drawn_q_T=np.full(len(seen), -np.log(300.0)))
    named = divergence_findings("teacher", flat, 300, drawn=True)
    assert [finding.check for finding in named if finding.asks == "another_teacher"] == ["flat_teacher"]
    varied = replace(seen, drawn_q_T=np.where(np.arange(len(seen)) % 2, -0.1, -12.0))
    assert not any(finding.asks for finding in divergence_findings("teacher", varied, 300, drawn=True))


def test_reach_counts_tokens_that_the_student_hardly_ever_draws(pair):
    rollouts_N, reader, _ = pair
    seen = read(rollouts_N, reader, reader, tokens_per_micro_batch=64, wanted="sampled")
    made = reach(replace(seen, drawn_p_T=np.log(np.where(np.arange(len(seen)) % 4 == 0, 0.001, 0.5))))
    assert made is not None and made.unreached == pytest.approx(0.25, abs=0.03)
