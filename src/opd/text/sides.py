"""One model of a pair with different tokenizers: how it writes answers for the other, and how it reads the other's."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.text.formats import Lead, PromptFormat
from opd.text.reading import Places, exact_places, places
from opd.text.token_bytes import TokenBytes
from opd.text.written import CONTROL, DROPPED, TEXT, UNKNOWN, Written, written
from opd.types import Row

_LEADS = 4096  # prompts whose rendering is kept


@dataclass(frozen=True)
class AnswerLead:
    """A prompt as one model reads it, and whether its tokenizer puts a space in front of an answer that has none."""

    prompt: Lead
    puts_space: bool


class Side:
    """One model's text and tokens.

    table     the bytes of its tokens.
    event_V   int64 [its vocabulary], filled by whoever pairs two sides: TEXT, or what a token is to the other one that
              is no text (see `written`). Tokens of no known text are never shown.
    alone     in front of a text without a prompt.
    """

    def __init__(self, fmt: PromptFormat) -> None:
        self.fmt = fmt
        self.table = TokenBytes(fmt.tokenizer)
        size = fmt.tokenizer.vocab_size
        known_V = np.zeros(size, dtype=np.bool_)
        known_V[list(fmt.tokenizer.tokens)] = True
        known_V[list(self.table.unknown_ids)] = False
        self.event_V = np.where(known_V, TEXT, DROPPED).astype(np.int64)
        control = np.array(sorted(fmt.guard.control_ids), dtype=np.int64)
        self._single_V = ~known_V  # one symbol that is no text, where this side reads
        self._single_V[control] = True
        self._symbol_V = np.full(size, UNKNOWN, dtype=np.int32)
        self._symbol_V[control] = CONTROL + control
        self.alone = self._with_space(Lead("", ()))
        self._leads: OrderedDict[str, tuple[Row, AnswerLead]] = OrderedDict()

    def lead(self, row: Row) -> AnswerLead:
        """Of the prompt of a row; the last ones are kept. DataError when the row does not fit the format."""
        kept = self._leads.get(row.id)
        if kept is not None and (kept[0] is row or kept[0] == row):
            return kept[1]
        lead = self._with_space(self.fmt.lead(row))
        self._leads[row.id] = row, lead
        if len(self._leads) > _LEADS:
            self._leads.popitem(last=False)
        return lead

    def written(self, ids_T: NDArray[np.int64], lead: AnswerLead, reader: Side) -> Written:
        """An answer in this side's tokens, for the other one."""
        inside = (ids_T >= 0) & (ids_T < len(self.event_V))
        event_T = np.where(inside, self.event_V[np.where(inside, ids_T, 0)], DROPPED)
        return written(self.table, ids_T, event_T, reader.fmt.guard.secret, drop_space=lead.puts_space)

    def read(self, lead: AnswerLead, text: Written) -> tuple[NDArray[np.int64], Places]:
        """int64 [U]: the other side's text in this side's tokens, and which part of it each of them is."""
        try:
            found = self.fmt.behind(lead.prompt, text.text)
        except Exception:  # tokenizers raises a bare one for what a vocabulary without an unknown token cannot say
            text = text.without(self._unsayable(text))
            found = self.fmt.behind(lead.prompt, text.text)
        symbol_R, length_U = self._symbols(found.ids)
        exact = exact_places(text, symbol_R, length_U)
        return found.ids, exact if exact is not None else places(text, symbol_R, length_U, found.offsets)

    def encoded(self, text: str) -> NDArray[np.int64]:
        """int64 [T]: a text by itself; characters that the tokenizer cannot say are left out."""
        tokenizer = self.fmt.tokenizer
        try:
            ids = tokenizer.encode(text)
        except Exception:  # as above
            ids = tokenizer.encode("".join(c for c in text if self._says(c)))
        return np.array(ids, dtype=np.int64)

    def unknown(self, ids_U: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [U]: tokens that stand for text without a name."""
        return np.isin(ids_U, list(self.table.unknown_ids))

    def _symbols(self, ids_U: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """int32 [R], int64 [U]: the symbols of tokens that this side read, and how many are each token's."""
        single_U = self._single_V[ids_U]
        raw, length_U = self.table.read(ids_U, single_U)
        symbol_R = raw.astype(np.int32)
        symbol_R[(np.cumsum(length_U) - length_U)[single_U]] = self._symbol_V[ids_U[single_U]]
        return symbol_R, length_U

    def _with_space(self, prompt: Lead) -> AnswerLead:
        for probe in ("a", "0"):
            try:
                ids = self.fmt.behind(prompt, probe).ids
            except Exception:  # as above
                continue
            raw = self.table.read(ids)[0].tobytes()
            if raw.strip() == probe.encode():
                return AnswerLead(prompt, raw[:1] == b" ")
        return AnswerLead(prompt, False)

    def _unsayable(self, text: Written) -> frozenset[str]:
        return frozenset(c for c in set(text.letters()) if not self._says(c))

    def _says(self, character: str) -> bool:
        try:
            self.fmt.tokenizer.encode(character)
        except Exception:  # as above
            return False
        return True
