"""What models say about answers that are already written, token by token: the graded record of any text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.journal.graded import FORMAT, SCHEMA_VERSION, GradedAnswer, GradedRecord, ReaderInfo, grouped
from opd.models.causal import CausalLM
from opd.models.packing import pack, plan
from opd.objectives.head import head_logits
from opd.teachers.local import LocalTeacher
from opd.teachers.member import Member
from opd.teachers.own_words import as_read, coverage, in_own_words, in_shares
from opd.text.agreement import compare
from opd.text.crossing import Crossing, CrossRead
from opd.text.formats import PromptFormat
from opd.text.pieces import piece_alone, pieces
from opd.text.tokenizer import Tokenizer
from opd.types import Batch, Rollout, ScorerRows, Want

# About the tokens of one reader: [T] `logprobs`, `entropy`, a teacher's `reverse_kl` when there is a student; [T, K]
# `ids` and `top`, the K most likely tokens and their log-probabilities.
Columns = Mapping[str, NDArray[Any]]
_NOTHING: Columns = {key: np.empty(0) for key in ("logprobs", "entropy", "reverse_kl", "ids", "top")}
_DIGITS = 4
_NUMBERS = 2**24  # of one reader's [C, V]: a view is for people, and need not take more memory than training


def writer(
    model: CausalLM, fmt: PromptFormat, *, chunk_tokens: int, share_prompts: bool, temperature: float = 1.0
) -> LocalTeacher:
    """The student as a reader of its own answers, over its live weights."""
    return LocalTeacher(
        model,
        fmt,
        compare(fmt, fmt),
        name="student",
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        share_prompts=share_prompts,
    )


def read_answers(
    rollouts_N: Sequence[Rollout],
    readers: Mapping[str, Member],
    *,
    student: str | None,
    tokenizer: Tokenizer,
    models: Mapping[str, str],
    top_k: int,
    tokens_per_micro_batch: int,
    chunk_tokens: int,
    device: torch.device,
    title: str,
    step: int | None = None,
    turns: Mapping[str, int] | None = None,
    scores: Mapping[str, float | None] | None = None,
) -> GradedRecord:
    """Every reader's view of every token of `rollouts_N`, answers in the order given. Nothing is trained or drawn.

    readers     name to reader; the student's is made by `writer`. All agreements are with the format that made the
                rollouts' ids; one with another tokenizer reads the answers in its own.
    student     the reader that is the writer, or None. All others are teachers.
    tokenizer   the one of the rollouts' ids; `top` and `texts` are in its numbering.
    models      how each reader's model is called.
    turns       rollout id to its turn in a chat, 0 where missing. `scores`: rollout id to its grade.

    A number that is not finite, or that a reader does not say, is None; a token without a log-probability has no `top`.
    Weights that a reader keeps in host memory come for the reading and go back after it. At most one teacher's and the
    student's logits of `chunk_tokens` tokens exist at the same time, in float32 or wider.
    """
    teachers = [name for name in readers if name != student]
    order = [*([] if student is None else [student]), *teachers]
    crossed: dict[str, _Crossed] = {}
    read: dict[tuple[str, str], Columns] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in order:
            stack.callback(readers[name].release)
        marks = {name: readers[name].fingerprint_now() for name in order}
        alike = {name: readers[name] for name in order if not isinstance(readers[name].agreement, Crossing)}
        asked = _Asked(student, top_k, tokens_per_micro_batch, chunk_tokens, device)
        read |= asked.all(rollouts_N, alike)
        for name in order:
            agreement, fmt = readers[name].agreement, readers[name].format
            if isinstance(agreement, Crossing):
                reads = {rollout.id: agreement.read(rollout) for rollout in rollouts_N}
                crossed[name] = _Crossed(fmt.tokenizer, reads)
                theirs = [as_read(rollout, reads[rollout.id], fmt) for rollout in rollouts_N]
                read |= asked.all(theirs, {name: in_own_words(readers[name])})
    answers = []
    for rollout in rollouts_N:
        columns = {name: read.get((rollout.id, name), _NOTHING) for name in order}
        turn, score = (turns or {}).get(rollout.id, 0), (scores or {}).get(rollout.id)
        answers.append(_answer(rollout, columns, crossed, student, tokenizer, turn, score))
    shown = {pair[0] for answer in answers for rows in answer["top"].values() for row in rows for pair in row}
    infos: dict[str, ReaderInfo] = {name: {"model": models[name], "fingerprint": marks[name]} for name in order}
    for name, facts in crossed.items():
        infos[name]["crossed"] = coverage(rollouts_N, facts.reads)
    record: GradedRecord = {
        "schema_version": SCHEMA_VERSION,
        "format": FORMAT,
        "title": title,
        "step": step,
        "student": student,
        "teachers": teachers,
        "readers": infos,
        "texts": {str(number): piece_alone(tokenizer, number) for number in sorted(shown)},
        "answers": answers,
    }
    if crossed:
        record["own_texts"] = {name: _own_texts(name, facts.tokenizer, answers) for name, facts in crossed.items()}
    return record


@dataclass(frozen=True)
class _Crossed:
    """What a reader with another tokenizer reads. reads: by rollout id."""

    tokenizer: Tokenizer
    reads: Mapping[str, CrossRead]


@dataclass(frozen=True)
class _Asked:
    """How readers are asked; see `read_answers`."""

    student: str | None
    top_k: int
    tokens_per_micro_batch: int
    chunk_tokens: int
    device: torch.device

    def all(self, rollouts_N: Sequence[Rollout], readers: Mapping[str, Member]) -> dict[tuple[str, str], Columns]:
        """(rollout id, reader) to what it says about the tokens; no entry for an answer without tokens."""
        evidence = {name: reader.evidence(rollouts_N) for name, reader in readers.items()}
        found = {}
        for group in plan([r for r in rollouts_N if len(r.response_ids)], self.tokens_per_micro_batch):
            batch = pack(group, device=self.device)
            scored = {n: evidence[n].read(batch, _want(reader, group, self.top_k)) for n, reader in readers.items()}
            for name, columns in _read(batch, scored, self.student, self.top_k, self.chunk_tokens).items():
                found |= {(rollout_id, name): rows for rollout_id, rows in _by_rollout(batch, columns)}
        return found


def _want(reader: Member, group: Sequence[Rollout], top_k: int) -> Want:
    """As much as the reader can say."""
    return Want(reader.resolution, frozenset(r.id for r in group), min(top_k, reader.most_entries))


def _read(
    batch: Batch, scored: Mapping[str, ScorerRows | None], student: str | None, top_k: int, chunk_tokens: int
) -> dict[str, Columns]:
    """What each reader says about the tokens of one micro-batch, a chunk of logits at a time."""
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in scored}
    heads = [rows.head for rows in scored.values() if rows is not None and rows.head is not None]
    vocab = max((head.vocab_size for head in heads), default=1)
    chunk_tokens = max(1, min(chunk_tokens, _NUMBERS // vocab))
    for start in range(0, len(batch.token_T), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        own_CV: Tensor | None = None
        for name, rows in scored.items():  # the student comes first
            assert rows is not None
            if rows.hidden_TD is None:
                parts[name].append(_said(rows, chunk, top_k, compared=own_CV is not None))
                continue
            log_CV = _log_probabilities(rows, chunk)
            found = _about(log_CV, batch.token_T[chunk], top_k)
            if name == student:
                own_CV = log_CV
            elif own_CV is not None:
                found["reverse_kl"] = _divergence(own_CV, log_CV)
            parts[name].append(found)
    return {
        name: {key: torch.cat([part[key] for part in found]).cpu().numpy() for key in found[0]}
        for name, found in parts.items()
    }


def _said(rows: ScorerRows, chunk: slice, top_k: int, *, compared: bool) -> dict[str, Tensor]:
    """The same of a scorer that does not say everything: no entropy, and no divergence."""
    assert rows.logprobs_T is not None
    logprobs_C = rows.logprobs_T[chunk].masked_fill(~rows.valid_T[chunk], torch.nan)
    nothing_C = torch.full_like(logprobs_C, torch.nan)
    found = {"logprobs": logprobs_C, "entropy": nothing_C, **({"reverse_kl": nothing_C} if compared else {})}
    top_CK = logprobs_C.new_full((len(logprobs_C), top_k), torch.nan)
    ids_CK = torch.full_like(top_CK, -1, dtype=torch.int64)
    if rows.entries_TK is not None and rows.entry_ids_TK is not None:
        entries_CK = rows.entries_TK[chunk].nan_to_num(nan=-torch.inf)
        best_CK = entries_CK.topk(min(top_k, entries_CK.shape[1]), dim=-1)
        k = best_CK.values.shape[1]
        top_CK[:, :k] = best_CK.values
        ids_CK[:, :k] = rows.entry_ids_TK[chunk].gather(1, best_CK.indices)
    return found | {"top": top_CK, "ids": ids_CK}


def _log_probabilities(rows: ScorerRows, chunk: slice) -> Tensor:
    """[C, V] under the scorer's temperature; rows that are not valid are NaN."""
    assert rows.hidden_TD is not None and rows.head is not None
    log_CV = head_logits(rows.hidden_TD[chunk], rows.head).div_(rows.temperature).log_softmax(-1)
    log_CV[~rows.valid_T[chunk]] = torch.nan
    return log_CV


