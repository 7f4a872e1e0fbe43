"""What is seen before the loss is made: the anchor of several updates, the selection of a step, lost evidence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from opd.learner import learner as room
from opd.objectives.kernels.choice import TILED
from tests import rooms
from tests.learner.kinds import OWN, SAMPLED, gradient, step


@pytest.fixture
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0, dtype=torch.float64)
    teacher = rooms.teacher(rooms.causal(seed=1, dtype=torch.float64), fmt)
    return student, teacher, step(rooms.causal(seed=0), fmt)


def logprobs(model, rollout) -> torch.Tensor:
    """[T], from the whole logits of one answer."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt.ids, rollout.response_ids]))[None]
    with torch.no_grad():
        logp_TV = torch.log_softmax(
            model.module(ids).logits[0, len(rollout.prompt.ids) - 1 : -1, : model.vocab_size], -1
        )
    return logp_TV.gather(1, torch.from_numpy(rollout.response_ids)[:, None])[:, 0]


def passes(monkeypatch) -> list:
    """(token rows, term rows, values) of every pass that makes a gradient."""
    seen = []

    def noted(hidden_TD, head, rows, terms, scorers, **options):
        loss, values = TILED.loss(hidden_TD, head, rows, terms, scorers, **options)
        seen.append((rows, terms, values))
        return loss, values

    monkeypatch.setattr(room, "choose_kernel", lambda *asked: dataclasses.replace(TILED, loss=noted))
    return seen


def updates(student, term: dict, n: int, lr: float = 3e-3):
    return rooms.learner(
        student, rooms.objective({"name": "t", **term}), learner={"updates_per_batch": n}, optim={"lr": lr}
    )


def test_later_updates_remember_the_student_of_the_first(parts, monkeypatch) -> None:
    student, teacher, made = parts
    seen = passes(monkeypatch)
    term = {**SAMPLED, **OWN, "importance": {"kind": "ppo", "against": "proximal"}, "advantage_under": "proximal"}
    updates(student, term, 3).update(made, teacher.evidence(made))
    (first, _, before), *later = seen
    assert first.proximal_T is None and len(later) == 2
    for rows, _, values in later:
        assert torch.equal(rows.proximal_T, before.logprob_T), "frozen, for masked tokens as well"
        ratio_T = values.terms["t"].ratio_T
        kept_T = ~values.terms["t"].value_T.isnan() & (ratio_T != 0)
        assert torch.allclose(ratio_T[kept_T], (values.logprob_T - before.logprob_T).exp()[kept_T], rtol=1e-6)
    assert not torch.allclose(later[1][2].logprob_T, before.logprob_T, atol=1e-3), "and the student has moved"


def test_W_03_the_anchor_and_the_ratio_make_the_whole_ratio_to_the_sampler(parts, monkeypatch) -> None:
    """Plain ratios: weight before the kernel times ratio in it is pi / mu, under the student of each update."""
    student, teacher, made = parts
    seen = passes(monkeypatch)
    term = {**SAMPLED, **OWN, "importance": {"kind": "ratio", "against": "proximal"}}
    updates(student, term, 2).update(made, teacher.evidence(made))
    for rows, (term_rows,), values in seen:
        trained_T = term_rows.weight_T != 0
        tokens = int(trained_T.sum())
        whole_T = (term_rows.weight_T * tokens * values.terms["t"].ratio_T)[trained_T]
        assert torch.allclose(whole_T, (values.logprob_T - rows.behaviour_T).exp()[trained_T], rtol=1e-5)
    assert seen[1][0].proximal_T is not None


def test_micro_batches_that_train_nothing_are_remembered_too(parts, monkeypatch) -> None:
    student, teacher, made = parts
    term = {**SAMPLED, "domains": ["m"], **OWN, "importance": {"kind": "tis", "against": "proximal"}}
    seen = passes(monkeypatch)
    learner = updates(student, term, 2)
    learner.tokens_per_micro_batch = 1
    assert learner.update(made, teacher.evidence(made)).applied
    own = [r for r in made if r.domain == "m" and r.behaviour == "student"]
    assert len(seen) == 2 * len(own) < 2 * len(made), "the others cost no gradient"


