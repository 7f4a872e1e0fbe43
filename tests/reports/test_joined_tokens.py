"""A teacher with another tokenizer, as a person meets it: the token page, the terminal, the report of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from opd.journal.graded import check, worst
from opd.reports.caveats import caveats
from opd.reports.page.curves import figures
from opd.reports.page.report import report
from opd.reports.page.tokens import graded_page, token_view
from opd.reports.run_data import read_run
from opd.reports.terminal_tokens import show
from tests.browser import Browser
from tests.browser import browser as browser
from tests.reports.graded import by_hand, joined
from tests.reports.parts import plain_console
from tests.reports.runs import make_run
from tests.reports.test_report_page import shown as as_read
from tests.reports.test_token_page import panel, shown, token

CLASSES = "[...document.querySelectorAll('.token-text > [data-token]')].map(e => e.className)"
COVERED = (
    "teacher has another tokenizer: 85.7 % of the tokens fit to tokens of its own, 42.9 % are the same token to both"
)


def test_spans_are_joined_split_or_dotted_and_said_in_the_legend(browser: Browser, tmp_path: Path) -> None:
    with shown(browser, tmp_path, joined()) as tab:
        first, second, split, same, none, mark, end = tab.js(CLASSES)
        assert first == "t-m4 t-join t-join-first" and second == "t-m4 t-join t-join-last"
        assert split == "t-m5 t-split" and same == "t-0" and mark == "t-0" and end == "t-m1 t-end"
        assert none == "t-unmapped"
        said = tab.js("document.querySelector('#token-view').innerText")
        assert COVERED in said and "1.20 tokens in the mean, and 1.20 of its own" in said
        assert "one span, which the teacher reads in tokens of its own" in said
        borders = tab.js(
            "[...document.querySelectorAll('.token-text > [data-token]')].map(e => {"
            " const s = getComputedStyle(e); return s.borderBottomWidth + s.borderBottomStyle; })"
        )
        assert borders[:4] == ["2pxsolid", "2pxsolid", "2pxdotted", "0pxnone"]
        assert tab.js("document.querySelector('#token-colour').parentNode.hidden"), (
            "there is no KL over two vocabularies"
        )


def test_the_panel_shows_both_sides_of_a_span_and_its_number_as_a_whole(browser: Browser, tmp_path: Path) -> None:
    with shown(browser, tmp_path, joined()) as tab:
        tab.click(token(1))
        said = panel(tab)
        assert "−4.00 nats for the 2 tokens of its span: 55 times less likely to the teacher" in said
        sides = tab.js("[...document.querySelectorAll('.token-sides > dd')].map(d => d.textContent)")
        assert sides == ["hello", "hello−5.00"], "two tokens here, one of the teacher's with its log-probability"
        assert tab.js("document.querySelectorAll('.token-sides > dd:nth-of-type(1) > .token-side').length") == 2
        rows = tab.js("[...document.querySelectorAll('.token-readers tr')].map(r => r.innerText.split(/\\s*\\t\\s*/))")
        assert rows[1:] == [
            ["student", "−0.500", "60.7 %", "0.50"],
            ["student, span", "−1.000", "36.8 %", "1.00"],
            ["teacher, span", "−5.000", "0.67 %", "0.50"],
        ]
        lists = tab.js("[...document.querySelectorAll('.token-tops > div')].map(d => d.innerText.split('\\n'))")
        assert lists[1] == ["teacher, where the span begins", "Hi", "90.5 %", "</s>", "1.8 %", "hello", "0.67 %"]
        tab.press("ArrowRight")
        tab.press("ArrowRight")
        assert "−0.05 nats: about as likely" in panel(tab) and "one span" not in panel(tab)


def test_why_a_token_has_no_number_is_said(browser: Browser, tmp_path: Path) -> None:
    record = joined()
    with shown(browser, tmp_path, record) as tab:
        tab.hover(token(4))
        assert "No number: part of a character that is not whole, which teacher cannot read." in panel(tab)
        title = tab.js("document.querySelector('.t-unmapped[data-token]').title")
        assert title.startswith("No number: part of a character")
    record["answers"][0]["pieces"][4] = "<think>"
    with shown(browser, tmp_path, record) as tab:
        tab.hover(token(4))
        assert "no such control token, or reads other text here" in panel(tab)


def test_the_next_worst_goes_from_span_to_span(browser: Browser, tmp_path: Path) -> None:
    record = check(joined())
    order = [place for _, place, _ in worst(record, 9, "teacher")]
    assert order == [2, 0, 6, 3, 5], "token 1 is said with token 0"
    with shown(browser, tmp_path, record) as tab:
        assert "5 tokens to go through" in tab.js("document.querySelector('#token-rank').innerText")
        for place in order:
            tab.press("n")
            assert f"token {place + 1} of 7" in panel(tab)


def test_without_scripts_and_cut_short_the_spans_are_there_too(browser: Browser, tmp_path: Path) -> None:
    with shown(browser, tmp_path, joined(), scripts=False) as tab:
        classes = tab.js("[...document.querySelectorAll('.token-static .token-text > span')].map(e => e.className)")
        assert classes[:5] == [
            "t-m4 t-join t-join-first",
            "t-m4 t-join t-join-last",
            "t-m5 t-split",
            "t-0",
            "t-unmapped",
        ]
        title = tab.js("document.querySelector('.token-static .t-unmapped').title")
        assert title.startswith("teacher reads nothing here, or something else")
    long = joined()
    answer = long["answers"][0]
    answer["prompt"] = "p" * 6000
    whole = token_view([check(long)])
    small = token_view([check(long)], budget_bytes=len(whole.body.encode()) + 600)
    kept = small.data["token-data"]["records"][0]["answers"][0]
    assert 0 < len(kept["spans"][1]) < 7 and kept["spans"][0] is None, "the student has none"
    with shown(browser, tmp_path, small) as tab:
        tab.hover(token(0))
        assert "teacher" in panel(tab)


def test_two_teachers_one_with_each_kind_of_tokenizer(browser: Browser, tmp_path: Path) -> None:
    record = joined()
    alike = by_hand(*(("x", -0.5, -3.0),) * 7)["answers"][0]
    record["teachers"] = ["alike", "teacher"]
    record["readers"]["alike"] = {"model": "example/alike", "fingerprint": ""}
    for key in ("logprobs", "entropy", "top", "reverse_kl"):
        record["answers"][0][key]["alike"] = alike[key]["teacher"]
    with shown(browser, tmp_path, record) as tab:
        assert not any("join" in name for name in tab.js(CLASSES))
        tab.select("#token-colour", "kl")
        tab.select("#token-teacher", "1")
        assert tab.js(CLASSES)[0] == "t-m4 t-join t-join-first", "colours are of the penalty again"
        tab.select("#token-teacher", "0")
        assert not any("join" in name for name in tab.js(CLASSES))


def test_S_6_hostile_texts_of_the_teachers_own_tokens_stay_text(browser: Browser, tmp_path: Path) -> None:
    record = joined()
    answer = record["answers"][0]
    answer["own"]["teacher"][0] = [(7, "<img src=x onerror='window.fired = 1'>", -5.0)]
    record["own_texts"]["teacher"]["0"] = "</script><script>window.fired = 2</script>"
    with shown(browser, tmp_path, record) as tab:
        tab.hover(token(0))
        assert "<img src=x" in panel(tab) and "</script>" in panel(tab)
        assert tab.js("window.fired") is None


def test_a_terminal_marks_a_span_as_a_whole_and_shows_both_sides() -> None:
    record = joined()
    record["answers"][0]["logprobs"]["teacher"][:2] = [-4.5, -4.5]
    console, raw = plain_console()
    show(check(record), console)
    text = raw.getvalue().decode()
    assert COVERED in " ".join(text.split())
    assert "[hello -4.0]" in text and "[ -" not in text
    found = text[text.index("Worst tokens") : text.index("By domain")]
    assert "   -8.0     -9.0     -1.0   " in found and 'tokens 1 to 2 of one, for teacher "hello"' in found
    assert 'token 3 of one, for teacher " w" "or"' in found
    assert 'teacher would write "Hi" 90.5 %, "</s>" 1.8 %' in found
    assert "tokens 2" not in found and max(map(len, text.splitlines())) <= 80


# ---- the report of a run --------------------------------------------------------------------------------------------


def across(covered: float, same: float) -> Any:
    facts = {"coverage": covered, "same": same, "span_tokens": 1.4, "span_own_tokens": 1.1}
    return lambda step, line: line | {f"scorer/teacher/{key}": value for key, value in facts.items()}


SPAN = {"objective.preset": "span"}


def test_a_report_says_what_was_not_trained_and_draws_how_much_was(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", change_line=across(0.65, 0.4), **SPAN))
    said = as_read(report(run))
    assert "35.0 % of the tokens were not trained: teacher has another tokenizer, which reads other text there" in said
    assert "Tokens joined with teacher" in said and "Of the tokens that are joined with a teacher of another" in said
    figure = next(figure for figure in figures(run) if figure.title == "Tokens joined with teacher")
    assert [name for name, _ in figure.names] == ["a: in spans", "b: the same token"] and figure.percent
    strict = as_read(report(read_run(make_run(tmp_path / "b", change_line=across(0.95, 0.4)))))
    assert "60.0 % of the tokens were not trained: teacher has another tokenizer, and alignment strict trains" in strict
    for n, (share, options) in enumerate([((0.95, 0.4), SPAN), ((0.95, 0.85), {})]):
        fine = as_read(report(read_run(make_run(tmp_path / f"c{n}", change_line=across(*share), **options))))
        assert "were not trained" not in fine and "Tokens joined with teacher" in fine
    assert "Tokens joined" not in as_read(report(read_run(make_run(tmp_path / "d"))))


def test_runs_whose_tokens_are_joined_in_different_ways_are_told_apart(tmp_path: Path) -> None:
    runs = {
        "A": read_run(make_run(tmp_path / "a", change_line=across(0.9, 0.4), **SPAN)),
        "B": read_run(make_run(tmp_path / "b")),
    }
    (said,) = [one for one in caveats(runs, "sorting") if "joined" in one]
    assert "A span, 90.0 % of the tokens trained, B the student's own tokenizer" in said
    again = {**runs, "B": read_run(make_run(tmp_path / "c", change_line=across(0.9, 0.4), **SPAN))}
    assert not any("joined" in one for one in caveats(again, "sorting"))


@pytest.mark.parametrize("change", [lambda r: None, lambda r: r.update(student=None)])
def test_a_page_of_such_a_record_is_written_with_and_without_a_student(change) -> None:
    record = copy.deepcopy(joined())
    change(record)
    if record["student"] is None:
        for key in ("logprobs", "entropy", "top"):
            record["answers"][0][key].pop("student")
        record["answers"][0].pop("reverse_kl")
        record["readers"].pop("student")
    assert COVERED in graded_page(check(record))
