"""The methods once more, typed from their sources: a loss for every token of one answer, differentiated by autograd.

Written from the papers' formulas as `methods.md` states them (section in brackets), with full softmaxes and plain sums;
nothing of the training code or of the oracle is used. `held` is the papers' stop-gradient. Losses are to descend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.oracle.presets.expectation import Answer, Loss, held

# ---- over the whole vocabulary ---------------------------------------------------------------------------------


def kl(loga_TV: Tensor, logb_TV: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(logb_TV, loga_TV, reduction="none", log_target=True).sum(-1)


def reverse_kl(a: Answer) -> Tensor:
    """KL(p || q) [3.1]"""
    return kl(a.logp_TV, a.logq_TV)


def forward_kl(a: Answer) -> Tensor:
    """KL(q || p) [3.2]"""
    return kl(a.logq_TV, a.logp_TV)


def jsd(beta: float) -> Loss:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p [3.2]"""

    def loss(a: Answer) -> Tensor:
        logm_TV = (beta * a.q_TV + (1 - beta) * a.p_TV).log()
        return beta * kl(a.logq_TV, logm_TV) + (1 - beta) * kl(a.logp_TV, logm_TV)

    return loss


def skew_forward_kl(alpha: float) -> Loss:
    """KL(q || alpha q + (1 - alpha) p) [3.8]"""
    return lambda a: kl(a.logq_TV, (alpha * a.q_TV + (1 - alpha) * a.p_TV).log())


def skew_reverse_kl(alpha: float) -> Loss:
    """KL(p || (1 - alpha) q + alpha p) [3.8]"""
    return lambda a: kl(a.logp_TV, ((1 - alpha) * a.q_TV + alpha * a.p_TV).log())


def weighted_reverse_kl(weights: Mapping[str, float]) -> Loss:
    """sum_k w_k KL(p || m_k), each scorer by itself [3.13]"""
    return lambda a: torch.stack([w * kl(a.logp_TV, a.scored[name]) for name, w in weights.items()]).sum(0)


def sharper(temperature: float) -> Loss:
    """KL(p || p_0^(1 / temperature) / Z)"""
    return lambda a: kl(a.logp_TV, torch.log_softmax(a.scored["teacher"] / temperature, -1))


# ---- on a few entries ------------------------------------------------------------------------------------------


def chosen(log_TV: Tensor, k: int) -> Tensor:
    """bool [T, V]: entries whose rank is below k."""
    order_TV = held(log_TV).argsort(-1, descending=True)
    return torch.zeros_like(log_TV, dtype=torch.bool).scatter_(-1, order_TV[:, :k], True)


def rescaled(log_TV: Tensor, kept_TV: Tensor) -> Tensor:
    """[T, K]: log of the probabilities of the kept entries, divided by their sum."""
    kept = log_TV[kept_TV].view(len(log_TV), -1).exp()
    return (kept / kept.sum(-1, keepdim=True)).log()


def with_rest(log_TV: Tensor, kept_TV: Tensor) -> Tensor:
    """[T, K + 1]: the kept entries and everything else as one more."""
    kept = log_TV[kept_TV].view(len(log_TV), -1).exp()
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()


def local_support_matching(k: int, special: int) -> Loss:
    """KL(p^ || q^), both rescaled to the teacher's k likeliest; drawn special tokens are masked [3.7]"""

    def loss(a: Answer) -> Tensor:
        kept_TV = chosen(a.logq_TV, k)
        loss_T = kl(rescaled(a.logp_TV, kept_TV), rescaled(a.logq_TV, kept_TV))
        return torch.where(a.token_T == special, math.nan, loss_T)

    return loss


def two_classes_more(divergence: Loss, k: int, of: str) -> Loss:
    """A divergence over the k likeliest entries of the teacher or the student and one class for the rest [1.3, 3.11]"""

    def loss(a: Answer) -> Tensor:
        kept_TV = chosen(a.logq_TV if of == "teacher" else a.logp_TV, k)
        narrow = replace(a, logp_TV=with_rest(a.logp_TV, kept_TV), scored={"teacher": with_rest(a.logq_TV, kept_TV)})
        return divergence(narrow)

    return loss


