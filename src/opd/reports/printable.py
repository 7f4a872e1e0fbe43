"""Foreign text made harmless. Prompts, answers, names and errors pass through here before a person sees them."""

from __future__ import annotations

import re
import unicodedata

# Control, format (bidi overrides, invisible tags), lone surrogates, line and paragraph separators.
_HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji are written with them
_ASCII = re.compile(r"[\x20-\x7e]*\Z")


def printable(text: object, *, lines: bool = False, encoding: str = "utf-8") -> str:
    """`text` with every character that could move the cursor, recolour or reorder what is shown written as an escape.

    Line breaks and tabs are escaped too, so that the result is one line, unless `lines` keeps them. So is what a
    stream's `encoding` cannot hold. The result is still to be shown as plain text: rich's markup or a document's
    own syntax are for the caller to switch off or escape.
    """
    text = str(text)
    if _ASCII.match(text):
        return text
    shown = "".join(_escape(c) if _harmful(c) and not (lines and c in "\n\t") else c for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _harmful(character: str) -> bool:
    return unicodedata.category(character) in _HARMFUL and character not in _JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
