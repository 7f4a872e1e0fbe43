"""The properties of the real loop, for every kind of term: how a step is cut, ordered, padded, repeated or poisoned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.models.causal import CausalLM
from opd.models.packing import plan
from tests import rooms
from tests.learner.kinds import DIVERGENCES, KINDS, OWN, SAMPLED, gradient, step

NAMES = ("teacher", "reference", "weak")


def scorers(fmt, models):
    return rooms.panel(*(rooms.teacher(m, fmt, name=name) for name, m in zip(NAMES, models, strict=True)))


@pytest.fixture(scope="module")
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0, dtype=torch.float64)
    others = [rooms.causal(kind, seed=n, dtype=torch.float64) for n, kind in enumerate(("qwen3", "llama", "gpt2"), 1)]
    made = step(rooms.causal(seed=0), fmt)
    assert len({len(r.response_ids) for r in made}) > 2 and {r.finish_reason for r in made} == {"stop", "length"}
    return student, scorers(fmt, others), made, fmt


@pytest.mark.parametrize("name", KINDS)
def test_M_01_M_05_M_07_M_08_the_cut_the_order_and_the_padding_side_change_nothing(parts, name: str) -> None:
    student, teacher, made, _ = parts
    whole = gradient(student, KINDS[name], made, teacher)
    assert whole.norm() > 1e-3
    assert len(plan(made, 100)) > 3
    turned = [made[i] for i in np.random.default_rng(0).permutation(len(made))]
    for rollouts_N, options in (
        (made, {"tokens_per_micro_batch": 100}),
        (made, {"tokens_per_micro_batch": 1}),
        (turned, {"tokens_per_micro_batch": 50}),
        (made, {"learner": {"share_prompts": False}}),
        (made, {"learner": {"share_prompts": False}, "padding_side": "left"}),
    ):
        assert rooms.distance(whole, gradient(student, KINDS[name], rollouts_N, teacher, **options)) < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_student_equals_teacher_gives_nothing(parts, name: str) -> None:
    student, teacher, made, fmt = parts
    itself = scorers(fmt, [student] * 3)
    zero = gradient(student, DIVERGENCES[name], made, itself).norm()
    assert zero < 1e-9 * gradient(student, DIVERGENCES[name], made, teacher).norm()


@pytest.mark.parametrize("name", [name for name in KINDS if "select" not in name])
def test_M_12_the_batch_twice_is_the_batch_once(parts, name: str) -> None:
    """A selection takes a rounded-up number of tokens, and rounds twice the batch another way."""
    student, teacher, made, _ = parts
    twice = made + [dataclasses.replace(r, id=r.id + "/again") for r in made]
    once = gradient(student, KINDS[name], made, teacher)
    assert rooms.distance(once, gradient(student, KINDS[name], twice, teacher)) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_M_03_M_06_poison_where_nothing_is_trained_changes_nothing(parts, name: str) -> None:
    """Log-probabilities of masked tokens, and answers of the data that nobody reads."""
    student, teacher, made, _ = parts
    poisoned = []
    for n, r in enumerate(made):
        bad = np.where(r.mask, r.behaviour_logprobs, (np.nan, np.inf, 0.0, -9999.0)[n % 4]).astype(np.float32)
        unread = dataclasses.replace(r.prompt, completion_ids=np.arange(3 + n, dtype=np.int64))
        poisoned.append(dataclasses.replace(r, behaviour_logprobs=bad, prompt=unread))
    assert torch.equal(gradient(student, KINDS[name], made, teacher), gradient(student, KINDS[name], poisoned, teacher))


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("now", [True, False])
def test_M_09_masked_tokens_get_no_gradient_for_any_discount(parts, monkeypatch, discount: float, now: bool) -> None:
    """Read at the states that predict them: exactly zero there, something at trained ones with a future."""
    if discount == 0 and not now:
        return
    student, teacher, made, _ = parts
    seen = []
    hidden = CausalLM.hidden

    def kept(self, *inputs):
        states = hidden(self, *inputs)
        if states.requires_grad:
            states.retain_grad()
            seen.append(states)
        return states

    monkeypatch.setattr(CausalLM, "hidden", kept)
    own = [r for r in made if r.behaviour == "student"]
    term = {**SAMPLED, **OWN, "credit": {"discount": discount, "now": now}}
    gradient(student, term, own, teacher, learner={"share_prompts": False})  # all states in one rectangle
    (states,) = seen
    (group,) = plan(own, 10_000)
    for n, r in enumerate(group):
        first = len(r.prompt.ids) - 1
        norms = states.grad[n, first : first + len(r.response_ids)].norm(dim=-1)
        assert torch.all(norms[torch.from_numpy(~r.mask)] == 0)
        with_future = np.flatnonzero(r.mask)[: None if now else -1]
        assert torch.all(norms[with_future] > 0)


def test_credit_follows_its_definition_on_the_real_loop(parts) -> None:
    """Forward KL, discount 0.9, truncated ratios: full logits, loops and autograd against the learner."""
    student, teacher, made, _ = parts
    own = [r for r in made if r.behaviour == "student"]
    term = {
        **SAMPLED,
        "shape": {"kind": "forward_kl"},
        "credit": {"discount": 0.9},
        "importance": {"kind": "tis", "cap": 1.1},
    }
    ours = gradient(student, term, own, teacher, tokens_per_micro_batch=100)
    student.module.zero_grad()
    tokens, loss = sum(int(r.mask.sum()) for r in own), torch.zeros((), dtype=torch.float64)
    for r in own:
        ids = torch.from_numpy(np.concatenate([r.prompt.ids, r.response_ids]))[None]
        logp_T, logq_T = (
            torch.log_softmax(m.module(ids).logits[0, len(r.prompt.ids) - 1 : -1, : m.vocab_size], -1)
            .gather(1, torch.from_numpy(r.response_ids)[:, None])
            .squeeze(1)
            for m in (student, teacher.members["teacher"].model)
        )
        ratio_T = (logq_T - logp_T).exp().detach()
        weight_T = (logp_T - torch.from_numpy(r.behaviour_logprobs)).exp().detach().clamp(max=1.1)
        trained = np.flatnonzero(r.mask)
        for t in trained:
            credit = ratio_T[t] - 1
            for later in trained[trained > t]:
                credit = credit - 0.9 ** float(later - t) * ratio_T[later] * ratio_T[later].log()
            loss = loss - weight_T[t] * credit * logp_T[t] / tokens
    loss.backward()
    assert rooms.distance(ours, rooms.gradient(student)) < 1e-6


def test_O_15_lambda_and_the_reference_reach_the_gradient(parts) -> None:
    student, teacher, made, fmt = parts

    def of(scale: float, panel):
        return gradient(student, {**SAMPLED, **OWN, "target": {"kind": "extrapolated", "scale": scale}}, made, panel)

    members = teacher.members
    swapped = rooms.panel(
        members["teacher"], rooms.teacher(members["weak"].model, fmt, name="reference"), members["weak"]
    )
    plain = gradient(student, {**SAMPLED, **OWN}, made, teacher)
    assert rooms.distance(of(1.0, teacher), plain) < 1e-6 and rooms.distance(of(1.25, teacher), plain) > 0.05
    assert rooms.distance(of(1.25, teacher), of(1.25, swapped)) > 0.05
    # log-linear: the gradient is, too
    assert rooms.distance(of(1.25, teacher) - plain, 0.5 * (of(1.5, teacher) - plain)) < 1e-5


def test_O_19_every_routed_teacher_moves_its_own_domain_alone(parts) -> None:
    student, teacher, made, fmt = parts
    members = teacher.members
    other = rooms.panel(
        members["teacher"], rooms.teacher(members["weak"].model, fmt, name="reference"), members["weak"]
    )
    for domain, moves in (("m", False), ("c", True)):
        term = {"target": {"kind": "routed", "routes": {"m": "teacher", "c": "reference"}}, "domains": [domain]}
        apart = rooms.distance(gradient(student, term, made, teacher), gradient(student, term, made, other))
        assert (apart > 0.05) == moves


def test_O_21_the_reward_reaches_the_gradient_of_a_mixed_objective(parts) -> None:
    student, teacher, made, _ = parts
    mixed = [{"kind": "outcome", **OWN}, {**SAMPLED, **OWN}]
    flipped = [dataclasses.replace(r, reward=None if r.reward is None else 1 - r.reward) for r in made]
    ours, theirs = (gradient(student, mixed, rollouts_N, teacher) for rollouts_N in (made, flipped))
    assert rooms.distance(ours, theirs) > 0.05
    distilled = gradient(student, mixed[1], made, teacher)
    assert rooms.distance(ours + theirs, 2 * distilled) < 1e-6, "group advantages change their sign with the rewards"


def test_O_17_an_advantage_that_is_the_teachers_is_not_standardised(parts) -> None:
    """2 log q - log p instead of log q doubles the log-ratio, and the gradient: nothing divides by a deviation."""
    student, teacher, made, _ = parts
    far = {**SAMPLED, **OWN, "target": {"kind": "extrapolated", "reference": "student", "scale": 2.0}}
    once, twice = (gradient(student, term, made, teacher) for term in ({**SAMPLED, **OWN}, far))
    assert rooms.distance(2 * once, twice) < 1e-6


def test_O_18_cross_entropy_on_the_students_own_samples_has_no_gradient(parts) -> None:
    student, teacher, made, _ = parts
    data, distil = {"kind": "data"}, {**SAMPLED, **OWN}
    own = [r for r in made if r.behaviour == "student"]
    assert torch.equal(gradient(student, [distil, data], own, teacher), gradient(student, distil, own, teacher))
    assert (
        rooms.distance(gradient(student, [distil, data], made, teacher), gradient(student, distil, made, teacher))
        > 0.05
    )
