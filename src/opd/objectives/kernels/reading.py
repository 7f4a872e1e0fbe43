"""What one model says about the tokens of a block: a distribution, some entries of one, or the drawn tokens alone."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from opd.objectives.kernels.subset import Subset
from opd.objectives.transfer import suspects

LEAST = 1e-30  # what is left of a probability, where rounding has left nothing


class Reading:
    """One model on the rows of a block that it has evidence for; the softmax is taken when it is first asked for.

    reverse_kl  KL(student || this) at some of the rows, left here by a term that has computed it.
    """

    def __init__(
        self,
        rows: Subset,
        token_R: Tensor,
        *,
        logits_RV: Tensor | None = None,
        drawn_R: Tensor | None = None,
        entries: Known | None = None,
    ):
        """logits_RV: already divided by the temperature; or drawn_R: log-probabilities of the tokens `token_R`, and
        those of some other entries."""
        self.rows = rows
        self._token_R = token_R
        self._logits_RV = logits_RV
        self._given_R = drawn_R
        self._entries = entries
        self.reverse_kl: tuple[Subset, Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether the distribution over the vocabulary is there."""
        return self._logits_RV is not None

    @property
    def foreign(self) -> bool:
        """Whether the model has another tokenizer (`foreign.py`)."""
        return False

    @cached_property
    def shared_RV(self) -> Tensor:
        """bool [R, V]: the student's tokens whose log-probabilities are there, each the model's own for that token."""
        return torch.ones((), dtype=torch.bool, device=self._token_R.device).expand(self.logp_RV.shape)

    @cached_property
    def outside_R(self) -> Tensor:
        """[R]: the probability of tokens that the student has not."""
        return self.logp_RV.new_zeros(len(self.rows))

    def top(self, k: int) -> Tensor:
        """int64 [R, k]: the model's most likely tokens in the student's numbering, -1 where the student has none."""
        ids_RS = self.logp_RV.topk(min(k, self.logp_RV.shape[1]), dim=1, sorted=False).indices
        return torch.nn.functional.pad(ids_RS, (0, k - ids_RS.shape[1]), value=-1)

    @property
    def logits_RV(self) -> Tensor:
        return self._spread_RV if self._logits_RV is None else self._logits_RV

    @cached_property
    def _spread_RV(self) -> Tensor:
        """As far as it is known: what is left of the probability is shared evenly by all other entries."""
        assert self._entries is not None and self._given_R is not None, "only drawn tokens are scored here"
        return self._entries.spread(self._token_R, self._given_R)

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


class Known(NamedTuple):
    """Log-probabilities at some entries of each row; ids are -1 where a row has fewer.

    The other entries are given equal shares of the rest. No support on few entries sees that: it compares known
    entries, and the sum of all others. Of a scorer's most likely tokens the least likely one is at least as likely as
    the mean of the rest, so they come first here, too.
    """

    ids_RK: Tensor
    logm_RK: Tensor
    vocab_size: int

    def spread(self, token_R: Tensor, drawn_R: Tensor) -> Tensor:
        """[R, V] log-probabilities, in the dtype of `drawn_R`, the log-probability of `token_R`. A row with one that
        is not finite is NaN."""
        there_RK = self.ids_RK >= 0
        new_R = ~(self.ids_RK == token_R[:, None]).any(-1)
        sum_R = torch.where(there_RK, self.logm_RK.double().exp(), 0.0).sum(-1)
        sum_R += torch.where(new_R, drawn_R.double().exp(), 0.0)
        others_R = self.vocab_size - there_RK.sum(-1) - new_R.long()
        left_R = (1.0 - sum_R).clamp_(min=LEAST).log() - others_R.clamp(min=1).double().log()
        spread_RW = left_R.to(drawn_R.dtype)[:, None].repeat(1, self.vocab_size + 1)  # the last for ids that are -1
        ids_RK = self.ids_RK.masked_fill(~there_RK, self.vocab_size)
        spread_RW.scatter_(1, token_R[:, None], drawn_R[:, None])
        spread_RW.scatter_(1, ids_RK, self.logm_RK.to(drawn_R.dtype))
        return spread_RW[:, :-1]


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
