"""Same tokens or a refusal that says why; ends that meet, or an error."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from opd.errors import ModelError
from opd.text.agreement import Agreement, compare, rendered_difference
from opd.text.crossing import agree
from opd.text.formats import PromptFormat
from opd.text.tokenizer import Tokenizer
from tests import tiny
from tests.text import families
from tests.text.families import PLAIN, row

END, IM_START, IM_END = 0, 1, 2


def chat(*ends: int, tokenizer: Tokenizer | None = None, **fields) -> PromptFormat:
    return PromptFormat(tokenizer or families.made(), replace(PLAIN, **fields), ends)


def base(*ends: int, **fields) -> PromptFormat:
    return PromptFormat(families.made(chat=False), replace(PLAIN, **fields), ends)


def edited(change) -> Tokenizer:
    state = json.loads(tiny._backend(300).to_str())
    change(state)
    return Tokenizer(families.wrapped(Backend.from_str(json.dumps(state))), "edited")


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_one_tokenizer_agrees_with_itself():
    assert compare(chat(), chat()) == Agreement(vocab_size=300)
    assert compare(chat(), chat(tokenizer=Tokenizer(tiny.tokenizer()))).order() is None


def test_A_02_equal_size_with_permuted_ids_is_refused():
    def swap(state):
        vocab = state["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    a, b = sorted(families.made().id(letter) for letter in "ab")
    with pytest.raises(ModelError, match=rf"300 tokens.*300 tokens.*2 ids.*{a}: 'a' and 'b'; {b}: 'b' and 'a'"):
        compare(chat(), chat(tokenizer=edited(swap)))


def test_A_12_another_tokenizer_is_refused_both_ways_where_ids_are_read_as_they_are():
    other = chat(tokenizer=families.made("unigram"))
    for pair in ((chat(), other), (other, chat())):
        with pytest.raises(ModelError, match="different tokenizers, and here one is read as the other"):
            compare(*pair)
        assert agree(*pair).foreign


def test_same_vocabulary_that_splits_text_differently_is_refused():
    def digits(state):
        state["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, state["pre_tokenizer"]],
        }

    def unmerged(state):
        state["model"]["merges"] = []

    def normalised(state):
        backend = Backend.from_str(json.dumps(state))
        backend.normalizer = normalizers.NFKC()
        state["normalizer"] = json.loads(backend.to_str())["normalizer"]

    for change in (digits, unmerged, normalised):
        with pytest.raises(ModelError, match=r"vocabularies agree, but .* is encoded as"):
            compare(chat(), chat(tokenizer=edited(change)))
        assert agree(chat(), chat(tokenizer=edited(change))).foreign


def test_A_03_a_teacher_may_have_added_tokens_a_student_may_not():
    bigger = tiny.tokenizer()
    bigger.add_tokens(["<think>", "</think>"])
    more = chat(tokenizer=Tokenizer(bigger))
    assert compare(chat(), more).vocab_size == 300 and not agree(chat(), more).foreign
    with pytest.raises(ModelError, match=r"2 ids of the student's.*300: '<think>' and None"):
        compare(more, chat())


def test_teacher_with_more_words_is_refused():
    def more(state):
        state["model"]["vocab"]["xyz"] = 300

    with pytest.raises(ModelError, match=r"1 words that the student does not know, the first: \['xyz'\]"):
        compare(chat(), chat(tokenizer=edited(more)))


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_ends", [(IM_END,), (IM_END, END)])
@pytest.mark.parametrize("student", [base(END), chat(END)])
def test_A_16_base_student_and_chat_teacher_exchange_their_ends(student, teacher_ends):
    agreement = compare(student, chat(*teacher_ends))
    assert agreement.end_map == ((END, IM_END),)
    answer = np.array([40, IM_END, 41, IM_START, END])
    assert agreement.teacher_ids(answer).tolist() == [40, END, 41, IM_START, IM_END]
    assert answer.tolist() == [40, IM_END, 41, IM_START, END]
    order = agreement.order()
    assert order.dtype == np.int64 and order[:4].tolist() == [IM_END, IM_START, END, 3]
    assert (order[3:] == np.arange(3, 300)).all()


@given(st.lists(st.integers(0, 299), max_size=20))
def test_the_exchange_is_its_own_inverse_and_agrees_with_the_order(ids):
    agreement = Agreement(vocab_size=300, end_map=((END, IM_END),))
    ids = np.array(ids, dtype=np.int64)
    read = agreement.teacher_ids(ids)
    assert (agreement.teacher_ids(read) == ids).all()
    assert (agreement.order()[ids] == read).all()


def test_ends_that_both_know_need_no_exchange():
    agreement = compare(chat(IM_END, END), chat(IM_END, END))
    assert agreement.end_map == () and agreement.notes == ()
    assert compare(base(END, IM_END), chat(IM_END, END)).end_map == ()


def test_A_16_student_end_that_the_teacher_merely_also_uses_is_exchanged():
    # The teacher nearly always writes <|im_end|>: a student that does not stop there would go on and on.
    agreement = compare(base(END), chat(IM_END, END))
    assert agreement.end_map == ((END, IM_END),)
    assert agreement.notes == ("the teacher may also end answers with '<|endoftext|>', at which the student goes on",)


def test_ends_of_one_side_only_are_noted():
    notes = compare(chat(IM_END, END), chat(IM_END)).notes
    assert notes == ("the student also ends answers with '<|endoftext|>', which is no end for the teacher",)
    assert "student's chat template closes answers with '<|im_end|>'" in compare(chat(END), chat(END)).notes[0]
    assert "teacher's chat template closes" in compare(chat(END), chat(END)).notes[1]


def test_A_16_teacher_end_that_the_student_does_not_know_is_refused():
    bigger = tiny.tokenizer()
    bigger.add_tokens(["<|done|>"], special_tokens=True)
    bigger.eos_token = "<|done|>"
    bigger.chat_template = bigger.chat_template.replace("<|im_end|>", "<|done|>")
    teacher = chat(tokenizer=Tokenizer(bigger))
    with pytest.raises(ModelError, match=r"grow without end.*'<\|im_end\|>'.*'<\|done\|>' has id 300"):
        compare(chat(), teacher)
    # A teacher that is told to end as the student does is fine.
    assert compare(chat(), chat(tokenizer=Tokenizer(bigger), end_tokens=("<|im_end|>",))).end_map == ()


@pytest.mark.parametrize("ordinary_side", ["student", "teacher"])
def test_A_16_ordinary_text_cannot_stand_for_an_end(ordinary_side):
    line, turn = base(end_tokens=("\n",)), chat(IM_END)
    pair = (line, turn) if ordinary_side == "student" else (turn, line)
    with pytest.raises(ModelError, match=r"grow without end.*'Ċ' is ordinary text"):
        compare(*pair)
    assert compare(line, line).end_map == ()


# ---- prompts side by side -------------------------------------------------------------------------------------------


def test_A_10_difference_of_rendered_prompts():
    shown = rendered_difference(base(plain_template="user: {prompt}"), chat(), row("12 + 7?"))
    assert "student reads (plain, " in shown and "teacher reads (chat, " in shown
    assert "\n- user: 12 + 7?\n" in shown and "\n+ <|im_start|>user\n" in shown and "\n+ 12 + 7?<|im_end|>" in shown


def test_A_10_no_difference_is_said_plainly():
    assert rendered_difference(chat(), chat(), row("hi")).endswith("difference: none, both read the same prompt")
