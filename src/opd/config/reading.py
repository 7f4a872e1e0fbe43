"""Config files as plain data that remembers where each value stands. Imports no torch.

YAML is read by the rules of YAML 1.2, because those of 1.1 surprise: here `1e-5` is a number, only `true` and `false`
are booleans (`no` is text), `12:30:00` is text. Tags, anchors and aliases are refused: a config is data, and every
value in it stands where it is used.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd.config.problems import Problem, origin_of
from opd.config.schema_walk import KeyPath, dotted

# A config is written by hand; a resolved one (.json) may carry the rows of an inline source.
MAX_BYTES = {".yaml": 1 << 20, ".yml": 1 << 20, ".toml": 1 << 20, ".json": 64 << 20}
MAX_DEPTH = 50

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Unreadable(Exception):
    """A file or value that gives no data at all."""

    def __init__(self, problem: Problem):
        super().__init__(problem.what)
        self.problem = problem


@dataclass
class Layer:
    """One origin's values.

    data      dicts, lists, text, numbers, booleans and None only.
    origins   where a value stands, e.g. `recipe.yaml:12`; a value without an entry stands where its section stands.
    problems  keys that are given twice; the data is still complete.
    """

    data: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[Problem] = field(default_factory=list)

    def origins_under(self, path: KeyPath) -> dict[KeyPath, str]:
        """The origins of the value at `path` and of all that is in it."""
        inner = {key: origin for key, origin in self.origins.items() if key[: len(path)] == path}
        return {path: origin_of(path, self.origins)} | inner


def read_file(file: str | Path) -> Layer:
    """The config in a .yaml, .yml, .toml or .json file; raises Unreadable."""
    name = str(file)
    path = Path(file).expanduser()
    suffix = path.suffix.lower()
    if suffix not in MAX_BYTES:
        raise Unreadable(Problem(name, f"a config file ends in {', '.join(MAX_BYTES)}"))
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES[suffix] + 1)
    except FileNotFoundError:
        raise Unreadable(Problem(name, "this file does not exist")) from None
    except IsADirectoryError:
        raise Unreadable(Problem(name, "this is a folder, not a config file")) from None
    except OSError as error:
        raise Unreadable(Problem(name, f"this file cannot be read: {error.strerror}")) from None
    if len(raw) > MAX_BYTES[suffix]:
        raise Unreadable(Problem(name, f"a {suffix} config holds at most {MAX_BYTES[suffix]} bytes; this is larger"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(Problem(name, f"this is not UTF-8 text (byte {error.start})")) from None
    layer = {".toml": _read_toml, ".json": _read_json}.get(suffix, _read_yaml)(text, name)
    if not layer.data:
        raise Unreadable(Problem(name, "this file is empty; `opd init` writes a config to start from"))
    return layer


def read_mapping(values: Mapping[str, Any], origin: str) -> Layer:
    """Values that come from Python."""
    return Layer(plain(values, origin), {(): origin})


def read_value(text: str, said: str) -> Any:
    """The value of an override: a YAML list, mapping or quoted text when it begins like one, else one plain scalar."""
    return _read_yaml_value(text, said) if text.lstrip()[:1] in tuple("[{\"'") else scalar(text)


def scalar(text: str) -> Any:
    """What plain (unquoted) text stands for: null, a boolean, a number, or the text itself."""
    text = text.strip()
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def plain(value: Any, origin: str, path: KeyPath = ()) -> Any:
    """`value` in the types of JSON (tuples become lists, paths text); raises Unreadable for anything else."""
    if len(path) > MAX_DEPTH:
        raise Unreadable(Problem(dotted(path[:3]), f"this is nested deeper than {MAX_DEPTH} levels", origin=origin))
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise Unreadable(Problem(dotted(path), f"its key {key!r} is not text", origin=origin))
        return {key: plain(item, origin, (*path, key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item, origin, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    what = "a finite number is needed" if isinstance(value, float) else f"{type(value).__name__} is not plain data"
    advice = "use text, numbers, true or false, null, lists and mappings"
    raise Unreadable(Problem(dotted(path), what, given=repr(value), origin=origin, allowed=advice))


# ---- YAML -------------------------------------------------------------------------------------------------------


def _read_yaml(text: str, name: str) -> Layer:
    layer = Layer({}, {})
    data = _YamlReader(text, name, layer).document()
    if data is not None and not isinstance(data, dict):
        raise Unreadable(Problem(name, f"a config is a mapping of sections (student: ...), not a {_kind(data)}"))
    layer.data = data or {}
    return layer


def _read_yaml_value(text: str, said: str) -> Any:
    layer = Layer({}, {})
    value = _YamlReader(text, said, layer).document()
    if layer.problems:
        raise Unreadable(layer.problems[0])
    return value


def _kind(data: object) -> str:
    return "list" if isinstance(data, list) else "single value"


class _YamlReader:
    """Builds data straight from the parser's events, so that no constructor, tag or alias is ever acted on."""

    def __init__(self, text: str, name: str, layer: Layer):
        self.name = name
        self.layer = layer
        self.events = self._events(text)

    def _events(self, text: str) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.name}:{mark.line + 1}" if mark else self.name
            said = " ".join(part for part in (error.context, error.problem) if part)
            raise Unreadable(Problem(where, f"this is not valid YAML: {said}")) from None
        except yaml.YAMLError as error:
            raise Unreadable(Problem(self.name, f"this is not valid YAML: {str(error).splitlines()[0]}")) from None

    def _refuse(self, event: yaml.Event, what: str) -> Unreadable:
        return Unreadable(Problem(self._place(event), what))

    def _place(self, event: yaml.Event) -> str:
        return f"{self.name}:{event.start_mark.line + 1}"

    def document(self) -> Any:
        data = None
        seen = False
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self._refuse(event, "a second document begins here; a config file holds one")
                seen = True
            elif isinstance(event, yaml.NodeEvent):
                data = self._node(event, ())
        return data

    def _refuse_features(self, event: yaml.Event) -> None:
        if getattr(event, "anchor", None):
            raise self._refuse(event, "anchors and aliases (&name, *name) are not read; put text with & or * in quotes")
        if tag := getattr(event, "tag", None):
            raise self._refuse(event, f"the tag {tag} is not read; put text that begins with ! in quotes")

    def _node(self, event: yaml.Event, path: KeyPath) -> Any:
        self._refuse_features(event)
        if len(path) > MAX_DEPTH:
            raise self._refuse(event, f"this is nested deeper than {MAX_DEPTH} levels")
        self.layer.origins.setdefault(path, self._place(event))
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else scalar(event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self._node(item, (*path, len(items))))
            return items
        return self._mapping(path)

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self._refuse(key, "a key must be text; put a value that begins with { or [ in quotes")
            here = (*path, key.value)
            self._refuse_features(key)
            if key.value in data:
                both = f"{self.layer.origins[here]} and {self._place(key)}"
                self.layer.problems.append(Problem(dotted(here), f"this is given twice: {both}; keep one of them"))
            self.layer.origins[here] = self._place(key)
            data[key.value] = self._node(next(self.events), here)
        return data


