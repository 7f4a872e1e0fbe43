"""Student and a scorer with another tokenizer over the same answers: the same numbers as `doctor.evidence`, where the
two can be joined.

The scorer is read in its own words. Where a span begins both have read the same text and say what comes next, each over
its own vocabulary: what the student's has of it is compared, and the rest of either is one more class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.models.packing import pack
from opd.objectives.head import head_logits
from opd.teachers.member import Member, MemberEvidence
from opd.teachers.own_words import as_read, in_own_words, in_shares
from opd.text.crossing import Crossing, CrossRead
from opd.types import Batch, Rollout, ScorerRows, Spans, Want

Columns = dict[str, NDArray[np.float64]]


class Across:
    """What a scorer with another tokenizer says about some answers.

    k       of the overlap. columns: the names of what is known at a token, see `evidence.Tokens`.
    """

    def __init__(
        self,
        rollouts_N: Sequence[Rollout],
        teacher: Member,
        want: Want,
        *,
        k: int,
        chunk: int,
        columns: Sequence[str],
    ) -> None:
        crossing = teacher.agreement
        assert isinstance(crossing, Crossing)
        self.reads: Mapping[str, CrossRead] = {r.id: crossing.read(r) for r in rollouts_N}
        self._theirs = {r.id: as_read(r, self.reads[r.id], teacher.format) for r in rollouts_N}
        self._evidence: MemberEvidence = in_own_words(teacher).evidence(list(self._theirs.values()))
        self._want, self._k, self._chunk, self._columns = want, k, chunk, columns
        self._teacher_of_V = torch.from_numpy(crossing.teacher_of_V)
        self._student_of_W = torch.full((teacher.format.tokenizer.vocab_size,), -1)
        shared_V = self._teacher_of_V >= 0
        self._student_of_W[self._teacher_of_V[shared_V]] = torch.nonzero(shared_V)[:, 0]

    def columns(self, batch: Batch, own: ScorerRows) -> tuple[dict[str, Columns], ScorerRows | None]:
        """Rollout id to the columns of its tokens, of one micro-batch; and the rows that they were made of.

        own   the student's rows: its states at every token of the batch.
        """
        group = [self._theirs[r.id] for r in batch.rollouts]
        read = [r for r in group if len(r.response_ids)]
        other = pack(read, device=batch.token_T.device)
        rows = self._evidence.read(other, self._want) if read else None
        logp_T, entropy_T = self._drawn(own, batch.token_T)
        logq_U = None if rows is None else self._said(rows, other.token_T)
        begins_T, begins_U = self._begins(batch)
        facts = {} if rows is None else self._compared(own, rows, begins_T, begins_U)
        found: dict[str, Columns] = {}
        t = u = 0
        for rollout in batch.rollouts:
            T, U = len(rollout.response_ids), len(self.reads[rollout.id].ids)
            spans = self.reads[rollout.id].spans
            of: Columns = {name: np.full(T, np.nan) for name in self._columns} | {"first_q": np.full(T, -1.0)}
            of["drawn_p"], of["entropy_p"] = _averaged(logp_T[t : t + T], spans), entropy_T[t : t + T]
            if logq_U is not None:
                of["drawn_q"] = in_shares(logq_U[u : u + U], spans)
            here = (begins_T >= t) & (begins_T < t + T)
            for name, values_R in facts.items():
                of[name][begins_T[here] - t] = values_R[here]
            found[rollout.id] = of
            t, u = t + T, u + U
        return found, rows

    def _begins(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64 [R], twice: the first token of every span, among the batch's tokens and among the scorer's."""
        ours, theirs, t, u = [], [], 0, 0
        for rollout in batch.rollouts:
            read = self.reads[rollout.id]
            ours.append(t + _first(read.spans.span_T))
            theirs.append(u + _first(read.spans.span_U))
            t, u = t + len(rollout.response_ids), u + len(read.ids)
        return np.concatenate(ours), np.concatenate(theirs)

    def _drawn(self, rows: ScorerRows, token_T: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[T], twice: log-probabilities of tokens in the rows' own numbering, and entropies."""
        logprobs, entropies = [], []
        for at_C in torch.arange(len(token_T)).split(self._size(rows)):
            log_CV = _log_probabilities(rows, at_C)
            logprobs.append(log_CV.gather(1, token_T[at_C].to(log_CV.device)[:, None])[:, 0])
            entropies.append(torch.special.entr(log_CV.exp()).sum(-1))
        return torch.cat(logprobs).cpu().numpy(), torch.cat(entropies).cpu().numpy()

    def _said(self, rows: ScorerRows, token_U: Tensor) -> NDArray[np.float64]:
        if rows.hidden_TD is not None:
            values_U = self._drawn(rows, token_U)[0]
        else:
            assert rows.logprobs_T is not None
            values_U = rows.logprobs_T.double().cpu().numpy()
        return np.where(rows.valid_T.cpu().numpy(), values_U, np.nan)

    def _compared(
        self, own: ScorerRows, rows: ScorerRows, t_R: NDArray[np.int64], u_R: NDArray[np.int64]
    ) -> Mapping[str, NDArray[np.float64]]:
        """What is known where spans begin; nothing of a scorer that gives drawn tokens alone."""
        if rows.hidden_TD is None and rows.entries_TK is None:
            return {}
        parts: list[dict[str, Tensor]] = []
        for t_C, u_C in zip(
            torch.from_numpy(t_R).split(self._size(own)), torch.from_numpy(u_R).split(self._size(own)), strict=True
        ):
            logp_CV = _log_probabilities(own, t_C)
            facts = self._whole(logp_CV, rows, u_C) if rows.hidden_TD is not None else self._entries(logp_CV, rows, u_C)
            valid_C = rows.valid_T.cpu()[u_C].to(logp_CV.device)
            parts.append({name: values.double().where(valid_C, torch.nan).cpu() for name, values in facts.items()})
            if "first_q" in facts:
                parts[-1]["first_q"] = facts["first_q"].double().where(valid_C, -1.0).cpu()
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in (parts[0] if parts else {})}

    def _whole(self, logp_CV: Tensor, rows: ScorerRows, u_C: Tensor) -> dict[str, Tensor]:
        logq_CW = _log_probabilities(rows, u_C)
        of_V = self._teacher_of_V.to(logq_CW.device)
        logq_CV = logq_CW.index_select(1, of_V.clamp(min=0)).masked_fill(of_V < 0, -torch.inf)
        shared_V = of_V >= 0
        p_CV, q_CV = logp_CV[:, shared_V].exp(), logq_CV[:, shared_V].exp()
        ours_Ck = logp_CV.topk(self._k).indices
        first_Ck = logq_CW.topk(min(self._k, logq_CW.shape[1])).indices
        return {
            "entropy_q": torch.special.entr(logq_CW.exp()).sum(-1),
            "outside_q": 1 - logq_CV.gather(1, ours_Ck).exp().sum(-1),
            **_divergences(p_CV, q_CV),
            **self._overlap(logp_CV, ours_Ck, first_Ck),
        }

    def _entries(self, logp_CV: Tensor, rows: ScorerRows, u_C: Tensor) -> dict[str, Tensor]:
        assert rows.entries_TK is not None and rows.entry_ids_TK is not None
        ids_CK = rows.entry_ids_TK[u_C.to(rows.entry_ids_TK.device)].to(logp_CV.device)
        logq_CK = rows.entries_TK[u_C.to(rows.entries_TK.device)].to(logp_CV.device).double()
        logq_CK = logq_CK.masked_fill((ids_CK < 0) | ~logq_CK.isfinite(), -torch.inf)
        order_CK = logq_CK.argsort(-1, descending=True)[:, : self._k]
        ids_CK, logq_CK = ids_CK.gather(1, order_CK), logq_CK.gather(1, order_CK)
        ids_CK = ids_CK.masked_fill(logq_CK.isinf(), -1)
        mine_CK = self._in_students(ids_CK)
        p_CK = logp_CV.gather(1, mine_CK.clamp(min=0)).exp() * (mine_CK >= 0)
        q_CK = logq_CK.exp() * (mine_CK >= 0)
        ours_Ck = logp_CV.topk(self._k).indices
        return {**_divergences(p_CK, q_CK), **self._overlap(logp_CV, ours_Ck, ids_CK)}

    def _overlap(self, logp_CV: Tensor, ours_Ck: Tensor, theirs_Ck: Tensor) -> dict[str, Tensor]:
        """theirs_Ck: the scorer's most likely tokens in its own numbering, the first one first."""
        mine_Ck = self._in_students(theirs_Ck)
        hit_Ck = ((ours_Ck[:, :, None] == mine_Ck[:, None, :]) & (mine_Ck >= 0)[:, None, :]).any(-1)
        inside_Ck = logp_CV.gather(1, mine_Ck.clamp(min=0)).exp() * (mine_Ck >= 0)
        return {
            "overlap": hit_Ck.double().mean(-1),
            "shared": (logp_CV.gather(1, ours_Ck).exp() * hit_Ck).sum(-1),
            "outside_p": 1 - inside_Ck.sum(-1),
            "first_q": theirs_Ck[:, 0],
        }

    def _in_students(self, ids: Tensor) -> Tensor:
        """Ids of the scorer's in the student's numbering, -1 for what it lacks."""
        return self._student_of_W.to(ids.device)[ids.clamp(min=0)].where(ids >= 0, -1)

    def _size(self, rows: ScorerRows) -> int:
        assert rows.head is not None
        return max(1, min(self._chunk, 2**24 // rows.head.vocab_size))


def mapped(rollouts_N: Sequence[Rollout], reads: Mapping[str, CrossRead]) -> NDArray[np.bool_]:
    """bool [T]: the tokens in spans, of all answers one after the other."""
    return np.concatenate([reads[r.id].spans.span_T >= 0 for r in rollouts_N]) if rollouts_N else np.empty(0, np.bool_)


def _first(span: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first place of every span, in order."""
    there = np.flatnonzero(span >= 0)
    return there[np.unique(span[there], return_index=True)[1]]


def _averaged(values_T: NDArray[np.float64], spans: Spans) -> NDArray[np.float64]:
    """Of each span's tokens their mean, as `in_shares` shares what the scorer says; other tokens keep theirs."""
    alone = replace(spans, span_U=spans.span_T)
    return np.where(spans.span_T >= 0, in_shares(values_T, alone), values_T)


def _divergences(p_CS: Tensor, q_CS: Tensor) -> dict[str, Tensor]:
    """KL in both directions over shared tokens, and one class for all others of each."""
    tails = [(1 - x.sum(-1, keepdim=True)).clamp(min=0) for x in (p_CS, q_CS)]
    p, q = (torch.cat([x, tail], -1) for x, tail in zip((p_CS, q_CS), tails, strict=True))
    return {"reverse": _kl(p, q), "forward": _kl(q, p)}


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-12).log()), 0.0).sum(-1)


def _log_probabilities(rows: ScorerRows, at: Tensor) -> Tensor:
    """float64 [C, V], in the numbering of the rows' head."""
    assert rows.hidden_TD is not None and rows.head is not None
    logits = head_logits(rows.hidden_TD[at.to(rows.hidden_TD.device)], rows.head)
    return torch.log_softmax(logits.double() / rows.temperature, -1)
