"""From a transcript, in any of the shapes people have one in, to the answers in it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opd.config.sources import Columns
from opd.errors import DataError
from opd.journal.lock import is_run_folder
from opd.journal.reader import read_metrics, read_rollouts
from opd.prompts.rows import RowReader
from opd.types import Row

Transcript = str | Path | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]]

ENDINGS = (".txt", ".md", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text to be read.

    row       its prompt and, as completion, the answer itself.
    turn      which of a chat's assistant turns it is, from 0.
    closed    whether its end belongs to it: an answer ends, a piece of raw text may go on.
    recorded  the line of a run's rollouts: ids are then taken from it, not from text.
    """

    row: Row
    turn: int = 0
    closed: bool = True
    recorded: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answers:
    """What a transcript holds; `more` says whether answers beyond the limit were left out."""

    name: str
    answers: list[Answer]
    more: bool


def read_transcript(given: Transcript, columns: Columns | None = None, *, step: int | None, limit: int) -> Answers:
    """The first `limit` answers of a transcript; DataError when it cannot be read or holds none.

    given     a file: .txt and .md are raw text; .json is a row, a list of rows or one chat; .jsonl is rows. `-` is
              standard input, JSON or raw text. A run folder: the rollouts of its last step, or of `step`. From Python:
              a row, a list of rows (a string is raw text, a list a chat) or one chat.
    columns   which columns of a row mean what. Rows are what training takes, `RowReader` reads them; of a chat in
              `messages` every assistant turn is an answer to what stands before it. One that opens a chat is skipped.
    """
    name, found = _answers(given, columns, step)
    answers = list(islice(found, limit + 1))
    if not answers:
        raise DataError(
            f"{name}: there is nothing to grade: no row has an answer (columns completion, messages or text)"
        )
    return Answers(name, answers[:limit], len(answers) > limit)


def _answers(given: Transcript, columns: Columns | None, step: int | None) -> tuple[str, Iterator[Answer]]:
    if isinstance(given, str | Path) and str(given) != "-" and is_run_folder(Path(given).expanduser()):
        _unread(columns, "a run's rollouts have no columns to name")
        folder = Path(given).expanduser().resolve()
        return folder.name, _recorded(folder, step)
    if step is not None:
        raise DataError(f"step={step} is for the folder of a run, and {_shown(given)} is none")
    if not isinstance(given, str | Path):
        name = "transcript"
        return name, _of_records(name, [(f"{name}: row {n}", r) for n, r in enumerate(_rows(given))], columns)
    place = "standard input" if str(given) == "-" else str(given)
    name = "stdin" if str(given) == "-" else Path(given).stem
    text = _text(given, place)
    if not text.strip():
        raise DataError(f"{place}: is empty, so there is nothing to grade")
    records = _records(text, place, Path(given).suffix if str(given) != "-" else "")
    if records is None:
        _unread(columns, f"{place} is raw text and has no columns")
        return name, _of_records(name, [(place, {"text": text})], None)
    return name, _of_records(name, records, columns)


def _unread(columns: Columns | None, why: str) -> None:
    if columns is not None:
        raise DataError(f"columns.*: nothing reads them: {why}")


def _shown(given: Any) -> str:
    return str(given) if isinstance(given, str | Path) else "this transcript"


# ---- files ----------------------------------------------------------------------------------------------------------


def _text(given: str | Path, place: str) -> str:
    try:
        if str(given) == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        path = Path(given).expanduser()
        if path.is_dir():
            raise DataError(f"{place}: this folder is no run of opd")
        if path.suffix not in ENDINGS:
            raise DataError(
                f"{place}: a transcript ends in {', '.join(ENDINGS)}, is - (standard input) or a run folder"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = ". In Python, a text itself is given as {'text': ...}" if missing else ""
        raise DataError(f"{place}: cannot be read: {error.strerror}{hint}") from error


def _records(text: str, place: str, ending: str) -> list[tuple[str, Any]] | None:
    """(where it stands, record) for each row of JSON or JSON Lines; None for raw text. Without an ending, what reads
    as JSON is JSON."""
    if ending in (".txt", ".md") or (not ending and text.lstrip()[0] not in "[{"):
        return None
    if ending != ".jsonl":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if ending:
                raise DataError(f"{place}: not JSON: {error}") from error
        else:
            return [(f"{place}: row {n}", record) for n, record in enumerate(_rows(whole))]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                records.append((f"{place}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            if not ending:
                return None
            raise DataError(f"{place}:{number}: not a JSON object: {error}") from error
    return records


def _rows(given: Any) -> list[Any]:
    """A row, a list of rows, or one chat: as rows. A string is raw text; a list among rows is a chat."""
    if isinstance(given, Mapping):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise DataError(f"a transcript is a row, a list of rows or a chat, this is of type {type(given).__name__}")
    if given and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in given):
        return [{"messages": list(given)}]
    return [_row(item) for item in given]


def _row(item: Any) -> Any:
    if isinstance(item, str):
        return {"text": item}
    return {"messages": list(item)} if isinstance(item, list | tuple) else item


# ---- rows -----------------------------------------------------------------------------------------------------------


def _of_records(name: str, records: Sequence[tuple[str, Any]], columns: Columns | None) -> Iterator[Answer]:
    reader: RowReader | None = None
    for n, (where, record) in enumerate(records):
        reader = reader or RowReader(columns or Columns(), record, where)
        row = reader.row(f"{name}/{n}", name, record, where)
        if reader.used[0] == reader.columns.messages:
            yield from _turns(row)
        elif row.completion is not None:
            yield Answer(row=row, closed=row.prompt != "")


def _turns(row: Row) -> Iterator[Answer]:
    """Every assistant turn of a chat, each behind its own context."""
    assert not isinstance(row.prompt, str)
    turns = list(row.prompt)
    if row.completion is not None:
        turns.append({"role": "assistant", "content": row.completion})
    places = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    for number, n in enumerate(places):
        if n > 0:
            id = row.id if len(places) == 1 else f"{row.id}/{number}"
            before = dataclasses.replace(row, id=id, prompt=tuple(turns[:n]), completion=turns[n]["content"])
            yield Answer(row=before, turn=number)


# ---- a run's rollouts -----------------------------------------------------------------------------------------------


def _recorded(folder: Path, step: int | None) -> Iterator[Answer]:
    if step is None:
        steps = [line["step"] for line in read_metrics(folder)]
        if not steps:
            raise DataError(f"{folder}: this run has written no rollouts yet")
        step = steps[-1]
    for line in read_rollouts(folder, step):
        row = Row(id=line["prompt_id"], domain=line["domain"], prompt=line["prompt"], completion=line["response"])
        yield Answer(row=row, closed=line["finish_reason"] == "stop", recorded=line)
