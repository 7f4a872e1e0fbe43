"""The token view as a reader meets it: in Chromium, with keys, mouse and finger."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opd.journal.graded import check, penalty, worst
from opd.reports.page.base import json_for_html, page
from opd.reports.page.tokens import TokenView, graded_page, token_view
from opd.reports.printable import printable
from tests.browser import Browser, Tab
from tests.reports.graded import by_hand, english

PAYLOADS = (
    "</script><script>window.fired = 1</script>",
    "<img src=x onerror=\"window.fired = 2; fetch('http://example.invalid/')\">",
    "<svg onload=alert(1)>",
    "<style>body { display: none }</style>",
    "\"'><b onmouseover=window.fired=3>",
    "--><!--<script>",
    "]]>&lt;{{ 7*7 }}${7*7}",
    "\u202egnp.exe\u2066",
    "\x1b[31mred\x1b]0;title\x07",
    "a\x00b",
    "\ud800 \U000e0041\u2028\ufeff",
    "__proto__",
    "javascript:window.fired=4",
)


BY_DOMAIN = "document.querySelector('#token-by-domain').parentNode.getClientRects().length > 0"


@contextmanager
def shown(browser: Browser, folder: Path, what: Any, **window: Any) -> Iterator[Tab]:
    """A record's own page, or a view of several in a page; nothing may go wrong on it."""
    file = folder / "tokens.html"
    if isinstance(what, TokenView):
        file.write_text(page("t", what.body, css=[what.css], js=[what.js], data=what.data))
    else:
        file.write_text(graded_page(check(what)))
    with browser.open(file, **window) as tab:
        yield tab
        assert tab.problems() == []


def panel(tab: Tab) -> str:
    return tab.js("document.querySelector('#token-panel').innerText")


def told(text: str) -> float:
    """The first signed number with decimals in a text."""
    found = re.search(r"[+−]?\d+\.\d+", text)
    assert found, text
    return float(found[0].replace("−", "-"))


def token(i: int, pane: int = 0) -> str:
    return f"section:nth-of-type({pane + 1}) > .token-text > [data-token='{i}']"


FOUR = by_hand(("Two", -0.5, -0.6), (" and", -0.1, -4.1), (" two", -3.0, -0.5), ("<|end|>", -0.2, -2.2))
FOUR["answers"][0]["finish_reason"] = "stop"


def test_hover_shows_everything_about_a_token(browser: Browser, tmp_path: Path):
    record = copy.deepcopy(FOUR)
    record["answers"][0]["top"]["teacher"][1] = [(2, -0.2), (0, -2.0)]
    record["answers"][0]["turn"] = 3
    with shown(browser, tmp_path, record) as tab:
        assert "Point at a token" in panel(tab)
        tab.hover(token(1))
        said = panel(tab)
        for expected in (" and", "id 1", "token 2 of 4", "turn 3", "−4.00 nats: 55 times less likely to the teacher"):
            assert expected in said
        rows = tab.js("[...document.querySelectorAll('.token-readers tr')].map(r => r.innerText.split(/\\s*\\t\\s*/))")
        assert rows[1:] == [["student", "−0.100", "90.5 %", "0.50"], ["teacher", "−4.100", "1.7 %", "0.25"]]
        assert "KL(student || teacher)\n0.1000" in said
        lists = tab.js("[...document.querySelectorAll('.token-tops > div')].map(d => d.innerText.split('\\n'))")
        assert lists[0] == ["student", " and", "90.5 %"]
        # what was written is there even when it is not among the alternatives
        assert lists[1] == ["teacher", " two", "81.9 %", "Two", "13.5 %", " and", "1.7 %"]
        bars = tab.js("[...document.querySelectorAll('.token-tops rect')].map(r => r.getAttribute('width'))")
        assert bars == ["90.48%", "81.87%", "13.53%", "1.66%"]
        written = tab.js("[...document.querySelectorAll('.t-written .t-name')].map(e => e.textContent)")
        assert written == [" and", " and"]
        tab.hover("h1")
        assert "Point at a token" in panel(tab)


def test_keyboard_focus_and_arrow_keys_show_it_too(browser: Browser, tmp_path: Path):
    with shown(browser, tmp_path, FOUR) as tab:
        tab.js("document.querySelector('.token-prompt summary').focus()")
        tab.press("Tab")
        assert "token 1 of 4" in panel(tab)
        for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 4), ("ArrowRight", 4)):
            tab.press(key)
            assert f"token {place} of 4" in panel(tab)
        assert tab.js("document.querySelectorAll('.token-text [tabindex=\"0\"]').length") == 1  # one stop for Tab
        tab.press("Escape")
        assert "Point at a token" in panel(tab)
        tab.click(token(3))  # it has the focus already
        tab.hover("h1")
        assert "token 4 of 4" in panel(tab)


