"""A config as people compare it: dotted options, which of them were changed, where several configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from opd.config.presets import expand
from opd.config.schema_walk import ROOT, KeyPath, Option, dotted
from opd.errors import ConfigError
from opd.reports.model_card import public_name

# Where a run is written and how it is shown: two runs always differ there, and compute the same.
NOT_COMPARED = ("run.folder", "run.log_every", "run.existing", "run.overwrite", "tracking.name")
PATHS = ("model", "tokenizer", "path", "folder")  # options that may hold a path of this machine
MISSING = "-"


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted option to value; empty lists and sections are values. Inline rows are one value."""
    return {dotted(path): value for path, value in _leaves(config, ())}


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a resolved config that are not at their default, and what has no default; dotted.

    What a preset stands for is left out: the preset says it.
    """
    made = {dotted(path): value for path, value in _changed(config, ROOT, ())}
    return _without_expansion(made, config)


def differences(configs: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, list[str]]]:
    """(dotted option, its value in each config) wherever these differ; a path is its last part, a missing option "-".

    Of a section that only some runs have, the options that are not at their default. Two paths whose last parts are
    equal are shown with as many parts as tell them apart.
    """
    flats = [_without_expansion(flat(config), config) if config else {} for config in configs]
    telling = {name for config in configs if config for name in changed(config)}
    names = dict.fromkeys(name for one in flats for name in one)
    made = []
    for name in names:
        values = [one.get(name, _above(one, name)) for one in flats]
        if name in NOT_COMPARED or all(value == values[0] for value in values):
            continue
        if any(other.startswith(f"{name}.") for other in names):  # a section that one run lacks: its options say it
            continue
        if any(name not in one for one in flats) and not any(f"{name}.".startswith(f"{t}.") for t in telling):
            continue
        if name.rpartition(".")[2] in PATHS:
            made.append((name, _shortened([as_text(value) for value in values])))
        else:
            made.append((name, [as_text(value) for value in values]))
    return made


def _above(options: Mapping[str, Any], name: str) -> Any:
    """What stands for an option that is not there: None of a section that is none, else MISSING."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in options and options[name] is None:
            return None
    return MISSING


def as_text(value: Any) -> str:
    """A value as a config file would spell it, on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_text, value))}]" if len(value) <= 8 else f"{len(value)} entries"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_text(item)}' for key, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list) and path[-1:] != ("rows",) and any(isinstance(item, Mapping) for item in value):
        entries = enumerate(value)
    if not entries or not value:
        yield path, value
        return
    for key, item in entries:
        yield from _leaves(item, (*path, key))


def _changed(value: Any, option: Option | None, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    section = option.section(value) if option is not None and isinstance(value, Mapping) else None
    if option is not None and section is not None:
        for key, item in value.items():
            field = section.model_fields.get(key)
            if field is None:  # another version's option
                yield from _leaves(item, (*path, key))
                continue
            default = _plain(field.get_default(call_default_factory=True, validated_data={}))
            if item != default or (key == "kind" and len(option.sections) > 1):
                yield from _changed(item, Option(field.annotation, tuple(field.metadata)), (*path, key))
    elif option is not None and option.values is not None and option.values.sections and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _changed(item, option.values, (*path, key))
    elif option is not None and option.is_list and isinstance(value, list) and value:
        inner = option.child(0)
        if inner is None or not inner.sections:
            yield path, value
            return
        for index, item in enumerate(value):
            yield from _changed(item, inner, (*path, index))
    else:
        yield path, value


def _plain(default: Any) -> Any:
    if default is PydanticUndefined:
        return PydanticUndefined
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _without_expansion(options: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    objective = config.get("objective")
    if not isinstance(objective, Mapping) or objective.get("preset") is None:
        return options
    try:
        own = expand(objective["preset"], objective.get("parameters") or {}).behaviour
    except (ConfigError, ValidationError):  # a preset that this version does not have
        own = None
    same = own is not None and objective.get("behaviour") == own.model_dump(mode="json")
    said = ("objective.terms", "objective.behaviour") if same else ("objective.terms",)
    return {name: value for name, value in options.items() if not name.startswith(said)}


def _shortened(paths: Sequence[str]) -> list[str]:
    """The last part of each; more parts where different paths would look the same."""
    short = [public_name(path) for path in paths]
    parts = 2
    while len(set(short)) < len(set(paths)) and parts < 20:
        short = ["/".join([part for part in path.split("/") if part][-parts:]) for path in paths]
        parts += 1
    return short
