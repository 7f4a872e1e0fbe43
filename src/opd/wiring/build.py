"""From a config to live rooms, cheapest checks first: no weights are loaded before all that can be known is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from opd.config.reads import writing_scorers
from opd.config.schema import Config, Evals, Model, Sampling, Scorer, Student, Task
from opd.config.scorers import all_scorers, examined, loaded_as, option_of
from opd.costs.size import ModelSize, model_size
from opd.errors import BadInput, DataError, ModelError, OpdError
from opd.evals.tasks import EvalTask
from opd.grading.graders import check_rows, make_grader
from opd.models.loading import (
    check_loadable,
    generation_end_ids,
    pick_device,
    pick_dtype,
    read_config,
    tokenizer_source,
)
from opd.objectives.objective import gate_scorers, target_scorers
from opd.prompts.mixture import PromptStream
from opd.prompts.sources import read_source
from opd.protocols import Grader
from opd.text.agreement import Agreement
from opd.text.contexts import PromptContext
from opd.text.crossing import Crossing, agree
from opd.text.formats import Format, PromptFormat
from opd.text.tokenizer import load_tokenizer
from opd.types import Prompt, Rollout, Row, SamplingParams
from opd.wiring.foreign import check_foreign
from opd.wiring.foreign_fit import check_fit, own_tokens
from opd.wiring.writing import needs_completions, one_answer


@dataclass(frozen=True)
class Texts:
    """How the student and every scorer read and end: known before any weights are loaded.

    scorers     by name, each with its own context.
    agreements  of every scorer with the student.
    """

    student: PromptFormat
    scorers: Mapping[str, PromptFormat]
    agreements: Mapping[str, Agreement | Crossing]

    @property
    def foreign(self) -> tuple[str, ...]:
        """The scorers that have another tokenizer than the student."""
        return tuple(name for name, agreement in self.agreements.items() if agreement.foreign)

    @property
    def notes(self) -> list[str]:
        """What fits well enough to run but is worth a look; a note says whose where there are several scorers."""
        several = len(self.scorers) > 1
        return [
            f"{name}: {n}" if several else n for name, agreement in self.agreements.items() for n in agreement.notes
        ]


def load_format(spec: Model, role: str) -> PromptFormat:
    """The tokenizer and prompt format of one model; its folder is looked at first, so that messages name the model."""
    check_loadable(spec, role)
    source, revision = tokenizer_source(spec)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=spec.trust_remote_code)
    context = PromptContext(**spec.context.model_dump()) if isinstance(spec, Scorer) else None
    return PromptFormat(tokenizer, Format(**spec.format.model_dump()), generation_end_ids(spec, role), context)


def load_texts(config: Config) -> Texts:
    """All formats and what they agree on; raises ModelError when a scorer and the student cannot read each other,
    ConfigError when the config asks of a scorer with another tokenizer what it cannot say."""
    student = load_format(config.student, "student")
    formats, agreements = {}, {}
    for name, scorer in all_scorers(config).items():
        formats[name] = load_format(loaded_as(config, scorer), scorer_role(config, name))
        try:
            agreements[name] = agree(student, formats[name])
        except ModelError as error:
            raise error if name == "teacher" else ModelError(f"{option_of(config, name)}: {error}") from error
    texts = Texts(student, formats, agreements)
    check_foreign(config, texts)
    return texts


def scorer_role(config: Config, name: str) -> str:
    """How messages call the model of a scorer: by the option that names its weights."""
    return option_of(config, name) if all_scorers(config)[name].weights == "model" else "student"


def sampling_params(spec: Sampling, fmt: PromptFormat, *, samples: int | None = None) -> SamplingParams:
    """The sampler's parameters, with the ids that end an answer."""
    stops = {token: fmt.tokenizer.id(token) for token in spec.stop_tokens}
    for token, number in stops.items():
        if number is None:
            raise ModelError(f"sampling.stop_tokens: {token!r} is not one token of {fmt.tokenizer.source}")
    return SamplingParams(
        max_tokens=spec.max_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        stop_ids=tuple(dict.fromkeys((*fmt.end_ids, *(n for n in stops.values() if n is not None)))),
        samples_per_prompt=spec.samples_per_prompt if samples is None else samples,
    )


