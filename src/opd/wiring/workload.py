"""What one step of a config does, in the counts that its limit follows from (`costs/roofline.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opd.config.behaviours import DatasetWrites, Mixture, Speculative, StudentWrites, TeacherMixed, TeacherWrites
from opd.config.behaviours import Writer as WriterSpec
from opd.config.reads import evidence, read_by
from opd.config.schema import Config, Scorer
from opd.config.scorers import COPIED, all_scorers, is_away, loaded_as
from opd.costs.roofline import Placed, Reading, Step, Text, Writing, token_passes
from opd.costs.size import ModelSize
from opd.models.loading import adapter_targets, pick_device
from opd.objectives.objective import Objective
from opd.prompts.mixture import PromptStream
from opd.types import Prompt
from opd.wiring.build import Texts, compute_type, config_size, read_prompts, scorer_role, stored_type
from opd.wiring.foreign_fit import measured

STUDENT = "student"
_SAMPLED = 256  # prompts whose lengths stand for all; a scorer with a context of its own renders each anew


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of a step.

    tokens    of one, in the mean.
    longest   tokens of the longest in a step; None: all are of one length.
    number    of answers in a step; None: as many as the config asks for.
    """

    tokens: float
    longest: float | None = None
    number: float | None = None


def planned_answers(config: Config, prompts: PromptStream, tokens: int | None = None) -> Answers:
    """The answers of a run to come: of `tokens` tokens, else as long as they may get; those of data as they are."""
    asked = min(tokens or config.sampling.max_tokens, config.sampling.max_tokens)
    data = [len(p.completion_ids) for p in _sample(config, prompts) if p.completion_ids is not None]
    lengths, numbers = [], []
    for writer, share in _shares(config):
        from_data = isinstance(writer, DatasetWrites) and data
        lengths.append(sum(min(n, config.sampling.max_tokens) for n in data) / len(data) if from_data else asked)
        numbers.append(share * _samples(config, writer))
    return Answers(tokens=sum(n * m for n, m in zip(lengths, numbers, strict=True)) / sum(numbers))


def workload(
    config: Config,
    texts: Texts,
    prompts: PromptStream,
    answers: Answers,
    *,
    sizes: Mapping[str, ModelSize] | None = None,
    trainable: int | None = None,
) -> Step:
    """One step in the mean.

    sizes       of "student" and scorers by name; those that are missing are read off the models' configs.
    trainable   parameters that are trained, where not all are; None: asked of the adapter's config.
    """
    sizes = sizes or {}
    vocab = texts.student.tokenizer.vocab_size
    student = Placed(
        size=_without_padding(sizes.get(STUDENT) or config_size(config.student, STUDENT), vocab),
        dtype=compute_type(config.student),
        stored=stored_type(config.student),
        device=str(pick_device(config.student.device)),
    )
    placed = {STUDENT: _decoder(config, student)}
    for name, scorer in all_scorers(config).items():
        if is_away(scorer):
            continue  # what it takes is no work of this machine
        own = texts.scorers[name].tokenizer.vocab_size if name in texts.foreign else vocab
        placed[name] = _placed(config, name, scorer, student, sizes.get(name), own)
    seen = _sample(config, prompts)
    planned = config.prompts.per_step * sum(share * _samples(config, writer) for writer, share in _shares(config))
    number = planned if answers.number is None else answers.number
    text = Text(
        prompts=config.prompts.per_step,
        answers=number,
        prompt_tokens=_mean([len(p.ids) for p in seen]),
        answer_tokens=answers.tokens,
    )
    if config.student.lora is not None and trainable is None:
        trainable = adapter_targets(config.student).parameters(config.student.lora.rank)
    return Step(
        student=student,
        text=text,
        writing=_writing(config, texts, seen, placed, text, number / planned, answers.longest),
        scoring=_scoring(config, texts, seen, placed, text),
        trainable=trainable,
        updates=config.learner.updates_per_batch,
        looks=Objective(config.objective, special_ids=frozenset()).looks,
        micro_batch=config.learner.tokens_per_micro_batch,
    )


def _writing(
    config: Config,
    texts: Texts,
    seen: Sequence[Prompt],
    placed: Mapping[str, Placed],
    text: Text,
    scale: float,
    longest: float | None,
) -> dict[str, Writing]:
    """Every model that writes, or helps to write; `scale` is how many answers there are for each that was planned."""
    shares: dict[str, tuple[float, float]] = {}  # prompts, answers
    for writer, share in _shares(config):
        asked = config.prompts.per_step * share
        for name in _models(writer):
            prompts, answers = shares.get(name, (0.0, 0.0))
            shares[name] = (prompts + asked, answers + asked * _samples(config, writer) * scale)
    made = {}
    for name, (prompts, answers) in shares.items():
        length = text.prompt_tokens if name == STUDENT else _prompt_length(texts, name, seen)
        passes = token_passes(answers, text.answer_tokens, config.engine.slots, longest)
        tokens = text.answer_tokens * _rate(texts, name, seen)
        own = Text(prompts=prompts, answers=answers, prompt_tokens=length, answer_tokens=tokens)
        made[name] = Writing(model=placed[name], text=own, passes=passes)
    return made


