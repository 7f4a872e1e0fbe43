"""Which part of a text each token is."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise

from tokenizers.pre_tokenizers import ByteLevel

from opd.text.tokenizer import Tokenizer

BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece names a byte that is no word's part
_LOST = "\ufffd"


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text; together they are exactly `tokenizer.show(ids)`.

    Special tokens are visible. A character that is cut over several tokens stands at the one that completes it, the
    ones before it add ""; bytes that never become a character are U+FFFD, at the token that shows it or at the last.
    The time grows with the number of tokens, not with its square. Where a decoder rewrites across tokens, which none
    of the common ones does, the borders are approximate; the sum stays exact.
    """
    numbers = [int(number) for number in ids]
    whole = tokenizer.show(numbers)
    names = [tokenizer.tokens.get(number, "") for number in numbers]
    parts = _of_bytes(names) if is_byte_level(tokenizer) else _of_units(tokenizer, numbers, names)
    return parts if "".join(parts) == whole else _cut(whole, [len(part) for part in parts])


def piece_alone(tokenizer: Tokenizer, number: int) -> str:
    """How one token is shown without a text around it: with its leading space, and bytes of a cut character as hex."""
    name = tokenizer.tokens.get(number)
    if name is None:
        return f"<id {number}>"
    if is_byte_level(tokenizer):
        raw = bytes_of_name(name)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)
    if BYTE_NAME.fullmatch(name):
        return name
    try:
        before = tokenizer.encode("a")
    except Exception:  # tokenizers raises a bare one for what a vocabulary without an unknown token cannot say
        before = []
    return pieces(tokenizer, [*before, number])[-1] or tokenizer.show([number])


# ---- byte-level: a token is bytes ---------------------------------------------------------------------------------


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are made of bytes in disguise, and decoding is nothing but joining them."""
    decoder = tokenizer.hf.backend_tokenizer.decoder
    state = None if decoder is None else json.loads(decoder.__getstate__())
    while state is not None and state["type"] == "Sequence":
        inner = [part for part in state["decoders"] if part["type"] != "Fuse"]
        state = inner[0] if len(inner) == 1 else None
    return state is not None and state["type"] == "ByteLevel"


def _of_bytes(names: Sequence[str]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes_of_name(name), final=n + 1 == len(names)) for n, name in enumerate(names)]


def bytes_of_name(name: str) -> bytes:
    """A name with a character that stands for no byte is an added token's own text."""
    disguised = _disguises()
    try:
        return bytes(disguised[character] for character in name)
    except KeyError:
        return name.encode(errors="replace")


@cache
def _disguises() -> dict[str, int]:
    """Character to byte, in the byte-level alphabet of GPT-2: printable Latin-1 is itself, the others follow 0x100."""
    alphabet = set(ByteLevel.alphabet())
    itself = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


# ---- all others: a token is text, a run of byte tokens is read together --------------------------------------------


def _of_units(tokenizer: Tokenizer, numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    """Each unit is decoded behind the one before it: decoders treat the first token of a text in a way of its own."""
    starts = [
        n
        for n in range(len(names))
        if n == 0 or not (BYTE_NAME.fullmatch(names[n]) and BYTE_NAME.fullmatch(names[n - 1]))
    ]
    found: list[str] = []
    previous = 0
    for start, end in pairwise([*starts, len(names)]):
        before = tokenizer.show(numbers[previous:start])
        text = tokenizer.show(numbers[previous:end])[len(before) :]
        found += [text] if end == start + 1 else _of_run(names[start:end], text)
        previous = start
    return found


def _of_run(names: Sequence[str], text: str) -> list[str]:
    """A run of byte tokens is characters when all of it is valid UTF-8, else it is U+FFFD for every byte."""
    raw = [bytes([int(name[3:5], 16)]) for name in names]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        parts = [decoder.decode(byte, final=n + 1 == len(raw)) for n, byte in enumerate(raw)]
    except UnicodeDecodeError:
        parts = [_LOST] * len(raw)
    if "".join(parts) == f" {text}":  # some decoders take one space off the start of a text
        parts[0] = ""
    return parts


def _cut(text: str, lengths: Sequence[int]) -> list[str]:
    """`text` in pieces of these lengths; the last one takes what is left."""
    if not lengths:
        return []
    ends = [*accumulate(lengths[:-1]), len(text)]
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
