"""Two measurements of the same problems: on how many one is better, and whether that could be chance.

The problems that came out alike say nothing about a difference. On the others a coin would make as many better as
worse, so the split is tested against a coin: the exact sign test, which for one answer to a problem is McNemar's test
in its exact form (McNemar 1947; Dixon and Mood 1946). It sees differences that two overlapping intervals hide, since
the luck of which problems were asked is in both measurements and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.reports.figures import counted

Row = Mapping[str, Any]
Problem = tuple[str, str]

CONFIDENCE = 0.95  # where a run's config does not say
ROUNDING = 1e-9  # three tenths are not 0.3; a difference of scores that is none


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One measurement against an earlier one, or against another run's.

    better, worse, same   problems, by the mean of their answers.
    change                of the mean score, later minus earlier.
    p                     two-sided, from 0 to 1: how often a coin splits the changed problems at least as unevenly.
    """

    better: int
    worse: int
    same: int
    change: float
    p: float

    def is_clear(self, confidence: float = CONFIDENCE) -> bool:
        """Whether there is a difference: the split is not chance, and the mean says which way."""
        return self.p < 1 - confidence and (self.better > self.worse) == (self.change > 0)

    def words(self, confidence: float = CONFIDENCE) -> str:
        """`better on 41 problems, worse on 9: not chance, p < 0.00001`."""
        if not self.better and not self.worse:
            return f"the same on all {counted(self.same, 'problem')}"
        said = f"better on {counted(self.better, 'problem')}, worse on {self.worse}"
        if self.p >= 1 - confidence:
            return f"{said}: could be chance, {p_value(self.p)}"
        if not self.is_clear(confidence):
            return f"{said}, though the mean score says otherwise: no clear difference, {p_value(self.p)}"
        return f"{said}: not chance, {p_value(self.p)}"

    def times(self, comparisons: int) -> Paired:
        """The same as one of so many comparisons: p multiplied by their number (Bonferroni), at most 1."""
        p = min(1.0, self.p * comparisons)
        return Paired(better=self.better, worse=self.worse, same=self.same, change=self.change, p=p)


def paired(earlier: Row | None, later: Row | None) -> Paired | None:
    """Compares two lines of `evals.jsonl` problem by problem.

    None unless both asked the same problems (`problems`), with as many graded answers to each: the mean of four answers
    falls between 0 and 1 more often than that of one, so a coin would not be fair.
    """
    one, other = problems(earlier), problems(later)
    if not one or not other or one.keys() != other.keys():
        return None
    pairs = [(one[key], other[key]) for key in one]
    if any(len(a) != len(b) for a, b in pairs):
        return None
    changes = [(math.fsum(b) - math.fsum(a)) / len(a) for a, b in pairs if a]
    if not changes:
        return None
    better, worse = sum(change > ROUNDING for change in changes), sum(change < -ROUNDING for change in changes)
    return Paired(
        better=better,
        worse=worse,
        same=len(changes) - better - worse,
        change=math.fsum(changes) / len(changes),
        p=sign_test(better, worse),
    )


def problems(row: Row | None) -> dict[Problem, list[float]] | None:
    """(place in its source, prompt) of every problem of an evaluation, with the scores of its graded answers.

    An id is `<source name>/<place>`; what a config calls its source does not make the problem another one. None without
    answers, where a prompt is not in the record, and where one place holds two prompts.
    """
    found: dict[Problem, list[float]] = {}
    answers = (row or {}).get("answers")
    if not isinstance(answers, list) or not answers:
        return None
    for answer in answers:
        if not isinstance(answer, Mapping) or "problem" not in answer or not isinstance(answer.get("prompt"), str):
            return None
        scores = found.setdefault((str(answer["problem"]).rpartition("/")[2], answer["prompt"]), [])
        if isinstance(answer.get("score"), int | float):
            scores.append(float(answer["score"]))
    return found if len({place for place, _ in found}) == len(found) else None


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p of `better` heads and `worse` tails of a fair coin: min(1, 2 P(X <= min)), X ~ B(n, 1/2)."""
    n, least = better + worse, min(better, worse)
    ways = tail = 1  # math.comb(n, 0), and the sum so far
    for i in range(least):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << n))  # whole numbers up to here, so nothing is rounded before


def p_value(p: float) -> str:
    """`p = 0.73`, `p = 0.0021`, `p < 0.00001`."""
    if p < 1e-5:
        return "p < 0.00001"
    digits = max(2, 1 - math.floor(math.log10(p)))
    return f"p = {p:.{digits}f}"
