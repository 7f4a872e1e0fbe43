"""From a config to live rooms, cheapest checks first: no weights are loaded before all that can be known is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd.config.schema import Config, Evals, Model, Sampling, Task
from opd.costs.size import ModelSize, model_size
from opd.errors import BadInput, DataError, ModelError, OpdError
from opd.evals.tasks import EvalTask
from opd.grading.graders import check_rows, make_grader
from opd.models.loading import generation_end_ids, read_config
from opd.prompts.mixture import PromptStream
from opd.prompts.sources import read_source
from opd.protocols import Grader
from opd.text.agreement import Agreement, compare
from opd.text.formats import Format, PromptFormat
from opd.text.tokenizer import load_tokenizer
from opd.types import Prompt, Row, SamplingParams


@dataclass(frozen=True)
class Texts:
    """How student and teacher read and end: known before any weights are loaded."""

    student: PromptFormat
    teacher: PromptFormat | None
    agreement: Agreement | None


def load_format(spec: Model) -> PromptFormat:
    """The tokenizer and prompt format of one model."""
    tokenizer = load_tokenizer(
        spec.tokenizer or spec.model,
        revision=None if spec.tokenizer else spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )
    return PromptFormat(tokenizer, Format(**spec.format.model_dump()), generation_end_ids(spec))


def load_texts(config: Config) -> Texts:
    """Both formats and what they agree on; raises ModelError when the two cannot read each other."""
    student = load_format(config.student)
    if config.teacher is None:
        return Texts(student, None, None)
    teacher = load_format(config.teacher)
    return Texts(student, teacher, compare(student, teacher))


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
    samples = 1 if config.objective.behaviour == "dataset" else None
    return sampling_params(config.sampling, texts.student, samples=samples)


def load_prompts(config: Config, fmt: PromptFormat) -> PromptStream:
    """The training prompts, rendered in the student's format."""
    spec = config.prompts
    need_completion = config.objective.behaviour == "dataset"
    sources = [(read_source(source), source.weight) for source in spec.sources]
    return PromptStream(
        sources,
        lambda row: render(row, fmt),
        per_step=spec.per_step,
        max_prompt_tokens=spec.max_prompt_tokens,
        shuffle=spec.shuffle,
        seed=spec.seed,
        need_completion=need_completion,
    )


def render(row: Row, fmt: PromptFormat) -> Prompt:
    """A row in one model's format; DataError when its tokenizer cannot encode it."""
    try:
        return Prompt(row=row, ids=fmt.prompt_ids(row), completion_ids=fmt.completion_ids(row))
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
    for spec in evals.tasks:
        rows = read_source(spec.source)
        settings = spec.grader.model_dump(exclude={"kind"})
        check_rows(spec.grader.kind, settings, rows)
        tasks.append(PreparedTask(spec, rows, make_grader(spec.grader.kind, settings, workers=evals.workers)))
    return tasks


def check_context(config: Config, texts: Texts, prompts: PromptStream, tasks: Sequence[PreparedTask]) -> None:
    """Raises BadInput when a prompt and its answer cannot fit into a model's positions."""
    checks: list[tuple[str, Model, int, str]] = []
    longest = prompts.longest
    checks.append(("student", config.student, longest + config.sampling.max_tokens, "sampling.max_tokens"))
    if texts.teacher is not None and config.teacher is not None:
        teacher_longest = max(len(texts.teacher.prompt_ids(row)) for row in prompts.rows())
        total = teacher_longest + config.sampling.max_tokens
        checks.append(("teacher", config.teacher, total, "sampling.max_tokens"))
    for task in tasks:
        limit = (task.spec.sampling or config.sampling).max_tokens
        task_longest = max(len(texts.student.prompt_ids(row)) for row in task.rows)
        checks.append(("student", config.student, task_longest + limit, f"max_tokens of task {task.spec.name}"))
    for role, model, needed, option in checks:
        positions = getattr(read_config(model, role).get_text_config(), "max_position_embeddings", None)
        if positions is not None and needed > positions:
            raise BadInput(
                f"{role} {model.model} has {positions} positions, but the longest prompt plus {option} needs {needed}: "
                f"lower {option} or prompts.max_prompt_tokens."
            )


def config_size(spec: Model, role: str, parameters: int | None = None) -> ModelSize:
    """The counts of a model from its config alone, or with its exact number of parameters."""
    return model_size(read_config(spec, role).to_dict(), parameters)