def test_tap_opens_a_sheet_on_a_narrow_screen_and_closes_it(browser: Browser, tmp_path: Path):
    with shown(browser, tmp_path, FOUR, width=390, height=844) as tab:
        visible = "getComputedStyle(document.querySelector('#token-panel')).display"
        assert tab.js(visible) == "none"
        tab.tap(token(2))
        assert tab.js(visible) == "block" and "12 times more likely" in panel(tab)
        tab.js("document.querySelector('.token-sheet-jump button:last-child').click()")
        assert "token 2 of 4" in panel(tab)
        tab.tap(".token-close")
        assert tab.js(visible) == "none"


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(browser: Browser, tmp_path: Path, width: int):
    record = english(3, 60, teachers=2)
    record["title"] = record["answers"][0]["pieces"][5] = "long" * 60
    record["answers"][0]["domain"] = record["answers"][0]["id"] = "d" * 150
    with shown(browser, tmp_path, record, width=width) as tab:
        tab.press("n")
        assert tab.js("document.documentElement.scrollWidth") == width


def test_next_worst_goes_to_the_truly_worst_token_of_all_answers(browser: Browser, tmp_path: Path):
    record = english(5, 80)
    order = worst(check(record), 6, "teacher")
    place = "(() => { const t = document.activeElement; return [+t.parentNode.dataset.answer, +t.dataset.token] })()"
    with shown(browser, tmp_path, record) as tab:
        assert tab.js("document.querySelector('#token-previous').disabled")
        for answer, index, value in order:
            tab.press("n")
            assert tab.js(place) == [answer, index]
            assert told(panel(tab)) == pytest.approx(value, abs=0.006)
        tab.press("p")
        assert tab.js(place) == list(order[4][:2])
        tab.click("#token-next")
        assert tab.js(place) == list(order[5][:2])
        assert tab.js("document.querySelector('#token-rank').textContent").startswith("worst 6 of ")
        tab.select("#token-answer", "0")
        tab.click("#token-only")
        tab.js("document.querySelector('#token-answer').focus()")
        tab.press("n")  # from a list too
        assert tab.js(place) == list(next(w[:2] for w in worst(check(record), 400, "teacher") if w[0] == 0))


def test_masked_tokens_are_hatched_and_never_the_worst(browser: Browser, tmp_path: Path):
    record = copy.deepcopy(FOUR)
    record["answers"][0]["mask"] = [1, 0, 1, 1]
    with shown(browser, tmp_path, record) as tab:
        assert tab.js(f"document.querySelector({json.dumps(token(1))}).className") == "t-masked"
        tab.press("n")
        assert "token 4 of 4" in panel(tab)
        tab.hover(token(1))
        assert "Masked: does not count." in panel(tab) and "nats:" not in panel(tab)
        tab.select("#token-colour", "kl")  # over the vocabulary it has a value there too
        assert tab.js(f"document.querySelector({json.dumps(token(1))}).className") == "t-masked"
        assert tab.js("document.querySelector('#token-rank').textContent") == "3 tokens to go through"


def test_filter_by_domain_answer_and_teacher(browser: Browser, tmp_path: Path):
    record = english(6, 60, teachers=2)
    record["answers"][0]["domain"] = ""
    with shown(browser, tmp_path, record) as tab:
        ids = "[...document.querySelectorAll('#token-answer option')].map(o => o.textContent)"
        wide = tab.js("document.querySelector('#token-by-domain svg').getAttribute('width')")
        tab.select("#token-domain", "=reading")
        assert tab.js(ids) == ["2. 0-1", "5. 0-4"]
        assert not tab.js(BY_DOMAIN), "one bar compares nothing"
        tab.press("n")
        found = [w for w in worst(check(record), 1000, "teacher") if w[0] in (1, 4)]
        assert f"token {found[0][1] + 1} of" in panel(tab)
        tab.select("#token-teacher", "1")
        tab.press("n")
        found = [w for w in worst(check(record), 1000, "teacher-1") if w[0] in (1, 4)]
        assert f"token {found[0][1] + 1} of" in panel(tab)
        tab.select("#token-domain", "=")  # no name is a domain too
        assert tab.js(ids) == ["1. 0-0"]
        tab.select("#token-domain", "all")
        assert len(tab.js(ids)) == 6 and tab.js(BY_DOMAIN)
        assert tab.js("document.querySelector('#token-by-domain svg').getAttribute('width')") == wide
        tab.select("#token-answer", "3")
        assert "0-3" in tab.js("document.querySelector('.token-facts').innerText")


