"""Teachers with another tokenizer in the record of a run: how well their tokens fit to the student's, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.journal.graded import Coverage
from opd.reports.figures import percent
from opd.reports.run_data import Curve, RunData

LITTLE = 0.8  # share of the tokens below which a report says that the others are not trained (ours)
_COVERAGE = re.compile(r"scorer/(.+)/coverage\Z")


def said(name: str, found: Coverage) -> str:
    """A sentence or two: what of the answers it reads as they are, and in which pieces."""
    whole = (
        f"{name} has another tokenizer: {percent(found['coverage'])} of the tokens fit to tokens of its own, "
        f"{percent(found['same'])} are the same token to both"
    )
    if found["span_tokens"] is None or found["span_own_tokens"] is None:
        return f"{whole}."
    return (
        f"{whole}. From one border that both have to the next there are {found['span_tokens']:.2f} tokens in the mean, "
        f"and {found['span_own_tokens']:.2f} of its own."
    )


@dataclass(frozen=True)
class Joined:
    """One such teacher in a run. alignment: how the terms that read it join its tokens; covered, same: shares of the
    tokens by step."""

    name: str
    alignment: str
    covered: Curve
    same: Curve

    @property
    def trained(self) -> float | None:
        """Share of the tokens that its terms can train, mean over the steps."""
        shares = [y for _, y in (self.same if self.alignment == "strict" else self.covered) if y is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def warning(self) -> str | None:
        """Why it taught less than it seems; None where it taught nearly everything."""
        if (share := self.trained) is None or share >= LITTLE:
            return None
        why = f"{self.name} has another tokenizer, which reads other text there, or none"
        advice = "nothing kept the student from writing more of them. Look at them in the token view"
        if self.alignment == "strict":
            why = f"{self.name} has another tokenizer, and alignment strict trains tokens that are the same to both"
            advice = "with alignment span, gold or alm more can be"
        return f"{percent(1 - share)} of the tokens were not trained: {why}; {advice}."


def joined(run: RunData) -> list[Joined]:
    """The teachers of a run that have another tokenizer, in the order of its metrics."""
    found = []
    for key in run.metric_names:
        if match := _COVERAGE.match(key):
            name = match[1]
            found.append(Joined(name, _alignment(run, name), run.curve(key), run.curve(f"scorer/{name}/same")))
    return found


def _alignment(run: RunData, name: str) -> str:
    """That of the first term that names the scorer: all that read it have one."""
    for term in run.option("objective.terms") or []:
        if isinstance(term, Mapping) and name in _texts(term.get("target")):
            kind = term.get("alignment", "strict")
            return str(kind.get("kind", "strict") if isinstance(kind, Mapping) else kind)
    return "strict"


def _texts(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*map(_texts, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return set().union(*map(_texts, value))
    return {value} if isinstance(value, str) else set()
