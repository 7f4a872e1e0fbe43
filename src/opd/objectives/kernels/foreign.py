"""What a scorer with another tokenizer says, told in the student's vocabulary as far as that goes.

Its softmax is over its own vocabulary. On tokens that both have, its log-probabilities stand at the student's ids; what
it gives to others is kept as one number: the mass outside.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from opd.objectives.kernels.reading import Known, Reading
from opd.objectives.kernels.subset import Subset
from opd.types import ScorerRows


class SharedVocabulary:
    """Which of a scorer's U tokens is which of the student's V. U is not known where it says a few entries alone.

    order_V  int64: the scorer's token; any of them where it has none.
    """

    def __init__(self, scorer: ScorerRows) -> None:
        assert scorer.shared_V is not None, f"the scorer {scorer.name} has the student's tokenizer"
        self.shared_V = scorer.shared_V
        head = scorer.head
        self._order_V, self._size_U = (None, 0) if head is None else (head.order_V, head.vocab_size)

    @cached_property
    def order_V(self) -> Tensor:
        assert self._order_V is not None, "its head's order_V names the scorer's tokens"
        return torch.where(self.shared_V, self._order_V, 0)

    @cached_property
    def student_of_U(self) -> Tensor:
        """int64 [U]: the student's token, -1 where it has none."""
        device = self.shared_V.device
        found = torch.full((self._size_U + 1,), -1, dtype=torch.int64, device=device)
        to_V = torch.where(self.shared_V, self.order_V, self._size_U)  # the last is for those that are not shared
        found[to_V] = torch.arange(len(to_V), device=device)
        return found[:-1]

    @cached_property
    def rest(self) -> tuple[Tensor, Tensor]:
        """int64: the student's tokens that the scorer has not, and the scorer's that the student has not."""
        return (~self.shared_V).nonzero()[:, 0], (self.student_of_U < 0).nonzero()[:, 0]

    @cached_property
    def matched_share(self) -> Tensor:
        """float64: shared tokens over the scorer's vocabulary."""
        return self.shared_V.sum().double() / self._size_U


class ForeignReading(Reading):
    """A scorer with another tokenizer that gives its whole vocabulary.

    own         its distribution over its own vocabulary; `own_token_R` is its token at each row, `token_R`
                the student's.
    vocabulary  which of its tokens are the student's.
    before_R    log-probability of its tokens of the span before this one; None: there is none.
    """

    def __init__(
        self,
        rows: Subset,
        token_R: Tensor,
        logits_RU: Tensor,
        own_token_R: Tensor,
        vocabulary: SharedVocabulary,
        before_R: Tensor | None = None,
    ) -> None:
        super().__init__(rows, token_R, logits_RV=logits_RU)
        self.own = Reading(rows, own_token_R, logits_RV=logits_RU)
        self.token_R, self.own_token_R = token_R, own_token_R
        self.vocabulary = vocabulary
        self.before_R = before_R

    @property
    def foreign(self) -> bool:
        return True

    @property
    def logits_RV(self) -> Tensor:
        return self._logits_told_RV

    @cached_property
    def _logits_told_RV(self) -> Tensor:
        return self._told(self.own.logits_RV)

    @property
    def top_R(self) -> Tensor:
        return self.own.top_R

    @property
    def log_top_R(self) -> Tensor:
        return self.own.log_top_R

    @cached_property
    def logp_RV(self) -> Tensor:
        return self._told(self.own.logp_RV)

    @cached_property
    def p_RV(self) -> Tensor:
        return self.logp_RV.exp()

    @cached_property
    def drawn_R(self) -> Tensor:
        """Log-probabilities of the scorer's tokens; of all tokens of the span where some came before this one."""
        drawn_R = self.own.drawn_R
        return drawn_R if self.before_R is None else drawn_R + self.before_R.to(drawn_R.dtype)

    @cached_property
    def entropy_R(self) -> Tensor:
        """Over its own vocabulary."""
        return self.own.entropy_R

    @cached_property
    def same_R(self) -> Tensor:
        """bool: its token is the student's at this row. Of spans that are the least common runs of both, that holds
        for those of one token on either side alone: a longer one would end a token earlier."""
        vocabulary = self.vocabulary
        return (vocabulary.order_V[self.token_R] == self.own_token_R) & vocabulary.shared_V[self.token_R]

    @cached_property
    def shared_RV(self) -> Tensor:
        return self.vocabulary.shared_V.expand(len(self.rows), -1)

    @cached_property
    def outside_R(self) -> Tensor:
        return self.own.p_RV @ (self.vocabulary.student_of_U < 0).to(self.own.p_RV.dtype)

    def top(self, k: int) -> Tensor:
        logp_RU = self.own.logp_RV
        ids_RS = logp_RU.topk(min(k, logp_RU.shape[1]), dim=1, sorted=False).indices
        return _padded(self.vocabulary.student_of_U[ids_RS], k)

    def _told(self, log_RU: Tensor) -> Tensor:
        """[R, V]: at the student's ids, and -inf where there is nothing."""
        return log_RU.index_select(1, self.vocabulary.order_V).masked_fill_(~self.vocabulary.shared_V, -torch.inf)


