"""Student and scorer over the same answers, token by token: the numbers that the checks of stage 4 read.

Both distributions exist for a few tokens at a time only. Of a scorer that gives a few entries, what those entries tell
is there and the rest is NaN; of one that gives the drawn token, its log-probability alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.doctor.across import Across, mapped
from opd.doctor.thresholds import TOP_K
from opd.models.causal import CausalLM
from opd.models.packing import pack, plan
from opd.objectives.head import head_logits
from opd.teachers.local import LocalTeacher
from opd.teachers.member import Member
from opd.teachers.reading import writer
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Batch, Resolution, Rollout, ScorerRows, Want

_NUMBERS = 2**24  # of one model's [C, V] at a time


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What was seen at the tokens of all answers, one answer after the other. float64 [T], NaN where nothing is known.

    row_T, place_T          the answer that a token belongs to, and its position in it.
    drawn_p_T, drawn_q_T    log-probability of the drawn token under student and scorer.
    reverse_T, forward_T    KL(p || q), KL(q || p), in nats over the whole vocabulary; of few entries, over these and
                            one class for all others: at most the KL.
    entropy_p_T, entropy_q_T
    overlap_T               share of the two top k in common; shared_T: the student's mass there.
    outside_p_T             the student's mass outside the scorer's top k.
    outside_q_T             the scorer's mass outside the student's top k; of a whole distribution only.
    first_q_T               int64; the scorer's most likely token, -1 where it is not known.
    mapped_T                bool; False where a scorer with another tokenizer reads something else.

    Of a scorer with another tokenizer `drawn_q_T` is that of a span in equal shares, as is `drawn_p_T`; what is about
    distributions is known where spans begin, over the tokens that both have and one class for all others (`doctor.
    across`); `first_q_T` is in its own numbering.
    """

    resolution: Resolution
    k: int
    row_T: NDArray[np.int64]
    place_T: NDArray[np.int64]
    drawn_p_T: NDArray[np.float64]
    drawn_q_T: NDArray[np.float64]
    reverse_T: NDArray[np.float64]
    forward_T: NDArray[np.float64]
    entropy_p_T: NDArray[np.float64]
    entropy_q_T: NDArray[np.float64]
    overlap_T: NDArray[np.float64]
    shared_T: NDArray[np.float64]
    outside_p_T: NDArray[np.float64]
    outside_q_T: NDArray[np.float64]
    first_q_T: NDArray[np.int64]
    mapped_T: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row_T)

    @property
    def log_ratio_T(self) -> NDArray[np.float64]:
        """log q - log p of the drawn tokens."""
        return self.drawn_q_T - self.drawn_p_T

    def by_answer(self, values_T: NDArray[np.float64], answers: int) -> NDArray[np.float64]:
        """[N]: mean over the tokens of each answer that say something; NaN for one without any."""
        known_T = np.isfinite(values_T)
        count_N = np.bincount(self.row_T[known_T], minlength=answers)
        sum_N = np.bincount(self.row_T[known_T], weights=values_T[known_T], minlength=answers)
        return np.where(count_N > 0, sum_N / np.maximum(count_N, 1), np.nan)


_COLUMNS = ("drawn_p", "drawn_q", "reverse", "forward", "entropy_p", "entropy_q", "overlap", "shared")
_COLUMNS += ("outside_p", "outside_q")


