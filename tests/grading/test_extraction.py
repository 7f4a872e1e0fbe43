"""What the pure extraction functions find, and that hostile text costs them linear time."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.grading.extraction import boxed, final_answer, last_number, python_code


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("first 3, then 7", "7"),
        ("1,234,567.5 dollars", "1234567.5"),
        ("it is -3", "-3"),
        ("it is \u22123", "-3"),
        ("10-7", "7"),
        ("x = (2)-7", "7"),
        ("about 2.5e-3", "0.0025"),
        ("3/4 of it", "3/4"),
        (r"so \frac{3}{4}", "3/4"),
        (r"so -\dfrac{3}{4}", "-3/4"),
        (r"\boxed{12} because 5 + 7", "12"),
        (r"\boxed{7} no, \boxed{1{,}000}", "1000"),
        (r"\boxed{\text{seven}} or 7", "7"),
        (r"\boxed{12", "12"),
        ("50%", "50"),
        ("costs $5", "5"),
        (".5", "0.5"),
        ("3 or 1/0", "3"),
        ("8, or 1e999999999", "8"),
        ("#### 18", "18"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", r"\boxed{}", "1/0", "9" * 401])
def test_last_number_finds_nothing(text):
    assert last_number(text) is None


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6), st.text("abc xyz,.=:", max_size=20))
def test_last_number_reads_back_what_was_written(top, bottom, before):
    assert last_number(f"{before} {top:,}") == top
    assert last_number(f"{before} {top}/{bottom} ") == Fraction(top, bottom)
    assert last_number(rf"{before} \boxed{{\frac{{{top}}}{{{bottom}}}}} 5") == Fraction(top, bottom)


@given(st.floats(-1e100, 1e100))
def test_last_number_reads_floats_exactly(value):
    assert last_number(f"= {value!r}") == Fraction(repr(value))


@given(st.text())
def test_extraction_takes_any_text(text):
    for extract in (boxed, last_number, final_answer, python_code):
        extract(text)


@pytest.mark.parametrize(
    "unit",
    [
        "9",
        "1,",
        "1,111",
        "1 1/",
        "-",
        "-1",
        r"\frac{1",
        r"\boxed{",
        "{",
        "```",
        "`",
        "```a",
        "<answer>",
        "Answer:",
        "1e",
        " ",
    ],
)
@pytest.mark.parametrize("extract", [boxed, last_number, final_answer, python_code])
def test_extraction_of_a_million_hostile_characters_is_linear(extract, unit):
    text = (unit * 1_000_000)[:1_000_000]
    start = time.process_time()
    extract(text)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1} \boxed{2", None),
        ("1", None),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("think <answer>a</answer> <answer> b c </answer> end", "b c"),
        ("The answer is 4. The answer is 5.", "5"),
        ("ANSWER: x y\nmore", "x y"),
        ("Answer:\n1 2\n3 4", "1 2\n3 4"),
        ("  efgh\n", "efgh"),
        ("</answer> x", "</answer> x"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```\nthen\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\noutput\n```\n7\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("  ```py\n  if x:\n    y\n  ```", "if x:\n  y"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_python_code(text, code):
    assert python_code(text) == code
