"""Where each way of truncating the reverse KL ends (methods 1.3): one state, 50 tokens, the teacher's top 5."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd.objectives import oracle
from opd.objectives.oracle import divergences

V, K = 50, 5
Q_S, P_S, DRIFTED = (
    0.690,
    0.127,
    0.071,
)  # teacher's mass on its top 5; the student's at the start; renormalised, at rest
ENTROPY = 2.491  # of the teacher
ONE = oracle.tree(V, 1)
KEPT = (torch.arange(V) < K)[None]


def shape(seed: int, n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_two_sides(inside: Tensor, outside: Tensor, mass: float) -> Tensor:
    """[1, V] log-probabilities with the given mass inside, each side shaped by its logits."""
    halves = (inside.log_softmax(0) + math.log(mass), outside.log_softmax(0) + math.log(1 - mass))
    return torch.cat(halves)[None]


def solve(function, low: float, high: float) -> float:
    """Where a rising function crosses 0, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def entropy(logp: Tensor) -> float:
    return float(-(logp.exp() * logp).sum())


# One clear favourite and four others, all above whatever lies outside.
INSIDE = torch.tensor([0.60, 0.13, 0.10, 0.09, 0.08], dtype=torch.float64).log()
OUTSIDE = torch.linspace(-1, 1, V - K, dtype=torch.float64)[
    torch.randperm(V - K, generator=torch.Generator().manual_seed(1))
]


def teacher_of(sharpness: float) -> Tensor:
    return on_two_sides(INSIDE, sharpness * OUTSIDE, Q_S)


TEACHER = teacher_of(solve(lambda s: ENTROPY - entropy(teacher_of(s)), 0.0, 5.0))


def spread(logits: Tensor) -> float:
    """log of the mean of exp, of logits around their own mean: what a set gains when its shape gets sharper."""
    return float((logits - logits.mean()).logsumexp(0) - math.log(len(logits)))


def student_start() -> Tensor:
    """A student whose mass on the set is P_S, and sharper there than the teacher by what takes it to DRIFTED."""
    wanted = math.log(P_S / (1 - P_S)) - math.log(DRIFTED / (1 - DRIFTED)) + spread(TEACHER[0, :K])
    sharpness = solve(lambda s: spread(s * shape(2, K)) - wanted, 0.0, 20.0)
    return on_two_sides(sharpness * shape(2, K), shape(3, V - K), P_S)


START = student_start()


def by_autograd(value):
    def field(table: Tensor) -> Tensor:
        return oracle.local_field(ONE, table, TEACHER, lambda logp, logq: value(logp, logq, KEPT))

    return field


def stop_gradient_field(table: Tensor) -> Tensor:
    """sum over the set of sg(p log(p / q)) grad log p."""
    logp = ONE.logprobs(table)
    strength = torch.where(KEPT, logp.exp() * (logp - TEACHER), 0.0)
    return strength - logp.exp() * strength.sum(-1, keepdim=True)


FIELDS = {
    "full": by_autograd(lambda logp, logq, kept: divergences.reverse_kl(logp, logq)),
    "naive": by_autograd(divergences.naive_truncation),
    "renormalised": by_autograd(divergences.renormalised(divergences.reverse_kl)),
    "stop_gradient": stop_gradient_field,
    "bucket": by_autograd(divergences.bucketed(divergences.reverse_kl)),
}


@pytest.fixture(scope="module")
def rest() -> dict[str, Tensor]:
    """Method to the log-probabilities [1, V] where it comes to rest."""
    return {name: ONE.logprobs(oracle.fixed_point(field, START)) for name, field in FIELDS.items()}


def mass(logp: Tensor) -> float:
    return float(logp[KEPT].exp().sum())


def tail_kl(logp: Tensor) -> float:
    return float(divergences.kl(divergences.within(logp, ~KEPT), divergences.within(TEACHER, ~KEPT)))


def full_kl(logp: Tensor) -> float:
    return float(divergences.reverse_kl(logp, TEACHER))


def test_the_pair_is_the_published_one_where_it_can_be() -> None:
    assert mass(TEACHER) == pytest.approx(Q_S) and mass(START) == pytest.approx(P_S)
    assert entropy(TEACHER) == pytest.approx(ENTROPY)
    assert bool((TEACHER[0, :K].min() > TEACHER[0, K:].max()).item())  # the set is the teacher's top 5


def test_full_vocabulary_reaches_the_teacher(rest: dict[str, Tensor]) -> None:
    assert full_kl(rest["full"]) < 1e-12 and mass(rest["full"]) == pytest.approx(Q_S, abs=1e-9)
    assert entropy(rest["full"]) == pytest.approx(ENTROPY, abs=1e-9)


