from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from opd.reports.printable import printable
from tests.reports.parts import HOSTILE


def test_S_6_control_bidi_and_invisible_characters_are_escaped():
    assert printable("\x1b[31mred\x07") == r"\x1b[31mred\x07"
    assert printable("a\u202eb\u2066c") == r"a\u202eb\u2066c"
    assert printable("\x9b1m \U000e0041 \ud800 \u2028") == r"\x9b1m \U000e0041 \ud800 \u2028"
    assert printable("one\ntwo\tthree\r") == r"one\ntwo\tthree\r"
    assert printable("one\ntwo\tthree\r", lines=True) == "one\ntwo\tthree\\r"


def test_ordinary_text_of_any_script_stays():
    for text in ("plain", "häuser, 数学", "می‌خواهم", "👩‍🚀", r"C:\new [bold]"):
        assert printable(text) == text


def test_what_the_stream_cannot_hold_is_escaped():
    assert printable("ä数", encoding="ascii") == r"\xe4\u6570"
    assert printable("ä数", encoding="latin-1") == "ä" + r"\u6570"


@given(st.text(st.characters()) | st.just(HOSTILE))
def test_result_is_one_harmless_line(text):
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown.replace("\u200c", "").replace("\u200d", "")} & {
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    }
    assert shown.encode("utf-8") and len(shown.splitlines()) <= 1 if shown else text == ""
    assert printable(shown) == shown