def test_a_selection_is_made_over_the_whole_step(parts, monkeypatch) -> None:
    """The 40 % of all trained tokens with the largest entropy, recomputed from the model's own logits."""
    student, teacher, made = parts
    seen = passes(monkeypatch)
    gradient(student, {"tokens": {"select": {"by": "entropy", "share": 0.4}}}, made, teacher, tokens_per_micro_batch=60)
    entropies = []
    for r in made:
        ids = torch.from_numpy(np.concatenate([r.prompt.ids, r.response_ids]))[None]
        with torch.no_grad():
            logits = student.module(ids).logits[0, len(r.prompt.ids) - 1 : -1, : student.vocab_size]
        logp_TV = torch.log_softmax(logits, -1)
        entropies += (-(logp_TV.exp() * logp_TV).sum(-1))[torch.from_numpy(r.mask)].tolist()
    best = sorted(entropies)[-math.ceil(0.4 * len(entropies)) :]
    chosen = torch.cat([values.entropy_T[rows[0].weight_T != 0] for _, rows, values in seen])
    assert sorted(chosen.tolist()) == pytest.approx(best)


def test_selected_tokens_follow_the_divergence_of_a_sampled_term(parts) -> None:
    """The divergence that selects is over the vocabulary, so the evidence is full although the term is sampled."""
    student, teacher, made = parts
    term = {**SAMPLED, **OWN, "tokens": {"select": {"by": "divergence", "share": 0.3}}}
    learner = rooms.learner(student, rooms.objective({"name": "t", **term}))
    metrics = learner.gradients(made, teacher.evidence(made))
    whole = updates(student, OWN, 1, lr=1e-12).update(made, teacher.evidence(made)).scores
    kl_T = np.sort(np.concatenate([scores.reverse_kl for scores in whole.values()]))
    kl_T = kl_T[~np.isnan(kl_T)]
    best_T = kl_T[-math.ceil(0.3 * len(kl_T)) :]
    assert metrics["term/t/tokens"] == len(best_T) and metrics["reverse_kl"] == pytest.approx(best_T.mean(), rel=1e-5)


GATE = {"where": {"of": "student", "above": 3.8}}
LOOKED = {
    "credit": {**SAMPLED, **OWN, "credit": {"discount": 0.9, "length_norm": True}, "tokens": GATE},
    "prefix": {"tokens": {**GATE, "importance_of_prefix": 0.5}},
}


@pytest.mark.parametrize("name", LOOKED)
def test_M_09_a_shut_gate_is_a_mask_but_for_the_denominator(parts, name: str) -> None:
    """A token that the gate leaves out gives no credit and is no part of a prefix; micro-batches may be all shut."""
    _, teacher, made = parts
    student = rooms.causal(seed=0, dtype=torch.float64, scale=20.0)
    opened, count = [], 0
    for r in made:
        ids = torch.from_numpy(np.concatenate([r.prompt.ids, r.response_ids]))[None]
        with torch.no_grad():
            logp_TV = student.module(ids).logits[0, len(r.prompt.ids) - 1 : -1, : student.vocab_size].log_softmax(-1)
        open_T = (-(logp_TV.exp() * logp_TV).sum(-1) > GATE["where"]["above"]).numpy()
        count += int((r.mask & open_T).sum()) if name == "prefix" or r.behaviour == "student" else 0
        opened.append(dataclasses.replace(r, mask=r.mask & open_T))
    term = LOOKED[name]
    ungated = {**term, "tokens": {key: value for key, value in term["tokens"].items() if key != "where"}}
    read = [r for r in made if name == "prefix" or r.behaviour == "student"]
    tokens = sum(int(r.mask.sum()) for r in read)
    assert 0 < count < tokens and any(not r.mask.any() for r in opened)
    expected = gradient(student, ungated, opened, teacher) * count / tokens
    for budget in (10_000, 1):
        assert rooms.distance(expected, gradient(student, term, made, teacher, tokens_per_micro_batch=budget)) < 1e-6