def test_colouring_by_kl_orders_by_kl(browser: Browser, tmp_path: Path):
    record = copy.deepcopy(FOUR)
    record["answers"][0]["reverse_kl"]["teacher"] = [0.0, 0.03, 2.6, 0.2]
    styles = "[...document.querySelectorAll('.token-text > [data-token]')].map(e => e.classList[0])"
    with shown(browser, tmp_path, record) as tab:
        assert tab.js(styles) == ["t-m1", "t-m5", "t-p4", "t-m4"]
        tab.select("#token-colour", "kl")
        assert tab.js(styles) == ["t-k0", "t-k1", "t-k6", "t-k3"]
        assert not tab.js("document.querySelector('#token-legend-kl').hidden")
        tab.press("n")
        assert "token 3 of 4" in panel(tab) and "2.600 nats of KL" in panel(tab)


def test_several_steps_show_the_same_prompt_before_and_after(browser: Browser, tmp_path: Path):
    records = [english(4, 40, step=step, seed=step) for step in (0, 20, 40)]
    records[1]["answers"].reverse()
    records[2]["answers"].pop(1)
    with shown(browser, tmp_path, token_view([check(r) for r in records])) as tab:
        heads = "[...document.querySelectorAll('.token-pane')].map(p => p.innerText.split('\\n').slice(0, 3))"
        assert [h[0] for h in tab.js(heads)] == ["step 40", "step 0"]
        tab.select("#token-answer", "1")
        assert tab.js("[...document.querySelectorAll('.token-facts > span:first-child')].map(e => e.innerText)") == [
            "40-2",
            "0-2",
        ]
        tab.select("#token-step", "1")
        assert "20-2" in tab.js("document.querySelector('.token-facts').innerText")
        tab.select("#token-answer", "2")
        tab.select("#token-beside", "2")
        assert "not among those of step 40" in tab.js("document.querySelectorAll('.token-pane')[1].innerText")
        tab.select("#token-beside", "")
        assert len(tab.js(heads)) == 1
        tab.select("#token-beside", "0")
        assert tab.js("document.querySelectorAll('#token-by-position polyline').length") == 2


def test_charts_have_the_means(browser: Browser, tmp_path: Path):
    record = english(4, 25)
    with shown(browser, tmp_path, record) as tab:
        titles = tab.js("[...document.querySelectorAll('#token-by-position circle title')].map(t => t.textContent)")
        values = [penalty(answer, "teacher", "student") for answer in record["answers"]]
        for position in range(25):
            here = [v[position] for v in values if len(v) > position and v[position] is not None]
            assert f"position {position + 1}: " in titles[position] and f"({len(here)} token" in titles[position]
            assert told(titles[position]) == pytest.approx(sum(here) / len(here), abs=0.002)
        domains = tab.js(
            "[...document.querySelectorAll('#token-by-domain .token-domain title')].map(t => t.textContent)"
        )
        assert sorted(domains) == ["arithmetic", "code", "reading"] and tab.js(BY_DOMAIN)
        assert tab.js("document.querySelector('#token-by-position text').textContent") == "nats per token"


def test_one_domain_has_no_chart_of_domains(browser: Browser, tmp_path: Path):
    record = english(4, 25)
    for answer in record["answers"]:
        answer["domain"] = "sorting"
    with shown(browser, tmp_path, record) as tab:
        assert not tab.js(BY_DOMAIN) and tab.js("document.querySelectorAll('#token-by-position circle').length")
        tab.select("#token-colour", "kl")
        assert not tab.js(BY_DOMAIN)


def test_the_legend_says_what_blue_is():
    assert "<b>Blue</b>: the teacher likes it more than the student did." in graded_page(check(english(1, 5)))
    alone = graded_page(check(english(1, 5, student=False)))
    assert "than the student did" not in alone and "<b>Blue</b>: it is more expected" in alone


