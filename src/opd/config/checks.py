"""Rules between options: expands the preset, and refuses combinations that have no valid meaning. Imports no torch.

A rule says what disagrees, why, and the nearest valid choice. Bounds of single options stand in the schema; what
needs models or data to be judged is checked where these are loaded.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from opd.config.naming import source_name
from opd.config.objective import ForwardKL, Objective, Spec, Term
from opd.config.presets import PRESETS, Preset, expand
from opd.config.problems import Problem, config_error, shown
from opd.config.schema import Config, InlineSource, ReasoningGymSource, Source, Student, Teacher
from opd.config.schema_walk import KeyPath, as_path, dotted, nearest_word
from opd.config.watching import blind
from opd.errors import ConfigError


class ConfigWarning(UserWarning):
    """A combination that runs, with a stated price."""


def check(config: Config, origin: Callable[[KeyPath], str] = lambda path: "") -> Config:
    """The config with its preset expanded into behaviour and terms.

    origin  from an option's path to where its value was given; messages name it.

    Raises ConfigError that lists every combination without a valid meaning; warns with ConfigWarning.
    """
    found = list(_objective_as_written(config))
    if not found:
        config = expanded(config)
        found = [problem for rule in RULES for problem in rule(config)]
    if found:
        raise config_error([replace(problem, origin=origin(as_path(problem.path))) for problem in found])
    for text in (*_prices(config), *_looks(config)):
        warnings.warn(text, ConfigWarning, stacklevel=2)
    return config


def expanded(config: Config) -> Config:
    """The config with the objective's terms and behaviour filled in from its preset."""
    objective = config.objective
    if objective.preset is None:
        return config
    preset = expand(objective.preset, objective.parameters)
    filled = {"terms": preset.terms, "behaviour": objective.behaviour or preset.behaviour}
    return config.model_copy(update={"objective": objective.model_copy(update=filled)})


# ---- the objective as it is written ------------------------------------------------------------------------------


def _objective_as_written(config: Config) -> Iterator[Problem]:
    objective = config.objective
    if objective.preset is None:
        if not objective.terms:
            what = "neither a preset nor terms are given, and the default preset counts only without this section"
            yield Problem("objective", what, allowed=f"preset: one of {', '.join(PRESETS)}; or terms")
        elif objective.behaviour is None:
            yield Problem("objective.behaviour", "terms without a preset need it", allowed="student, dataset")
        if objective.parameters:
            what = "nothing reads it: parameters belong to a preset, and none is given"
            yield Problem("objective.parameters", what, shown(objective.parameters))
        return
    try:
        preset = expand(objective.preset, objective.parameters)
    except ConfigError as error:
        path, _, what = str(error).partition(": ")
        known = list(PRESETS) if path == "objective.preset" else []
        yield Problem(path, what, near=nearest_word(objective.preset, known))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = dotted(("objective", "parameters", *item["loc"]))
            yield Problem(path, f"preset {objective.preset!r} refuses it: {item['msg']}", shown(item["input"]))
    else:
        if objective.terms and objective.terms != preset.terms:
            yield _disagreement(objective, preset)


def _disagreement(objective: Objective, preset: Preset) -> Problem:
    """The first difference between the terms of the preset and those that are written out."""
    ours = [term.model_dump(mode="json") for term in objective.terms]
    theirs = [term.model_dump(mode="json") for term in preset.terms]
    advice = f"objective={{preset: {objective.preset}}} for the preset alone, objective.preset=null for the terms alone"
    if len(ours) != len(theirs):
        what = f"preset {objective.preset!r} has {len(theirs)} terms"
        return Problem("objective.terms", what, f"{len(ours)} terms", allowed=advice)
    path, said, means = next(
        ((i, key), ours[i][key], theirs[i][key])
        for i in range(len(ours))
        for key in ours[i]
        if ours[i][key] != theirs[i][key]
    )
    where = dotted(("objective", "terms", *path))
    return Problem(where, f"preset {objective.preset!r} means {shown(means)} here", shown(said), allowed=advice)


# ---- rules about terms -------------------------------------------------------------------------------------------


def _is_sampled_teacher(term: Term) -> bool:
    return term.target == "teacher" and term.support == "sampled"


def _terms(config: Config) -> Iterator[tuple[str, Term]]:
    for i, term in enumerate(config.objective.terms):
        yield f"objective.terms.{i}", term