@pytest.mark.parametrize("name", LOOKED)
def test_a_term_that_begins_at_coefficient_0_is_left_out(parts, name: str) -> None:
    student, teacher, made = parts
    size = {"start": 0.0, "end": 1.0, "steps": 4}
    grown = {**LOOKED[name], "coefficient": size}
    assert torch.equal(gradient(student, [{}, grown], made, teacher), gradient(student, {}, made, teacher))


def test_a_selection_may_find_answers_that_are_masked_whole(parts) -> None:
    student, teacher, made = parts
    masked = [dataclasses.replace(r, mask=r.mask & (n % 3 != 0)) for n, r in enumerate(made)]
    term = {"tokens": {"select": {"by": "divergence", "share": 0.5}}}
    whole = gradient(student, term, masked, teacher)
    assert rooms.distance(whole, gradient(student, term, masked, teacher, tokens_per_micro_batch=1)) < 1e-6


class Failing:
    """Evidence that is not finite for some answers."""

    def __init__(self, inner, lost: set[str]) -> None:
        self.inner, self.lost = inner, lost

    def spans(self):
        return {}

    def prepare(self, wants):
        return 0

    def pull(self, batch, wants):
        found = self.inner.pull(batch, wants)
        for rows in found:
            index_T = torch.arange(len(batch.row_T)) if rows.index_T is None else rows.index_T
            bad_T = torch.tensor([batch.rollouts[n].id in self.lost for n in batch.row_T[index_T].tolist()])
            rows.valid_T[bad_T] = False
            (rows.logprobs_T if rows.hidden_TD is None else rows.hidden_TD)[bad_T] = float("nan")
        return found

    def release(self) -> None:
        self.inner.release()


@pytest.mark.parametrize(
    "term",
    [
        {"tokens": {"select": {"by": "either", "share": 0.5}}},
        {**SAMPLED, **OWN, "credit": {"discount": 0.9}},
        {"tokens": {"importance_of_prefix": 0.5}, "reduction": "sequence_mean"},
    ],
    ids=str,
)
def test_X_01_lost_evidence_is_as_if_the_tokens_had_been_masked(parts, term: dict) -> None:
    """Also where something is looked at before: what is not there enters neither selection, credit nor denominators."""
    student, teacher, made = parts
    lost = {made[1].id, made[6].id}
    masked = [dataclasses.replace(r, mask=r.mask & (r.id not in lost)) for r in made]
    expected = gradient(student, term, masked, teacher)
    for budget in (10_000, 60):
        learner = rooms.learner(student, rooms.objective({"name": "t", **term}), tokens_per_micro_batch=budget)
        metrics = learner.gradients(made, Failing(teacher.evidence(made), lost))
        assert rooms.distance(expected, rooms.gradient(student)) < 1e-6
        count = sum(int(r.mask.sum()) for r in made if r.id in lost)
        assert metrics["scorer/teacher/invalid"] == metrics["invalid_scores"] == count


def test_schedules_count_the_learners_steps(parts, monkeypatch) -> None:
    student, teacher, made = parts
    seen = passes(monkeypatch)
    learner = updates(student, {"coefficient": {"start": 1.0, "end": 0.5, "steps": 2}}, 1)
    for _ in range(4):
        learner.update(made, teacher.evidence(made))
    sizes = [float(rows[0].weight_T.sum()) for _, rows, _ in seen]
    assert sizes == pytest.approx([1.0, 0.75, 0.5, 0.5])