def test_ends_parts_white_space_and_truncation_are_marked(browser: Browser, tmp_path: Path):
    record = by_hand(("a\n", -1, -1), ("   ", -1, -1), ("", -1, -1), ("\t数", -1, -1), (" end", -1, -1))
    text = "document.querySelector('.token-text').innerText"
    with shown(browser, tmp_path, record) as tab:
        assert tab.js(text) == "a↵\n   #2→\t数 end"
        assert tab.js("document.querySelector('.t-space').textContent") == "   "
        assert tab.js("document.querySelector('.token-text .t-part').textContent") == "#2"
    record["answers"][0]["finish_reason"] = "stop"
    with shown(browser, tmp_path, record) as tab:
        assert "■ end" in tab.js(text) and tab.js("document.querySelector('.token-text .t-end').textContent") == " end"
    record["answers"][0]["finish_reason"] = "length"
    with shown(browser, tmp_path, record) as tab:
        assert "cut at the limit" in tab.js(text) and not tab.js("document.querySelector('.token-text .t-end')")


def test_without_a_student_the_penalty_is_surprise(browser: Browser, tmp_path: Path):
    record = english(2, 30, student=False)
    with shown(browser, tmp_path, record) as tab:
        assert "surprises the teacher" in tab.js("document.querySelector('.token-view').innerText")
        assert tab.js("document.querySelector('#token-colour').parentNode.hidden")
        answer, index, value = worst(check(record), 1, "teacher")[0]
        tab.press("n")
        assert "nats: more surprising" in panel(tab) and told(panel(tab)) == pytest.approx(value, abs=0.006)
        assert tab.js("document.querySelectorAll('.token-readers tr').length") == 2
        assert f"token {index + 1} of" in panel(tab) and record["answers"][answer]["id"] in tab.js(
            "document.querySelector('.token-facts').innerText"
        )


def test_odd_records(browser: Browser, tmp_path: Path):
    """No answers, an empty answer, one token, numbers that are missing, no alternatives."""
    empty = by_hand()
    with shown(browser, tmp_path, empty) as tab:
        tab.press("n")
        assert "(no tokens)" in tab.js("document.querySelector('.token-text').innerText")
    empty["answers"] = []
    with shown(browser, tmp_path, empty) as tab:
        assert "There are no answers to show." in tab.js("document.body.innerText")
    assert "There are no answers to show." in token_view([]).body
    one = by_hand(("x", -1.0, -3.0))
    one["answers"][0]["top"] = {"student": [[]], "teacher": [[]]}
    with shown(browser, tmp_path, one) as tab:
        tab.press("n")
        assert "token 1 of 1" in panel(tab) and "7.4 times less likely" in panel(tab)
    missing = by_hand(("x", -1.0, -3.0), ("y", -1.0, -1.0))
    missing["answers"][0]["logprobs"]["teacher"][0] = missing["answers"][0]["entropy"]["student"][0] = None
    missing["answers"][0]["reverse_kl"]["teacher"][0] = None
    with shown(browser, tmp_path, missing) as tab:
        tab.hover(token(0))
        assert "no number for this token" in panel(tab)
        rows = tab.js("[...document.querySelectorAll('.token-readers tr')].map(r => r.innerText.split(/\\s*\\t\\s*/))")
        assert rows[1:] == [["student", "−1.000", "36.8 %", "–"], ["teacher", "–", "–", "0.25"]]


def test_a_cut_answer_shows_what_is_there_and_how_much_is_not(browser: Browser, tmp_path: Path):
    view = token_view([check(english(2, 300))], budget_bytes=12_000)
    with shown(browser, tmp_path, view) as tab:
        drawn = tab.js("document.querySelectorAll('[data-token]').length")
        assert 8 <= drawn < 300 and f"cut after {drawn} tokens" in tab.js("document.body.innerText")
        assert f"… {300 - drawn} tokens left out" in tab.js("document.querySelector('.token-text').innerText")
        tab.press("n")
        assert "of 300" in panel(tab) and tab.js("document.querySelector('.token-tops')") is None


def test_the_page_opens_at_the_answer_with_the_worst_token_of_either_step(browser: Browser, tmp_path: Path):
    """By default the last step is shown and the first beside it; what training repaired is worth a look, too."""
    before, after = english(4, 30, step=0), english(4, 30, step=40)
    for record in (before, after):
        for answer in record["answers"]:
            answer["logprobs"]["teacher"] = list(answer["logprobs"]["student"])
    before["answers"][2]["logprobs"]["teacher"][20] = -12.0
    view = token_view([before, after])
    with shown(browser, tmp_path, view) as tab:
        assert tab.js("document.querySelector('#token-answer').value") == "2"


