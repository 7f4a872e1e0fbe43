"""A teacher's view of any text, token by token: no training, nothing drawn."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from opd.config.loading import load_config
from opd.config.schema import Config, Model, Scorer, Student
from opd.config.sources import Columns
from opd.errors import BadInput, ConfigError, DataError, ModelError
from opd.journal.atomic import write_atomic
from opd.journal.graded import GradedRecord
from opd.journal.records import to_json
from opd.models.loading import load_frozen, read_config
from opd.models.sanity import next_token_logits
from opd.reports.progress import RunView
from opd.teachers.local import LocalTeacher
from opd.teachers.reading import read_answers, writer
from opd.teachers.residence import resident
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing, agree
from opd.text.formats import PromptFormat
from opd.types import Prompt, Rollout, Row
from opd.wiring.build import load_format, render
from opd.wiring.run_rows import run_rows
from opd.wiring.transcripts import Answer, Answers, Transcript, read_transcript

STUDENT = "student"
_LEARNER = ("chunk_tokens", "tokens_per_micro_batch", "share_prompts")
_STUDENT_OPTIONS = tuple(name for name in Model.model_fields if name != "model")
_TEACHER_OPTIONS = (*_STUDENT_OPTIONS, "offload", "quantisation")


def grade(
    transcript: Transcript,
    teachers: str | Path | Mapping[str, str | Path],
    student: str | Path | None = None,
    *,
    out: str | Path | None = None,
    top_k: int = 5,
    limit: int = 50,
    step: int | None = None,
    student_wrote: bool = False,
    options: Sequence[str] = (),
    console: Console | None = None,
) -> GradedRecord:
    """What `teachers` say about every token of a transcript, as a record; with `out` also as a page and its JSON twin.

    transcript  a .txt, .md, .json or .jsonl file, `-` for standard input, the folder of a run (the rollouts of its last
                step, or of `step`); or from Python a row, rows or a chat: `{"text": "..."}`, a list of turns.
    teachers    a folder or hub name, or several under names of their own. Tokens are the student's, else the first
                teacher's; one with another tokenizer reads the text in tokens of its own, and is joined with them.
    student     a model that is shown beside them. Penalties are measured against it where it is the writer: in the
                rollouts of a run, and where `student_wrote` says so.
    out         page.html, with page.json beside it; both are replaced.
    top_k       most likely alternatives kept at every token. `limit`: at most so many answers.
    options     as on the command line, e.g. `teacher.format.kind=plain` for all teachers, `NAME.dtype=float32` for one,
                `student.device=cpu`, `columns.prompt=question`, `learner.chunk_tokens=128`, `run.threads=2`.

    An answer is read behind its own prompt, in each model's own format, and never cut. Raw text has no prompt, and its
    end is not graded. A run's rollouts are read with the ids that were recorded, by every model.

    Raises ConfigError, DataError or ModelError before weights are loaded when the input cannot work.
    """
    asked = _asked(teachers, student, options)
    page = None if out is None else _page(out, transcript)
    if student_wrote and student is None:
        raise BadInput("student_wrote says who wrote the text, but there is no student: name it, or leave it out")
    if top_k < 1 or limit < 1:
        raise BadInput(f"top_k and limit are at least 1, they are {top_k} and {limit}")
    found = read_transcript(transcript, asked.columns, step=step, limit=limit)
    if found.more:
        warnings.warn(
            f"{found.name}: only the first {limit} answers are graded; raise the limit for more", stacklevel=2
        )
    if asked.config.run.threads is not None:
        torch.set_num_threads(asked.config.run.threads)
    reading = _prepare(asked, found, transcript)
    with RunView(console=console or Console(quiet=True)) as view:
        view.start(0, [f"{name} {spec.model}" for name, spec in asked.specs.items()])
        view.phase("loading models")
        readers = _load(asked, reading)
        view.phase("reading")
        record = read_answers(
            reading.rollouts_N,
            readers,
            student=STUDENT if student is not None else None,
            tokenizer=reading.first.tokenizer,
            models={name: str(spec.model) for name, spec in asked.specs.items()},
            top_k=top_k,
            tokens_per_micro_batch=asked.config.learner.tokens_per_micro_batch,
            chunk_tokens=asked.config.learner.chunk_tokens,
            device=next(iter(readers.values())).model.device,
            title=found.name,
            turns={r.id: answer.turn for r, answer in zip(reading.rollouts_N, found.answers, strict=True)},
        )
    record["written_by_student"] = student_wrote or all(answer.recorded is not None for answer in found.answers)
    for answer, given in zip(record["answers"], found.answers, strict=True):
        if not given.closed and given.recorded is None:
            answer["finish_reason"] = None  # nobody said whether more was to come
    if page is not None:
        from opd.reports.page.tokens import graded_page

        write_atomic(page.with_suffix(".json"), to_json(record))
        write_atomic(page, graded_page(record).encode("utf-8", "backslashreplace"))
    return record


# ---- what was asked for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """specs: reader to its model, the student first. config: where batch sizes and threads are read from."""

    specs: dict[str, Student | Scorer]
    config: Config
    columns: Columns | None


def teacher_names(items: Sequence[str]) -> dict[str, str]:
    """`MODEL` or `NAME=MODEL`, several times, as name to model. A single model needs no name: it is the teacher."""
    named: dict[str, str] = {}
    for item in items:
        found = re.fullmatch(r"([A-Za-z][\w-]*)=(.+)", item)
        if found is None or Path(item).expanduser().exists():
            name, model = "teacher" if len(items) == 1 else Path(item).name, item
        else:
            name, model = found.groups()
        if name in named:
            raise ConfigError(f"--teacher: two teachers are called {name!r}, {named[name]} and {model}: use NAME=MODEL")
        named[name] = model
    return named


def _asked(
    teachers: str | Path | Mapping[str, str | Path], student: str | Path | None, options: Sequence[str]
) -> _Asked:
    named = {"teacher": teachers} if isinstance(teachers, str | Path) else dict(teachers)
    if not named:
        raise ConfigError("opd grade needs a teacher: --teacher MODEL")
    if STUDENT in named:
        raise ConfigError(f"a teacher cannot be called {STUDENT!r}: that is the name of the model beside the teachers")
    shared, own = _sorted_options(options, list(named), student is not None)
    base: dict[str, Any] = {
        "student": {"model": "student" if student is None else str(student)},
        "prompts": {"sources": [{"kind": "inline", "rows": ["none"]}]},
    }
    configs = {
        name: load_config((), [*shared, *own[name]], {**base, "teacher": {"model": str(model)}}).config
        for name, model in named.items()
    }
    first = next(iter(configs.values()))
    specs: dict[str, Student | Scorer] = {} if student is None else {STUDENT: first.student}
    for name, config in configs.items():
        assert config.teacher is not None
        specs[name] = config.teacher
    named_columns = any(option.startswith("prompts.") for option in shared)
    return _Asked(specs, first, first.prompts.sources[0].columns if named_columns else None)


def _sorted_options(
    options: Sequence[str], teachers: Sequence[str], has_student: bool
) -> tuple[list[str], dict[str, list[str]]]:
    """Options of a config for all readers, and those of one teacher alone; ConfigError for what is not read."""
    shared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in teachers}
    for item in options:
        section, _, rest = item.removeprefix("--").partition(".")
        option = re.split(r"[.=\s]", rest)[0]
        if section == STUDENT and has_student and option in _STUDENT_OPTIONS:
            shared.append(item)
        elif section in (*teachers, "teacher") and option in _TEACHER_OPTIONS:
            for name in teachers if section == "teacher" else [section]:
                own[name].append(f"teacher.{rest}")
        elif (section == "learner" and option in _LEARNER) or (section == "run" and option == "threads"):
            shared.append(item)
        elif section == "columns" and option in Columns.model_fields:
            shared.append(f"prompts.sources.0.columns.{rest}")
        else:
            readable = [f"teacher.{', '.join(_TEACHER_OPTIONS)}", f"columns.{', '.join(Columns.model_fields)}"]
            also = "the same for one teacher as NAME.option" + (" and for the student" if has_student else "")
            raise ConfigError(
                f"{item}: opd grade does not read this. It reads {'; '.join(readable)}; {also}; "
                f"learner.{', '.join(_LEARNER)}; run.threads"
                + ("" if has_student else "; student.* with --student MODEL")
            )
    return shared, own


def _page(out: str | Path, transcript: Transcript) -> Path:
    page = Path(out).expanduser()
    if page.suffix not in (".html", ".htm"):
        raise BadInput(f"{out}: the page's name ends in .html; its JSON twin takes the same name with .json")
    if not page.parent.is_dir():
        raise BadInput(f"{out}: there is no folder {page.parent}")
    if page.is_dir():
        raise BadInput(f"{out} is a folder; name a file")
    if not os.access(page.parent, os.W_OK):
        raise BadInput(f"{out}: {page.parent} cannot be written to; choose another --out")
    if (
        isinstance(transcript, str | Path)
        and Path(transcript).expanduser().resolve() == page.with_suffix(".json").resolve()
    ):
        raise BadInput(f"{out}: its JSON twin would replace the transcript {transcript}; choose another name")
    return page


# ---- before weights are loaded --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """first: the format that made the rollouts' ids."""

    formats: Mapping[str, PromptFormat]
    agreements: Mapping[str, Agreement | Crossing]
    rollouts_N: list[Rollout]

    @property
    def first(self) -> PromptFormat:
        return next(iter(self.formats.values()))


