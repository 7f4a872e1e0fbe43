from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.reports.page.base import attribute, json_for_html, page, text
from tests.browser import Browser
from tests.reports.parts import HOSTILE

_TEXT = st.text(st.characters()) | st.sampled_from(
    [HOSTILE, "</script><script>", "\" onload=x '", "<!--<script>", "]]>", "\x00", "\ud800"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner),
    max_leaves=20,
)


@given(_JSON)
def test_S_6_json_in_a_page_has_nothing_to_end_its_element_and_parses_back_equal(value):
    written = json_for_html(value)
    assert not set("<>&\u2028\u2029\u202e\u2066\x00\x7f\ufeff") & set(written)
    assert written.encode("utf-8")
    assert json.loads(written) == value


def test_json_is_compact_and_keeps_other_scripts_readable():
    assert json_for_html({"a": [1, 2.5, None], "b": "数学 ä"}) == '{"a":[1,2.5,null],"b":"数学 ä"}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_refused(number):
    with pytest.raises(ValueError):
        json_for_html({"x": [number]})


@given(_TEXT)
def test_S_6_text_and_attributes_are_escaped(value):
    for lines in (False, True):
        assert not re.search("[<>\"'\x00\u202e\ud800]", text(value, lines=lines))
    inside = attribute(value)
    assert inside[0] == inside[-1] == '"' and not re.search('[<>"\n]', inside[1:-1])


def test_text_keeps_lines_only_when_asked():
    assert text("a\n\tb") == r"a\n\tb"
    assert text("a\n\tb", lines=True) == "a\n\tb"


@pytest.mark.parametrize("block", ["a = '</script>'", "/* </STYLE> */", "x = '<!--'", "x = '<script'"])
def test_a_block_that_would_end_its_element_is_refused(block):
    for kind in ({"css": [block], "js": []}, {"css": [], "js": [block]}):
        with pytest.raises(ValueError, match="would end it"):
            page("t", "", data={}, **kind)


def test_a_data_id_is_a_plain_name():
    with pytest.raises(ValueError, match="data id"):
        page("t", "", css=[], js=[], data={'x"><script>': 1})


def test_S_6_only_our_own_script_and_style_take_effect(browser: Browser, tmp_path: Path):
    """The policy is shown to bite: what stands in the body does not run, and Chromium reports it."""
    body = (
        '<p id="own">own</p><p id="foreign" style="color: rgb(1, 2, 3)">foreign</p>'
        "<script>window.fired = 1</script><img src=http://example.invalid/x.png onerror='window.fired = 2'>"
        '<iframe src="http://example.invalid/"></iframe><style>#own { color: rgb(9, 9, 9) }</style>'
    )
    file = tmp_path / "page.html"
    js = "document.getElementById('own').dataset.ran = document.getElementById('facts').textContent"
    file.write_text(page("</title><b>t", body, css=["#own { color: rgb(4, 5, 6) }"], js=[js], data={"facts": [1]}))
    with browser.open(file) as tab:
        assert tab.js("getComputedStyle(document.getElementById('own')).color") == "rgb(4, 5, 6)"
        assert tab.js("getComputedStyle(document.getElementById('foreign')).color") != "rgb(1, 2, 3)"
        assert tab.js("document.getElementById('own').dataset.ran") == "[1]"
        assert tab.js("window.fired === undefined && document.title") == "</title><b>t"
        problems = tab.problems()
    for directive in ("script-src-elem", "script-src-attr", "style-src-elem", "style-src-attr", "img-src", "frame-src"):
        assert any("policy" in problem and directive in problem for problem in problems), (directive, problems)


def test_the_client_sees_errors_dialogs_and_requests(browser: Browser, tmp_path: Path):
    """What other tests rely on: `problems` is empty only when nothing happened."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><script>console.error('told'); alert('hello'); new Image().src = 'http://example.invalid/i.png';"
        "setTimeout(() => { throw new Error('late') })</script>"
    )
    with browser.open(file) as tab:
        problems = "\n".join(tab.problems())
    for expected in ("console: ['told']", "dialog: hello", "request: http://example.invalid/i.png", "Error: late"):
        assert expected in problems