def _scoring(
    config: Config, texts: Texts, seen: Sequence[Prompt], placed: Mapping[str, Placed], text: Text
) -> dict[str, Reading]:
    """Every scorer that a term reads, with the share of the answers that it is asked about."""
    behaviour = config.objective.behaviour
    assert behaviour is not None, "the preset is not expanded"
    weight = {writer.kind: 0.0 for writer, _ in _shares(config)}
    for writer, share in _shares(config):
        weight[writer.kind] += share * _samples(config, writer)
    whole: dict[str, bool] = {}
    written: dict[str, float] = {}
    for term in config.objective.terms:
        part = sum(weight[kind] for kind in read_by(term, behaviour)) / sum(weight.values())
        for name, resolution in evidence(term).items():
            whole[name] = whole.get(name, False) or resolution != "sampled"
            written[name] = max(written.get(name, 0.0), part)
    made = {}
    for name, asked in read_prompts(config, seen).items():
        if name not in whole or name not in placed:
            continue  # it writes, and nobody asks it afterwards; or it reads elsewhere
        share = written[name] * len(asked) / len(seen)
        own = Text(
            prompts=text.prompts * share,
            answers=text.answers * share,
            prompt_tokens=_prompt_length(texts, name, asked),
            answer_tokens=text.answer_tokens * _rate(texts, name, asked),
        )
        model = placed[name]
        made[name] = Reading(
            model=model, text=own, whole=whole[name], arrives=_arriving(config, name, model, placed[STUDENT], own)
        )
    return made


def _arriving(config: Config, name: str, model: Placed, student: Placed, text: Text) -> float:
    """Bytes over the link in a step: weights that are elsewhere between two steps, and states that change devices."""
    scorer = all_scorers(config)[name]
    away = scorer.offload != "none" and scorer.weights in ("model", "initial", *COPIED)
    weights = model.weight_bytes if away and model.device != "cpu" else 0.0
    if model.device == student.device:
        return weights
    width = model.head_width
    return weights + width * (text.written * model.size.hidden + model.head)


def _placed(config: Config, name: str, scorer: Scorer, student: Placed, size: ModelSize | None, vocab: int) -> Placed:
    spec = loaded_as(config, scorer)
    follows = scorer.weights in ("student", "adapter_off", *COPIED)
    return Placed(
        size=_without_padding(size or config_size(spec, scorer_role(config, name)), vocab),
        dtype=compute_type(spec),
        stored=student.stored if follows else stored_type(spec),
        device=str(pick_device(spec.device)),
    )


def _without_padding(size: ModelSize, vocab: int) -> ModelSize:
    """A head has a row for every token of the tokenizer; those behind them are never multiplied."""
    rows = min(vocab, size.vocab)
    idle = (size.vocab - rows) * size.hidden
    return replace(size, vocab=rows, active_parameters=size.active_parameters - idle)


def _decoder(config: Config, student: Placed) -> Placed:
    """The student as it writes."""
    dtype = student.dtype if config.engine.dtype == "auto" else config.engine.dtype
    stored = student.stored if student.stored in ("int8", "int4") else dtype
    return Placed(size=student.size, dtype=dtype, stored=stored, device=student.device)


def _shares(config: Config) -> list[tuple[WriterSpec, float]]:
    """Writers, each with its share of the prompts."""
    behaviour = config.objective.behaviour
    assert behaviour is not None, "the preset is not expanded"
    if isinstance(behaviour, Mixture):
        return [(part.writer, part.share) for part in behaviour.of]
    return [(behaviour, 1.0)]


def _samples(config: Config, writer: WriterSpec) -> int:
    """Answers that a writer gives to a prompt."""
    return 1 if isinstance(writer, DatasetWrites) else config.sampling.samples_per_prompt


def _models(writer: WriterSpec) -> list[str]:
    """The models that are run to write."""
    if isinstance(writer, StudentWrites):
        return [STUDENT]
    if isinstance(writer, TeacherWrites):
        return [writer.scorer]
    return [STUDENT, writer.scorer] if isinstance(writer, TeacherMixed | Speculative) else []


def _sample(config: Config, prompts: PromptStream) -> list[Prompt]:
    """Prompts of steps that are spread over the run."""
    steps = max(1, min(config.run.steps, _SAMPLED // config.prompts.per_step))
    chosen = [config.run.steps * n // steps for n in range(steps)]
    return [prompt for step in chosen for prompt in prompts.batch(step)]


def _prompt_length(texts: Texts, name: str, asked: Sequence[Prompt]) -> float:
    """Mean tokens of these prompts as a scorer reads them."""
    few = asked[:: max(1, len(asked) // _SAMPLED)]
    return _mean([len(texts.scorers[name].prompt_ids(prompt.row)) for prompt in few])


def _rate(texts: Texts, name: str, asked: Sequence[Prompt]) -> float:
    """A model's tokens for one of the student's."""
    return (measured(texts, name, asked).rate or 1.0) if name in texts.foreign else 1.0


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / max(len(numbers), 1)
