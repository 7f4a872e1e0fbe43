"""How the tokens of a scorer with another tokenizer fit to the student's answers, and which alignment that asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd.config.objective import DivergenceTerm
from opd.config.reads import scorers_of
from opd.config.schema import Config
from opd.doctor import thresholds as line
from opd.doctor.findings import Finding
from opd.journal.graded import grouped
from opd.reports.figures import percent
from opd.teachers.own_words import coverage
from opd.text.crossing import Crossing, CrossRead
from opd.text.pieces import pieces
from opd.types import Rollout
from opd.wiring.build import Texts

EXAMPLES = 5
# What a stretch of text is, the first that fits.
_KINDS = (
    ("digits", re.compile(r"\s*\d[\d\s]*")),
    ("white space", re.compile(r"\s+")),
    ("words", re.compile(r"\s*\w[\w\s]*", re.ASCII)),
    ("letters beyond ASCII", re.compile(r"\s*\w[\w\s]*")),
)
OTHERS = "marks and mixtures"


def alignment_findings(
    config: Config, texts: Texts, rollouts_N: Sequence[Rollout], names: Sequence[str]
) -> list[Finding]:
    """One for each of `names` that has another tokenizer, on the student's own answers."""
    found = []
    for name in names:
        crossing = texts.agreements[name]
        if isinstance(crossing, Crossing):
            kind = next((term.alignment.kind for term in terms_of(config, name)), "strict")
            found.append(alignment_finding(name, crossing, rollouts_N, kind))
    return found


def terms_of(config: Config, name: str) -> list[DivergenceTerm]:
    """The terms that read a scorer; of one that has another tokenizer all have one alignment."""
    return [
        term for term in config.objective.terms if isinstance(term, DivergenceTerm) and name in scorers_of(term.target)
    ]


def alignment_finding(name: str, crossing: Crossing, rollouts_N: Sequence[Rollout], kind: str) -> Finding:
    """kind: the alignment with which the run's terms read the scorer."""
    reads = {rollout.id: crossing.read(rollout) for rollout in rollouts_N}
    found = coverage(rollouts_N, reads)
    parted, unread = _differences(crossing, rollouts_N, reads)
    shares = {what: count / parted.total() for what, count in _by_kind(parted).most_common()} if parted else {}
    figures: dict[str, Any] = {
        **found,
        "vocabulary": crossing.matched_share,
        "alignment": kind,
        "differ": shares,
        "spans": [f"{a} = {b}" for (a, b), _ in parted.most_common(EXAMPLES)],
        "unmapped": [piece for piece, _ in unread.most_common(EXAMPLES)],
    }
    said = (
        f"{name} has another tokenizer, with {percent(crossing.matched_share)} of its vocabulary among the student's: "
        f"{percent(found['coverage'])} of the student's tokens are in spans of both, {percent(found['same'])} are the "
        "same token to both"
    )
    if found["span_tokens"] is not None and found["span_own_tokens"] is not None:
        said += f"; {found['span_tokens']:.2f} tokens in a span, {found['span_own_tokens']:.2f} of {name}'s"
    if parted:
        kinds = ", ".join(f"{what} {percent(share)}" for what, share in shares.items())
        said += f". Spans that are not one token of either: {kinds}, most often {'; '.join(figures['spans'])}"
    if unread:
        said += f". Not in a span, most often: {', '.join(figures['unmapped'])}"
    lost, same = 1 - found["coverage"], found["same"]
    if found["coverage"] < line.COVERED_LEAST:
        return Finding(
            check="alignment",
            stage=4,
            level="stop",
            said=said,
            means=f"{percent(lost)} of what the student writes is no text that {name} reads, and cannot be trained",
            change=(f"{'teacher' if name == 'teacher' else f'scorers.{name}'}.model=...",),
            figures=figures,
            asks="another_teacher",
        )
    if kind == "strict" and same < line.SAME:
        return Finding(
            check="alignment",
            stage=4,
            level="warn",
            said=said,
            means=f"strict trains these {percent(same)} alone; span, gold or alm all {percent(found['coverage'])}",
            change=("objective.preset=span",),
            figures=figures,
        )
    if found["coverage"] < line.COVERED:
        return Finding(
            check="alignment",
            stage=4,
            level="warn",
            said=said,
            means=f"{percent(lost)} of the tokens are not trained, and nothing keeps the student from writing more of "
            "them",
            figures=figures,
        )
    fits = f"strict trains {percent(same)} of the tokens, and compares what else each could have said"
    return Finding(
        check="alignment",
        stage=4,
        level="ok",
        said=said,
        means=fits if kind == "strict" else "" if same < line.SAME else f"{kind} trains all of it; {fits}",
        figures=figures,
    )


def _differences(
    crossing: Crossing, rollouts_N: Sequence[Rollout], reads: Mapping[str, CrossRead]
) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Spans that are several tokens of either side, as the two rows of pieces; and tokens without a span."""
    parted: Counter[tuple[str, str]] = Counter()
    unread: Counter[str] = Counter()
    for rollout in rollouts_N:
        read = reads[rollout.id]
        ours = pieces(crossing.student_fmt.tokenizer, rollout.response_ids)
        theirs = pieces(crossing.teacher_fmt.tokenizer, read.ids)
        unread.update(_visible([ours[t]]) for t in np.flatnonzero(read.spans.span_T < 0))
        both = zip(grouped(read.spans.span_T.tolist()), grouped(read.spans.span_U.tolist()), strict=True)
        for of_T, of_U in both:
            if len(of_T) > 1 or len(of_U) > 1:
                parted[_visible([ours[t] for t in of_T]), _visible([theirs[u] for u in of_U])] += 1
    return parted, unread


def _visible(parts: Sequence[str]) -> str:
    return "·".join(repr(part)[1:-1].replace(" ", "␣") or "_" for part in parts)


def _by_kind(parted: Mapping[tuple[str, str], int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (ours, _), count in parted.items():
        text = ours.replace("·", "").replace("␣", " ").replace("_", "")
        kind = next((name for name, pattern in _KINDS if pattern.fullmatch(text)), OTHERS)
        counts[kind] += count
    return counts
