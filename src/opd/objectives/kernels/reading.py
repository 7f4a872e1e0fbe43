"""What one model says about the tokens of a block: a distribution over the vocabulary, or the drawn tokens alone."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

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

    @property
    def logits_RV(self) -> Tensor:
        assert self._logits_RV is not None, "only drawn tokens are scored here"
        return self._logits_RV

    @cached_property
    def _softmax(self) -> Softmax:
        return softmax(self.logits_RV)

    @property
    def top_R(self) -> Tensor:
        """The largest logit of each row."""
        return self._softmax.top_R1[:, 0]

    @property
    def log_top_R(self) -> Tensor:
        """The log-probability of the entry that has it: log p = logits - top + log_top."""
        return self._softmax.log_top_R1[:, 0]

    @cached_property
    def logp_RV(self) -> Tensor:
        return (self.logits_RV - self._softmax.top_R1).add_(self._softmax.log_top_R1)

    @cached_property
    def p_RV(self) -> Tensor:
        return self._softmax.unscaled_RV.div_(self._softmax.sum_R1)

    @cached_property
    def drawn_R(self) -> Tensor:
        """Log-probabilities of the drawn tokens."""
        if self._given_R is not None:
            return self._given_R
        drawn_R1 = self.logits_RV.gather(1, self._token_R[:, None])
        return (drawn_R1 - self._softmax.top_R1).add_(self._softmax.log_top_R1)[:, 0]

    @cached_property
    def entropy_R(self) -> Tensor:
        """[R] in nats, with 0 log 0 = 0."""
        product_RV = (self.logits_RV - self._softmax.top_R1).mul_(self.p_RV)
        entropy_R = -product_RV.sum(-1)
        if suspects(entropy_R, lambda x: x.isnan().any()):
            entropy_R = -product_RV.masked_fill_(self.p_RV == 0, 0.0).sum(-1)
        return entropy_R - self.log_top_R


class Softmax(NamedTuple):
    """What is known of softmax(logits): it is `unscaled` / `sum`, where `sum` is almost 1."""

    unscaled_RV: Tensor
    sum_R1: Tensor
    top_R1: Tensor
    log_top_R1: Tensor


def softmax(logits_RV: Tensor) -> Softmax:
    """torch's own adds float32 numbers up one after the other: at 150,000 entries its p sum to 1 within 1e-5 only, and
    fields that nearly cancel (JSD of distributions far apart) are lost in that. `sum` adds in a tree: within 1e-7. But
    its softmax goes over a row while the cache holds it, so it is taken and then scaled; 1 over the sum that it divided
    by is the p of the likeliest entry.
    """
    p_RV = torch.softmax(logits_RV, -1)
    sum_R1 = p_RV.sum(-1, keepdim=True)
    log_top_R1 = (p_RV.amax(-1, keepdim=True) / sum_R1).log_()
    return Softmax(p_RV, sum_R1, logits_RV.amax(-1, keepdim=True), log_top_R1)


def log_softmax(logits_RV: Tensor) -> Tensor:
    """log p, as exact."""
    made = softmax(logits_RV)
    return torch.sub(logits_RV, made.top_R1, out=made.unscaled_RV).add_(made.log_top_R1)
