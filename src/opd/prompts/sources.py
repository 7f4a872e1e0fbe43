"""Where rows come from: files, datasets, generated problems, or Python itself. Every row is checked when it is read."""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from opd.config.schema import (
    Columns,
    DatasetSource,
    InlineSource,
    JsonlSource,
    ParquetSource,
    ReasoningGymSource,
    Source,
)
from opd.errors import DataError
from opd.types import Message, Row

# What a chat template may read of a turn besides its text. Dropping it would change the chat without a word.
_MORE_THAN_TEXT = ("tool_calls", "reasoning_content", "thinking")


def read_source(source: Source) -> list[Row]:
    """All rows of a source (at most `source.limit`), in their own order; DataError for the first that cannot be used.

    The first row decides what all rows are, by the first of these columns that it has:

        messages             a chat; its final assistant turn is the completion, a chat that ends with the user is a prompt
        prompt [completion]  a string or a chat, and maybe its answer (a string or one assistant turn)
        text                 raw text: the completion of an empty prompt

    A row's id is `<source name>/<index in the source>`; columns with another meaning travel to the graders.
    """
    name = source_name(source)
    # From Python, or in a config, a prompt may be a bare string.
    records = ((where, {source.columns.prompt: r} if isinstance(r, str) else r) for where, r in _records(source))
    rows: list[Row] = []
    reader: _Reader | None = None
    for index, (where, record) in enumerate(islice(records, source.limit)):
        reader = reader or _Reader(source.columns, record, where)
        rows.append(reader.row(f"{name}/{index}", name, record, where))
    if not rows:
        raise DataError(f"{name}: there are no rows in {_place(source)}")
    return rows


def source_name(source: Source) -> str:
    """How reports call a source: its `name`, else the stem of its file, its dataset's last name, or its task."""
    if source.name is not None:
        return source.name
    if isinstance(source, ReasoningGymSource):
        return source.task
    if isinstance(source, InlineSource):
        return "inline"
    last = Path(source.path).name
    return last.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json").removesuffix(".parquet")


# ---- from a record to a row -----------------------------------------------------------------------------------------


class _Reader:
    """Reads records that all have the columns of the first."""

    def __init__(self, columns: Columns, first: Any, where: str) -> None:
        self.columns = columns
        self.used = _used(columns, _mapping(first, where))
        if not self.used:
            raise DataError(
                f"{where}: none of the columns {columns.messages!r}, {columns.prompt!r}, {columns.text!r} is there, "
                f"only {_named(first)}. Say which one it is: columns.prompt=..., columns.messages=... or columns.text=..."
            )

    def row(self, id: str, name: str, record: Any, where: str) -> Row:
        columns, used = self.columns, self.used
        if _used(columns, _mapping(record, where)) != used:
            raise DataError(f"{where}: its columns are {_named(record)}, but rows before it have {_named(used)}")
        completion: str | None
        if used[0] == columns.messages:
            turns = _turns(record[columns.messages], f"{where}: {columns.messages}")
            prompt, completion = _split(turns, f"{where}: {columns.messages}")
        elif used[0] == columns.prompt:
            prompt = _prompt(record[columns.prompt], f"{where}: {columns.prompt}")
            completion = _completion(record[columns.completion], f"{where}: {columns.completion}") if used[1:] else None
        else:
            prompt, completion = "", _string(record[columns.text], f"{where}: {columns.text}")
        domain = name
        if columns.domain is not None:
            if columns.domain not in record:
                raise DataError(f"{where}: no column {columns.domain!r} (columns.domain), only {_named(record)}")
            domain = _string(record[columns.domain], f"{where}: {columns.domain}")
        rest = {key: value for key, value in record.items() if key not in (*used, columns.domain)}
        return Row(id=id, domain=domain, prompt=prompt, completion=completion, columns=rest)


def _used(columns: Columns, record: Mapping[str, Any]) -> tuple[str, ...]:
    if columns.messages in record:
        return (columns.messages,)
    if columns.prompt in record:
        return (columns.prompt, *([columns.completion] if columns.completion in record else []))
    return (columns.text,) if columns.text in record else ()


def _mapping(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a row is an object with columns, this one is {_kind(record)}")
    return record


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_kind(value)}, not a string")
    if not value.strip():
        raise DataError(f"{where} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} is not valid Unicode: {error.reason} at character {error.start}") from error
    return value


