"""Every pair of seven tokenizers, on any Unicode string and on ids that no encoder would give: nothing is lost, nothing
counted twice, and what is said to be the same text is the same bytes."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.text.crossing import Crossing, CrossRead, agree
from opd.text.formats import PromptFormat
from opd.text.probes import PROBES
from opd.text.token_bytes import TokenBytes
from opd.types import Prompt, Rollout
from tests import rooms
from tests.text import families
from tests.text.families import CROSSED, PLAIN, STYLES, row
from tests.text.test_tokenizer import HOSTILE

# As teachers: have tokens for everything, and change nothing; put spaces before words, and take them for granted.
KEEPS_TEXT = ("byte_bpe", "byte_bpe_digits", "unigram", "llama", "gemma", "prefix_space")
ADDS_SPACES = ("wordpiece", "bert", "t5", "digits_metaspace")
# As students: put a space in front of every text.
PUTS_SPACE = ("unigram", "unigram_nfkc", "wordpiece", "bert", "llama", "t5", "digits_metaspace", "prefix_space")
fuzz = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@cache
def pair(student: str, teacher: str) -> Crossing:
    crossing = agree(*(PromptFormat(families.made(family), PLAIN) for family in (student, teacher)))
    assert isinstance(crossing, Crossing)
    return crossing


@cache
def table(family: str) -> TokenBytes:
    return TokenBytes(families.made(family))


PAIRS = list(permutations(CROSSED, 2))


def is_text(family: str, ids) -> bool:
    """All tokens are text, and all their bytes are characters."""
    silent = families.made(family).special_ids | table(family).unknown_ids
    try:
        table(family).read(np.array(ids, dtype=np.int64))[0].tobytes().decode()
    except UnicodeDecodeError:
        return False
    return not silent & set(ids)


def spans_of(span) -> dict[int, list[int]]:
    """Span to its tokens, which must be in a row; spans must come in order."""
    found: dict[int, list[int]] = {}
    for n, number in enumerate(span):
        if number >= 0:
            found.setdefault(number, []).append(n)
    assert list(found) == list(range(len(found)))
    assert all(tokens == list(range(tokens[0], tokens[-1] + 1)) for tokens in found.values())
    return found


def check(student: str, teacher: str, ids: list[int], read: CrossRead) -> None:
    crossing = pair(student, teacher)
    span_T, span_U, same_T = (x.tolist() for x in (read.spans.span_T, read.spans.span_U, read.spans.same_T))
    assert len(span_T) == len(same_T) == len(ids) and len(span_U) == len(read.ids)
    ours, theirs = spans_of(span_T), spans_of(span_U)
    assert ours.keys() == theirs.keys()  # every span has tokens of both; each token is in one span or in none
    own, other = (table(family) for family in (student, teacher))
    raw_T, raw_U = [own.of(n) for n in ids], [other.of(n) for n in read.ids.tolist()]
    if ids and raw_T[0][:1] == b" " and student in PUTS_SPACE:
        raw_T[0] = raw_T[0][1:]
    special = families.made(student).special_ids
    for span, tokens in ours.items():
        a, b = b"".join(raw_T[n] for n in tokens), b"".join(raw_U[n] for n in theirs[span])
        if special & {ids[n] for n in tokens}:
            assert len(tokens) == len(theirs[span]) == 1  # a control token is one token to both
        elif teacher in ADDS_SPACES:
            assert a.replace(b" ", b"") == b.replace(b" ", b"")
        else:
            assert a == b or (span == 0 and b" " + a == b)
        if any(same_T[n] for n in tokens):
            assert len(tokens) == len(theirs[span]) == 1
            assert crossing.teacher_of_V[ids[tokens[0]]] == read.ids[theirs[span][0]]
    taken_for_space = "▁".encode() in b"".join(raw_T)  # by those who write a space as this character
    if any(raw_T) and is_text(student, ids) and teacher in KEEPS_TEXT and not taken_for_space:
        assert -1 not in span_T and -1 not in span_U  # all of it, and
        assert b"".join(raw_T) == b"".join(raw_U) or b" " + b"".join(raw_T) == b"".join(raw_U)
        ends_T, ends_U = (np.cumsum([len(raw) for raw in raws]) for raws in (raw_T, raw_U))
        if len(ends_T) and len(ends_U):
            meet = set(ends_T.tolist()) & set((ends_U - (ends_U[-1] - ends_T[-1])).tolist())
            assert len(meet - {0}) == len(ours)  # no span could be cut once more


def check_text(text: str, pairs) -> None:
    for student, teacher in pairs:
        ids, read = pair(student, teacher).read_text(text)
        check(student, teacher, ids.tolist(), read)


@settings(max_examples=1000, **fuzz)
@given(text=st.text(max_size=24) | HOSTILE, part=st.integers(0, 13))
def test_A_06_any_string_of_any_pair(text: str, part: int) -> None:
    check_text(text, PAIRS[part::14])


@pytest.mark.slow
@settings(max_examples=10_000, **fuzz)
@given(text=st.text(max_size=40) | HOSTILE, part=st.integers(0, 2))
def test_A_06_many_strings_of_any_pair(text: str, part: int) -> None:
    check_text(text, PAIRS[part::3])


@pytest.mark.parametrize("style", STYLES)
def test_A_06_tokenizers_as_known_models_have_them(style: str) -> None:
    assert table(style).exact
    for text in (*PROBES, " the fox", "the  fox ", "\n\tthe", "a", " ", ""):
        check_text(text, [(style, other) for other in CROSSED] + [(other, style) for other in CROSSED])


def check_ids(data: st.DataObject, pairs) -> None:
    """Also of what only a bad student writes: halves of characters, control tokens anywhere, ids of no token."""
    for student, teacher in pairs:
        crossing = pair(student, teacher)
        ids = data.draw(st.lists(st.integers(0, crossing.vocab_size - 1), max_size=16))
        check(student, teacher, ids, crossing.read(answer(crossing, ids)))


def answer(crossing: Crossing, ids: list[int]) -> Rollout:
    """An answer that was cut off, to a row of raw text."""
    asked = row("", completion="-")
    prompt = Prompt(row=asked, ids=crossing.student_fmt.prompt_ids(asked))
    return rooms.answer(prompt, ids, [-1.0] * len(ids), finish_reason="length")


@settings(max_examples=120, **fuzz)
@given(data=st.data(), part=st.integers(0, 20))
def test_A_13_any_ids_of_any_pair(data: st.DataObject, part: int) -> None:
    check_ids(data, PAIRS[part::21])


@pytest.mark.slow
@settings(max_examples=1000, **fuzz)
@given(data=st.data(), part=st.integers(0, 6))
def test_A_13_many_ids_of_any_pair(data: st.DataObject, part: int) -> None:
    check_ids(data, PAIRS[part::7])
