"""Which options exist: walks the schema along a path, says in words what an option takes, and finds near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, Discriminator

from opd.config.schema import Config
from opd.config.spec import Spec

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def as_path(text: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in text.split("."))


@dataclass(frozen=True)
class Option:
    """One place of the schema: its type, and the bounds that pydantic checks on it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that may stand here, unions and annotations taken apart."""
        if get_origin(self.annotation) is Annotated:
            return Option(get_args(self.annotation)[0]).alternatives
        if get_origin(self.annotation) in (Union, UnionType):
            return tuple(t for part in get_args(self.annotation) for t in Option(part).alternatives)
        return (self.annotation,)

    @property
    def sections(self) -> dict[str, type[Spec]]:
        """The sections that may stand here, by `kind` (by their own name where there is nothing to choose)."""
        models = [t for t in self.alternatives if isinstance(t, type) and issubclass(t, Spec)]
        return {kind: m for m in models for kind in _kinds(m)}

    @property
    def is_section(self) -> bool:
        """Whether nothing but a section (or null) may stand here."""
        return {*self.alternatives} - {type(None)} == {*self.sections.values()} != set()

    @property
    def takes_only_text(self) -> bool:
        return set(self.alternatives) <= {str, type(None)}

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is tuple for kind in self.alternatives)

    @property
    def values(self) -> Option | None:
        """What stands under every key of a mapping with keys of the user's choice; None where there is none."""
        maps = [get_args(kind)[1] for kind in self.alternatives if get_origin(kind) in (dict, Mapping)]
        return Option(maps[0]) if maps else None

    @property
    def marks(self) -> tuple[Any, ...]:
        """What is annotated here: bounds, discriminators, validators."""
        parts = get_args(self.annotation)
        if get_origin(self.annotation) is Annotated:
            return (*self.metadata, *parts[1:], *Option(parts[0]).marks)
        unions = parts if get_origin(self.annotation) in (Union, UnionType) else ()
        return (*self.metadata, *(mark for part in unions for mark in Option(part).marks))

    @property
    def has_short_form(self) -> bool:
        """Whether text may stand for a whole section: `importance: ratio`, `target: math_teacher`."""
        return bool(self.sections) and any(isinstance(mark, BeforeValidator) for mark in self.marks)

    def section(self, value: Any) -> type[Spec] | None:
        """The section that `value` is, as far as its `kind` tells."""
        models = list(dict.fromkeys(self.sections.values()))
        if len(models) == 1:
            return models[0]
        if not isinstance(value, Mapping):
            return None
        chosen = [mark.discriminator for mark in self.marks if isinstance(mark, Discriminator)]
        choose = next((one for one in chosen if isinstance(one, Callable)), lambda value: value.get("kind"))
        kind = choose(value)
        return self.sections.get(kind) if isinstance(kind, str) else None

    def child(self, key: str | int, value: Any = None) -> Option | None:
        """What stands under `key` when `value` stands here, or None where nothing may."""
        chosen = self.section(value)
        for section in [chosen] if chosen else self.sections.values():
            if key in section.model_fields:
                field = section.model_fields[str(key)]
                return Option(field.annotation, tuple(field.metadata))
        for kind in self.alternatives:
            if get_origin(kind) is tuple and isinstance(key, int):
                return Option(get_args(kind)[0])
        if self.values and isinstance(key, str):
            return self.values
        return Option(Any) if self.annotation is Any else None


ROOT = Option(Config)


def _kinds(section: type[Spec]) -> tuple[str, ...]:
    """The values of `kind` that mean this section; its own name where it has none."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else (section.__name__,)


def value_at(data: Any, path: KeyPath) -> Any:
    """The value at `path`, or None where there is none."""
    for key in path:
        if isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        elif isinstance(data, Mapping):
            data = data.get(key)
        else:
            return None
    return data


def option_at(path: KeyPath, data: Any) -> Option | None:
    """The option at `path` in a config that holds `data`, or None where there is no such option."""
    option: Option | None = ROOT
    for i, key in enumerate(path):
        option = option.child(key, value_at(data, path[:i]))
        if option is None:
            return None
    return option


def describe(option: Option) -> str:
    """What the option takes, in words."""
    bounds = [text for mark in option.metadata for text in _bound(mark)]
    choices = dict.fromkeys(_describe_type(t, option) for t in option.alternatives if t is not type(None))
    text = " ".join([" or ".join(choices), " and ".join(bounds)]).strip()
    return f"{text}, or null" if type(None) in option.alternatives else text


def _describe_type(kind: Any, option: Option) -> str:
    if isinstance(kind, type) and issubclass(kind, Spec):
        if len(option.sections) > 1:
            short = "text, or " if option.has_short_form else ""
            return f"{short}a section with kind: {' | '.join(option.sections)}"
        return f"a section with the options {', '.join(kind.model_fields)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        size = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        return f"a list of {size}entries, each {describe(Option(parts[0]))}"
    if get_origin(kind) is dict:
        return "a mapping"
    if get_origin(kind) is Mapping:
        return f"a mapping from names, each to {describe(Option(get_args(kind)[1]))}"
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(kind, "any value")


def _bound(mark: Any) -> Iterator[str]:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    for name, text in words.items():
        if (limit := getattr(mark, name, None)) is not None:
            yield f"{text} {limit}"
    if getattr(mark, "min_length", None):
        yield f"with at least {mark.min_length} of them"


def every_path(data: Any, option: Option = ROOT, path: KeyPath = ()) -> Iterator[KeyPath]:
    """All options of a config that holds `data`: those of its own kinds, and of a first entry for an empty list."""
    if path:
        yield path
    if section := option.section(data):
        for name, field in section.model_fields.items():
            yield from every_path(value_at(data, (name,)), Option(field.annotation), (*path, name))
    if option.values and isinstance(data, Mapping):
        for name in data:
            yield from every_path(data[name], option.values, (*path, name))
    for kind in option.alternatives:
        if get_origin(kind) is tuple and Option(get_args(kind)[0]).sections:
            for i in range(len(data) if isinstance(data, list) and data else 1):
                yield from every_path(value_at(data, (i,)), Option(get_args(kind)[0]), (*path, i))


def nearest(path: KeyPath, data: Any) -> list[str]:
    """The existing options that somebody may have meant by `path`, likeliest first, three at most.

    They are the nearest name in the same section, and the same name in other sections, the outermost ones.
    """
    *parents, key = path
    parent = tuple(parents)
    known = sorted(every_path(data), key=len)
    siblings = {str(p[-1]): p for p in known if p[:-1] == parent}
    close = nearest_word(key, list(siblings)) or [name for name in siblings if name.startswith(str(key))][:1]
    found = [siblings[name] for name in close]
    same = [p for p in known if p[-1] == key]
    found += [p for p in same if len(p) == len(same[0])]
    if not found:
        leaves = {str(p[-1]): p for p in reversed(known)}
        found = [leaves[name] for name in difflib.get_close_matches(str(key), leaves, n=1, cutoff=0.8)]
    return [dotted(p) for p in dict.fromkeys(found)][:3]


def nearest_word(word: object, words: list[str]) -> list[str]:
    """The word that is spelt most alike; else those, two at most, that hold it whole."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    return close or [other for other in words if len(str(word)) > 3 and str(word) in other][:2]