def test_only_the_shown_answer_is_drawn(browser: Browser, tmp_path: Path):
    with shown(browser, tmp_path, english(3, 2000)) as tab:
        assert tab.js("document.querySelectorAll('[data-token]').length") == 2000
        before = tab.js("performance.now()")
        tab.press("n")
        assert tab.js("performance.now()") - before < 2000  # ms; 100 on an idle machine


def test_without_scripts_the_first_answers_are_there_with_the_same_colours(browser: Browser, tmp_path: Path):
    record = english(3, 120)
    record["answers"][0]["mask"][3] = 0
    styles = (
        "[...document.querySelectorAll('.token-text')].map(t =>"
        "[...t.children].map(e => e.className).filter(name => name.startsWith('t-')))"
    )
    with shown(browser, tmp_path, record, scripts=False) as tab:
        static = tab.js(styles)
        assert "Let" in tab.js("document.querySelector('.token-text').innerText")
        assert tab.js("document.querySelector('#token-app').hidden") and len(static) == 3
        assert re.fullmatch(r"[+-]\d\.\d\d nats, id \d+", tab.js("document.querySelector('.token-text span').title"))
        assert "need JavaScript" in tab.js("document.body.innerText")
    with shown(browser, tmp_path, record) as tab:
        first = worst(check(record), 1, "teacher")[0][0]  # with scripts the page opens where there is most to see
        assert tab.js(styles)[0] == static[first] and tab.js("document.querySelector('#token-static')") is None


def hostile() -> dict[str, Any]:
    """Every payload in every place that holds text."""
    every = " ".join(PAYLOADS)
    record = by_hand(*((payload, -0.1, -2.0) for payload in PAYLOADS), prompt=every, finish_reason="length")
    names = {"student": PAYLOADS[0], "teacher": PAYLOADS[1], "__proto__": "__proto__", "constructor": "constructor"}
    record["readers"] = {name: {"model": every, "fingerprint": every} for name in names.values()}
    record["student"], record["teachers"] = names["student"], [n for n in names.values() if n != names["student"]]
    record["title"] = every
    source = record["answers"][0]
    record["answers"] = []
    for payload in PAYLOADS:
        answer = copy.deepcopy(source) | {"id": payload, "prompt_id": payload, "domain": payload}
        for key in ("logprobs", "entropy", "top"):
            values = answer[key]
            answer[key] = {new: values.get(old, values["teacher"]) for old, new in names.items()}
        answer["reverse_kl"] = dict.fromkeys(record["teachers"], source["reverse_kl"]["teacher"])
        record["answers"].append(answer)
    return record


@pytest.mark.parametrize("scripts", [True, False])
def test_S_6_foreign_text_is_text_everywhere_and_nothing_runs(browser: Browser, tmp_path: Path, scripts: bool):
    with shown(browser, tmp_path, hostile(), scripts=scripts) as tab:
        everything = "document.documentElement.textContent"
        seen = tab.js("document.querySelector('.token-text').textContent")
        assert tab.js("document.title") == printable(" ".join(PAYLOADS))
        for payload in PAYLOADS:
            assert re.sub(r"\s", "", printable(payload)) in re.sub(r"[\s↵]", "", seen)
        if scripts:
            for index in range(len(PAYLOADS)):
                tab.select("#token-answer", str(index))
                tab.hover(token(index))
                shown_id = tab.js("document.querySelector('.token-facts > span').textContent")
                assert shown_id == printable(PAYLOADS[index])
            for colour, teacher in (("kl", "1"), ("penalty", "2")):
                tab.select("#token-colour", colour)
                tab.select("#token-teacher", teacher)
                tab.press("n")
            tab.select("#token-domain", "=" + printable(PAYLOADS[0]))
        assert tab.js("window.fired") is None
        assert tab.js("document.querySelectorAll('main img, main svg[onload], main script, main style').length") == 0
        assert not re.search("[\x00\x1b\u202e\u2066\ufeff]", tab.js(everything))


def test_S_6_the_data_of_a_hostile_record_round_trips():
    view = token_view([check(hostile())])
    written = json_for_html(view.data["token-data"])
    assert json.loads(written)["texts"] == view.data["token-data"]["texts"]
    assert [printable(payload, lines=True) for payload in PAYLOADS] == view.data["token-data"]["texts"]
