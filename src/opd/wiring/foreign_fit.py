"""How a scorer's tokens fit to the student's on a run's own texts: measured, said, and refused where almost none do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from opd.config.objective import DivergenceTerm
from opd.config.problems import Problem, config_error
from opd.config.reads import scorers_of
from opd.config.schema import Config
from opd.errors import DataError
from opd.reports.figures import percent
from opd.text.crossing import Crossing
from opd.text.pieces import pieces
from opd.types import Prompt, Rollout, Row

if TYPE_CHECKING:
    from opd.wiring.build import Texts

LEAST = 0.02  # share of the student's tokens: where fewer can be trained a run is about nothing
_TEXTS = 32  # of the prompts that a scorer reads
_CHARACTERS = 4_000  # of a prompt's text, where no answer came with the row
_EXAMPLE = 100  # characters of the example, about


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was counted over some texts, all in tokens.

    texts   how many, and `of` what they are.
    ours    of the student; `mapped` of these are in spans, `same` are the same entry of both vocabularies.
    theirs  of the scorer; `spans` counts the spans.
    """

    texts: int
    of: str
    ours: int
    mapped: int
    same: int
    theirs: int
    spans: int

    @property
    def rate(self) -> float:
        """The scorer's tokens for one of the student's."""
        return self.theirs / max(self.ours, 1)

    def trained(self, alignment: str) -> float:
        """Share of the student's tokens that a term with this alignment can train."""
        return (self.same if alignment == "strict" else self.mapped) / max(self.ours, 1)


def measured(texts: Texts, name: str, asked: Iterable[Prompt]) -> Fit:
    """The fit of the scorer `name` on the answers that came with these prompts, or else on the prompts' own text."""
    crossing = texts.agreements[name]
    assert isinstance(crossing, Crossing), f"{name} has the student's tokenizer"
    counted = np.zeros(5, np.int64)
    number, with_answers = 0, True
    for rollout, is_answer in _written(texts, asked):
        read = crossing.read(rollout)
        span_T = read.spans.span_T
        spans = int(span_T.max(initial=-1)) + 1
        counted += (len(span_T), (span_T >= 0).sum(), read.spans.same_T.sum(), len(read.ids), spans)
        number, with_answers = number + 1, with_answers and is_answer
    ours, mapped, same, theirs, spans = counted.tolist()
    of = "answers of the data" if with_answers else "prompts' texts"
    return Fit(texts=number, of=of, ours=ours, mapped=mapped, same=same, theirs=theirs, spans=spans)


def own_tokens(texts: Texts, name: str, asked: Iterable[Prompt], tokens: int) -> int:
    """How many tokens an answer of `tokens` of the student's has for the scorer `name`, about, and at least one."""
    if name not in texts.foreign or not (fit := measured(texts, name, asked)).ours:
        return tokens
    return max(1, math.ceil(tokens * fit.rate))


def check_fit(config: Config, texts: Texts, read: dict[str, list[Prompt]]) -> None:
    """Raises ConfigError where a term could train next to nothing. read: scorer to prompts that it is asked about."""
    problems = []
    for name in texts.foreign:
        fit = measured(texts, name, read.get(name, ()))
        for i, term in enumerate(config.objective.terms):
            if not isinstance(term, DivergenceTerm) or name not in scorers_of(term.target) or not fit.ours:
                continue
            kind = term.alignment.kind
            if fit.trained(kind) < LEAST:
                what = f"{kind} could train {percent(fit.trained(kind))} of the student's tokens with {name}, as the "
                what += f"{fit.texts} {fit.of} show"
                spans = f"span, gold or alm ({percent(fit.trained('span'))})"
                allowed = spans if kind == "strict" and fit.trained("span") >= LEAST else "another teacher"
                problems.append(Problem(f"objective.terms.{i}.alignment", what, kind, allowed=allowed))
    if problems:
        raise config_error(problems)


def foreign_lines(texts: Texts, read: dict[str, list[Prompt]]) -> list[str]:
    """For a person: of each scorer with another tokenizer what is shared, what is covered, and one example."""
    lines = []
    for name in texts.foreign:
        crossing = texts.agreements[name]
        assert isinstance(crossing, Crossing)
        shared = int((crossing.teacher_of_V >= 0).sum())
        lines.append(
            f"{name} has another tokenizer, of {texts.scorers[name].tokenizer.vocab_size:,} tokens: {shared:,} are "
            f"also among the student's {crossing.vocab_size:,}"
        )
        asked = read.get(name, [])
        fit = measured(texts, name, asked)
        if fit.ours:
            lines.append(
                f"{name} on {fit.texts} {fit.of}: {percent(fit.trained('span'))} of the student's tokens are in spans "
                f"of both, {percent(fit.trained('strict'))} are the same token to both; {fit.rate:.2f} of its tokens "
                "for one of the student's"
            )
        for rollout, _ in islice(_written(texts, asked), 1):
            lines.append(f"{name}, for example (the student's tokens=its own): {example(crossing, rollout)}")
    return lines


def example(crossing: Crossing, rollout: Rollout, characters: int = _EXAMPLE) -> str:
    """The first spans of an answer on one line: `a` the same to both, `b·c=bc` a span, `(d)` not mapped.

    `·` stands between tokens, two spaces between spans.
    """
    read = crossing.read(rollout)
    ours = pieces(crossing.student_fmt.tokenizer, rollout.response_ids)
    theirs = pieces(crossing.teacher_fmt.tokenizer, read.ids)
    span_T, span_U, same_T = read.spans.span_T, read.spans.span_U, read.spans.same_T
    parts: list[str] = []
    start, length = 0, 0
    while start < len(ours) and length < characters:
        span = span_T[start]
        end = start + 1
        while end < len(ours) and span >= 0 and span_T[end] == span:
            end += 1
        left = "·".join(_visible(piece) for piece in ours[start:end])
        if span < 0:
            part = f"({left})"
        elif same_T[start]:
            part = left
        else:
            part = f"{left}={'·'.join(_visible(theirs[u]) for u in np.flatnonzero(span_U == span))}"
        parts.append(part)
        start, length = end, length + len(part) + 2
    return "  ".join(parts) + ("  ..." if start < len(ours) else "")


def _visible(piece: str) -> str:
    return piece.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t") or "_"


def _written(texts: Texts, asked: Iterable[Prompt]) -> Iterator[tuple[Rollout, bool]]:
    """Answers to some of the prompts, spread over all of them, and whether they came with the data."""
    prompts = list(asked)
    for prompt in prompts[:: max(1, len(prompts) // _TEXTS)][:_TEXTS]:
        if prompt.completion_ids is not None:
            yield _answer(prompt, prompt.completion_ids), True
            continue
        row = replace(prompt.row, completion=_text(prompt.row)[:_CHARACTERS])
        try:
            ids = texts.student.completion_ids(row)
        except DataError:
            continue  # a prompt with an end token in it is fine as a prompt
        if ids is not None and row.completion:
            yield _answer(prompt, ids), False


def _text(row: Row) -> str:
    """What a row's prompt says: a chat's last turn."""
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]


def _answer(prompt: Prompt, ids: Sequence[int] | np.ndarray) -> Rollout:
    return Rollout(
        id=f"{prompt.id}/fit",
        prompt=prompt,
        response_ids=np.asarray(ids, np.int64),
        behaviour_logprobs=np.full(len(ids), np.nan, np.float32),
        mask=np.ones(len(ids), np.bool_),
        policy_version=0,
        behaviour="dataset",
        finish_reason="stop",
    )
