"""The bytes of every token: what it adds to a text behind other text. Vectorised, for texts of millions of tokens."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opd.text.pieces import BYTE_NAME, bytes_of_name, is_byte_level, pieces
from opd.text.probes import PROBES
from opd.text.tokenizer import Tokenizer

NEVER_VALID = 0xFF  # a byte that is no part of any UTF-8 text
_LOST = "\ufffd".encode()


class TokenBytes:
    """What the tokens of one tokenizer stand for, as bytes.

    exact    every token is the same bytes wherever it stands, and a table of them says what the decoder says. Where
             that does not hold on probes (a decoder that rewrites across tokens), texts are cut with `pieces`: slower.
    unknown_ids  tokens that stand for text the tokenizer has no name for, and so for no text at all.

    Bytes are those inside a text: `▁a` is " a", although a decoder takes the space off at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unknown_ids = _unknown(tokenizer)
        self._anchor = _anchor(tokenizer)
        self._is_byte_V = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._table = self._bytes_of_all()
        self._length_V = np.array([len(raw) for raw in self._table], dtype=np.int64)
        self._start_V = np.cumsum(self._length_V) - self._length_V
        self._flat = np.frombuffer(b"".join(self._table), dtype=np.uint8)
        self.exact = True
        self.exact = all(self._holds(ids) for ids in self._trials())

    def of(self, number: int) -> bytes:
        """The bytes of one token; none for an id of no token."""
        return self._table[number] if 0 <= number < len(self._table) else b""

    def read(
        self, ids: NDArray[np.int64], single: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """uint8 [bytes], int64 [T]: the bytes of all tokens in a row, and how many of them are each token's.

        A token where `single` holds is no text: it counts as one byte of any value.
        """
        if self.exact:
            inside = (ids >= 0) & (ids < len(self._table))
            known = np.where(inside, ids, 0)
            length_T = np.where(inside, self._length_V[known], 0)
            start_T = self._start_V[known]
            flat = self._flat
        else:
            parts = [part.encode().replace(_LOST, b"\xff") for part in self._pieces(ids)]
            length_T = np.array([len(part) for part in parts], dtype=np.int64)
            start_T = np.cumsum(length_T) - length_T
            flat = np.frombuffer(b"".join(parts), dtype=np.uint8)
        if single is not None:
            length_T = np.where(single, 1, length_T)
            start_T = np.where(single, 0, start_T)
            flat = flat if len(flat) else np.zeros(1, dtype=np.uint8)
        end_T = np.cumsum(length_T)
        total = int(end_T[-1]) if len(end_T) else 0
        return flat[np.repeat(start_T - (end_T - length_T), length_T) + np.arange(total)], length_T

    def spoiled(self, ids: NDArray[np.int64], length_T: NDArray[np.int64], raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`raw` as the decoder shows it: a run of byte tokens is characters when all of it is, and else none of it."""
        if not self.exact or not self._is_byte_V.any():
            return raw
        is_byte_T = self._is_byte_V[np.clip(ids, 0, len(self._is_byte_V) - 1)] & (length_T == 1)
        edges = np.flatnonzero(np.diff(is_byte_T, prepend=False, append=False))
        start_T = np.cumsum(length_T) - length_T
        raw = raw.copy()
        for first, last in edges.reshape(-1, 2).tolist():
            start, end = start_T[first], start_T[last - 1] + 1
            try:
                raw[start:end].tobytes().decode()
            except UnicodeDecodeError:
                raw[start:end] = NEVER_VALID
        return raw

    @cached_property
    def ids_of_bytes(self) -> dict[bytes, int]:
        """The token of each string of bytes that one is; of several the one that an encoder would take: no byte token
        where there is a piece, no added token where there is an ordinary one, then the first."""
        added = self.tokenizer.added_ids
        found: dict[bytes, int] = {}
        for number in sorted(self.tokenizer.tokens, key=lambda n: (n in added, bool(self._is_byte_V[n]), n)):
            if number not in self.unknown_ids and self._table[number]:
                found.setdefault(self._table[number], number)
        return found

    # ---- how the table is made and checked ------------------------------------------------------------------------

    def _bytes_of_all(self) -> list[bytes]:
        tokenizer, table = self.tokenizer, [b""] * self.tokenizer.vocab_size
        if is_byte_level(tokenizer):
            for number, name in tokenizer.tokens.items():
                table[number] = bytes_of_name(name)
            return table
        numbers = list(tokenizer.tokens)
        before = len(tokenizer.show(self._anchor))
        shown = tokenizer.hf.backend_tokenizer.decode_batch(
            [[*self._anchor, number] for number in numbers], skip_special_tokens=False
        )
        for number, text in zip(numbers, shown, strict=True):
            table[number] = text[before:].encode(errors="replace")
        named = {n: int(name[3:5], 16) for n, name in tokenizer.tokens.items() if BYTE_NAME.fullmatch(name)}
        if any(table[n] == bytes([byte]) for n, byte in named.items() if byte < 0x80):  # else they are just names
            for number, byte in named.items():
                table[number] = bytes([byte])
                self._is_byte_V[number] = True
        return table

    def _trials(self) -> list[list[int]]:
        """Token sequences on which the table has to agree with the decoder: probe texts, and what no encoder gives."""
        found = [ids for probe in PROBES if (ids := _encoded(self.tokenizer, probe))]
        ordinary = sorted(self.tokenizer.tokens.keys() - self.tokenizer.special_ids)
        if ordinary:
            found += np.random.default_rng(0).choice(ordinary, size=(16, 32)).tolist()
        return found

    def _holds(self, ids: list[int]) -> bool:
        numbers = np.array(ids, dtype=np.int64)
        raw, length_T = self.read(numbers)
        text = raw.tobytes().decode(errors="replace")
        if "\ufffd" in text:
            text = self.spoiled(numbers, length_T, raw).tobytes().decode(errors="replace")
        return text == self._behind(ids)

    def _behind(self, ids: list[int]) -> str:
        return self.tokenizer.show([*self._anchor, *ids])[len(self.tokenizer.show(self._anchor)) :]

    def _pieces(self, ids: NDArray[np.int64]) -> list[str]:
        return pieces(self.tokenizer, [*self._anchor, *ids.tolist()])[len(self._anchor) :]


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except Exception:  # tokenizers raises a bare one for what a vocabulary without an unknown token cannot say
        return []


def _anchor(tokenizer: Tokenizer) -> list[int]:
    """One token that is text: decoders treat the first token of a text in a way of its own."""
    for text in ("a", "0", *PROBES):
        if ids := _encoded(tokenizer, text):
            return ids[-1:]
    return sorted(tokenizer.tokens)[:1]


def _unknown(tokenizer: Tokenizer) -> frozenset[int]:
    model = json.loads(tokenizer.hf.backend_tokenizer.to_str())["model"]
    named = tokenizer.hf.get_vocab().get(model.get("unk_token"))
    found = {tokenizer.hf.unk_token_id, named, model.get("unk_id")} - {None, tokenizer.bos_id, tokenizer.eos_id}
    return frozenset(found)
