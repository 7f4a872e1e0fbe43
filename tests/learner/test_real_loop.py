"""Four properties on the real path: sampler, teacher, learner and objective together, on several architectures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.models.packing import plan
from tests import rooms, tiny

OBJECTIVES = {
    "reverse_kl": {"preset": "reverse_kl"},
    "forward_kl": {"preset": "forward_kl"},
    "jsd": {"preset": "jsd"},
    "tml": {"preset": "tml"},
    "sequence_mean": {"behaviour": "student", "terms": [{"name": "r", "reduction": "sequence_mean"}]},
}


def gradient_of(student, objective, rollouts_N, teacher, **options) -> torch.Tensor:
    learner = rooms.learner(student, objective, **options)
    learner.gradients(rollouts_N, teacher.evidence(rollouts_N))
    return rooms.gradient(student)


@pytest.fixture(scope="module", params=["qwen3", "gpt2", "qwen3_next"])
def parts(request):
    fmt = rooms.prompt_format()
    student = rooms.causal(request.param, seed=0)
    teacher = rooms.teacher(rooms.causal(request.param, seed=1), fmt)
    made = rooms.rollouts(student, fmt)
    assert len({len(r.response_ids) for r in made}) > 2, "ragged answers are the point"
    return student, teacher, made, fmt


@pytest.mark.parametrize("name", OBJECTIVES)
def test_O_19_swapping_the_teacher_changes_the_gradient(parts, name: str) -> None:
    student, teacher, made, fmt = parts
    other = rooms.teacher(rooms.causal("llama", seed=7), fmt)
    ours = gradient_of(student, OBJECTIVES[name], made, teacher)
    theirs = gradient_of(student, OBJECTIVES[name], made, other)
    assert rooms.distance(ours, theirs) > 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_student_equals_teacher_gives_a_gradient_at_rounding_level(parts, name: str) -> None:
    student, teacher, made, fmt = parts
    itself = rooms.teacher(student, fmt)
    zero = gradient_of(student, OBJECTIVES[name], made, itself).norm()
    ordinary = gradient_of(student, OBJECTIVES[name], made, teacher).norm()
    assert zero < 1e-5 * ordinary


@pytest.mark.parametrize("name", OBJECTIVES)
def test_M_01_M_05_M_07_M_08_accumulation_order_and_padding_side_change_nothing(parts, name: str) -> None:
    """1, 2, 4 and as many micro-batches as rollouts; any order; either side."""
    student, teacher, made, _ = parts
    objective = OBJECTIVES[name]
    whole = gradient_of(student, objective, made, teacher)
    budgets = {len(plan(made, budget)): budget for budget in range(40, 1000)}
    for steps in (2, 4, len(made)):
        split = gradient_of(student, objective, made, teacher, tokens_per_micro_batch=budgets.get(steps, 1))
        assert rooms.distance(whole, split) < 1e-5
    assert {1, 2, 4} <= budgets.keys() and len(plan(made, 1)) == len(made)
    shuffled = [made[i] for i in np.random.default_rng(0).permutation(len(made))]
    assert rooms.distance(whole, gradient_of(student, objective, shuffled, teacher)) < 1e-5
    left = gradient_of(student, objective, made, teacher, padding_side="left", learner={"share_prompts": False})
    assert rooms.distance(whole, left) < 1e-5


def test_M_06_gradient_ignores_answers_that_came_with_the_data(parts) -> None:
    """Editing the data's own, untrained answers must not reach loss or gradient."""
    student, teacher, made, _ = parts
    edited = [
        dataclasses.replace(r, prompt=dataclasses.replace(r.prompt, completion_ids=np.arange(40, dtype=np.int64)))
        for r in made
    ]
    found = []
    for rollouts_N in (made, edited):
        learner = rooms.learner(student)
        found.append((learner.gradients(rollouts_N, teacher.evidence(rollouts_N)), rooms.gradient(student)))
    (metrics, ours), (again, theirs) = found
    assert torch.equal(ours, theirs) and metrics == again


