"""Scorers exactly where something reads them, and their options where these do something. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from opd.config.behaviours import TeacherWrites, writers
from opd.config.objective import DivergenceTerm, Term
from opd.config.objective_rules import known_domains
from opd.config.problems import Problem, changed, shown
from opd.config.reads import TEACHER, evidence, per_teacher, readers, scorers, teachers, writing_scorers
from opd.config.schema import Config, Context, Scorer, TextFormat
from opd.config.schema_walk import nearest_word
from opd.config.slots import Schedule
from opd.config.targets import STUDENT, Delta, Extrapolated, Product, Routed, Single, Veto

NAME = re.compile(r"[a-z0-9_]+")


def scorer_rules(config: Config) -> Iterator[Problem]:
    """Names, and who is read by what."""
    have, needed = scorers(config), readers(config.objective)
    if config.teacher is not None and TEACHER in config.scorers:
        what = "this is given twice: teacher is the short form of scorers.teacher"
        yield Problem(f"scorers.{TEACHER}", what, allowed="one of the two")
    for name in config.scorers:
        if name == STUDENT:
            what = "in a target this name is the student as it is now, held fixed"
            yield Problem(f"scorers.{name}", what, name, allowed="another name; weights: student where you mean that")
        elif not NAME.fullmatch(name):
            what = "metrics are called by this name"
            yield Problem(f"scorers.{name}", what, shown(name), allowed="lower-case letters, digits and _")
    for name, why in needed.items():
        if name not in have and name != STUDENT:
            yield _missing(name, why, list(have), unread=[other for other in have if other not in needed])
    for name, (path, scorer) in have.items():
        by_evals = name == TEACHER and config.evals.teacher and config.evals.tasks
        if name not in needed and not by_evals:
            what = "nothing reads it: no term has it in its target, no gate asks it and no behaviour has it write"
            also = ", and no eval task takes it as the goal" if name == TEACHER else ""
            near = nearest_word(name, [other for other in needed if other not in have])
            yield Problem(path, what + also, scorer.model or scorer.weights, allowed="leave it out", near=near)
        yield from _one(config, name, path, scorer)
    if config.objective.behaviour is not None and STUDENT in writing_scorers(config.objective.behaviour):
        what = "no scorer has this name: the student writes by itself"
        yield Problem("objective.behaviour", what, STUDENT, allowed="behaviour: student; or the name of a scorer")
    yield from _teacher_temperature(config)
    for i, term in enumerate(config.objective.terms):
        yield from _target(config, f"objective.terms.{i}", term)


def _missing(name: str, why: str, have: list[str], unread: list[str]) -> Problem:
    near = nearest_word(name, have) or unread[:1]
    if name == TEACHER:
        what = f"this is required: {why}"
        return Problem("teacher.model", what, allowed="teacher: {model: ...}, a folder or hub name", near=near)
    line = f"scorers: {{{name}: {{model: a folder or hub name}}}}, or {{{name}: {{weights: initial}}}}, the student "
    line += "before training (also ema, past, student)"
    return Problem(f"scorers.{name}", f"this is required: {why}", allowed=line, near=near)


# ---- one scorer --------------------------------------------------------------------------------------------------


def _one(config: Config, name: str, path: str, scorer: Scorer) -> Iterator[Problem]:
    yield from _weights(config, path, scorer)
    yield from _view(config, name, path, scorer)
    if scorer.device == "cpu" and scorer.offload == "cpu":
        what = f"nothing reads it: {path}.device is cpu, so the weights are in host memory already"
        yield Problem(f"{path}.offload", what, scorer.offload, allowed="none or disk")


# Options about weights that a scorer made of the student has no say in: it is the student's module, or a copy of it.
_ITS_OWN = ("revision", "tokenizer", "dtype", "device", "attention", "trust_remote_code", "quantisation")


def _weights(config: Config, path: str, scorer: Scorer) -> Iterator[Problem]:
    student, kind = config.student, scorer.weights
    for option, reader in (("ema_rate", "ema"), ("every", "past")):
        for _, value in changed(scorer, option) if kind != reader else ():
            what = f"nothing reads it: {path}.weights is {kind}"
            yield Problem(f"{path}.{option}", what, shown(value), allowed=f"weights: {reader}; or leave it out")
    if kind == "model":
        if scorer.model is None:
            what = "this is required: its weights are those of a model"
            yield Problem(
                f"{path}.model", what, allowed="a folder or hub name; or weights: initial, ema, past, student"
            )
        return
    whose = f"nothing reads it: {path}.weights is {kind}, which takes the student's"
    if scorer.model is not None and not (kind == "adapter_off" and scorer.model == student.model):
        yield Problem(f"{path}.model", whose, shown(scorer.model), allowed="leave it out; or weights: model")
    for option, value in changed(scorer, *_ITS_OWN):
        if not (kind == "adapter_off" and option in ("revision", "tokenizer") and value == getattr(student, option)):
            yield Problem(f"{path}.{option}", whose, shown(value), allowed="leave it out; or weights: model")
    if kind in ("student", "adapter_off"):
        for option, value in changed(scorer, "offload"):
            what = f"nothing reads it: weights: {kind} takes no memory of its own"
            yield Problem(f"{path}.{option}", what, shown(value), allowed="leave it out")
    elif scorer.offload != "none" and student.lora is not None:
        what = f"it would do nothing: weights: {kind} share the student's frozen weights (student.lora), which stay"
        yield Problem(f"{path}.offload", what, scorer.offload, allowed="none")
    elif scorer.offload == "disk" and kind in ("ema", "past"):
        what = f"disk loads a model that stays as it is, and weights: {kind} change with the student"
        yield Problem(f"{path}.offload", what, "disk", allowed="cpu or none")
    if kind == "adapter_off" and student.lora is None:
        what = "the student has no adapter to turn off: its own weights would be its teacher"
        yield Problem(f"{path}.weights", what, kind, allowed="student.lora: {}; or weights: initial")


def _view(config: Config, name: str, path: str, scorer: Scorer) -> Iterator[Problem]:
    """What the scorer reads, and at which temperature."""
    yield from format_problems(f"{path}.format", scorer.format)
    if "{" not in scorer.context.template:
        what = "nothing of the row has a place in it"
        said = scorer.context.template
        yield Problem(f"{path}.context.template", what, shown(said), allowed="text with {prompt} or {column}")
    read = [term.name for term in config.objective.terms if name in evidence(term)]
    if scorer.temperature is not None and not read:
        what = "nothing reads it: no term does, and answers are drawn with sampling.temperature"
        yield Problem(f"{path}.temperature", what, shown(scorer.temperature), allowed="leave it out")
    if scorer.weights == "student" and scorer.context == Context() and scorer.format == TextFormat():
        write = config.objective.behaviour
        if write is not None and any(isinstance(w, TeacherWrites) and w.scorer == name for w in writers(write)):
            what = "it is the student as it is now, on the same prompt: what it writes are the student's own samples"
            yield Problem(f"{path}.weights", what, "student", allowed="initial; or a context of its own")
        if scorer.temperature in (None, config.objective.student_temperature) and any(
            isinstance(term, DivergenceTerm) and term.target == Single(scorer=name) for term in config.objective.terms
        ):
            what = "it is the student as it is now, on the same prompt: the divergence is zero and trains nothing"
            yield Problem(f"{path}.weights", what, "student", allowed="initial, ema or past; or a context of its own")


def format_problems(path: str, text: TextFormat) -> Iterator[Problem]:
    """Text formats whose options are read."""
    if "{prompt}" not in text.plain_template:
        what = "the prompt has no place in it"
        yield Problem(f"{path}.plain_template", what, text.plain_template, allowed="text with {prompt}")
    unread = {"chat": ["plain_template"], "plain": ["chat_template_kwargs"], "auto": []}[text.kind]
    for option, value in changed(text, *unread):
        what = f"nothing reads it: {path}.kind is {text.kind}"
        yield Problem(f"{path}.{option}", what, shown(value), allowed="kind: auto; or leave it out")


def _teacher_temperature(config: Config) -> Iterator[Problem]:
    read = {name for term in config.objective.terms for name in evidence(term)}
    for_default = [n for n, (_, scorer) in scorers(config).items() if n in read and scorer.temperature is None]
    if config.objective.teacher_temperature != 1 and not for_default:
        what = "nothing reads it: every scorer says its own temperature" if read else "nothing reads it: no term has a "
        what += "" if read else "scorer"
        yield Problem("objective.teacher_temperature", what, shown(config.objective.teacher_temperature), allowed="1.0")


# ---- targets -----------------------------------------------------------------------------------------------------


def _target(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if not isinstance(term, DivergenceTerm):
        return
    target, where = term.target, f"{path}.target"
    if isinstance(target, Single | Routed) and STUDENT in teachers(target):
        what = "it is the student as it is now, held fixed: the divergence is zero and trains nothing"
        yield Problem(where, what, STUDENT, allowed="a scorer; weights: student with a context of its own is one")
    if isinstance(target, Routed):
        yield from _routes(config, where, target)
    elif isinstance(target, Extrapolated):
        if isinstance(target.teacher, Routed):
            yield from _routes(config, f"{where}.teacher", target.teacher)
        yield from _extrapolated(where, target)
    elif isinstance(target, Product):
        for name, weight in target.weights.items():
            if weight == 0:
                yield Problem(f"{where}.weights.{name}", "with weight 0 nothing reads it", "0", allowed="leave it out")
    elif isinstance(target, Delta):
        if target.strong == target.weak:
            what = f"{target.strong} over itself is 1: what the strong model has over the weak one is nothing"
            yield Problem(f"{where}.weak", what, target.weak, allowed="another scorer")
    elif isinstance(target, Veto):
        yield from _veto(where, target)


def _routes(config: Config, where: str, target: Routed) -> Iterator[Problem]:
    known = known_domains(config) if target.by == "domain" else frozenset()
    if not known:
        return
    for value in target.routes:
        if value not in known:
            what = f"no row has the domain {value!r}: sources without columns.domain have their names as domains"
            near = nearest_word(value, sorted(known))
            yield Problem(f"{where}.routes.{value}", what, allowed=", ".join(sorted(known)), near=near)
    lost = sorted(known - set(target.routes))
    if lost and target.otherwise is None:
        what = f"rows of {', '.join(lost)} have no scorer"
        yield Problem(f"{where}.routes", what, shown(dict(target.routes)), allowed="a route for each; or otherwise")
    if not lost and target.otherwise is not None:
        what = "nothing reads it: every domain has a route"
        yield Problem(f"{where}.otherwise", what, target.otherwise, allowed="leave it out")


def _extrapolated(where: str, target: Extrapolated) -> Iterator[Problem]:
    names = teachers(target.teacher)
    for option in ("reference", "scale"):
        given = getattr(target, option)
        for name in given if isinstance(given, Mapping) else ():
            if name not in names:
                what = f"{name} is no teacher of this target"
                near = nearest_word(name, list(names))
                yield Problem(f"{where}.{option}.{name}", what, allowed=", ".join(names), near=near)
    parts = list(per_teacher(target))
    read = {reference for _, reference, scale in parts if scale != 1}
    is_one_name = isinstance(target.reference, str)
    for name, reference, scale in parts:
        if isinstance(target.scale, Mapping) and name not in target.scale:
            yield Problem(f"{where}.scale", f"the teacher {name} has no lambda", shown(dict(target.scale)))
        elif scale != 1 and reference is None:
            what = f"lambda {scale:g} of {name} needs a reference: without one it would be 1"
            yield Problem(f"{where}.reference", what, allowed=f"{{{name}: ...}}, a scorer; or lambda 1")
        elif scale != 1 and reference == name:
            what = f"{name} is its own reference, so that lambda does nothing"
            yield Problem(f"{where}.reference", what, name, allowed="another scorer; or target: single")
        elif scale == 1 and reference not in (None, *read) and (len(parts) == 1 or not is_one_name):
            what = f"nothing reads it: with lambda 1 the target of {name} is {name} itself"
            yield Problem(f"{where}.reference", what, reference, allowed=f"another lambda; or target: {name}")
    if len(parts) > 1 and not read and is_one_name:
        what = "nothing reads it: every lambda is 1"
        yield Problem(f"{where}.reference", what, str(target.reference), allowed="another lambda; or target: routed")


def _veto(where: str, target: Veto) -> Iterator[Problem]:
    share = target.share
    ends = (share.start, share.end) if isinstance(share, Schedule) else (share, share)
    if min(ends) < 0 or max(ends) >= 1:
        what = "its fixed point is q^(1 / (1 - share))"
        yield Problem(f"{where}.share", what, shown(max(ends, key=abs)), allowed="at least 0 and less than 1")
    elif max(ends) == 0:
        what = f"with share 0 the target is {target.scorer} itself"
        yield Problem(f"{where}.share", what, "0", allowed=f"target: {target.scorer}")
