"""How much of the same text two tokenizers agree on, measured on probe texts before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opd.errors import ModelError
from opd.text.probes import PROBES
from opd.text.sides import Side
from opd.text.written import Written

_LEAST = 1 / 3  # of the text that a teacher has names for
_MOST = 0.9


@dataclass(frozen=True)
class Fit:
    """Shares of the bytes that the student can write of `PROBES`; together they are 1.

    mapped   the teacher reads the same bytes.
    unknown  the teacher has no name for them.
    changed  the teacher's tokenizer makes other text of them, or leaves them out. `examples`: such text, and what the
             teacher reads in its place.
    """

    mapped: float
    unknown: float
    changed: float
    examples: tuple[tuple[str, str], ...] = ()

    def check(self, student: str, teacher: str) -> None:
        """ModelError where the teacher would read another text than the student's."""
        if self.mapped == 0 or self.mapped < _LEAST * (self.mapped + self.changed):
            raise ModelError(
                f"student {student} and teacher {teacher} have different tokenizers, and the teacher's does not keep "
                f"texts: of probe texts it leaves {self.mapped:.0%} as they are, changes {self.changed:.0%}"
                f"{self._example()} and has no tokens for {self.unknown:.0%}. What it says would be about other texts "
                "than the student's; choose a teacher with a tokenizer that keeps case, spaces and accents"
            )

    def notes(self, teacher: str) -> tuple[str, ...]:
        found = []
        if self.changed > 1 - _MOST:
            found.append(
                f"the tokenizer of {teacher} changes {self.changed:.0%} of probe texts{self._example()}: nothing is "
                "learnt there"
            )
        if self.unknown > 1 - _MOST:
            found.append(f"the tokenizer of {teacher} has no tokens for {self.unknown:.0%} of probe texts")
        return tuple(found)

    def _example(self) -> str:
        return ", " + ", ".join(f"{a!r} to {b!r}" for a, b in self.examples) if self.examples else ""


def measured(student: Side, teacher: Side, *, examples: int = 3) -> Fit:
    """The fit of a teacher that reads the student's texts."""
    total = changed = unknown = 0
    found: dict[str, str] = {}
    for probe in PROBES:
        text = student.written(student.encoded(probe), student.alone, teacher)
        ids_U, places = teacher.read(teacher.alone, text)
        nameless_U = teacher.unknown(ids_U)
        is_text_B = text.symbol_B >= 0
        wrong_B = places.lost_B.copy()
        nameless_B = places.lost_B & ~np.isin(text.symbol_B, list(b" \t\r\n"))
        for n in np.flatnonzero(places.bad_U).tolist():
            part = slice(places.start_U[n], places.end_U[n])
            wrong_B[part] = True
            nameless_B[part] |= nameless_U[n]
            if len(found) < examples and not nameless_U[n] and part.start < part.stop:
                unit = ids_U[places.bad_U & (places.start_U == part.start)]
                found.setdefault(_shown(text, part), teacher.fmt.tokenizer.show(unit).strip())
        total += int(is_text_B.sum())
        changed += int((is_text_B & wrong_B & ~nameless_B).sum())
        unknown += int((is_text_B & wrong_B & nameless_B).sum())
    if not total:
        return Fit(0.0, 0.0, 0.0)
    return Fit(1 - (changed + unknown) / total, unknown / total, changed / total, tuple(found.items()))


def _shown(text: Written, part: slice) -> str:
    return bytes(s for s in text.symbol_B[part].tolist() if 0 <= s < 0x100).decode(errors="replace")