def term_rules(config: Config) -> Iterator[Problem]:
    """What a term may be by itself and with who writes the answers."""
    behaviour = config.objective.behaviour
    for name, count in Counter(term.name for _, term in _terms(config)).items():
        if count > 1:
            yield Problem("objective.terms", f"{count} terms have the name {name!r}; metrics need different ones")
    for path, term in _terms(config):
        if term.coefficient == 0:
            yield Problem(f"{path}.coefficient", "a term with coefficient 0 trains nothing: remove the term", "0")
        if term.target == "data":
            if behaviour != "dataset":
                what = (
                    "target data is cross-entropy, which has gradient zero in expectation on the student's own samples"
                )
                yield Problem(
                    f"{path}.target", what, "data", allowed="target: teacher; or objective.behaviour: dataset"
                )
            if not isinstance(term.shape, ForwardKL):
                what = "target data is a single token: only its cross-entropy (forward_kl) is finite"
                yield Problem(f"{path}.shape.kind", what, term.shape.kind, allowed="forward_kl")
            if term.support != "sampled":
                what = "target data is known at its own tokens only"
                yield Problem(f"{path}.support", what, term.support, allowed="sampled")
        elif term.support == "sampled" and behaviour != "student":
            what = "a sampled term averages over tokens that the student drew, and here the dataset wrote them"
            yield Problem(f"{path}.support", what, "sampled", allowed="support: full; or objective.behaviour: student")
        if not _is_sampled_teacher(term):
            for option, other in (("importance", "none"), ("advantage_under", "student")):
                if (value := getattr(term, option)) != other:
                    what = "it would do nothing: only sampled terms with target teacher have drawn tokens to weight"
                    yield Problem(f"{path}.{option}", what, value, allowed=f"{other}; or support: sampled")


def teacher_rules(config: Config) -> Iterator[Problem]:
    """A teacher exactly where something reads it."""
    needed = [term.name for _, term in _terms(config) if term.target == "teacher"]
    if needed and config.teacher is None:
        what = f"this is required: the objective's term {needed[0]!r} has target: teacher"
        yield Problem("teacher.model", what, allowed="a folder or hub name; or objective.preset: sft")
    if config.teacher is None:
        return
    if not needed and not (config.evals.teacher and config.evals.tasks):
        what = "nothing reads it: no term has target: teacher, and no eval task takes it as the goal"
        yield Problem("teacher", what, config.teacher.model, allowed="no teacher; or a preset that reads one")
    if not needed and config.objective.teacher_temperature != 1:
        what = "nothing reads it: no term has target: teacher"
        yield Problem("objective.teacher_temperature", what, shown(config.objective.teacher_temperature), allowed="1.0")
    if config.teacher.adapter_off:
        yield from _adapter_off(config.student, config.teacher)
    elif config.teacher.device == "cpu" and config.teacher.offload != "none":
        what = "nothing reads it: teacher.device is cpu, so the weights are in host memory already"
        yield Problem("teacher.offload", what, config.teacher.offload, allowed="none")


def _adapter_off(student: Student, teacher: Teacher) -> Iterator[Problem]:
    """A teacher that is the student's base: one model, so that everything about its weights is said once."""
    if student.lora is None:
        what = "the student has no adapter to turn off: its own weights would be its teacher"
        yield Problem("teacher.adapter_off", what, "true", allowed="student.lora: {}; or adapter_off: false")
    for option in ("model", "revision"):
        ours, theirs = getattr(student, option), getattr(teacher, option)
        if ours != theirs:
            what = f"teacher.adapter_off takes the student's own weights, and student.{option} is {shown(ours)}"
            yield Problem(f"teacher.{option}", what, shown(theirs), allowed="the same; or adapter_off: false")
    for option, value in _changed(teacher, "dtype", "device", "attention", "quantisation", "offload"):
        what = "nothing reads it: teacher.adapter_off takes the student's own weights, as they are and where they are"
        yield Problem(f"teacher.{option}", what, shown(value), allowed="leave it out; or adapter_off: false")


