"""How far things that are not exact are from what they stand for, each as a number on the models of this page."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from measures import estimators, top_k
from opd.objectives import oracle
from opd.objectives.oracle import Drawn, divergences

TREE, SEEDS = estimators.TREE, estimators.SEEDS


def bullets(distances: Mapping[tuple[float, float], tuple[float, float]]) -> str:
    local = [biased_local(seed) for seed in SEEDS]
    rows = (
        ("**The local field is not the sequence-level gradient.**",
         f"Against the gradient of KL(p ‖ q) of whole answers it has a cosine of {said(local, 'cosine')} and a "
         f"relative error of {said(local, 'relative')} over ten random pairs. Per preset: [distance.md](distance.md)."),
        ("**A mean over each answer's own length is biased on drawn tokens:**",
         f"its length depends on the tokens. Relative error {of(estimators.own_mean)} (`reduction: sequence_mean`; "
         "`token_mean` divides by a count over the step, with a bias of order "
         "1 / answers, and `constant` by a constant)."),
        ("**A ratio per token does not bring stale prefixes back.**",
         f"Weighted by p / mu the mean is exact in the states of the *older* student; against the student's own states "
         f"the error is {of(estimators.weighted, stale=True)}, and {of(estimators.as_cost('k1'), stale=True)} without "
         "weights. Truncated and clipped weights (TIS, IcePop, PPO) are biased where they bind."),
        ("**Discounts 0 and 1 are different objectives** for lambda other than 1:",
         f"at lambda = 1.5 their fixed points lie {distances[1.5, 0.0][1]:.4f} nats apart here. A "
         "discount in between reaches neither."),
        ("**The tail bucket does not see inside the tail.**",
         f"It ends with the right masses and {left('bucket'):.3f} nats left on the model above; "
         "`sampled_correction` is unbiased for the whole vocabulary."),
        ("**`renormalise` and the naive sum change the optimum:**",
         f"{left('renormalised'):.3f} and {left('naive'):.3f} nats from the teacher, where full support has 0. "
         "The first is offered because LSM has it, with a warning; the second is not."),
        ("**The exact baseline leaves the mean alone, and may raise the variance.**",
         f"On the pairs above by a median of {noise():.0%}: minus KL is not the best baseline where the student "
         "is sure of one token."),
    )  # fmt: skip
    return "\n".join(f"- {head} {text}" for head, text in rows)


def biased_local(seed: int) -> oracle.Bias:
    """The local field of the reverse KL against the sequence-level gradient."""
    student, teacher, _ = estimators.tables(seed)
    return oracle.bias(
        oracle.local_field(TREE, student, teacher, divergences.reverse_kl),
        oracle.sequence_field(TREE, student, teacher, divergences.reverse_kl),
    )


def of(loss: Callable[[Drawn], Tensor], *, stale: bool = False) -> str:
    row = estimators.Row("", loss, "", stale)
    return said([estimators.measured(row, seed)[1] for seed in SEEDS], "relative")


def said(found: list[oracle.Bias], what: str) -> str:
    values = [getattr(one, what) for one in found]
    return f"{min(values):.2f} to {max(values):.2f}"


def left(name: str) -> float:
    return top_k.pair.full_kl(top_k.rest(name))


def noise() -> float:
    """The median over pairs of variance with the baseline over variance without, minus 1."""
    rows = {row.name: row for row in estimators.ROWS}
    plain, baseline = rows["k1 as cost: policy gradient"], rows["the same, exact baseline"]
    ratios = [
        estimators.measured(baseline, seed)[0].variance / estimators.measured(plain, seed)[0].variance for seed in SEEDS
    ]
    return estimators.median(ratios) - 1
