"""What a preset stands for, filled into a config: behaviour, terms, and the fields of scorers that it decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opd.config.behaviours import StudentWrites
from opd.config.presets import Preset, expand
from opd.config.reads import TEACHER
from opd.config.schema import Config, Scorer
from opd.config.schema_walk import KeyPath
from opd.config.spec import Spec

_WEIGHTS = ("weights", "ema_rate", "every")


def expanded(config: Config) -> Config:
    """The config with terms, behaviour and scorers filled in from its preset. What the config gives itself wins; terms
    without a preset are on the student's own answers where nothing else is said."""
    objective = config.objective
    if objective.preset is None:
        filled = {"behaviour": objective.behaviour or StudentWrites()}
        return config.model_copy(update={"objective": objective.model_copy(update=filled)})
    preset = expand(objective.preset, objective.parameters)
    filled = {"terms": preset.terms, "behaviour": objective.behaviour or preset.behaviour}
    changes: dict[str, Any] = {"objective": objective.model_copy(update=filled)}
    others = dict(config.scorers)
    for name, scorer in preset.scorers.items():
        if name == TEACHER and name not in others:
            changes["teacher"] = filled_in(config.teacher, scorer)
        else:
            others[name] = filled_in(others.get(name), scorer)
    if others != dict(config.scorers):
        changes["scorers"] = others
    return config.model_copy(update=changes)


def filled_in(given: Scorer | None, preset: Scorer) -> Scorer:
    """A given scorer with what it leaves open; one with a model of its own keeps its weights."""
    if given is None:
        return preset
    return _merged(given, preset, leave=_WEIGHTS if given.model is not None else ())


def _merged(given: Any, preset: Any, leave: tuple[str, ...] = ()) -> Any:
    changes: dict[str, Any] = {}
    for name in preset.model_fields_set - set(leave):
        if name not in given.model_fields_set:
            changes[name] = getattr(preset, name)
        elif isinstance(getattr(preset, name), Spec):
            changes[name] = _merged(getattr(given, name), getattr(preset, name))
    return given.model_copy(update=changes)


def scorer_paths(preset: Preset) -> Iterator[tuple[KeyPath, Any]]:
    """(option, value) of every field of a scorer that the preset decides; `teacher` stands where configs put it."""
    for name, scorer in preset.scorers.items():
        base: KeyPath = (TEACHER,) if name == TEACHER else ("scorers", name)
        for path, value in _fields(scorer):
            yield (*base, *path), value


def _fields(section: Spec) -> Iterator[tuple[KeyPath, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            continue
        if isinstance(value, Spec):
            yield from (((name, *path), inner) for path, inner in _fields(value))
        else:
            yield (name,), value