def test_M_12_duplicating_the_batch_changes_nothing(parts) -> None:
    student, teacher, made, _ = parts
    twice = made + [dataclasses.replace(r, id=r.id + "/again") for r in made]
    assert rooms.distance(gradient_of(student, None, made, teacher), gradient_of(student, None, twice, teacher)) < 1e-5


def test_M_03_masked_tokens_are_not_trained_whatever_they_hold(parts) -> None:
    """A tool's tokens stand in the answer with mask False: they condition what follows and get no gradient."""
    student, teacher, made, _ = parts
    masked = []
    for rollout in made:
        mask = rollout.mask.copy()
        mask[1::2] = False
        masked.append(dataclasses.replace(rollout, mask=mask))
    poisoned = [
        dataclasses.replace(r, behaviour_logprobs=np.where(r.mask, r.behaviour_logprobs, np.nan).astype(np.float32))
        for r in masked
    ]
    for name in ("reverse_kl", "tml"):
        clean = gradient_of(student, OBJECTIVES[name], masked, teacher)
        assert torch.equal(clean, gradient_of(student, OBJECTIVES[name], poisoned, teacher))
        assert rooms.distance(clean, gradient_of(student, OBJECTIVES[name], made, teacher)) > 0.05


def test_X_01_a_teacher_that_fails_on_some_answers_leaves_the_others_as_they_are() -> None:
    """Evidence that is not finite leaves the loss and its denominator: the same as if those tokens were masked."""
    fmt = rooms.prompt_format()
    student, good = rooms.causal(seed=0), rooms.causal(seed=1)
    made = rooms.rollouts(student, fmt)
    lost = {r.id for r in made[2:4]}

    class Failing:
        def __init__(self, inner):
            self.inner = inner

        def spans(self):
            return {}

        def prepare(self, wants):
            return 0

        def pull(self, batch, wants):
            (rows,) = self.inner.pull(batch, wants)
            bad_T = torch.tensor([batch.rollouts[n].id in lost for n in batch.row_T.tolist()])
            rows.valid_T[bad_T] = False
            (rows.logprobs_T if rows.hidden_TD is None else rows.hidden_TD)[bad_T] = float("nan")
            return [rows]

        def release(self):
            self.inner.release()

    for name in ("reverse_kl", "tml", "sequence_mean"):
        teacher = rooms.teacher(good, fmt)
        kept = [r for r in made if r.id not in lost]
        expected = gradient_of(student, OBJECTIVES[name], kept, teacher)
        learner = rooms.learner(student, OBJECTIVES[name])
        metrics = learner.gradients(made, Failing(teacher.evidence(made)))
        assert rooms.distance(expected, rooms.gradient(student)) < 1e-5
        assert metrics["invalid_scores"] == sum(len(r.response_ids) for r in made if r.id in lost)
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["reverse_kl"])


