"""What estimators are on average, and how noisy: exact expectations over every answer of small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from opd.objectives import oracle
from opd.objectives.oracle import Drawn, divergences

TREE = oracle.tree(4, 3, end=3)
SEEDS = range(10)
EXACT = 1e-9
LENGTH_N = TREE.mask_NT.sum(-1)


@dataclass(frozen=True)
class Row:
    """loss: from all answers to a loss per token [N, T]. stale: the answers are an older student's.
    discount and baseline need the tree, so they are written as functions of it as well."""

    name: str
    loss: Callable[[Drawn], Tensor]
    formula: str
    stale: bool = False


def k(drawn: Drawn) -> dict[str, Tensor]:
    """Estimates of KL(p || q) from the drawn token, r = q / p."""
    log_r = drawn.logq_NT() - drawn.logp_NT()
    return {"k1": -log_r, "k2": log_r.square() / 2, "k3": log_r.exp() - 1 - log_r}


def direct(name: str) -> Callable[[Drawn], Tensor]:
    return lambda drawn: k(drawn)[name]


def as_cost(name: str) -> Callable[[Drawn], Tensor]:
    return lambda drawn: k(drawn)[name].detach() * drawn.logp_NT()


def weighted(drawn: Drawn) -> Tensor:
    return (drawn.logp_NT() - drawn.behaviour_NT).detach().exp() * as_cost("k1")(drawn)


def own_mean(drawn: Drawn) -> Tensor:
    """Each answer's mean over its own tokens, times the usual length so that sizes compare."""
    usual = (drawn.behaviour_NT.sum(-1).exp() * LENGTH_N).sum()
    return as_cost("k1")(drawn) * (usual / LENGTH_N)[:, None]


def with_baseline(drawn: Drawn) -> Tensor:
    value_NT = full(divergences.reverse_kl)(drawn).detach()
    return (k(drawn)["k1"].detach() - value_NT) * drawn.logp_NT()


def with_future(drawn: Drawn) -> Tensor:
    cost_NT = torch.where(TREE.mask_NT, k(drawn)["k1"].detach(), 0.0)
    return oracle.discounted(cost_NT, 1.0) * drawn.logp_NT()


def full(divergence: divergences.Divergence) -> Callable[[Drawn], Tensor]:
    return lambda drawn: divergence(drawn.student_NTV.log_softmax(-1), drawn.teacher_NTV.log_softmax(-1))


def sampled_forward(drawn: Drawn) -> Tensor:
    return -(drawn.logq_NT() - drawn.logp_NT()).detach().expm1() * drawn.logp_NT()


ROWS = (
    Row("whole vocabulary", full(divergences.reverse_kl), "sum_v p_v log(p_v / q_v)"),
    Row("k1 as cost: policy gradient", as_cost("k1"), "sg(k1) log p"),
    Row("the same, exact baseline", with_baseline, "sg(k1 - KL(p ‖ q)) log p"),
    Row("the same, discount 1", with_future, "sg(sum of k1 from t on) log p"),
    Row("the same, mean over each answer's own length", own_mean, "sg(k1) log p / length of the answer"),
    Row("k2 differentiated", direct("k2"), "k2"),
    Row("k3 differentiated", direct("k3"), "k3"),
    Row("k1 differentiated", direct("k1"), "k1"),
    Row("k2 as cost", as_cost("k2"), "sg(k2) log p"),
    Row("k3 as cost", as_cost("k3"), "sg(k3) log p"),
    Row("forward KL, drawn tokens", sampled_forward, "-sg(r - 1) log p"),
    Row("forward KL, whole vocabulary", full(divergences.forward_kl), "sum_v q_v log(q_v / p_v)"),
    Row("k1 as cost, answers of an older student", as_cost("k1"), "sg(k1) log p", stale=True),
    Row("the same, weighted by p / mu", weighted, "sg(p / mu k1) log p", stale=True),
)


def tables(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, older student."""
    student, teacher = TREE.random_table(seed), TREE.random_table(seed + 1000)
    return student, teacher, student + TREE.random_table(seed + 2000, 0.5)


def fields(seed: int) -> dict[str, Tensor]:
    student, teacher, older = tables(seed)
    return {
        "reverse KL": oracle.local_field(TREE, student, teacher, divergences.reverse_kl),
        "forward KL": oracle.local_field(TREE, student, teacher, divergences.forward_kl),
        "KL of whole answers": oracle.sequence_field(TREE, student, teacher, divergences.reverse_kl),
        "reverse KL, where the older student goes": oracle.local_field(
            TREE, student, teacher, divergences.reverse_kl, states_of=older
        ),
    }


def measured(row: Row, seed: int) -> tuple[oracle.Moments, oracle.Bias, set[str]]:
    """Moments, the bias against the reverse KL's local field, and what the mean equals."""
    student, teacher, older = tables(seed)
    made = oracle.moments(TREE, student, teacher, row.loss, older if row.stale else None)
    known = fields(seed)
    equals = {name for name, field in known.items() if oracle.bias(made.mean_SV, field).relative < EXACT}
    if float(made.mean_SV.norm()) < EXACT:
        equals = {"nothing: it is zero"}
    return made, oracle.bias(made.mean_SV, known["reverse KL"]), equals


def table() -> str:
    rows = [
        "| estimator | loss of a token | its mean is the gradient of | cosine | error | variance |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in ROWS:
        found = [measured(row, seed) for seed in SEEDS]
        equals = set.intersection(*(names for _, _, names in found))
        zero = any("zero" in name for name in equals)
        cosines = "–" if zero else spread([b.cosine for _, b, _ in found], 3)
        errors = spread([b.relative for _, b, _ in found], 2)
        noise = f"{median(m.variance for m, _, _ in found):.2f}"
        what = ", ".join(sorted(equals)) or "none of them"
        rows.append(f"| {row.name} | {row.formula} | {what} | {cosines} | {errors} | {noise} |")
    return "\n".join(rows)


def spread(values: list[float], digits: int) -> str:
    """One number where all agree, else the smallest and the largest."""
    low, high = (f"{abs(x) if abs(x) < EXACT else x:.{digits}f}" for x in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"