def _about(log_CV: Tensor, token_C: Tensor, top_k: int) -> dict[str, Tensor]:
    top_CK, ids_CK = log_CV.topk(min(top_k, log_CV.shape[1]), dim=-1)
    return {
        "logprobs": log_CV.gather(1, token_C[:, None])[:, 0],
        "entropy": torch.special.entr(log_CV.exp()).sum(-1),
        "top": top_CK,
        "ids": ids_CK,
    }


def _divergence(own_CV: Tensor, log_CV: Tensor) -> Tensor:
    """[C] KL(student || teacher); rounding may not make it negative."""
    return (own_CV.exp() * (own_CV - log_CV)).sum(-1).clamp_min(0)


# ---- to plain JSON ------------------------------------------------------------------------------------------------


def _by_rollout(batch: Batch, columns: Columns) -> Iterator[tuple[str, Columns]]:
    row_T = batch.row_T.cpu().numpy()
    for n, rollout in enumerate(batch.rollouts):
        yield rollout.id, {key: values[row_T == n] for key, values in columns.items()}


def _answer(
    rollout: Rollout,
    columns: Mapping[str, Columns],
    crossed: Mapping[str, _Crossed],
    student: str | None,
    tokenizer: Tokenizer,
    turn: int,
    score: float | None,
) -> GradedAnswer:
    own = {name: columns[name] for name in crossed}
    columns = {
        name: _in_shares(of, crossed[name].reads[rollout.id]) if name in crossed else of for name, of in columns.items()
    }
    answer: GradedAnswer = {
        "id": rollout.id,
        "prompt_id": rollout.prompt.id,
        "domain": rollout.domain,
        "turn": turn,
        "prompt": tokenizer.show(rollout.prompt.ids),
        "finish_reason": rollout.finish_reason,
        "score": score,
        "ids": rollout.response_ids.tolist(),
        "pieces": pieces(tokenizer, rollout.response_ids),
        "mask": rollout.mask.astype(int).tolist(),
        "logprobs": {name: _rounded(of["logprobs"]) for name, of in columns.items()},
        "entropy": {name: _rounded(of["entropy"]) for name, of in columns.items()},
        "top": {name: _top(of) for name, of in columns.items()},
    }
    if student is not None:
        answer["reverse_kl"] = {n: _rounded(of["reverse_kl"]) for n, of in columns.items() if n != student}
    if crossed:
        answer["spans"] = {name: facts.reads[rollout.id].spans.span_T.tolist() for name, facts in crossed.items()}
        answer["own"] = {
            name: _own(of, crossed[name].reads[rollout.id], crossed[name].tokenizer) for name, of in own.items()
        }
        answer["own_top"] = {name: _own_top(of, crossed[name].reads[rollout.id]) for name, of in own.items()}
    return answer