class _AsRecorded(PromptFormat):
    """A format for prompts whose ids are known: a run's rollouts are read exactly as they were written."""

    def __init__(self, fmt: PromptFormat) -> None:
        self.__dict__.update(fmt.__dict__)

    def prompt_ids(self, row: Row) -> NDArray[np.int64]:
        return np.array(row.columns["prompt_ids"], dtype=np.int64)


def _prepare(asked: _Asked, found: Answers, transcript: Transcript) -> _Reading:
    formats: dict[str, PromptFormat] = {name: load_format(spec, name) for name, spec in asked.specs.items()}
    first = next(iter(formats))
    agreements = {name: _agreement(first, name, formats) for name in formats}
    for note in dict.fromkeys(note for agreement in agreements.values() for note in agreement.notes):
        warnings.warn(note, stacklevel=3)
    rows: dict[str, Row] = {}
    lines = [answer.recorded for answer in found.answers if answer.recorded is not None]
    foreign = {name: agreement for name, agreement in agreements.items() if isinstance(agreement, Crossing)}
    if lines:
        _check_written_with(formats[first], lines)
        if foreign:
            assert isinstance(transcript, str | Path)
            rows = run_rows(Path(transcript).expanduser(), lines, formats[first])
        formats = {name: fmt if name in foreign else _AsRecorded(fmt) for name, fmt in formats.items()}
    rollouts = [_rollout(answer, formats[first], rows) for answer in found.answers]
    for name, spec in asked.specs.items():
        _check_lengths(name, spec, formats[name], rollouts, foreign.get(name))
    return _Reading(formats, agreements, rollouts)


