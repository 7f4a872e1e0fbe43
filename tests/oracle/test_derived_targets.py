"""Fixed points of log-linear targets: G-OPD at discount 0 and 1 (methods 1.4), products, Veto, delta (1.5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd.objectives import oracle
from opd.objectives.oracle import divergences

TREE = oracle.tree(4, 3, end=3)
START, TEACHER, REFERENCE = (TREE.random_table(seed) for seed in (0, 1, 2))
ONE = oracle.tree(6, 1)


def extrapolated(scale: float) -> Tensor:
    """[S, V]: scale (log q - log m) + log m, not normalised."""
    logq, logm = TREE.logprobs(TEACHER), TREE.logprobs(REFERENCE)
    return scale * (logq - logm) + logm


def gopd_field(scale: float, discount: float, sign: float = 1.0):
    """Descent for the token reward scale (log q - log m) - (log p - log m), times a sign."""

    def field(table: Tensor) -> Tensor:
        reward = extrapolated(scale) - TREE.logprobs(table)
        return sign * oracle.return_field(TREE, table, reward, discount)

    return field


def local(scale: float) -> Tensor:
    """[N]: log-probability of every answer under the mixture that is normalised in every state."""
    return TREE.at_tokens(extrapolated(scale).log_softmax(-1)).sum(-1)


def tilted(scale: float) -> Tensor:
    """[N]: log-probability of every answer under q^scale m^(1 - scale), normalised over answers."""
    return TREE.at_tokens(extrapolated(scale)).sum(-1).log_softmax(0)


def kl(loga: Tensor, logb: Tensor) -> float:
    return float((loga.exp() * (loga - logb)).sum())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_gopd_ends_in_the_local_mixture_or_in_the_sequence_level_tilt(scale: float, discount: float) -> None:
    found = TREE.answer_logprobs(oracle.fixed_point(gopd_field(scale, discount), START))
    wanted, other = (local(scale), tilted(scale)) if discount == 0 else (tilted(scale), local(scale))
    assert kl(found, wanted) < 1e-12
    if scale == 1:
        assert kl(found, other) < 1e-12 and kl(found, TREE.answer_logprobs(TEACHER)) < 1e-12
    else:
        assert kl(found, other) > 0.01


def test_local_and_global_differ_by_what_the_states_normalisers_say() -> None:
    gaps = [kl(local(s), tilted(s)) for s in (1.0, 1.25, 1.5)]
    assert gaps[0] < 1e-14 and gaps[0] < gaps[1] < gaps[2]
    assert 0.02 < gaps[2] < 0.5  # 0.11 nats on a published toy of this size
    # With normalised rewards a discount of 1 would end elsewhere: the states' normalisers matter.
    normalised = extrapolated(1.5).log_softmax(-1)
    found = oracle.fixed_point(lambda z: oracle.return_field(TREE, z, normalised - TREE.logprobs(z), 1.0), START)
    assert kl(TREE.answer_logprobs(found), local(1.5)) < 1e-12


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_O_16_the_sign_printed_in_gopds_equation_14_leads_away_from_its_own_target(discount: float) -> None:
    wanted = local(1.5) if discount == 0 else tilted(1.5)
    gaps: dict[float, list[float]] = {}
    for sign in (1.0, -1.0):
        table, gaps[sign] = START.clone(), []
        for _ in range(60):
            gaps[sign].append(kl(TREE.answer_logprobs(table), wanted))
            table = table - 0.5 * gopd_field(1.5, discount, sign)(table)
    assert gaps[1.0] == sorted(gaps[1.0], reverse=True) and gaps[1.0][-1] < 0.8 * gaps[1.0][0]
    assert gaps[-1.0] == sorted(gaps[-1.0]) and gaps[-1.0][-1] > 1.2 * gaps[-1.0][0]


def test_weighted_reverse_kls_are_one_to_the_product_of_experts() -> None:
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    experts = torch.stack([ONE.logprobs(ONE.random_table(seed))[0] for seed in (1, 2, 3)])
    product = (weights[:, None] * experts).sum(0)
    log_z = product.logsumexp(0)
    for seed in (5, 6):
        logp = ONE.logprobs(ONE.random_table(seed))[0]
        several = sum(float(w) * kl(logp, e) for w, e in zip(weights, experts, strict=True))
        assert several == pytest.approx(kl(logp, product - log_z) - float(log_z), abs=1e-14)

    def field(table: Tensor) -> Tensor:
        parts = [oracle.local_field(ONE, table, e[None], divergences.reverse_kl) for e in experts]
        return torch.einsum("k,ksv->sv", weights, torch.stack(parts))

    found = ONE.logprobs(oracle.fixed_point(field, ONE.random_table(9)))
    torch.testing.assert_close(found[0], product - log_z, atol=1e-10, rtol=0)


def reverse_kl_to(target) -> Tensor:
    """Where the reverse KL to a target that is made from the student, held fixed, comes to rest."""

    def field(table: Tensor) -> Tensor:
        logp = ONE.logprobs(table)
        h = target(logp) - logp
        p = logp.exp()
        return -p * (h - (p * h).sum(-1, keepdim=True))

    return ONE.logprobs(oracle.fixed_point(field, ONE.random_table(0)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_veto_ends_in_a_sharper_teacher(share: float) -> None:
    logq = ONE.logprobs(ONE.random_table(1))
    found = reverse_kl_to(lambda logp: logq + share * logp)  # q p^share
    torch.testing.assert_close(found, (logq / (1 - share)).log_softmax(-1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0])
def test_delta_adds_the_strong_models_lead_to_the_base(alpha: float) -> None:
    strong, weak, base = (ONE.logprobs(ONE.random_table(seed)) for seed in (1, 2, 3))
    found = reverse_kl_to(lambda logp: (strong - weak) / alpha + base)
    torch.testing.assert_close(found, (base + (strong - weak) / alpha).log_softmax(-1), atol=1e-10, rtol=0)


def test_coefficients_that_do_not_add_up_to_1_are_a_temperature() -> None:
    logq = ONE.logprobs(ONE.random_table(1))
    found = reverse_kl_to(lambda logp: 1.7 * logq)
    torch.testing.assert_close(found, (1.7 * logq).log_softmax(-1), atol=1e-10, rtol=0)
