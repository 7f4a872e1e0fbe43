"""An answer in one model's tokens, as text that another model can read, with every byte's place kept.

Text is counted in symbols: its bytes, and one symbol for each token that is no text. So a control token of one model
and its counterpart of the other are one symbol, and can be compared like bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from opd.text.token_bytes import TokenBytes

# Of what is no text. Only control tokens have equals: CONTROL + the reader's id.
CONTROL = 0x100
DROPPED = -1  # a token that the reader is not shown
UNKNOWN = -2  # text that the reader has no name for

TEXT = -2  # in `event_T`: no event
_EVENT_BYTE = 0xFE  # never part of UTF-8, like 0xFF
_EVENT_MARK, _INVALID_MARK = "\uddfe", 0xDC00  # lone surrogates: no decoded text holds one


@dataclass(frozen=True)
class Written:
    """text      what the reader is given: `sealed` in the sense of its guard.
    symbol_B     int32 [B]: the symbols of all tokens in a row. Bytes that are no character's are shown as U+FFFD, and
                 so are never the reader's.
    start_C, end_C  int64 [C]: the symbols that each character of `text` is.
    start_T, end_T  int64 [T]: the symbols of each token.
    """

    text: str
    symbol_B: NDArray[np.int32]
    start_C: NDArray[np.int64]
    end_C: NDArray[np.int64]
    start_T: NDArray[np.int64]
    end_T: NDArray[np.int64]

    def letters(self) -> str:
        """The characters of `text` that are no part of a control token's name."""
        return "".join(c for c, is_text in zip(self.text, self._is_letter_C(), strict=True) if is_text)

    def without(self, characters: frozenset[str]) -> Written:
        """The same for a reader that cannot be given these characters; their symbols stay, as nobody's."""
        gone_C = np.array([c in characters for c in self.text], dtype=np.bool_) & self._is_letter_C()
        text = "".join(c for c, gone in zip(self.text, gone_C.tolist(), strict=True) if not gone)
        return replace(self, text=text, start_C=self.start_C[~gone_C], end_C=self.end_C[~gone_C])

    def ended(self) -> Written:
        """The same with one token more, that is the end: one symbol, and nothing to read."""
        size = len(self.symbol_B)
        return replace(
            self,
            symbol_B=np.append(self.symbol_B, np.int32(DROPPED)),
            start_T=np.append(self.start_T, size),
            end_T=np.append(self.end_T, size + 1),
        )

    def _is_letter_C(self) -> NDArray[np.bool_]:
        return self.symbol_B[self.start_C] < CONTROL


def written(
    table: TokenBytes,
    ids_T: NDArray[np.int64],
    event_T: NDArray[np.int64],
    secret: Callable[[int], str],
    *,
    drop_space: bool,
) -> Written:
    """The answer `ids_T` for a reader.

    event_T     int64 [T]: TEXT for a token that is text; for others the reader's control token, or DROPPED.
    secret      the reader's name for one of its control tokens.
    drop_space  the writer puts a space in front of an answer that is not in the text.
    """
    raw, length_T = table.read(ids_T, event_T != TEXT)
    if drop_space and len(raw) and raw[0] == 0x20:
        first = int(np.flatnonzero(length_T)[0])
        if event_T[first] == TEXT:
            raw, length_T = raw[1:], length_T.copy()
            length_T[first] -= 1
    end_T = np.cumsum(length_T)
    start_T = end_T - length_T
    events = np.flatnonzero(event_T != TEXT)
    raw = _marked(raw, start_T[events])
    text = raw.tobytes().decode(errors="opd.text.marks")
    code_C = _codes(text)
    if (_is_invalid(code_C)).any():
        raw = _marked(table.spoiled(ids_T, length_T, raw), start_T[events])
        text = raw.tobytes().decode(errors="opd.text.marks")
        code_C = _codes(text)

    invalid_C = _is_invalid(code_C)
    length_C = 1 + (code_C >= 0x80) + (code_C >= 0x800) + (code_C >= 0x10000)
    length_C = np.where(invalid_C, code_C - _INVALID_MARK, length_C)
    length_C = np.where(code_C == ord(_EVENT_MARK), 1, length_C).astype(np.int64)
    end_C = np.cumsum(length_C)
    start_C = end_C - length_C
    symbol_B = raw.astype(np.int32)
    symbol_B[start_T[events]] = np.where(event_T[events] >= 0, CONTROL + event_T[events], DROPPED)

    if invalid_C.any():
        text = text.translate({_INVALID_MARK + n: "\ufffd" for n in range(1, 4)})
    if len(events):
        names = ["" if number < 0 else secret(number) for number in event_T[events].tolist()]
        times_C = np.ones(len(code_C), dtype=np.int64)
        times_C[code_C == ord(_EVENT_MARK)] = [len(name) for name in names]
        start_C, end_C = np.repeat(start_C, times_C), np.repeat(end_C, times_C)
        parts = text.split(_EVENT_MARK)
        text = "".join(part for pair in zip(parts, [*names, ""], strict=True) for part in pair)
    return Written(text, symbol_B, start_C, end_C, start_T, end_T)


def _marked(raw: NDArray[np.uint8], events: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Bytes in which 0xFE stands for events and nothing else."""
    strange = raw == _EVENT_BYTE
    if not len(events) and not strange.any():
        return raw
    raw = np.where(strange, np.uint8(0xFF), raw)
    raw[events] = _EVENT_BYTE
    return raw


def _marks(error: UnicodeError) -> tuple[str, int]:
    """Decodes what is no character to one mark that tells an event, or the number of bytes that are lost."""
    assert isinstance(error, UnicodeDecodeError)
    if error.object[error.start] == _EVENT_BYTE:
        return _EVENT_MARK, error.end
    return chr(_INVALID_MARK + error.end - error.start), error.end


codecs.register_error("opd.text.marks", _marks)


def _codes(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _is_invalid(code_C: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (code_C > _INVALID_MARK) & (code_C <= _INVALID_MARK + 3)