def _agreement(first: str, name: str, formats: Mapping[str, PromptFormat]) -> Agreement | Crossing:
    try:
        agreement = agree(formats[first], formats[name])
    except ModelError as error:
        if first == STUDENT:
            raise
        raise ModelError(f"{name} cannot be shown beside {first}, here called the student: {error}") from error
    return agreement if first == STUDENT and name != first else replace(agreement, notes=())


def _rollout(answer: Answer, fmt: PromptFormat, rows: Mapping[str, Row]) -> Rollout:
    row = answer.row
    if answer.recorded is not None:
        return _recorded(answer, rows.get(row.id, row))
    prompt = render(row, fmt)
    assert prompt.completion_ids is not None
    response = prompt.completion_ids
    last = int(response[-1])
    if not answer.closed and (last in fmt.tokenizer.added_ids or not _ends_in(row.completion, fmt, last)):
        response = response[:-1]  # the end token that the format closes every completion with
    if not len(response):
        raise DataError(f"row {row.id}: the tokenizer of {fmt.tokenizer.source} makes no token of its answer")
    return Rollout(
        id=row.id,
        prompt=prompt,
        response_ids=response,
        behaviour_logprobs=np.full(len(response), np.nan, dtype=np.float32),
        mask=np.ones(len(response), dtype=np.bool_),
        policy_version=0,
        behaviour="dataset",
        finish_reason="stop" if answer.closed else "length",
    )


