"""Whether a model reads prompts as it was taught to: what it makes of them in another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from opd.config.schema import Config
from opd.doctor import thresholds as line
from opd.doctor.ability import Answers, Problems, answer, gain
from opd.doctor.evidence import read
from opd.doctor.findings import Finding
from opd.doctor.rooms import engine_for
from opd.errors import OpdError
from opd.models.causal import CausalLM
from opd.teachers.local import LocalTeacher
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing, agree
from opd.text.formats import PromptFormat
from opd.types import Prompt, Rollout, Row


@dataclass(frozen=True)
class Other:
    """Another way to write the same prompts for the same model, and the config lines that would choose it."""

    name: str
    fmt: PromptFormat
    change: tuple[str, ...]


def others(fmt: PromptFormat, student: PromptFormat, option: str) -> list[Other]:
    """Chat where it is plain, plain where it is chat, and the student's own way; those that write other prompts."""
    made: list[Other] = []
    ways: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
    flipped = "plain" if fmt.kind == "chat" else "chat"
    ways.append((flipped, {"kind": flipped}, (f"{option}.format.kind={flipped}",)))
    theirs = {**asdict(student.format), "kind": student.kind, "end_tokens": fmt.format.end_tokens}
    names = ("plain_template", "system_prompt", "chat_template_kwargs")
    changes = [f"{option}.format.kind={student.kind}"] if student.kind != fmt.kind else []
    changes += [f"{option}.format.{n}={theirs[n]!r}" for n in names if theirs[n] != getattr(fmt.format, n)]
    ways.append(("the student's format", theirs, tuple(changes)))
    for name, settings, change in ways:
        try:
            other = PromptFormat(fmt.tokenizer, replace(fmt.format, **settings), fmt.end_ids, fmt.context)
        except OpdError:
            continue  # there is no template, or it does not fit
        if all(other.fingerprint != known.fingerprint for known in (fmt, *(known.fmt for known in made))):
            made.append(Other(name, other, change))
    return made


def reads_better(
    rollouts_N: Sequence[Rollout], student: LocalTeacher, member: LocalTeacher, other: Other, *, tokens: int
) -> float | None:
    """Nats a token that answers gain when the teacher reads their prompts in the other format; None where it cannot."""
    try:
        foreign = isinstance(member.agreement, Crossing)
        twin = LocalTeacher(
            member.model,
            other.fmt,
            agree(student.format, other.fmt) if foreign else member.agreement,
            name=member.name,
            temperature=member.temperature,
            chunk_tokens=member.chunk_tokens,
            share_prompts=member.share_prompts,
        )
        now = read(rollouts_N, student, member, tokens_per_micro_batch=tokens, wanted="sampled")
        then = read(rollouts_N, student, twin, tokens_per_micro_batch=tokens, wanted="sampled")
    except OpdError:
        return None  # a row that the other format cannot write, or an end that does not fit
    gap_T = then.drawn_q_T - now.drawn_q_T
    gap_T = gap_T[np.isfinite(gap_T)]
    return float(gap_T.mean()) if len(gap_T) else None


def template_finding(
    config: Config,
    name: str,
    model: CausalLM,
    other: Other,
    gap: float | None,
    now: Answers | None,
    problems: Problems | None,
    agreement: Agreement | Crossing,
) -> Finding | None:
    """The teacher (or the student) in the other format: nothing where that is no better.

    gap       `reads_better`; None: not known.
    now       its answers in the configured format; None: nobody graded them.
    """
    said = "" if gap is None else f"the student's answers gain {gap:.2f} nats a token when {name} reads {other.name}"
    if now is not None and problems is not None:
        tag = f"doctor/{name}/{other.name}"
        then = written(config, problems, model, other.fmt, tag=tag, agreement=agreement)
        both = gain(now, then)
        if both is None:
            return None
        mean, error, n = both
        if mean <= line.SIGMA * error or mean <= line.SOLVES:
            return None
        before, after = 100 * (now.mean or 0), 100 * (then.mean or 0)
        scores = f"{name} gets {before:.0f} % of {n} right as it is, {after:.0f} % in {other.name}"
        return Finding(
            check="format",
            stage=4,
            level="stop" if name != "student" else "warn",
            said="; ".join(part for part in (scores, said) if part),
            means=f"{name} reads prompts in a format that it was not trained on",
            change=other.change,
            figures={"gain": mean, "standard_error": error, "nats": gap},
            asks="mend_template" if name != "student" else None,
        )
    if gap is None or gap < line.FORMAT_GAP:
        return None
    stop = gap > line.FORMAT_BROKEN
    return Finding(
        check="format",
        stage=4,
        level="stop" if stop else "warn",
        said=said,
        means="a teacher that reads another format than it was trained on scores the format, not the answer"
        + ("" if stop else "; a base student may write what a base model continues, so look at both prompts"),
        change=other.change,
        figures={"nats": gap},
        asks="mend_template" if stop else None,
    )


def written(
    config: Config,
    problems: Problems,
    model: CausalLM,
    fmt: PromptFormat,
    *,
    tag: str,
    agreement: Agreement | Crossing | None = None,
) -> Answers:
    """A model's answers to the problems in a format. agreement: with the student's tokens, which `problems` has."""

    def prompt(row: Row) -> Prompt:
        return Prompt(row=row, ids=fmt.prompt_ids(row))

    mine = replace(problems, params=replace(problems.params, stop_ids=_ends(problems, fmt, agreement)))
    return answer(mine, engine_for(config, model), prompt, fmt, tag=tag)


def as_student(
    answers_N: Sequence[Rollout], prompts_P: Sequence[Prompt], agreement: Agreement | Crossing
) -> list[Rollout]:
    """Answers that a teacher wrote, as the student would have: its prompt, its tokens, its end token."""
    return [_as_student(rollout, prompt, agreement) for rollout, prompt in zip(answers_N, prompts_P, strict=True)]


def _as_student(rollout: Rollout, prompt: Prompt, agreement: Agreement | Crossing) -> Rollout:
    if isinstance(agreement, Agreement):  # an exchange of two tokens undoes itself
        return replace(rollout, prompt=prompt, response_ids=agreement.teacher_ids(rollout.response_ids))
    ids_T = agreement.student_answer(prompt, rollout.response_ids, ended=rollout.finish_reason == "stop")
    return replace(
        rollout,
        prompt=prompt,
        response_ids=ids_T,
        behaviour_logprobs=np.full(len(ids_T), np.nan, dtype=np.float32),
        mask=np.ones(len(ids_T), dtype=np.bool_),
        turns=(),
    )


def _ends(problems: Problems, fmt: PromptFormat, agreement: Agreement | Crossing | None) -> tuple[int, ...]:
    """The format's own, and what the student stops at where the model has it, too."""
    asked = problems.params.stop_ids
    if isinstance(agreement, Crossing):
        asked = [n for n in agreement.teacher_of_V[list(asked)].tolist() if n >= 0]
    return tuple(dict.fromkeys((*fmt.end_ids, *asked)))