def training_params(config: Config, texts: Texts) -> SamplingParams:
    """How the answers of a step come about; a row of data has one answer, whatever the config says."""
    samples = 1 if one_answer(config) else None
    return sampling_params(config.sampling, texts.student, samples=samples)


def load_prompts(config: Config, fmt: PromptFormat) -> PromptStream:
    """The training prompts, rendered in the student's format."""
    spec = config.prompts
    sources = []
    for i, source in enumerate(spec.sources):
        with _named(f"prompts.sources.{i}"):
            sources.append((read_source(source), source.weight))
    with _named("prompts"):
        return PromptStream(
            sources,
            lambda row: render(row, fmt),
            per_step=spec.per_step,
            max_prompt_tokens=spec.max_prompt_tokens,
            shuffle=spec.shuffle,
            seed=spec.seed,
            need_completion=needs_completions(config),
        )


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Data errors say which option of the config brought them."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{option}: {error}") from error


def cut_answers(config: Config, prompts: PromptStream) -> str | None:
    """A sentence about answers of the data that are longer than the limit; None where none is cut."""
    if not needs_completions(config):
        return None
    lengths = [len(p.completion_ids) for p in prompts.prompts() if p.completion_ids is not None]
    limit = config.sampling.max_tokens
    cut = sum(length > limit for length in lengths)
    if not cut:
        return None
    return (
        f"{cut} of {len(lengths)} answers are longer than sampling.max_tokens = {limit} (the longest: "
        f"{max(lengths)} tokens): they are cut there and their end is not learned"
    )


def render(row: Row, fmt: PromptFormat) -> Prompt:
    """A row in one model's format; DataError when its tokenizer cannot encode it."""
    with _encoding(row, fmt):
        return Prompt(row=row, ids=fmt.prompt_ids(row), completion_ids=fmt.completion_ids(row))


def _longest(rows: Iterable[Row], fmt: PromptFormat) -> int:
    """Tokens of the longest prompt in one model's format."""
    longest = 0
    for row in rows:
        with _encoding(row, fmt):
            longest = max(longest, len(fmt.prompt_ids(row)))
    return longest


@contextmanager
def _encoding(row: Row, fmt: PromptFormat) -> Iterator[None]:
    try:
        yield
    except OpdError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception, for example without an unknown token
        raise DataError(f"row {row.id}: the tokenizer of {fmt.tokenizer.source} cannot encode it: {error}") from error


@dataclass(frozen=True)
class PreparedTask:
    """A held-out task before it is bound to a model."""

    spec: Task
    rows: Sequence[Row]
    grader: Grader

    def bind(self, fmt: PromptFormat, sampling: Sampling) -> EvalTask:
        """The task as one model takes it, in its own format."""
        params = sampling_params(self.spec.sampling or sampling, fmt, samples=self.spec.samples)
        return EvalTask(
            name=self.spec.name,
            prompts_P=tuple(render(row, fmt) for row in self.rows),
            grader=self.grader,
            params=params,
        )


def load_tasks(evals: Evals) -> list[PreparedTask]:
    """Held-out problems and their graders; a row without a reference is found here, not after training."""
    tasks = []
    for i, spec in enumerate(evals.tasks):
        with _named(f"evals.tasks.{i}.source"):
            rows = read_source(spec.source)
        settings = spec.grader.model_dump(exclude={"kind"})
        with _named(f"evals.tasks.{i}.grader"):
            check_rows(spec.grader.kind, settings, rows)
        tasks.append(PreparedTask(spec, rows, make_grader(spec.grader.kind, settings, workers=evals.workers)))
    return tasks