def sampling_rules(config: Config) -> Iterator[Problem]:
    """The distribution that answers are drawn from, against what the terms assume of it."""
    sampling, objective = config.sampling, config.objective
    if objective.behaviour == "student" and sampling.temperature == 0:
        what = "training samples from the student, and the arg max is one answer, not a sample"
        yield Problem("sampling.temperature", what, "0", allowed="greater than 0, usually 1.0; evals may use 0")
        return
    for path, term in _terms(config):
        if not _is_sampled_teacher(term) or objective.behaviour != "student":
            continue
        if sampling.temperature != objective.student_temperature:
            what = f"{path} compares the distribution that was sampled from, but objective.student_temperature is "
            what += f"{objective.student_temperature}"
            yield Problem("sampling.temperature", what, shown(sampling.temperature), allowed="the same number for both")
        for option, whole in (("top_p", 1.0), ("top_k", 0)):
            if (value := getattr(sampling, option)) != whole:
                what = f"{path} averages over the student's whole distribution, and a cut tail is never drawn"
                allowed = f"{whole}; or support: full"
                yield Problem(f"sampling.{option}", what, shown(value), allowed=allowed)
        if config.learner.updates_per_batch > 1 and term.importance == "none":
            what = f"from the second update on the samples of {path} are not the student's any more"
            allowed = f"updates_per_batch: 1; or {path}.importance: ratio"
            yield Problem("learner.updates_per_batch", what, shown(config.learner.updates_per_batch), allowed=allowed)


# ---- rules about everything else ---------------------------------------------------------------------------------


def eval_rules(config: Config) -> Iterator[Problem]:
    """Evals that can run, and numbers that mean what they say."""
    evals = config.evals
    if not evals.tasks:
        for option, value in _changed(evals, "every", "teacher", "confidence", "workers"):
            what = "nothing reads it: evals.tasks is empty"
            yield Problem(f"evals.{option}", what, shown(value), allowed="some tasks; or leave it out")
    yield from _same_names("evals.tasks", [task.name for task in evals.tasks])
    for i, task in enumerate(evals.tasks):
        sampling = task.sampling or config.sampling
        if task.samples > 1 and sampling.temperature == 0:
            what = f"sampling.temperature is 0, so all {task.samples} answers to a problem are the same"
            yield Problem(f"evals.tasks.{i}.samples", what, shown(task.samples), allowed="1; or a temperature above 0")
        for option, value in _changed(task.sampling, "samples_per_prompt") if task.sampling else ():
            what = f"nothing reads it: evals.tasks.{i}.samples says how many answers a problem gets"
            yield Problem(f"evals.tasks.{i}.sampling.{option}", what, shown(value), allowed="leave it out")


def source_rules(config: Config) -> Iterator[Problem]:
    yield from _same_names("prompts.sources", [source_name(source) for source in config.prompts.sources])