def overlap_k(vocab_size: int) -> int:
    """k of the overlap: 16, or a tenth of a small vocabulary."""
    return min(TOP_K, max(1, vocab_size // 10))


def student_reader(
    model: CausalLM, fmt: PromptFormat, *, chunk_tokens: int, temperature: float, share_prompts: bool
) -> LocalTeacher:
    """The student as a reader of answers."""
    return writer(model, fmt, chunk_tokens=chunk_tokens, share_prompts=share_prompts, temperature=temperature)


@torch.no_grad()
def read(
    rollouts_N: Sequence[Rollout],
    student: LocalTeacher,
    teacher: Member,
    *,
    tokens_per_micro_batch: int,
    wanted: Resolution = "entries",
) -> Tokens:
    """Every token of `rollouts_N` under both, in the order of the answers given.

    teacher  a member of a panel, or the student itself. A scorer in this process gives its whole distribution, one that
             is elsewhere what it can.
    wanted   sampled: nothing but drawn tokens is asked of a scorer that is elsewhere.
    """
    k = overlap_k(student.vocab_size)
    if teacher.resolution == "sampled":
        wanted = "sampled"
    elif teacher.resolution == "entries":
        k = min(k, teacher.most_entries)
    full = [r for r in rollouts_N if len(r.response_ids)]
    want = Want(wanted, frozenset(r.id for r in full), top_k=k if wanted == "entries" else 0)
    seen: dict[str, dict[str, Tensor]] = {}
    if isinstance(teacher.agreement, Crossing):
        return _across(rollouts_N, full, student, teacher, want, k, tokens_per_micro_batch)
    ours, theirs = student.evidence(full), teacher.evidence(full)
    named = theirs.prepare({teacher.name: want})
    found: Resolution = "full"
    try:
        for group in plan(full, tokens_per_micro_batch):
            batch = pack(group, device=student.model.device)
            own = ours.read(batch, replace(want, resolution="full"))
            assert own is not None
            if named:
                batch = replace(batch, student_top_TK=_top(own, named, student.chunk_tokens))
            columns, found = _columns(batch, own, theirs.read(batch, want), k, student.chunk_tokens)
            start = 0
            for rollout in group:
                part = slice(start, start + len(rollout.response_ids))
                seen[rollout.id] = {name: values_T[part] for name, values_T in columns.items()}
                start = part.stop
    finally:
        theirs.release()
    return _joined(rollouts_N, seen, found, k)


def _across(
    rollouts_N: Sequence[Rollout],
    full: Sequence[Rollout],
    student: LocalTeacher,
    teacher: Member,
    want: Want,
    k: int,
    tokens_per_micro_batch: int,
) -> Tokens:
    """The same of a scorer with another tokenizer."""
    ours = student.evidence(full)
    across = Across(full, teacher, want, k=k, chunk=student.chunk_tokens, columns=_COLUMNS)
    seen: dict[str, dict[str, Tensor]] = {}
    found: Resolution = "sampled"
    try:
        for group in plan(full, tokens_per_micro_batch):
            batch = pack(group, device=student.model.device)
            own = ours.read(batch, replace(want, resolution="full"))
            assert own is not None
            columns, rows = across.columns(batch, own)
            if rows is not None:
                found = "full" if rows.hidden_TD is not None else "entries" if rows.entries_TK is not None else found
            for name, of in columns.items():
                seen[name] = {column: torch.from_numpy(values_T) for column, values_T in of.items()}
    finally:
        teacher.release()
    return replace(_joined(rollouts_N, seen, found, k), mapped_T=mapped(full, across.reads))


def _columns(
    batch: Batch, own: ScorerRows, rows: ScorerRows | None, k: int, chunk: int
) -> tuple[dict[str, Tensor], Resolution]:
    T = len(batch.token_T)
    columns = {name: torch.full((T,), torch.nan, dtype=torch.float64) for name in _COLUMNS}
    columns["first_q"] = torch.full((T,), -1)
    found: Resolution = "sampled"
    if rows is not None and rows.hidden_TD is not None:
        found = "full"
    elif rows is not None and rows.entries_TK is not None:
        found = "entries"
    assert own.head is not None
    chunk = max(1, min(chunk, _NUMBERS // own.head.vocab_size))
    place_T = torch.arange(T) if rows is None or rows.index_T is None else rows.index_T.cpu()
    for start in range(0, T, chunk):
        part = slice(start, min(start + chunk, T))
        logp_CV = _log_probabilities(own, torch.arange(part.start, part.stop))
        token_C = batch.token_T[part]
        _put(columns, part, drawn_p=logp_CV.gather(1, token_C[:, None])[:, 0])
        _put(columns, part, entropy_p=-(logp_CV.exp() * logp_CV).sum(-1))
        if rows is None:
            continue
        at_R = torch.nonzero((place_T >= part.start) & (place_T < part.stop))[:, 0]
        at_R = at_R[rows.valid_T.cpu()[at_R]]
        if not len(at_R):
            continue
        here_R = place_T[at_R]
        logp_RV = logp_CV[(here_R - start).to(logp_CV.device)]
        token_R = batch.token_T[here_R.to(batch.token_T.device)]
        if found == "full":
            facts = _whole(logp_RV, _log_probabilities(rows, at_R), token_R, k)
        elif found == "entries":
            facts = _entries(logp_RV, rows, at_R, k)
        else:
            assert rows.logprobs_T is not None
            facts = {"drawn_q": rows.logprobs_T[at_R.to(rows.logprobs_T.device)]}
        for name, values_R in facts.items():
            columns[name][here_R] = values_R.to("cpu", columns[name].dtype)
    return columns, found


def _whole(logp_RV: Tensor, logq_RV: Tensor, token_R: Tensor, k: int) -> dict[str, Tensor]:
    p_RV, q_RV = logp_RV.exp(), logq_RV.exp()
    gap_RV = logp_RV - logq_RV
    ours_Rk, theirs_Rk = logp_RV.topk(k).indices, logq_RV.topk(k).indices
    marked_RV = torch.zeros_like(p_RV, dtype=torch.bool).scatter_(1, theirs_Rk, True)
    shared_Rk = marked_RV.gather(1, ours_Rk)
    return {
        "drawn_q": logq_RV.gather(1, token_R[:, None])[:, 0],
        "reverse": (p_RV * gap_RV).sum(-1),
        "forward": -(q_RV * gap_RV).sum(-1),
        "entropy_q": -(q_RV * logq_RV).sum(-1),
        "overlap": shared_Rk.double().mean(-1),
        "shared": (p_RV.gather(1, ours_Rk) * shared_Rk).sum(-1),
        "outside_p": 1 - p_RV.gather(1, theirs_Rk).sum(-1),
        "outside_q": 1 - q_RV.gather(1, ours_Rk).sum(-1),
        "first_q": theirs_Rk[:, 0],
    }


def _entries(logp_RV: Tensor, rows: ScorerRows, at_R: Tensor, k: int) -> dict[str, Tensor]:
    """Of the scorer's most likely tokens: one class stands for all that were not named."""
    assert rows.entries_TK is not None and rows.entry_ids_TK is not None and rows.logprobs_T is not None
    at_R = at_R.to(rows.entries_TK.device)
    id_RK, logq_RK = rows.entry_ids_TK[at_R].to(logp_RV.device), rows.entries_TK[at_R].to(logp_RV.device)
    there_RK = (id_RK >= 0) & torch.isfinite(logq_RK)
    logq_RK = logq_RK.double().masked_fill(~there_RK, -torch.inf)
    order_RK = logq_RK.argsort(-1, descending=True)[:, :k]
    id_RK, logq_RK = id_RK.gather(1, order_RK), logq_RK.gather(1, order_RK)
    there_RK = there_RK.gather(1, order_RK)
    p_RK = logp_RV.gather(1, id_RK.clamp(min=0)).double().exp() * there_RK
    q_RK = logq_RK.exp()
    tail_p_R, tail_q_R = (1 - p_RK.sum(-1)).clamp(min=0), (1 - q_RK.sum(-1)).clamp(min=0)
    ours_RK = logp_RV.topk(id_RK.shape[1]).indices
    hit_RKK = (ours_RK[:, :, None] == id_RK[:, None, :]) & there_RK[:, None, :]
    shared_RK = hit_RKK.any(-1)
    return {
        "drawn_q": rows.logprobs_T[at_R.to(rows.logprobs_T.device)],
        "reverse": _kl(p_RK, q_RK) + _kl(tail_p_R[:, None], tail_q_R[:, None]),
        "forward": _kl(q_RK, p_RK) + _kl(tail_q_R[:, None], tail_p_R[:, None]),
        "overlap": shared_RK.double().mean(-1),
        "shared": (logp_RV.gather(1, ours_RK).exp() * shared_RK).sum(-1),
        "outside_p": tail_p_R,
        "first_q": id_RK[:, 0],
    }


def _kl(a_RK: Tensor, b_RK: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(a_RK > 0, a_RK * (a_RK.clamp(min=tiny).log() - b_RK.clamp(min=1e-12).log()), 0.0).sum(-1)


def _log_probabilities(rows: ScorerRows, at_R: Tensor) -> Tensor:
    """float64 [R, V]."""
    assert rows.hidden_TD is not None and rows.head is not None
    logits_RV = head_logits(rows.hidden_TD[at_R.to(rows.hidden_TD.device)], rows.head)
    return torch.log_softmax(logits_RV.double() / rows.temperature, -1)


def _top(own: ScorerRows, k: int, chunk: int) -> Tensor:
    """int64 [T, K]: the student's most likely tokens."""
    assert own.hidden_TD is not None and own.head is not None
    parts = [head_logits(part, own.head).topk(k).indices for part in own.hidden_TD.split(chunk)]
    return torch.cat(parts)


def _put(columns: dict[str, Tensor], part: slice, **facts: Tensor) -> None:
    for name, values_C in facts.items():
        columns[name][part] = values_C.to("cpu", columns[name].dtype)


def _joined(rollouts_N: Sequence[Rollout], seen: dict[str, dict[str, Tensor]], found: Resolution, k: int) -> Tokens:
    kept = [(n, seen[r.id]) for n, r in enumerate(rollouts_N) if r.id in seen]
    lengths = [len(rollouts_N[n].response_ids) for n, _ in kept]

    def column(name: str) -> NDArray[Any]:
        return torch.cat([facts[name] for _, facts in kept]).numpy() if kept else np.empty(0)

    return Tokens(
        resolution=found,
        k=k,
        row_T=np.repeat(np.array([n for n, _ in kept], dtype=np.int64), lengths),
        place_T=np.concatenate([np.arange(n) for n in lengths]) if kept else np.empty(0, np.int64),
        first_q_T=column("first_q").astype(np.int64),
        mapped_T=np.ones(sum(lengths), dtype=np.bool_),
        **{f"{name}_T": column(name) for name in _COLUMNS},
    )