class ForeignEntries(Reading):
    """One that gives a few entries: tokens that it was not asked about are as good as not shared.

    Entries with id -1 and a log-probability are tokens of its own that the student has not; they count among its most
    likely ones.
    """

    def __init__(self, rows: Subset, token_R: Tensor, drawn_R: Tensor, entries: Known) -> None:
        super().__init__(rows, token_R, drawn_R=drawn_R, entries=entries)
        self._known = entries

    @property
    def foreign(self) -> bool:
        return True

    @property
    def logits_RV(self) -> Tensor:
        return self.logp_RV

    @property
    def top_R(self) -> Tensor:
        return torch.zeros_like(self.drawn_R)

    @property
    def log_top_R(self) -> Tensor:
        return torch.zeros_like(self.drawn_R)

    @cached_property
    def logp_RV(self) -> Tensor:
        return self._at_ids(self._known.logm_RK.to(self.drawn_R.dtype), self.drawn_R, -torch.inf)

    @cached_property
    def p_RV(self) -> Tensor:
        return self.logp_RV.exp()

    @cached_property
    def shared_RV(self) -> Tensor:
        there_R = torch.ones_like(self._token_R, dtype=torch.bool)
        return self._at_ids(torch.ones_like(self._known.ids_RK, dtype=torch.bool), there_R, False)

    @cached_property
    def outside_R(self) -> Tensor:
        return (1.0 - self.logp_RV.double().exp().sum(-1)).clamp_(min=0.0).to(self.drawn_R.dtype)

    def top(self, k: int) -> Tensor:
        logm_RK = self._known.logm_RK
        said_RK = (self._known.ids_RK >= 0) | (logm_RK <= 0.0)  # what pads a row is no log-probability
        found = torch.where(said_RK, logm_RK, -torch.inf).topk(min(k, logm_RK.shape[1]), dim=1)
        ids_RS = self._known.ids_RK.gather(1, found.indices).masked_fill_(found.values == -torch.inf, -1)
        return _padded(ids_RS, k)

    def _at_ids(self, values_RK: Tensor, drawn_R: Tensor, otherwise: float | bool) -> Tensor:
        """[R, V]: values at the entries and at the drawn token."""
        ids_RK, V = self._known.ids_RK, self._known.vocab_size
        at_RW = torch.full((len(ids_RK), V + 1), otherwise, dtype=values_RK.dtype, device=ids_RK.device)
        at_RW.scatter_(1, self._token_R[:, None], drawn_R[:, None])
        at_RW.scatter_(1, ids_RK.masked_fill(ids_RK < 0, V), values_RK)  # the last column is for ids that are -1
        return at_RW[:, :-1]


def _padded(ids_RS: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(ids_RS, (0, k - ids_RS.shape[1]), value=-1)
