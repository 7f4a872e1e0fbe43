"""What a scorer reads in place of the row's own prompt: more than the student sees (a solution, feedback), or less."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from string import Formatter

from opd.errors import ConfigError, DataError
from opd.types import Message, Row

PROMPT = "{prompt}"  # the template that changes nothing


@dataclass(frozen=True)
class PromptContext:
    """Another prompt for a row, made from its own and its columns.

    template       text with {prompt}, {completion} (the answer that came with the row) and {column}. In a chat it takes
                   the place of the last user turn, whose text is then {prompt}. Braces that are text are doubled.
    system_prompt  in place of the format's own, and before the system turn that a chat brings; None: the format's own.

    ConfigError for a template that names something else than columns.
    """

    template: str = PROMPT
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for _, name, spec, conversion in self._parsed():
            if name is None:
                continue
            if spec or conversion or not name or any(sign in name for sign in ".[]") or name.isdecimal():
                raise ConfigError(
                    f"context.template {self.template!r}: {{{name}}} is no column. Write {{prompt}}, {{completion}} or "
                    "{column}; double the braces that are text"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row must bring besides its prompt."""
        names = (name for _, name, _, _ in self._parsed() if name is not None)
        return tuple(dict.fromkeys(name for name in names if name != "prompt"))

    def row(self, row: Row) -> Row:
        """The row with the prompt that is read in place of its own; DataError when it lacks a column."""
        if self.template == PROMPT:
            return row
        if isinstance(row.prompt, str):
            return replace(row, prompt=self._filled(row, row.prompt))
        turns: list[Message] = list(row.prompt)
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is None:
            raise DataError(f"row {row.id}: its chat has no user turn whose place context.template could take")
        turns[last] = {"role": "user", "content": self._filled(row, turns[last]["content"])}
        return replace(row, prompt=tuple(turns))

    def _filled(self, row: Row, prompt: str) -> str:
        parts = []
        for text, name, _, _ in self._parsed():
            parts.append(text)
            if name is not None:
                parts.append(prompt if name == "prompt" else self._value(row, name))
        return "".join(parts)

    def _value(self, row: Row, name: str) -> str:
        value = row.completion if name == "completion" else row.columns.get(name)
        if value is None:
            have = ", ".join(sorted(row.columns)) or "none"
            raise DataError(
                f"row {row.id}: the context of a scorer needs the column {name!r}, and the row has none (its columns: "
                f"{have}). Add it to the data, or name another column: in objective.parameters.column where a preset "
                f"has it, else in context.template, which is {self.template!r}"
            )
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    def _parsed(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            return list(Formatter().parse(self.template))
        except ValueError as error:
            what = f"context.template {self.template!r}: {error}; double the braces that are text"
            raise ConfigError(what) from error