def _turns(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is {_kind(value)}, not a list of turns {{role, content}}")
    if not value:
        raise DataError(f"{where} has no turns")
    turns: list[Message] = []
    for number, turn in enumerate(value):
        here = f"{where}[{number}]"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{here} is {_kind(turn)}, not a turn with the keys role and content")
        more = [key for key in _MORE_THAN_TEXT if turn.get(key)]
        if more:
            raise DataError(f"{here} has {more[0]}: only turns of plain text can be used")
        content = turn["content"]
        # An empty system prompt is a common way to switch the template's own one off.
        content = "" if turn["role"] == "system" and content == "" else _string(content, f"{here}.content")
        turns.append({"role": _string(turn["role"], f"{here}.role"), "content": content})
    return tuple(turns)


def _split(turns: tuple[Message, ...], where: str) -> tuple[tuple[Message, ...], str | None]:
    last = turns[-1]["role"]
    if last == "user":
        return turns, None
    if last != "assistant":
        raise DataError(f"{where} ends with the role {last!r}; a chat ends with the user or the assistant")
    if len(turns) == 1:
        raise DataError(f"{where} is an assistant turn with nothing before it")
    return turns[:-1], turns[-1]["content"]


def _prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return _string(value, where)
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is {_kind(value)}, neither a string nor a list of turns {{role, content}}")
    turns = _turns(value, where)
    if turns[-1]["role"] == "assistant":
        raise DataError(f"{where} ends with an assistant turn; a chat with its answer goes into columns.messages")
    return turns


def _completion(value: Any, where: str) -> str:
    if isinstance(value, list | tuple):
        turns = _turns(value, where)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DataError(f"{where} has the roles {[turn['role'] for turn in turns]}, not one assistant turn")
        return turns[0]["content"]
    return _string(value, where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"an object with the keys {_named(value)}"
    return f"of type {type(value).__name__}"


def _named(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "nothing"


# ---- from a source to records -----------------------------------------------------------------------------------------


def _records(source: Source) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) for every record of a source."""
    if isinstance(source, JsonlSource):
        return _jsonl(source.path)
    if isinstance(source, InlineSource):
        return _counted(source_name(source), source.rows)
    if isinstance(source, ParquetSource):
        return _counted(source.path, _parquet(source.path))
    if isinstance(source, DatasetSource):
        return _counted(source.path, _dataset(source))
    return _counted(source.task, _reasoning_gym(source))


def _counted(place: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{place}: row {index}", record) for index, record in enumerate(records))


def _place(source: Source) -> str:
    return source.task if isinstance(source, ReasoningGymSource) else getattr(source, "path", "the config")


def _jsonl(path: str) -> Iterator[tuple[str, Any]]:
    opened: Callable[..., Any] = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opened(Path(path).expanduser(), "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not a JSON object: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start} of the line") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.dataset
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow: install opd[data]") from error
    try:
        for batch in pyarrow.dataset.dataset(Path(path).expanduser(), format="parquet").to_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _dataset(source: DatasetSource) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source.path}: datasets are read with the `datasets` library: install opd[data]") from error
    folder = Path(source.path).expanduser()
    saved = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(folder)
        else:
            place = str(folder) if folder.is_dir() else source.path
            loaded = datasets.load_dataset(place, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the hub, the cache and each file format raise their own kinds
        raise DataError(
            f"{source.path} (config {source.config}, split {source.split!r}, revision {source.revision or 'default'}): "
            f"cannot be loaded: {type(error).__name__}: {error}. For a hub dataset check the name and the network "
            "(HF_HUB_OFFLINE); a private or gated one needs HF_TOKEN"
        ) from error
    if isinstance(loaded, Mapping):
        if source.split not in loaded:
            raise DataError(f"{source.path}: there is no split {source.split!r}, only {_named(map(str, loaded))}")
        loaded = loaded[source.split]
    return loaded


def _reasoning_gym(source: ReasoningGymSource) -> Iterator[Any]:
    """Problems with all that their scorer needs later: task, settings (with seed and size), index, and the entry."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise DataError(f"{source.task}: reasoning-gym is not there: install opd[reasoning-gym]") from error
    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, n=3, cutoff=0.4)
        meant = f"; did you mean {_named(near)}?" if near else ""
        raise DataError(f"reasoning-gym has no task {source.task!r}{meant}")
    settings = {**source.settings, "seed": source.seed, "size": source.size}
    try:
        problems = create_dataset(source.task, **settings)
        for index in range(source.size):
            entry = problems[index]
            yield {
                source.columns.prompt: entry["question"],
                "answer": entry["answer"],
                "reasoning_gym_task": source.task,
                "reasoning_gym_settings": settings,
                "reasoning_gym_index": index,
                # As JSON has it: tuples are lists, keys are strings. Problems made from settings and index are exact.
                "reasoning_gym_entry": json.loads(json.dumps(entry, default=str)),
            }
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"reasoning-gym task {source.task!r} with the settings {source.settings}: {type(error).__name__}: {error}"
        ) from error
