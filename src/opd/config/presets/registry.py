"""What a preset is, where it comes from, and how its parameters are read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from opd.config.behaviours import Behaviour
from opd.config.objective import Term
from opd.config.schema import Scorer
from opd.config.slots import Schedule
from opd.errors import ConfigError

Status = Literal["vetted", "experimental"]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Preset:
    """What a named method stands for.

    scorers    by name, with the fields that the method decides; a config's own entries win over them.
    sampling   options of `sampling` that the method cannot do without, with the value that they must have; where it is
               a Schedule, any schedule will do.
    """

    behaviour: Behaviour
    terms: tuple[Term, ...]
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A preset's function, and where it comes from.

    source    paper or page.
    status    experimental: only secondary sources were read, or the choice of some constants is ours.
    example   parameters to show it with, where some have no default.
    """

    make: Callable[..., Preset]
    source: str
    status: Status
    example: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.make.__name__

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.make) or ""

    @property
    def formula(self) -> str:
        """What is minimised: the first paragraph of the function's docstring, on one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @cached_property
    def parameters(self) -> type[BaseModel]:
        """The function's parameters as a model that refuses what it does not know."""
        hints = get_type_hints(self.make, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(self.make).parameters.items()
        }
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)


METHODS: dict[str, Method] = {}


def method(
    source: str, status: Status = "vetted", example: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Preset]], Callable[..., Preset]]:
    """Registers a function as the preset of its name."""

    def register(make: Callable[..., Preset]) -> Callable[..., Preset]:
        METHODS[make.__name__] = Method(make, source, status, example or {})
        return make

    return register


def expand(name: str, parameters: Mapping[str, Any]) -> Preset:
    """The preset `name` with its parameters, read as strictly as a config file.

    Raises ConfigError for a name or parameter that does not exist or is missing, ValidationError for values that the
    preset refuses.
    """
    if name not in METHODS:
        raise ConfigError(f"objective.preset: there is no {name!r}; the presets are {', '.join(sorted(METHODS))}")
    made = METHODS[name]
    known = made.parameters.model_fields
    for key in parameters:
        if key not in known:
            raise ConfigError(f"objective.parameters.{key}: preset {name!r} takes {', '.join(known) or 'none'}")
    for key, option in known.items():
        if option.is_required() and key not in parameters:
            line = f"objective: {{preset: {name}, parameters: {as_line(made.example)}}}"
            raise ConfigError(f"objective.parameters.{key}: preset {name!r} needs it, e.g. {line}")
    read = made.parameters.model_validate_json(json.dumps(dict(parameters)), strict=True)
    return made.make(**{key: getattr(read, key) for key in parameters})


def as_line(value: Any) -> str:
    """Plain data as YAML would have it on one line."""
    if isinstance(value, Schedule):
        return as_line(value.model_dump())
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_line(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_line, value))}]"
    return value if isinstance(value, str) and value.replace("_", "").isalnum() else json.dumps(value)