def _in_shares(columns: Columns, read: CrossRead) -> Columns:
    """What a reader says about its own tokens [U], at the answer's [T]: see `journal.graded.GradedAnswer`."""
    T = len(read.spans.span_T)
    nothing_TK = np.empty((T, 0))
    values: dict[str, NDArray[Any]] = {key: in_shares(columns[key], read.spans) for key in ("logprobs", "entropy")}
    return {**values, "reverse_kl": np.full(T, np.nan), "ids": nothing_TK, "top": nothing_TK}


def _own(columns: Columns, read: CrossRead, tokenizer: Tokenizer) -> list[list[tuple[int, str, float | None]]]:
    shown, said = pieces(tokenizer, read.ids), _rounded(columns["logprobs"])
    return [[(int(read.ids[u]), shown[u], said[u]) for u in tokens] for tokens in grouped(read.spans.span_U.tolist())]


def _own_top(columns: Columns, read: CrossRead) -> list[list[tuple[int, float]]]:
    rows = _top(columns)
    return [rows[tokens[0]] for tokens in grouped(read.spans.span_U.tolist())]


def _own_texts(name: str, tokenizer: Tokenizer, answers: Sequence[GradedAnswer]) -> dict[str, str]:
    shown = {pair[0] for answer in answers for row in answer.get("own_top", {})[name] for pair in row}
    return {str(number): piece_alone(tokenizer, number) for number in sorted(shown)}


def _rounded(values_T: NDArray[Any]) -> list[float | None]:
    return [_round(value) if math.isfinite(value) else None for value in values_T.tolist()]


def _top(columns: Columns) -> list[list[tuple[int, float]]]:
    return [
        [(number, _round(value)) for number, value in zip(ids, values, strict=True) if math.isfinite(value)]
        for ids, values in zip(columns["ids"].tolist(), columns["top"].tolist(), strict=True)
    ]


def _round(value: float) -> float:
    return round(value, _DIGITS) + 0.0  # no -0.0