def test_O_6_naive_truncation_empties_the_support(rest: dict[str, Tensor]) -> None:
    logp = rest["naive"]
    assert mass(logp) == pytest.approx(Q_S / math.e, abs=1e-9) and round(mass(logp), 3) == 0.254
    torch.testing.assert_close(logp[KEPT], TEACHER[KEPT] - 1, atol=1e-9, rtol=0)  # p = q / e on the set
    p = Q_S / math.e
    away = -p + (1 - p) * (math.log((1 - p) / (1 - Q_S)) + tail_kl(logp))
    assert full_kl(logp) == pytest.approx(away, abs=1e-9) and full_kl(logp) > full_kl(rest["bucket"])
    assert entropy(logp) > entropy(rest["bucket"]) > ENTROPY


def test_O_7_renormalised_lets_the_mass_drift_out(rest: dict[str, Tensor]) -> None:
    logp = rest["renormalised"]
    assert mass(logp) == pytest.approx(DRIFTED, abs=1e-9) and mass(logp) < P_S
    shaped = divergences.within(logp, KEPT)[KEPT] - divergences.within(TEACHER, KEPT)[KEPT]
    assert shaped.abs().max() < 1e-9  # the shape on the set is right
    assert tail_kl(logp) == pytest.approx(tail_kl(START), abs=1e-9)  # nothing moves outside
    field = FIELDS["renormalised"](START)
    assert field[~KEPT].abs().max() < 1e-15 and field[KEPT].sum().abs() < 1e-15
    assert entropy(logp) > entropy(rest["bucket"])
    # Sharper or flatter than the teacher decides which way: a flat start gains mass instead.
    flat = on_two_sides(torch.zeros(K, dtype=torch.float64), shape(3, V - K), P_S)
    assert mass(ONE.logprobs(oracle.fixed_point(FIELDS["renormalised"], flat))) > P_S


@pytest.mark.parametrize("name", ["stop_gradient", "bucket"])
def test_stop_gradient_and_bucket_have_the_teachers_mass_and_leave_the_tails_shape(
    name: str, rest: dict[str, Tensor]
) -> None:
    logp = rest[name]
    assert mass(logp) == pytest.approx(Q_S, abs=1e-9)
    torch.testing.assert_close(logp[KEPT], TEACHER[KEPT], atol=1e-9, rtol=0)
    assert full_kl(logp) == pytest.approx((1 - Q_S) * tail_kl(logp), abs=1e-9)
    assert full_kl(logp) > 0.1 and entropy(logp) > ENTROPY


def test_unnormalised_kl_has_the_gradient_of_the_stop_gradient_form() -> None:
    field = by_autograd(divergences.unnormalised_kl)(START)
    torch.testing.assert_close(field, stop_gradient_field(START), atol=1e-15, rtol=0)
    assert oracle.bias(FIELDS["naive"](START), field).relative > 0.05  # what the - p of the unnormalised form takes out


def test_the_sample_corrected_bucket_is_unbiased_for_the_full_vocabulary() -> None:
    logp = ONE.logprobs(START)
    tail_p, tail_q = (torch.logsumexp(log[~KEPT], 0) for log in (logp, TEACHER))

    def correction(drawn: oracle.Drawn) -> Tensor:
        outside = ~KEPT[0][drawn.token_NT]
        cost = (drawn.logp_NT() - tail_p) - (drawn.logq_NT() - tail_q)
        return torch.where(outside, cost.detach() * drawn.logp_NT(), 0.0)

    made = FIELDS["bucket"](START) + oracle.expected_gradient(ONE, START, TEACHER, correction)
    torch.testing.assert_close(made, FIELDS["full"](START), atol=1e-14, rtol=0)
    assert oracle.bias(FIELDS["bucket"](START), FIELDS["full"](START)).relative > 0.01


def test_O_8_where_the_truncated_forward_kl_is_negative_the_bucket_is_not_and_keeps_its_gradient() -> None:
    student = on_two_sides(INSIDE, shape(3, V - K), 0.9)  # more mass on the set than the teacher
    truncated = torch.where(KEPT, TEACHER.exp() * (TEACHER - ONE.logprobs(student)), 0.0).sum()
    assert truncated < -0.1  # a clamp at 0 would drop the gradient
    field = by_autograd(divergences.bucketed(divergences.forward_kl))(student)
    assert field[KEPT].sum() > 0.1  # mass leaves the set
    for seed in range(20):
        logp, logq = (ONE.logprobs(ONE.random_table(s, 2.0)) for s in (seed, seed + 50))
        bucket = divergences.bucketed(divergences.forward_kl)(logp, logq, divergences.top_k_mask(logq, K))
        assert 0 <= bucket <= divergences.forward_kl(logp, logq)
