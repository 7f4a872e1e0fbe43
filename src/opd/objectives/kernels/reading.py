"""What one model says about the tokens of a block: a distribution over the vocabulary, or the drawn tokens alone."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from opd.objectives.kernels.subset import Subset
from opd.objectives.transfer import suspects


class Reading:
    """One model on the rows of a block that it has evidence for; the softmax is taken when it is first asked for.

    reverse_kl  KL(student || this) at some of the rows, left here by a term that has computed it.
    """

    def __init__(
        self, rows: Subset, token_R: Tensor, *, logits_RV: Tensor | None = None, drawn_R: Tensor | None = None
    ):
        """logits_RV: already divided by the temperature; or drawn_R: log-probabilities of the tokens `token_R`."""
        self.rows = rows
        self._token_R = token_R
        self._logits_RV = logits_RV
        self._given_R = drawn_R
        self.reverse_kl: tuple[Subset, Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether the distribution over the vocabulary is there."""
        return self._logits_RV is not None

    @cached_property
    def _softmax(self) -> tuple[Tensor, Tensor]:
        assert self._logits_RV is not None, "only drawn tokens are scored here"
        return log_softmax(self._logits_RV)

    @cached_property
    def logp_RV(self) -> Tensor:
        return self._softmax[0]

    @cached_property
    def p_RV(self) -> Tensor:
        return self._softmax[1]

    @cached_property
    def drawn_R(self) -> Tensor:
        """Log-probabilities of the drawn tokens."""
        if self._given_R is not None:
            return self._given_R
        return self.logp_RV.gather(1, self._token_R[:, None])[:, 0]

    @cached_property
    def entropy_R(self) -> Tensor:
        return entropy(self.p_RV, self.logp_RV)


def log_softmax(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """log p and p.

    torch's own adds float32 numbers up one after the other: at 150,000 entries its p sum to 1 within 1e-5 only, and
    fields that nearly cancel (JSD of distributions far apart) are lost in that. `sum` adds in a tree: within 1e-7. But
    its softmax goes over a row while the cache holds it, so it is taken and then scaled; 1 over the sum that it divided
    by is the p of the likeliest entry.
    """
    p_RV = torch.softmax(logits_RV, -1)
    scale_R1, sum_R1 = p_RV.amax(-1, keepdim=True), p_RV.sum(-1, keepdim=True)
    logp_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    return logp_RV.add_((scale_R1 / sum_R1).log_()), p_RV.div_(sum_R1)


def entropy(p_RV: Tensor, logp_RV: Tensor) -> Tensor:
    """[R] in nats, with 0 log 0 = 0."""
    product_RV = p_RV * logp_RV
    entropy_R = -product_RV.sum(-1)
    if suspects(entropy_R, lambda x: x.isnan().any()):
        entropy_R = -product_RV.masked_fill_(p_RV == 0, 0.0).sum(-1)
    return entropy_R
