"""The token view on terminals and in pipes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from opd.journal.graded import check
from opd.reports.terminal_tokens import show
from tests.journal.test_graded import record
from tests.reports.parts import HOSTILE, plain_console, terminal


def coloured(**environ: str) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    settings = {"force_terminal": True, "color_system": "truecolor", "_environ": environ}
    return Console(file=stream, width=80, **settings), raw  # type: ignore[arg-type]


def text_of(raw: io.BytesIO) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode())


def made(pieces: Sequence[str], penalties: Sequence[float | None], student: bool = False) -> Any:
    """One answer whose tokens have these penalties for teacher a."""
    graded = record(student)
    answer = graded["answers"][0]
    n = len(pieces)
    answer |= {"pieces": pieces, "ids": list(range(n)), "mask": [int(p is not None) for p in penalties]}
    for key, value in (("logprobs", 0.0), ("entropy", 0.0), ("top", [[0, -0.1], [1, -9.0]])):
        answer[key] = {name: [value] * n for name in answer[key]}
    answer["logprobs"]["a"] = [0.0 if p is None else p for p in penalties]
    if student:
        answer["reverse_kl"] = {"a": [0.1] * n, "b": [0.1] * n}
    graded["answers"] = [answer]
    return check(graded)


def test_without_colour_bad_tokens_are_marked_and_the_words_are_explained() -> None:
    console, raw = plain_console()
    show(made(["two", " plus", " two", " is", " five", "."], [0.1, -0.4, -2.9, 0.0, -7.24, None]), console)
    text = text_of(raw)
    assert "two plus two is [five -7.2]." in text and "\x1b" not in raw.getvalue().decode()
    said = " ".join(text.split())
    assert "marked: [token penalty]" in said and "log q + entropy" in said and "20 times less likely" in said
    assert "models/a" in text and "models/b" in text, "every teacher has its say"
    worst = text[text.index("Worst tokens") : text.index("By domain")]
    assert "   -7.2     -7.2   ?two plus two is[ five].\n         token 5 of x\n" in worst
    assert 'a would write "zero" 90.5 %, " one" <0.1 %' in worst
    assert worst.index("five]") < worst.index("[ two]") and "plus]" not in worst
    assert re.search(r"-2.088 +5   maths", text)


def test_beside_a_student_both_log_probabilities_and_both_alternatives_are_shown() -> None:
    console, raw = plain_console()
    show(made(["a", "b"], [0.0, -5.0], student=True), console)
    text = text_of(raw)
    assert "log q - log p" in text and "models/student" in " ".join(text.split())
    assert "penalty  teacher  student" in text and "   -5.0     -5.0      0.0   ?a[b]" in text
    assert 'student would write "zero"' in text


def test_with_colours_bad_is_orange_good_is_blue_and_nothing_is_bracketed() -> None:
    console, raw = coloured()
    show(made(["fine", " awful", " great", " even"], [0.0, -7.0, 2.0, 0.1]), console)
    output = raw.getvalue().decode()
    assert "\x1b[38;2;255;255;255;48;2;127;47;0mawful" in output and "[awful" not in output
    assert "\x1b[38;2;0;0;0;48;2;111;171;224m great" in output
    assert "colours:" in text_of(raw) and "fine awful great even" in text_of(raw)


@pytest.mark.parametrize("make", [lambda: coloured(NO_COLOR="1"), terminal])
def test_a_terminal_without_enough_colours_gets_marks(make) -> None:
    console, raw = make()
    show(made(["fine", " awful"], [0.0, -7.0]), console)
    assert "fine [awful -7.0]" in text_of(raw) and "48;2" not in raw.getvalue().decode()


@pytest.mark.parametrize("make", [plain_console, terminal, coloured])
def test_S_6_nothing_foreign_reaches_the_terminal_raw(make) -> None:
    for value in (0.0, -9.0):  # unmarked and marked
        console, raw = make()
        graded = made(["a", HOSTILE, "b"], [0.0, value, 0.0], student=True)
        graded["title"] = graded["readers"]["a"]["model"] = graded["readers"]["student"]["model"] = HOSTILE
        graded["texts"] = dict.fromkeys(graded["texts"], HOSTILE)
        graded["answers"][0].update(id=HOSTILE, domain=HOSTILE, prompt=HOSTILE)
        show(graded, console)
        output = raw.getvalue().decode()
        shown = re.sub(r"\x1b\[[0-9;]*m", "", output.replace("\x1b[31m", "HARM"))
        for harm in ("HARM", "\x1b", "\x07", "\r", "\u202e", "\u2066", "\u2028", "\U000e0041"):
            assert harm not in shown
        assert "[bold]" in shown and ":smile:" in shown, "rich's own markup is text here"


@pytest.mark.parametrize("make", [plain_console, coloured])
def test_everything_fits_80_columns(make) -> None:
    words = [" word", " 中文中文", "x" * 30, "y" * 30, "z" * 30, "\n", " ", "tab\t", "-" * 200, ""] * 12
    values = [0.0, -4.0, -8.0, 0.0, -1.0, -5.0, -3.3, 0.0, -6.0, -9.0] * 12
    for student in (False, True):
        console, raw = make()
        graded = made(words, values, student=student)
        graded["texts"] = {"0": "中" * 90, "1": "y" * 90}
        graded["answers"][0].update(id="i" * 200, domain="d" * 200, prompt="p" * 200)
        show(graded, console)
        lines = text_of(raw).split("\n")
        assert max(map(cell_len, lines)) <= 80
        assert "word" in "".join(lines) and "<id " in "".join(lines), "a token without a text of its own has its id"


def test_words_are_broken_between_and_marks_never_inside() -> None:
    console, raw = plain_console()
    show(made([f" w{n:02d}ord" for n in range(40)], [-5.0 if n % 3 == 0 else 0.0 for n in range(40)]), console)
    lines = text_of(raw).splitlines()
    for n in range(0, 40, 3):
        assert any(f"[w{n:02d}ord -5.0]" in line for line in lines)
    for n in range(1, 40, 3):
        assert any(re.search(rf"\bw{n:02d}ord\b", line) for line in lines)


def test_the_worst_answers_are_shown_in_their_order_and_long_ones_around_their_worst_token() -> None:
    graded = made(["x"] * 900, [0.0] * 900)
    first = graded["answers"][0]
    graded["answers"] = [{**first, "id": f"answer {n}", "logprobs": dict(first["logprobs"])} for n in range(4)]
    for n, value in ((3, -9.0), (1, -8.0), (0, -2.0)):
        graded["answers"][n]["logprobs"]["a"] = [0.0] * 700 + [value] + [0.0] * 199
    console, raw = plain_console()
    show(graded, console, limit=2)
    text = text_of(raw)
    text = text[: text.index("Worst tokens")]
    assert [line for line in text.splitlines() if line.startswith("answer ")] == ["answer 1", "answer 3"]
    assert "2 more answers" in text and "[x -9.0]" in text and text.count("x") < 2 * 410 and "... x" in text


def test_a_record_without_any_number_says_so() -> None:
    console, raw = plain_console()
    show(made(["a"], [None]), console)
    assert "no token that can be shown" in text_of(raw)
