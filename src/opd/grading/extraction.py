r"""Finding the answer in what a model wrote. Pure functions of text, in time linear in its length; nothing is run."""

from __future__ import annotations

import re
import textwrap
from collections import deque
from fractions import Fraction

_LONGEST_NUMBER = 400  # characters and decimal exponent; beyond it a number is not a number but an attack

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"(?:{_DIGITS})(?:[eE][-+]?\d+)?"
# A sign belongs to a number unless something stands before it that it could be subtracted from: 5-3 ends in 3.
_SIGN = r"(?:(?<![\w)\]}.])[-+])?"
_NUMBERS = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"\\[dt]?frac\{{(?P<top>[-+]?(?:{_NUMBER}))\}}\{{(?P<bottom>[-+]?(?:{_NUMBER}))\}}"
    rf"|(?P<number>{_NUMBER})(?: ?/ ?(?P<divisor>{_NUMBER}))?)",
    re.ASCII,
)
_SPACING = (("\u2212", "-"), ("\uff0d", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("$", ""))
_ANNOUNCED = re.compile(r"\banswer(?: is:?|:)", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced; None without one or when it was never closed."""
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start : start + token.start()].strip()
    return None


def last_number(text: str) -> Fraction | None:
    r"""The number in the last \boxed{...}, else the last number of the text; exact; None without one.

    Reads 1,234.5, 1{,}234, -3, 2.5e-3, 3/4, \frac{3}{4} and the Unicode minus. A comma is a thousands separator, never
    a decimal one. A percent sign is left out: 50% is 50. Numbers over 400 characters and divisions by zero are passed
    over in favour of the one before, sixteen of them at most.
    """
    inside = boxed(text)
    for part in (inside, text) if inside is not None else (text,):
        for written, plain in _SPACING:
            part = part.replace(written, plain)
        for match in reversed(deque(_NUMBERS.finditer(part), maxlen=16)):
            if (value := _value(match)) is not None:
                return value
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"] or match["number"], match["bottom"] or match["divisor"] or "1"
    numerator, denominator = _fraction(top), _fraction(bottom)
    if numerator is None or not denominator:
        return None
    return numerator / denominator * (-1 if match["sign"] == "-" else 1)


def _fraction(text: str) -> Fraction | None:
    exponent = re.search(r"[eE]([-+]?\d+)$", text)
    if len(text) > _LONGEST_NUMBER or (exponent and abs(int(exponent[1])) > _LONGEST_NUMBER):
        return None
    return Fraction(text.replace(",", ""))


def final_answer(text: str) -> str:
    """Inside the last <answer>...</answer>; else what follows the last "answer is" or "Answer:"; else the whole text.

    What follows is the rest of that line, without a closing full stop; when the line is empty, the lines after it.
    White space around the answer is trimmed.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    announced = deque(_ANNOUNCED.finditer(text), maxlen=1)
    if announced:
        line, _, after = text[announced[0].end() :].partition("\n")
        return line.strip().removesuffix(".").strip() or after.strip() or text.strip()
    return text.strip()


def python_code(text: str) -> str:
    """The last ```python block, else the last block of no language, else the whole text. Blocks are dedented.

    A last block that was never closed counts: a cut answer is graded as it stands.
    """
    found: dict[str, list[str]] = {}
    block: list[str] | None = None
    for line in text.split("\n"):
        if not line.lstrip().startswith("```"):
            if block is not None:
                block.append(line)
        elif block is None:
            language = line.strip().strip("`").strip().lower()
            block = found["python" if language in ("py", "python3") else language] = []
        else:
            block = None
    code = found.get("python", found.get(""))
    return text if code is None else textwrap.dedent("\n".join(code))