def later(loss: Loss, skipped: int) -> Loss:
    """Without the first tokens of every answer [3.11]"""
    return lambda a: torch.where(torch.arange(len(a.token_T)) < skipped, math.nan, loss(a))


def by_rank(a: Answer) -> Tensor:
    """sum |sort(p) - sort(q)| [3.6]"""
    return (a.p_TV.sort(-1).values - a.q_TV.sort(-1).values).abs().sum(-1)


# ---- on drawn tokens -------------------------------------------------------------------------------------------


def cross_entropy(a: Answer) -> Tensor:
    """-log p(y_t)"""
    return -a.logp_T


def thinking_machines(a: Answer) -> Tensor:
    """-(pi / mu) a_t, a_t = -(log mu - log q); differentiated through the ratio [3.1]"""
    return -a.ratio_T * -(a.drawn_T - a.logq_T)


def thinking_machines_discounted(discount: float) -> Loss:
    """The same with a_t <- sum over t' >= t of discount^(t' - t) a_t' [3.1]"""

    def loss(a: Answer) -> Tensor:
        return -a.ratio_T * from_here(a.logq_T - a.drawn_T, discount)

    return loss


def from_here(value_T: Tensor, discount: float) -> Tensor:
    T = len(value_T)
    return torch.stack([sum((discount ** (u - t) * value_T[u] for u in range(t + 1, T)), value_T[t]) for t in range(T)])


def mopd(routes: Mapping[str, str], low: float, high: float, alpha: float = 0.0) -> Loss:
    """-w_t A_t log pi, w_t = sg[pi / mu] inside [low, high], else 0; A_t = sg[log q_domain - log pi] + alpha A [3.4]

    `reward` is the answer's group advantage A here.
    """

    def loss(a: Answer) -> Tensor:
        w_T = held(a.ratio_T)
        w_T = torch.where((w_T < low) | (w_T > high), 0.0, w_T)
        advantage_T = held(a.at(a.scored[routes[a.domain]]) - a.logp_T)
        if alpha:
            advantage_T = advantage_T + alpha * a.reward
        return -w_T * advantage_T * a.logp_T

    return loss


def g_opd(scale: float, cap: float, discount: float = 0.0) -> Loss:
    """-w_t A_t log pi, A_t = log q - log pi + (lambda - 1)(log q - log m), w_t = min(pi / mu, cap) [3.5]"""

    def loss(a: Answer) -> Tensor:
        m_T = a.at(a.scored["reference"]) if "reference" in a.scored else torch.zeros_like(a.logq_T)
        advantage_T = a.logq_T - a.logp_T + (scale - 1) * (a.logq_T - m_T)
        return -held(a.ratio_T.clamp(max=cap) * from_here(advantage_T, discount)) * a.logp_T

    return loss


def g_opd_routed(scale: float, cap: float, routes: Mapping[str, str], bases: Mapping[str, str]) -> Loss:
    """The same, with teacher and reference by domain [3.5]"""

    def loss(a: Answer) -> Tensor:
        teacher = routes[a.domain]
        return g_opd(scale, cap)(
            replace(a, scored={"teacher": a.scored[teacher], "reference": a.scored[bases[teacher]]})
        )

    return loss


def compass(alpha: float) -> Loss:
    """-A_t log pi, A = sg[(l_T - l_R) - alpha (log pi - log pi_ref)] [3.5]"""

    def loss(a: Answer) -> Tensor:
        gain_T = a.logq_T - a.at(a.scored["weak"])
        return -held(gain_T - alpha * (a.logp_T - a.at(a.scored["reference"]))) * a.logp_T

    return loss