def read_prompts(config: Config, prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Scorer to the prompts whose answers it reads or writes in training; DataError when a prompt has no route.

    A scorer that is there for nothing is not among them.
    """
    found: dict[str, list[Prompt]] = {}
    assert config.objective.behaviour is not None
    writing = writing_scorers(config.objective.behaviour)
    for prompt in prompts:
        names = set(writing)
        for term in config.objective.terms:
            if not term.domains or prompt.domain in term.domains:
                names |= target_scorers(term, _unwritten(prompt)) | gate_scorers(term)
        for name in names:
            found.setdefault(name, []).append(prompt)
    return {name: found[name] for name in all_scorers(config) if name in found}


def _unwritten(prompt: Prompt) -> Rollout:
    """An answer of no tokens: what reads it depends on its row alone."""
    return Rollout(
        id=prompt.id,
        prompt=prompt,
        response_ids=np.empty(0, np.int64),
        behaviour_logprobs=np.empty(0, np.float32),
        mask=np.empty(0, np.bool_),
        policy_version=0,
        behaviour="student",
        finish_reason="stop",
    )


def exam_format(fmt: PromptFormat) -> PromptFormat:
    """A scorer's format for held-out tasks: with its context where that needs no column, else without; the solution
    that it sees in training is no part of an exam."""
    return fmt if not fmt.context.columns else fmt.without_context()


def check_context(config: Config, texts: Texts, prompts: PromptStream, tasks: Sequence[PreparedTask]) -> None:
    """Raises BadInput when a prompt and its answer cannot fit into a model's positions, DataError when a scorer's
    context needs a column that a row does not have, or a row has no scorer, ConfigError when next to nothing of the
    student's text can be joined with what a scorer reads."""
    limit = config.sampling.max_tokens
    scorers = all_scorers(config)
    _fits("student", config.student, prompts.longest, limit, "sampling.max_tokens")
    asked = read_prompts(config, prompts.prompts())
    for name, read in asked.items():
        longest = _longest((prompt.row for prompt in read), texts.scorers[name])
        spec, role = loaded_as(config, scorers[name]), scorer_role(config, name)
        own = own_tokens(texts, name, read, limit)
        _fits(role, spec, longest, limit, "sampling.max_tokens", who=name, own=own)
    check_fit(config, texts, asked)
    if name := examined(config):
        fmt = exam_format(texts.scorers[name])
        check_task_context(config, scorer_role(config, name), scorers[name], fmt, tasks)
    check_task_context(config, "student", config.student, texts.student, tasks)


def check_task_context(
    config: Config, role: str, model: Model, fmt: PromptFormat, tasks: Sequence[PreparedTask]
) -> None:
    """The same for one model and the held-out tasks it takes."""
    for task in tasks:
        option = "sampling.max_tokens" if task.spec.sampling is None else f"max_tokens of task {task.spec.name}"
        longest = _longest(task.rows, fmt)
        sampling_params(task.spec.sampling or config.sampling, fmt)
        _fits(role, model, longest, (task.spec.sampling or config.sampling).max_tokens, option)


def _fits(
    role: str,
    model: Model,
    prompt_tokens: int,
    max_tokens: int,
    option: str,
    who: str | None = None,
    own: int | None = None,
) -> None:
    """own: what max_tokens come to for a reader with other tokens, about; None: its tokens are the student's."""
    positions = getattr(read_config(model, role).get_text_config(), "max_position_embeddings", None)
    own = max_tokens if own is None else own
    if positions is not None and prompt_tokens + own > positions:
        reader = "" if who is None or role == who else f" as {who} reads it"
        other = "" if own == max_tokens else f", which are about {own} of its own,"
        raise BadInput(
            f"{role}.model: {model.model} has {positions} positions, but the longest prompt{reader} ({prompt_tokens} "
            f"tokens) plus {option} = {max_tokens}{other} needs {prompt_tokens + own}: lower {option} or drop long "
            "prompts."
        )


def config_size(spec: Model, role: str, parameters: int | None = None) -> ModelSize:
    """The counts of a model from its config alone, or with its exact number of parameters."""
    return model_size(read_config(spec, role).to_dict(), parameters)


def stored_type(spec: Student | Scorer) -> str:
    """What the weights are kept in: what is trained in float32, what is only read in fewer bits."""
    if isinstance(spec, Student) and spec.lora is None:
        return "float32"
    return compute_type(spec) if spec.quantisation == "none" else spec.quantisation


def compute_type(spec: Model) -> str:
    """What products run in: float32, bfloat16 or float16."""
    return str(pick_dtype(spec.dtype, pick_device(spec.device))).removeprefix("torch.")