def _ends_in(text: str | None, fmt: PromptFormat, number: int) -> bool:
    return text is not None and text.endswith(fmt.tokenizer.show([number]))


def _recorded(answer: Answer, row: Row) -> Rollout:
    line = answer.recorded
    assert line is not None
    row = replace(row, columns={**row.columns, "prompt_ids": line["prompt_ids"]})
    ids = np.array(line["response_ids"], dtype=np.int64)
    return Rollout(
        id=line["id"],
        prompt=Prompt(row=row, ids=np.array(line["prompt_ids"], dtype=np.int64)),
        response_ids=ids,
        behaviour_logprobs=np.array([np.nan if x is None else x for x in line["behaviour_logprobs"]], dtype=np.float32),
        mask=np.array(line["mask"], dtype=np.bool_),
        policy_version=line["policy_version"],
        behaviour=line["behaviour"],
        finish_reason=line["finish_reason"],
        turns=tuple((start, end) for start, end in line["turns"]),
    )


def _check_written_with(fmt: PromptFormat, lines: Sequence[Mapping[str, Any]]) -> None:
    for line in lines:
        if fmt.tokenizer.show(line["response_ids"]) != line["response"]:
            raise DataError(
                f"rollout {line['id']}: its ids are not the text that was recorded when {fmt.tokenizer.source} reads "
                "them; the run's student had another tokenizer. Name that student, whose tokens they are: "
                "--student MODEL"
            )


def _check_lengths(
    name: str, spec: Model, fmt: PromptFormat, rollouts_N: Sequence[Rollout], crossing: Crossing | None
) -> None:
    positions = getattr(read_config(spec, name).get_text_config(), "max_position_embeddings", None)
    for rollout in rollouts_N:
        ids = rollout.response_ids if crossing is None else crossing.read(rollout).ids
        prompt, answer = len(fmt.prompt_ids(rollout.prompt.row)), len(ids)
        if not prompt:
            raise DataError(
                f"row {rollout.id}: its prompt has no tokens for {name} {spec.model}: nothing predicts its answer"
            )
        if positions is not None and prompt + answer > positions:
            raise DataError(
                f"row {rollout.id}: its prompt ({prompt} tokens) and answer ({answer}) need {prompt + answer} "
                f"positions, {name} {spec.model} has {positions}. Texts are never cut: split the row, or leave it out"
            )


# ---- loading --------------------------------------------------------------------------------------------------------


def _load(asked: _Asked, reading: _Reading) -> dict[str, LocalTeacher]:
    learner = asked.config.learner
    prompts = [rollout.prompt for rollout in reading.rollouts_N[:4]]
    readers = {}
    for name, spec in asked.specs.items():
        fmt = reading.formats[name]
        own = fmt if reading.agreements[name].foreign else reading.first  # a teacher may have more tokens
        load = functools.partial(load_frozen, spec, own.tokenizer.vocab_size, role=name)
        if name == STUDENT:
            model = load()
            next_token_logits(model, model.head, [prompt.ids for prompt in prompts])
            readers[name] = writer(model, fmt, chunk_tokens=learner.chunk_tokens, share_prompts=learner.share_prompts)
            continue
        assert isinstance(spec, Scorer)
        readers[name] = LocalTeacher(
            resident(load, spec.offload),
            fmt,
            reading.agreements[name],
            name=name,
            temperature=1.0,
            chunk_tokens=learner.chunk_tokens,
            share_prompts=learner.share_prompts,
        )
        readers[name].check(prompts)
    return readers
