"""What a step says about itself, recomputed from the models' own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opd.learner import diagnostics
from opd.learner.diagnostics import GradientNoise
from tests import rooms
from tests.learner.kinds import OWN, SAMPLED, step

OVERLAP = 16  # entries of the student and of a scorer that are compared


@pytest.fixture(scope="module")
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0, dtype=torch.float64)
    panel = rooms.panel(
        rooms.teacher(rooms.causal(seed=1, dtype=torch.float64), fmt),
        rooms.teacher(rooms.causal("llama", seed=2, dtype=torch.float64), fmt, name="reference"),
    )
    return student, panel, step(rooms.causal(seed=0), fmt)


def tokens(model, rollouts_N) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] at the trained tokens of all answers, and those of the drawn tokens [T]."""
    whole = []
    for r in rollouts_N:
        ids = torch.from_numpy(np.concatenate([r.prompt.ids, r.response_ids]))[None]
        with torch.no_grad():
            logits = model.module(ids).logits[0, len(r.prompt.ids) - 1 : -1, : model.vocab_size]
        whole.append(torch.log_softmax(logits, -1)[torch.from_numpy(r.mask)])
    drawn_T = torch.from_numpy(np.concatenate([r.response_ids[r.mask] for r in rollouts_N]))
    logp_TV = torch.cat(whole)
    return logp_TV, logp_TV.gather(1, drawn_T[:, None])[:, 0]


def metrics(student, panel, rollouts_N, *terms: dict, **options) -> dict[str, float]:
    learner = rooms.learner(student, rooms.objective(*terms), tokens_per_micro_batch=80)
    return learner.gradients(rollouts_N, panel.evidence(rollouts_N), **options)


def test_M_15_scorers_are_described_over_the_whole_step(parts) -> None:
    student, panel, made = parts
    seen = metrics(student, panel, made, {"name": "t"}, {"name": "r", "target": "reference"}, diagnostics=True)
    logp_TV, _ = tokens(student, made)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    for name, member in panel.members.items():
        logq_TV, drawn_T = tokens(member.model, made)
        theirs_T = -(logq_TV.exp() * logq_TV).sum(-1)
        both_TV = torch.zeros_like(logp_TV).scatter(1, logp_TV.topk(OVERLAP).indices, 1.0)
        both_TV *= torch.zeros_like(logp_TV).scatter(1, logq_TV.topk(OVERLAP).indices, 1.0)
        expected = {
            "reverse_kl": (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1),
            "forward_kl": (logq_TV.exp() * (logq_TV - logp_TV)).sum(-1),
            "logprob": drawn_T,
            "entropy": theirs_T,
            "entropy_gap": entropy_T - theirs_T,
            "overlap": both_TV.sum(-1) / OVERLAP,
            "overlap_mass": (both_TV * logp_TV.exp()).sum(-1),
        }
        for fact, value_T in expected.items():
            assert seen[f"scorer/{name}/{fact}"] == pytest.approx(value_T.mean().item(), rel=1e-5), (name, fact)
    assert seen["entropy"] == pytest.approx(entropy_T.mean().item(), rel=1e-5)
    assert seen["reverse_kl"] == pytest.approx(seen["scorer/teacher/reverse_kl"]), "the first divergence term's target"


