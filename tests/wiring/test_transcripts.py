"""Which answers are in a transcript, whatever shape it has."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.config.sources import Columns
from opd.errors import DataError
from opd.wiring.transcripts import read_transcript

CHAT = [
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "sure?"},
]
PAIRS = [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "3 + 3?", "completion": "7"}]


def found(given, **more) -> list[tuple]:
    """(prompt, answer, turn, whether its end belongs to it) of every answer."""
    answers = read_transcript(given, **{"step": None, "limit": 50, **more}).answers
    return [(a.row.prompt, a.row.completion, a.turn, a.closed) for a in answers]


def file(tmp_path: Path, name: str, content) -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_raw_text_is_one_answer_to_nothing_with_an_open_end(tmp_path: Path) -> None:
    text = "# One\n\n{not json}\n"
    expected = [("", text, 0, False)]
    assert found(file(tmp_path, "a.txt", text)) == found(str(file(tmp_path, "a.md", text))) == expected
    assert found({"text": text}) == found([text]) == expected
    assert found(file(tmp_path, "bom.txt", "\ufeff" + text)) == expected


def test_rows_from_json_json_lines_and_python(tmp_path: Path) -> None:
    expected = [("2 + 2?", "4", 0, True), ("3 + 3?", "7", 0, True)]
    lines = "\n".join(json.dumps(row) for row in PAIRS) + "\n\n"
    assert found(PAIRS) == expected
    assert found(file(tmp_path, "a.json", PAIRS)) == found(file(tmp_path, "a.jsonl", lines)) == expected
    assert found(file(tmp_path, "one.json", PAIRS[0])) == found(PAIRS[0]) == expected[:1]
    separators = "x\u2028y\u0085z"  # line breaks to Python, not to JSON Lines
    text = json.dumps({"text": separators}, ensure_ascii=False)
    assert found(file(tmp_path, "b.jsonl", text)) == [("", separators, 0, False)]


def test_every_assistant_turn_is_an_answer_behind_its_own_context(tmp_path: Path) -> None:
    """The one that opens the chat has nothing before it, and the last user turn waits for an answer."""
    expected = [(tuple(CHAT[:2]), "4", 1, True), (tuple(CHAT[:4]), "7", 2, True)]
    assert (
        found(CHAT) == found([CHAT]) == found({"messages": CHAT}) == found(file(tmp_path, "a.json", CHAT)) == expected
    )
    assert found(file(tmp_path, "a.jsonl", json.dumps({"messages": CHAT}))) == expected
    ids = [answer.row.id for answer in read_transcript(CHAT, step=None, limit=9).answers]
    assert len(set(ids)) == 2
    few_shot = {"prompt": CHAT[1:4], "completion": "7"}
    assert found(few_shot) == [(tuple(CHAT[1:4]), "7", 0, True)], "an example inside a prompt is no answer"


def test_standard_input_is_json_where_it_reads_as_json(monkeypatch) -> None:
    def given(text: str) -> list[tuple]:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        return found("-")

    assert given(json.dumps(PAIRS)) == given("\n".join(map(json.dumps, PAIRS))) == found(PAIRS)
    assert given(json.dumps(CHAT)) == found(CHAT)
    for raw in ("42", "{a} b", "[1] said so\nand more", '"quoted"'):
        assert given(raw) == [("", raw, 0, False)]


def test_named_columns_and_the_limit() -> None:
    rows = [{"q": "a?", "a": "b", "about": "letters"}] * 3
    columns = Columns(prompt="q", completion="a", domain="about")
    made = read_transcript(rows, columns, step=None, limit=2)
    assert [(a.row.prompt, a.row.domain) for a in made.answers] == [("a?", "letters")] * 2 and made.more
    assert not read_transcript(rows, columns, step=None, limit=3).more


REFUSED = {
    "a prompt alone": ([{"prompt": "a?"}], "nothing to grade"),
    "a chat without answers": (CHAT[1:2], "nothing to grade"),
    "only an opening": ({"messages": CHAT[:2]}, "nothing to grade"),
    "no list": (3, "of type int"),
    "rows of two kinds": ([PAIRS[0], {"text": "b"}], "row 1"),
    "unknown columns": ([{"question": "a"}], "question"),
    "a file that is not there": ("no/such.txt", "No such file.*'text'"),
    "another ending": ("answers.pdf", r"\.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_answer_is_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        found(given)


def test_files_that_cannot_be_read_are_refused_with_their_place(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.json", "{", "not JSON"),
        ("a.jsonl", '{"text": "a"}\n{', "a.jsonl:2"),
        ("deep.json", "[" * 100_000, "not JSON"),
        ("empty.txt", " \n", "empty"),
    ):
        with pytest.raises(DataError, match=message):
            found(file(tmp_path, name, content))
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        found(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="no run"):
        found(tmp_path)
    text = file(tmp_path, "b.txt", "text")
    with pytest.raises(DataError, match="no columns"):
        found(text, columns=Columns(text="t"))
    with pytest.raises(DataError, match="step=3"):
        found(text, step=3)