def test_A_04_a_one_token_answer_is_trained_on_the_state_of_the_last_prompt_token() -> None:
    fmt = rooms.prompt_format()
    student, other = rooms.causal(seed=0), rooms.causal(seed=1)
    prompt = rooms.prompts(fmt)[1]
    made = [rooms.answer(prompt, [5], [-1.0])]
    learner = rooms.learner(student)
    metrics = learner.gradients(made, rooms.teacher(other, fmt).evidence(made))
    with torch.no_grad():
        logp, logq = (
            torch.log_softmax(m.module(torch.from_numpy(prompt.ids)[None]).logits[0, -1, : m.vocab_size].double(), -1)
            for m in (student, other)
        )
    assert metrics["loss"] == pytest.approx((logp.exp() * (logp - logq)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_some_steps_bring_the_student_to_the_teacher(kind: str) -> None:
    fmt = rooms.prompt_format()
    student = rooms.causal(kind, seed=0, scale=1.0)
    teacher = rooms.teacher(rooms.causal(kind, seed=1, scale=10.0), fmt)
    learner = rooms.learner(student, optim={"lr": 1e-2})
    seen = []
    for _ in range(16):
        made = rooms.rollouts(student, fmt)
        report = learner.update(made, teacher.evidence(made))
        assert report.applied
        seen.append(report.metrics["reverse_kl"])
    assert np.mean(seen[-3:]) < 0.85 * np.mean(seen[:3])


def test_terms_of_both_resolutions_add_up_with_their_coefficients(parts) -> None:
    student, teacher, made, _ = parts
    terms = [{"name": "all", "coefficient": 0.5}, {"name": "drawn", "support": "sampled", "coefficient": 2.0}]

    def of(*chosen, **changes):
        objective = {"behaviour": "student", "terms": [{**term, **changes} for term in chosen]}
        return gradient_of(student, objective, made, teacher)

    apart = 0.5 * of(terms[0], coefficient=1.0) + 2.0 * of(terms[1], coefficient=1.0)
    assert rooms.distance(of(*terms), apart) < 1e-5


def test_tokens_without_a_behaviour_logprob_leave_terms_that_need_it(parts) -> None:
    student, teacher, made, _ = parts
    masked, unknown = [], []
    for rollout in made:
        gone = np.arange(len(rollout.mask)) % 2 == 1
        masked.append(dataclasses.replace(rollout, mask=rollout.mask & ~gone))
        nan = np.where(gone, np.nan, rollout.behaviour_logprobs).astype(np.float32)
        unknown.append(dataclasses.replace(rollout, behaviour_logprobs=nan))
    ours, theirs = (gradient_of(student, OBJECTIVES["tml"], m, teacher) for m in (unknown, masked))
    assert rooms.distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", ["reverse_kl", "tml"])
def test_M_15_metrics_are_means_over_the_trained_tokens_of_the_step(parts, name: str) -> None:
    """Recomputed from the models' own logits; every other sampled log-probability is moved, up or down."""
    student, teacher, made, _ = parts
    made = [
        dataclasses.replace(
            r,
            mask=r.mask & (np.arange(len(r.mask)) != 1),
            behaviour_logprobs=(r.behaviour_logprobs + 0.1 * (-1.0) ** np.arange(len(r.mask))).astype(np.float32),
        )
        for r in made
    ]
    metrics = rooms.learner(student, OBJECTIVES[name], tokens_per_micro_batch=64).gradients(
        made, teacher.evidence(made)
    )
    seen: dict[str, list[float]] = {"entropy": [], "reverse_kl": [], "student_logprob": [], "policy_gap": []}
    for r in made:
        ids = torch.from_numpy(np.concatenate([r.prompt.ids, r.response_ids]))[None]
        with torch.no_grad():
            logp, logq = (
                torch.log_softmax(m.module(ids).logits[0, len(r.prompt.ids) - 1 : -1, : m.vocab_size].double(), -1)
                for m in (student, teacher.model)
            )
        for t in np.flatnonzero(r.mask):
            y = r.response_ids[t]
            seen["entropy"].append(-(logp[t].exp() * logp[t]).sum().item())
            full = (logp[t].exp() * (logp[t] - logq[t])).sum().item()
            seen["reverse_kl"].append(full if name == "reverse_kl" else (logp[t, y] - logq[t, y]).item())
            seen["student_logprob"].append(logp[t, y].item())
            seen["policy_gap"].append(abs(logp[t, y].item() - float(r.behaviour_logprobs[t])))
    for key, values in seen.items():
        assert metrics[key] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-5), key
    assert metrics["policy_gap_max"] == pytest.approx(max(seen["policy_gap"]), rel=1e-3)
    assert metrics["trained_tokens"] == sum(r.mask.sum() for r in made)
    assert metrics["masked_tokens"] == sum((~r.mask).sum() for r in made)
