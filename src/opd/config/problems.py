"""What is wrong with a config, in words: where, what was given, where it came from, what is allowed, what is near."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from opd.config.schema_walk import ROOT, KeyPath, Option, describe, dotted, nearest, nearest_word, option_at, value_at
from opd.config.spec import Spec
from opd.errors import ConfigError

# Options by the names that papers and other libraries give them.
_ELSEWHERE = {
    "lmbda": ("on_policy", "scale"),
    "lambda": ("scale", "on_policy"),
    "beta": ("kl",),
    "kl_coef": ("kl",),
    "epsilon": ("clip",),
    "gamma": ("discount",),
    "weight": ("coefficient",),
    "loss": ("preset", "shape"),
    "loss_type": ("preset", "shape"),
    "divergence": ("shape",),
}


def meant(name: object, options: Collection[str]) -> list[str]:
    """Those of `options` that another library calls `name`."""
    return [option for option in _ELSEWHERE.get(str(name), ()) if option in options][:1]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `path` is a dotted option, or a file (with its line) that cannot be read."""

    path: str
    what: str
    given: str = ""
    origin: str = ""
    allowed: str = ""
    near: Sequence[str] = ()
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.what}"]
        if self.given:
            lines.append(f"  given: {self.given}" + (f" ({self.origin})" if self.origin else ""))
        elif self.origin:
            lines.append(f"  from: {self.origin}")
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.near:
            lines.append(f"  did you mean {' or '.join(self.near)}?")
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)


def config_error(problems: Sequence[Problem]) -> ConfigError:
    """All problems in one error, each once."""
    texts = list(dict.fromkeys(map(str, problems)))
    return ConfigError("\n".join(texts if len(texts) == 1 else [f"{len(texts)} problems in the config", *texts]))


def origin_of(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where the value at `path`, or the nearest section around it, was given."""
    return next((origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origins), "")


def shown(value: Any) -> str:
    """A value as it would stand in a config, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def changed(spec: Spec, *options: str) -> Iterator[tuple[str, Any]]:
    """Those of `options` that are not at their default, with their values."""
    for option in options:
        value = getattr(spec, option)
        if value != type(spec).model_fields[option].get_default(call_default_factory=True):
            yield option, value


def explain(error: ValidationError, data: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> list[Problem]:
    """What pydantic refused, in the words of the config; one problem for each place."""
    problems: dict[KeyPath, Problem] = {}
    for item in error.errors(include_url=False):
        if not item["loc"]:
            return [Problem("config", f"this cannot be read: {item['msg']}")]  # text that is not valid Unicode
        path = _without_tags(item["loc"], data)
        value = value_at(data, path)
        if item["type"] == "too_short" and value:
            continue  # pydantic counts only the entries that were valid; theirs are the real problems
        kind = item["type"]
        if kind == "missing" and isinstance(path[-1], int):
            path, kind = path[:-1], "too_short"  # pydantic names the first entry that is not there
        if kind == "value_error":
            said = str(item.get("ctx", {}).get("error"))
            problems.setdefault(path, Problem(dotted(path), said, shown(value), origin_of(path, origins)))
        else:
            problems.setdefault(path, _problem(kind, path, data, origins))
    inside = {other[:n] for other in problems for n in range(len(other))}
    return [problem for path, problem in problems.items() if path not in inside]  # of a union's, the one that is nearer


def _without_tags(loc: tuple[str | int, ...], data: Mapping[str, Any]) -> KeyPath:
    """pydantic's location without the names it gives to the members of unions, which no config file holds."""
    path: KeyPath = ()
    tag_is_next = False
    for part in loc:
        option = option_at(path, data)
        if tag_is_next:
            tag_is_next = False
            continue
        value = value_at(data, path)
        if option is None or (path and not isinstance(value, dict | list)):
            break
        section = option.section(value)
        if isinstance(value, dict) and part not in value and part not in (section.model_fields if section else ()):
            continue  # a member of a union that has no kind: a number or a schedule, text or a mapping
        path = (*path, part)
        child = option_at(path, data)
        tag_is_next = child is not None and len(child.sections) > 1
    return path


def _problem(kind: str, path: KeyPath, data: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> Problem:
    value = value_at(data, path)
    origin = origin_of(path, origins)
    option = option_at(path, data)
    if kind == "missing":
        section = origin_of(path[:-1], origins)
        return Problem(dotted(path), "this is required and not given", origin=section, allowed=describe(option or ROOT))
    if kind == "extra_forbidden" or option is None:
        return _unknown(path, value, origin, data)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        kinds = list(option.sections)
        short = isinstance(value, str)
        where, chosen = dotted(path if short else (*path, "kind")), value if short else value.get("kind")
        if chosen is None:
            return Problem(where, "this is required and not given", origin=origin, allowed=f"one of {', '.join(kinds)}")
        origin = origin if short else origin_of((*path, "kind"), origins)
        near = nearest_word(chosen, kinds)
        return Problem(where, "there is no such kind", shown(chosen), origin, f"one of {', '.join(kinds)}", near)
    what, near = _misfit(value, path, option)
    return Problem(dotted(path), what, shown(value), origin, describe(option), near)


def _unknown(path: KeyPath, value: Any, origin: str, data: Mapping[str, Any]) -> Problem:
    *parents, key = path
    section = option_at(tuple(parents), data)
    model = section.section(value_at(data, tuple(parents))) if section else None
    allowed = ", ".join(model.model_fields) if model else ""
    others = [kind for kind, other in section.sections.items() if key in other.model_fields] if section else []
    if isinstance(key, str) and "." in key and option_at((*parents, *key.split(".")), data):
        keys = key.split(".")
        nested = ": {".join(keys) + ": ..." + "}" * (len(keys) - 1)
        return Problem(dotted(path), f"in a file this is written {nested}", shown(value), origin)
    what = f"only kind {' and '.join(others)} has this option" if others else "there is no such option"
    known = [dotted((*parents, name)) for name in meant(key, model.model_fields if model else ())]
    return Problem(dotted(path), what, shown(value), origin, allowed, [] if others else known or nearest(path, data))


def _misfit(value: Any, path: KeyPath, option: Option) -> tuple[str, list[str]]:
    """Why a value of an existing option does not fit, and what may have been meant."""
    words = [str(word) for kind in option.alternatives if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return "there is no such choice", nearest_word(value, words)
    if option.is_section and isinstance(value, str):
        if value in option.sections:
            return f"this is a section: write {{kind: {value}}}", []
        if any("preset" in model.model_fields for model in option.sections.values()):
            return f"this is a section: write {{preset: {value}}}", []
        required = [name for m in option.sections.values() for name, f in m.model_fields.items() if f.is_required()]
        return "this is a section, not a single value", [dotted((*path, name)) for name in dict.fromkeys(required)]
    if option.is_list and isinstance(value, str):
        return f"this is a list: write [{value}]", []
    if option.takes_only_text and isinstance(value, bool | int | float):
        return "this is text: put it in quotes", []
    return "this value does not fit", []