def minillm(discount: float) -> Loss:
    """-w_t [grad sum_v pi log(q / pi) + R_{t+1} grad log pi(y_t)], w_t = pi / mixture, R_{t+1} the mean of what follows
    with powers of the discount counted from t [3.3]

    The paper's w_t is on both parts. The first does not depend on the drawn token, so that its w_t is 1 on average.
    """

    def loss(a: Answer) -> Tensor:
        single_T = (a.p_TV * (a.logq_TV - a.logp_TV)).sum(-1)
        reward_T, T = held(a.logq_T - a.logp_T), len(a.token_T)
        norm = [max(T - t - 1, 1) for t in range(T)]
        credit = [sum(discount ** (u - t) * float(reward_T[u]) for u in range(t + 1, T)) / norm[t] for t in range(T)]
        return -held(a.ratio_T) * (single_T + torch.tensor(credit, dtype=torch.float64) * a.logp_T)

    return loss


def ppo(a: Answer, advantage: Tensor, clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A)"""
    return -torch.minimum(a.ratio_T * advantage, a.ratio_T.clamp(1 - clip, 1 + clip) * advantage)


def grpo(clip: float) -> Loss:
    """PPO's loss; `reward` is the answer's group advantage A here"""
    return lambda a: ppo(a, torch.full_like(a.logp_T, a.reward), clip)


def plain_reward(a: Answer) -> Tensor:
    """-r(y) log pi [3.2]"""
    return -a.reward * a.logp_T


def k2(a: Answer) -> Tensor:
    """(log pi / q)^2 / 2, differentiated [1.1, 3.8]"""
    return (a.logp_T - a.logq_T).square() / 2


def reverse_kl_clipped(clip: float) -> Loss:
    """PPO's loss with the advantage log(q / pi) [3.8]"""
    return lambda a: ppo(a, held(a.logq_T - a.logp_T), clip)


def verifier(right_from: float) -> Loss:
    """-R max(R log q / pi, 0) log pi, R = 1 for right and -1 for wrong answers [3.8]"""

    def loss(a: Answer) -> Tensor:
        sign = 1.0 if a.reward >= right_from else -1.0
        return -sign * held((sign * (a.logq_T - a.logp_T)).clamp(min=0)) * a.logp_T

    return loss


def binary(a: Answer) -> Tensor:
    """-sign(log q / pi) log pi [3.7]"""
    return -held((a.logq_T - a.logp_T).sign()) * a.logp_T


def reverse_kl_drawn(a: Answer) -> Tensor:
    """-log(q / pi) log pi"""
    return -held(a.logq_T - a.logp_T) * a.logp_T


def likelihood_matching(tau: float) -> Loss:
    """KL of (q^(1/tau), the rest) from (p^(1/tau), the rest), of the tokens as they stand [3.6]"""

    def loss(a: Answer) -> Tensor:
        p_T, q_T = (a.logp_T / tau).exp(), (a.logq_T / tau).exp()
        return q_T * (q_T / p_T).log() + (1 - q_T) * ((1 - q_T) / (1 - p_T)).log()

    return loss


def prefix_weighted(gamma: float) -> Loss:
    """times 1 + gamma (1 - sum_{k < t} |A_k| / sum_k |A_k|) [3.9]"""

    def loss(a: Answer) -> Tensor:
        size = held(a.logq_T - a.logp_T).abs()
        before = torch.stack([size[:t].sum() for t in range(len(size))])
        return (1 + gamma * (1 - before / size.sum())) * reverse_kl_drawn(a)

    return loss


def gated_forward_kl(above: float, k: int) -> Loss:
    """FKL over the teacher's k likeliest and the rest where H(q) > tau, 0 elsewhere [3.8]"""
    inner = two_classes_more(forward_kl, k, "teacher")

    def loss(a: Answer) -> Tensor:
        entropy_T = -(a.q_TV * a.logq_TV).sum(-1)
        return torch.where(entropy_T > above, inner(a), 0.0)

    return loss