# ---- TOML and JSON ----------------------------------------------------------------------------------------------

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*"
_ENTRY = re.compile(rf"{_DOTTED}=(.*)")
_TABLE = re.compile(rf"\s*\[{_DOTTED}\]\s*(?:#.*)?")
_ARRAY = re.compile(rf"\s*\[\[{_DOTTED}\]\]\s*(?:#.*)?")


def _read_toml(text: str, name: str) -> Layer:
    origins, twice = _toml_lines(text, name)
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        raise Unreadable(twice or Problem(name, f"this is not valid TOML: {error}")) from None
    except RecursionError:
        raise Unreadable(Problem(name, f"this is nested deeper than {MAX_DEPTH} levels")) from None
    return Layer(plain(data, name), origins)


def _toml_lines(text: str, name: str) -> tuple[dict[KeyPath, str], Problem | None]:
    """Where each key stands, and the first key that is given twice.

    tomllib tells no lines, so this reads line by line and sees `key =`, `[table]` and `[[table]]` at the start of a
    line; a value inside an inline table or list is placed where the whole value begins.
    """
    origins: dict[KeyPath, str] = {(): name}
    tables: set[KeyPath] = set()
    lengths: dict[KeyPath, int] = {}
    section: KeyPath = ()
    twice: Problem | None = None
    open_quotes = ""
    for number, line in enumerate(text.splitlines(), 1):
        if open_quotes:
            open_quotes = "" if open_quotes in line else open_quotes
            continue
        here: KeyPath | None = None
        repeated = False
        if found := _ARRAY.fullmatch(line):
            array = _toml_path((), found[1], lengths)
            lengths[array] = lengths.get(array, 0) + 1
            section = (*array, lengths[array] - 1)
            origins.setdefault(array, f"{name}:{number}")
            origins[section] = f"{name}:{number}"
        elif found := _TABLE.fullmatch(line):
            section = here = _toml_path((), found[1], lengths)
            repeated = here in tables
            tables.add(here)
        elif found := _ENTRY.match(line):
            here = _toml_path(section, found[1], lengths)
            repeated = here in origins
            for quotes in ('"""', "'''"):
                open_quotes = quotes if found[2].count(quotes) % 2 else open_quotes
        if here is not None:
            if repeated and twice is None:
                both = f"{origins[here]} and {name}:{number}"
                twice = Problem(dotted(here), f"this is given twice: {both}; keep one of them")
            origins.setdefault(here, f"{name}:{number}")
    return origins, twice


def _toml_path(section: KeyPath, key: str, lengths: Mapping[KeyPath, int]) -> KeyPath:
    """The path that a dotted TOML key means: a list of tables on the way stands for its newest entry."""
    path = section
    for i, part in enumerate(parts := [p.strip("\"'") for p in re.findall(_KEY, key)]):
        path = (*path, part)
        if path in lengths and i + 1 < len(parts):
            path = (*path, lengths[path] - 1)
    return path


def _read_json(text: str, name: str) -> Layer:
    """A resolved config. It is written by a machine on lines of its own making, so its origin is the file alone."""
    problems: list[Problem] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(items)
        if len(data) < len(items):
            key = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
            problems.append(Problem(key, f"this is given twice in one section of {name}; keep one of them"))
        return data

    try:
        data = plain(json.loads(text, object_pairs_hook=pairs), name)
    except (ValueError, RecursionError) as error:
        raise Unreadable(Problem(name, f"this is not valid JSON: {error}")) from None
    if not isinstance(data, dict):
        raise Unreadable(Problem(name, f"a config is a mapping of sections, not a {_kind(data)}"))
    return Layer(data, {(): name}, problems)