def test_quantiles_places_and_signs(parts) -> None:
    student, panel, made = parts
    terms = ({"name": "t", **SAMPLED}, {"name": "r", "target": "reference", **SAMPLED})
    seen = metrics(student, panel, made, *terms, diagnostics=True)
    _, logp_T = tokens(student, made)
    gaps = {n: tokens(panel.members[m].model, made)[1] - logp_T for n, m in (("t", "teacher"), ("r", "reference"))}
    for name, gap_T in gaps.items():
        size = np.sort(gap_T.abs().numpy())
        for key, q in (("p50", 0.5), ("p95", 0.95), ("p999", 0.999), ("max", 1.0)):
            expected = np.quantile(size, q, method="nearest")
            assert seen[f"term/{name}/log_ratio_{key}"] == pytest.approx(expected, rel=1e-5)
    same = (gaps["t"].sign() == gaps["r"].sign()).double().mean().item()
    assert seen["same_sign/r-t"] == seen["same_sign/reference-teacher"] == pytest.approx(same)
    tenth_T = np.concatenate([(np.arange(len(r.mask)) * 10 // len(r.mask))[r.mask] for r in made])
    for tenth in range(10):
        here = -gaps["t"].numpy()[tenth_T == tenth]
        assert seen[f"reverse_kl/tenth/{tenth + 1}"] == pytest.approx(here.mean(), rel=1e-5)


def test_signs_are_compared_where_both_terms_train(parts) -> None:
    student, panel, made = parts
    terms = ({"name": "a", **SAMPLED}, {"name": "b", "target": "reference", "domains": ["c"], **SAMPLED})
    seen = metrics(student, panel, made, *terms, diagnostics=True)
    there = [r for r in made if r.domain == "c"]
    signs = [tokens(panel.members[m].model, there)[1].sub(tokens(student, there)[1]).sign() for m in panel.members]
    assert seen["same_sign/a-b"] == pytest.approx((signs[0] == signs[1]).double().mean().item())


def test_weights_are_described_by_their_effective_sample_and_clipped_share(parts) -> None:
    student, panel, made = parts
    term = {"name": "t", **SAMPLED, **OWN, "importance": {"kind": "icepop", "low": 0.9, "high": 1.1}}
    seen = metrics(student, panel, made, term)
    own = [r for r in made if r.behaviour == "student"]
    _, logp_T = tokens(student, own)
    then_T = torch.from_numpy(np.concatenate([r.behaviour_logprobs[r.mask] for r in own]))
    ratio_T = (logp_T - then_T).exp()
    used_T = torch.where((ratio_T >= 0.9) & (ratio_T <= 1.1), ratio_T, 0.0)
    assert seen["term/t/ess"] == pytest.approx(
        (used_T.sum() ** 2 / used_T.square().sum() / len(used_T)).item(), rel=1e-5
    )
    assert seen["term/t/clipped"] == pytest.approx((used_T == 0).double().mean().item())
    assert 0 < seen["term/t/clipped"] < 1
    answers = {**term, "importance": {"kind": "ratio", "level": "sequence"}}
    by_answer = torch.cat(
        [(x.mean() * torch.ones_like(x)).exp() for x in (logp_T - then_T).split([r.mask.sum() for r in own])]
    )
    expected = by_answer.sum() ** 2 / by_answer.square().sum() / len(by_answer)
    assert metrics(student, panel, made, answers)["term/t/ess"] == pytest.approx(expected.item(), rel=1e-5)
    low, high = by_answer.quantile(0.3).item(), by_answer.quantile(0.7).item()
    cut = {**term, "importance": {"kind": "icepop", "level": "sequence", "low": min(low, 0.999), "high": high}}
    left = torch.where((by_answer >= cut["importance"]["low"]) & (by_answer <= high), by_answer, 0.0)
    seen = metrics(student, panel, made, cut)
    assert seen["term/t/clipped"] == pytest.approx((left == 0).double().mean().item()) and (left == 0).any()
    assert seen["term/t/ess"] == pytest.approx((left.sum() ** 2 / left.square().sum() / len(left)).item(), rel=1e-5)


def test_weights_of_a_term_that_is_at_rest_have_no_figures(parts) -> None:
    student, panel, made = parts
    size = {"start": 0.0, "end": 1.0, "steps": 4}
    seen = metrics(
        student, panel, made, {"name": "t"}, {"name": "u", **SAMPLED, **OWN, "importance": "tis", "coefficient": size}
    )
    assert not {"term/u/ess", "term/u/clipped"} & seen.keys() and all(math.isfinite(x) for x in seen.values())


def test_the_share_that_a_gate_lets_through_is_told(parts) -> None:
    student, panel, made = parts
    logq_TV, _ = tokens(panel.members["reference"].model, made)
    entropy_T = -(logq_TV.exp() * logq_TV).sum(-1)
    gate = {"where": {"of": "reference", "above": entropy_T.quantile(0.3).item()}}
    seen = metrics(student, panel, made, {"name": "t", "tokens": gate}, {"name": "u"})
    assert seen["term/t/open"] == pytest.approx((entropy_T > gate["where"]["above"]).double().mean().item())
    assert seen["term/t/tokens"] == len(entropy_T) and "term/u/open" not in seen
    everything = {"kind": "student_top_k", "k": student.vocab_size}  # no tail is left, so that none is resolved
    seen = metrics(student, panel, made, {"name": "t", "tokens": gate, "support": everything})
    assert seen["term/t/unresolved"] == 1.0, "of the tokens at which the gate is open"


def test_M_05_the_reverse_kl_does_not_hang_on_the_cut(parts) -> None:
    """Lambda 1 for one domain: there the target is a scorer itself, whatever else is in the micro-batch."""
    student, panel, made = parts
    routed = {"kind": "routed", "routes": {"m": "teacher", "c": "reference"}}
    scale = {"teacher": 1.25, "reference": 1.0}
    target = {"kind": "extrapolated", "teacher": routed, "reference": {"teacher": "reference"}, "scale": scale}
    found = []
    for budget in (10_000, 1):
        learner = rooms.learner(
            student, rooms.objective({"name": "t", "target": target}), tokens_per_micro_batch=budget
        )
        found.append(learner.gradients(made, panel.evidence(made)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_teacher_is_shown_at_each_token_by_the_first_term_that_trains_it(parts) -> None:
    """Domain m has the teacher, c the reference; scores are those of the token's own target, NaN where masked."""
    student, panel, made = parts
    learner = rooms.learner(
        student,
        rooms.objective(
            {"name": "d", "kind": "data"},
            {"name": "m", "domains": ["m"]},
            {"name": "c", "domains": ["c"], "target": "reference", "shape": {"kind": "forward_kl"}},
        ),
        tokens_per_micro_batch=80,
    )
    logq = {}
    for r in made:
        member = panel.members["teacher" if r.domain == "m" else "reference"].model
        (logp_TV, _), (logq_TV, drawn_T) = tokens(student, [r]), tokens(member, [r])
        logq[r.id] = drawn_T, (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1)
    report = learner.update(made, panel.evidence(made))
    for r in made:
        seen = report.scores[r.id]
        assert seen.teacher_logprobs[r.mask] == pytest.approx(logq[r.id][0].numpy(), rel=1e-4)
        assert seen.reverse_kl[r.mask] == pytest.approx(logq[r.id][1].numpy(), rel=1e-4)
        assert np.isnan(seen.teacher_logprobs[~r.mask]).all() and np.isnan(seen.student_logprobs[~r.mask]).all()


def test_the_closer_look_is_taken_at_the_first_step_and_every_so_many(parts) -> None:
    _, panel, made = parts
    student = rooms.causal(seed=0, dtype=torch.float64)
    learner = rooms.learner(student, rooms.objective({"name": "t"}), learner={"diagnostics_every": 2})
    looked = ["scorer/teacher/overlap" in learner.update(made, panel.evidence(made)).metrics for _ in range(5)]
    assert looked == [True, False, True, False, True]
    never = rooms.learner(student, rooms.objective({"name": "t"}), learner={"diagnostics_every": 0})
    assert "scorer/teacher/overlap" not in never.update(made, panel.evidence(made)).metrics


def test_the_closer_look_changes_no_gradient(parts) -> None:
    student, panel, made = parts
    found = []
    for closer in (False, True):
        metrics(student, panel, made, {"name": "t"}, {"name": "o", "kind": "outcome", **OWN}, diagnostics=closer)
        found.append(rooms.gradient(student))
    assert torch.equal(*found)


def test_gradient_noise_finds_the_mean_and_spread_that_samples_were_drawn_with(monkeypatch) -> None:
    """8 gradients of 2000 numbers with mean 2 and deviation 2: eight times 4 / 4."""
    monkeypatch.setattr(diagnostics, "PART", 300)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64))
    unread = torch.nn.Parameter(torch.zeros(3))
    noise = GradientNoise()
    for _ in range(8):
        drawn = 2.0 + 2.0 * torch.randn(2000, dtype=torch.float64)
        with noise.watch([parameter, unread]):
            (parameter * drawn).sum().backward()
    noise.end([parameter, unread])
    assert noise.ratio() == pytest.approx(8.0, rel=0.1)


def test_gradient_noise_needs_four_micro_batches_and_looks_at_no_gradient_without_them(parts, monkeypatch) -> None:
    student, panel, made = parts
    looked: list[int] = []
    square = diagnostics._square
    monkeypatch.setattr(diagnostics, "_square", lambda g: looked.append(g.numel()) or square(g))
    for budget, there in ((10_000, False), (80, True)):
        learner = rooms.learner(student, rooms.objective({"name": "t"}), tokens_per_micro_batch=budget)
        seen = learner.gradients(made, panel.evidence(made), diagnostics=True)
        assert ("gradient_snr" in seen) == there == bool(looked)


def test_how_much_a_scorers_log_probabilities_spread(parts) -> None:
    """One number for the whole step, whatever its micro-batches are."""
    student, panel, made = parts
    seen = metrics(student, panel, made, {"name": "t"}, {"name": "r", "target": "reference"})
    for name, member in panel.members.items():
        _, drawn_T = tokens(member.model, made)
        assert seen[f"scorer/{name}/spread"] == pytest.approx(float(drawn_T.std(correction=0)), rel=1e-9)