def _same_names(path: str, names: list[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            i = [i for i, other in enumerate(names) if other == name][1]
            what = f"{count} entries have the name {name!r}; ids and reports need different ones"
            yield Problem(f"{path}.{i}", what, shown(name), allowed="another `name`")


def format_rules(config: Config) -> Iterator[Problem]:
    """Text formats whose options are read."""
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is None:
            continue
        path, text = f"{role}.format", model.format
        if "{prompt}" not in text.plain_template:
            yield Problem(
                f"{path}.plain_template",
                "the prompt has no place in it",
                text.plain_template,
                allowed="text with {prompt}",
            )
        unread = {"chat": ["plain_template"], "plain": ["chat_template_kwargs"], "auto": []}[text.kind]
        for option, value in _changed(text, *unread):
            what = f"nothing reads it: {path}.kind is {text.kind}"
            yield Problem(f"{path}.{option}", what, shown(value), allowed="kind: auto; or leave it out")


def student_rules(config: Config) -> Iterator[Problem]:
    if config.student.dtype == "float16":
        what = "gradients of a mean over many tokens are below what float16 can hold, and nothing scales the loss"
        yield Problem("student.dtype", what, "float16", allowed="bfloat16 or float32")
    lora, bits = config.student.lora, config.student.quantisation
    if bits != "none" and lora is None:
        what = "quantised weights are frozen, so there would be nothing to train"
        yield Problem("student.quantisation", what, bits, allowed="none; or student.lora: {}")
    if bits != "none" and lora is not None and lora.save == "merged":
        what = f"merging into weights of {bits} would round the adapter to their few steps"
        yield Problem("student.lora.save", what, "merged", allowed="auto or adapter")


def optim_rules(config: Config) -> Iterator[Problem]:
    optim, steps = config.optim, config.run.steps
    if optim.schedule == "constant" and optim.final_lr_fraction != 0:
        what = "nothing reads it: optim.schedule is constant"
        yield Problem(
            "optim.final_lr_fraction", what, shown(optim.final_lr_fraction), allowed="schedule: cosine or linear"
        )
    if optim.warmup_steps > steps:
        what = f"the warm-up is longer than the run, run.steps is {steps}"
        yield Problem("optim.warmup_steps", what, shown(optim.warmup_steps), allowed=f"at most {steps}")


def guard_rules(config: Config) -> Iterator[Problem]:
    """Guards that see something, and thresholds that can be met."""
    guards, blinded = config.guards, blind(config)
    for name, guard in ((name, getattr(guards, name)) for name in type(guards).model_fields if name != "window"):
        why = None if guard.action == "off" else blinded.get(name)  # a recipe's guard may be switched off by a word
        for option, value in _changed(guard, *type(guard).model_fields) if why else ():
            what = f"nothing reads it: {why}"
            yield Problem(f"guards.{name}.{option}", what, shown(value), allowed="leave it out")
    if guards.kl_rising.action != "off" and guards.kl_rising.steps < 2 * guards.window:
        what = f"their end and their beginning overlap: guards.window is {guards.window}"
        allowed = f"at least {2 * guards.window}, or a smaller guards.window"
        yield Problem("guards.kl_rising.steps", what, shown(guards.kl_rising.steps), allowed=allowed)


def tracking_rules(config: Config) -> Iterator[Problem]:
    if config.tracking.kind in ("none", "tensorboard"):
        for option, value in _changed(config.tracking, "project", "name"):
            what = f"nothing reads it: tracking.kind is {config.tracking.kind}"
            yield Problem(f"tracking.{option}", what, shown(value), allowed="leave it out; or kind: trackio or wandb")


RULES = (
    term_rules,
    student_rules,
    teacher_rules,
    sampling_rules,
    eval_rules,
    source_rules,
    format_rules,
    optim_rules,
    guard_rules,
    tracking_rules,
)


# ---- what runs at a price ----------------------------------------------------------------------------------------


def _prices(config: Config) -> Iterator[str]:
    objective = config.objective
    teacher_terms = [(path, term) for path, term in _terms(config) if term.target == "teacher"]
    for path, term in teacher_terms:
        if term.support == "sampled" and term.reduction == "sequence_mean":
            yield (
                f"{path}.reduction: sequence_mean on a sampled term is biased, because 1 / length depends on the "
                "tokens drawn; token_mean is not"
            )
        if term.support == "full" and config.learner.updates_per_batch > 1 and objective.behaviour == "student":
            yield (
                f"learner.updates_per_batch: {config.learner.updates_per_batch} updates on the same answers: from the "
                f"second on, {path} is exact at states that an older student visited"
            )
    if teacher_terms and objective.teacher_temperature != objective.student_temperature:
        yield (
            f"objective.teacher_temperature: {objective.teacher_temperature} and student_temperature "
            f"{objective.student_temperature} differ: a student equal to its teacher is not at the optimum"
        )


def _looks(config: Config) -> Iterator[str]:
    """What runs, and is probably not what was meant."""
    teacher, student = config.teacher, config.student
    if teacher is not None and (teacher.model, teacher.revision, teacher.format) == (
        student.model,
        student.revision,
        student.format,
    ):
        yield f"teacher.model: teacher and student are the same model, {student.model}: their divergence starts at zero"
    trained = {_data(source) for source in config.prompts.sources} - {None}
    for i, task in enumerate(config.evals.tasks):
        if _data(task.source) in trained:
            yield f"evals.tasks.{i}.source: {task.name} takes the rows that are trained on; its score is not held out"


def _data(source: Source) -> tuple[str, ...] | None:
    """What tells two sources apart that were given different names; None where rows stand in the config."""
    if isinstance(source, InlineSource):
        return None
    if isinstance(source, ReasoningGymSource):
        return (source.task, str(source.seed), str(source.settings))
    return (source.path, getattr(source, "config", None) or "", getattr(source, "split", ""))


def _changed(spec: Spec, *options: str) -> Iterator[tuple[str, Any]]:
    """Those of `options` that are not at their default, with their values."""
    for option in options:
        value = getattr(spec, option)
        if value != type(spec).model_fields[option].get_default(call_default_factory=True):
            yield option, value
