"""What a teacher with another tokenizer reads of an answer, and what counts as the same."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from opd.errors import ModelError
from opd.lab.worlds import sorting
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing, CrossRead, agree
from opd.text.formats import Lead, PromptFormat
from opd.text.tokenizer import Tokenizer
from opd.types import Prompt, Rollout
from tests import rooms, tiny
from tests.text import families
from tests.text.families import CROSSED, PLAIN, row
from tests.text.test_formats import THINKING, with_template
from tests.text.test_tokenizer import HOSTILE

END, IM_START, IM_END, BOS = 0, 1, 2, 3  # of the byte-level ones
QUESTION = row("What is 12 + 7?", name="world/1")


def fmt(family: str = "byte_bpe", *ends: int, chat: bool = True, bos: bool = False, **fields) -> PromptFormat:
    return PromptFormat(families.made(family, chat=chat, bos=bos), replace(PLAIN, **fields), ends)


def crossing(student: PromptFormat, teacher: PromptFormat) -> Crossing:
    found = agree(student, teacher)
    assert isinstance(found, Crossing)
    return found


@cache
def to_unigram() -> Crossing:
    return crossing(fmt(), fmt("unigram"))


def answer(student: PromptFormat, ids, *, asked=QUESTION, finish_reason="stop") -> Rollout:
    prompt = Prompt(row=asked, ids=student.prompt_ids(asked))
    return rooms.answer(prompt, [int(n) for n in ids], [-1.0] * len(ids), finish_reason=finish_reason)


def read(found: Crossing, text_or_ids, *, asked=QUESTION, ended: bool = True) -> tuple[list[int], CrossRead]:
    """An answer with this text, closed by the student's end token; or with these ids."""
    student = found.student_fmt
    ids = text_or_ids
    if isinstance(ids, str):
        ids = [*student.answer_ids(asked, ids).tolist(), *student.end_ids[:1] * ended]
    return ids, found.read(answer(student, ids, asked=asked, finish_reason="stop" if ended else "length"))


def names(tokenizer: Tokenizer, ids) -> list[str]:
    return [tokenizer.tokens[int(n)] for n in ids]


def edited(change, family: str = "byte_bpe") -> PromptFormat:
    state = json.loads(tiny._backend(300).to_str() if family == "byte_bpe" else families._trained(family))
    change(state)
    unknown = None if family == "byte_bpe" else "<unk>"
    return PromptFormat(Tokenizer(families.wrapped(Backend.from_str(json.dumps(state)), unk=unknown), "edited"), PLAIN)


# ---- which of the two it is -----------------------------------------------------------------------------------------


def test_A_12_one_tokenizer_is_an_agreement_and_different_ones_are_a_crossing():
    assert isinstance(agree(fmt(), fmt()), Agreement) and not agree(fmt(), fmt(chat=False)).foreign
    assert to_unigram().foreign and crossing(fmt("unigram"), fmt()).foreign


def test_A_02_equal_size_with_permuted_ids_is_read_by_content():
    order = np.random.default_rng(0).permutation(np.arange(4, 300))
    moved = {old: int(new) for old, new in zip(range(4, 300), order, strict=True)}

    def permute(state):
        state["model"]["vocab"] = {token: moved.get(n, n) for token, n in state["model"]["vocab"].items()}

    found = crossing(fmt(), edited(permute))
    assert found.vocab_size == 300 and found.matched_share == 1.0 and found.notes == ()
    assert found.teacher_of_V.tolist() == [moved.get(n, n) for n in range(300)]
    ids, seen = read(found, "Sort: hgfe 中")
    assert seen.ids.tolist() == [moved.get(n, n) for n in ids]
    assert seen.spans.same_T.all() and seen.spans.span_T.tolist() == list(range(len(ids)))


def test_A_12_one_vocabulary_that_splits_differently_is_a_crossing():
    def digits(state):
        each = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [each, state["pre_tokenizer"]]}

    student = fmt("byte_bpe_digits")
    state = json.loads(families._trained("byte_bpe_digits"))
    state["model"]["merges"] = []
    teacher = PromptFormat(Tokenizer(families.wrapped(Backend.from_str(json.dumps(state)))), PLAIN)
    found = crossing(student, teacher)
    assert found.matched_share == 1.0 and found.fit.mapped == 1.0
    ids, seen = read(found, "again 2026")
    lengths = [len(found._student.table.of(n)) for n in ids[:-1]]
    assert max(lengths) > 1 and lengths[-4:] == [1] * 4
    assert seen.spans.span_T.tolist() == list(range(len(ids)))
    assert seen.spans.span_U.tolist() == [n for n, length in enumerate([*lengths, 1]) for _ in range(length)]
    assert seen.spans.same_T.tolist() == [length == 1 for length in [*lengths, 1]]
    assert isinstance(agree(edited(digits), edited(digits)), Agreement)


@pytest.mark.parametrize("student", CROSSED)
@pytest.mark.parametrize("teacher", CROSSED)
def test_shared_vocabulary_is_the_same_bytes_one_to_one(student, teacher):
    if student == teacher:
        return
    found = crossing(fmt(student), fmt(teacher))
    shared = np.flatnonzero(found.teacher_of_V >= 0)
    theirs = found.teacher_of_V[shared]
    assert len(set(theirs.tolist())) == len(theirs)
    assert found.matched_share == len(theirs) / len(found.teacher_fmt.tokenizer.tokens)
    for ours, other in zip(shared.tolist(), theirs.tolist(), strict=True):
        a, b = (names(f.tokenizer, [n])[0] for f, n in ((found.student_fmt, ours), (found.teacher_fmt, other)))
        if a in families.SPECIALS:
            assert a == b
        else:
            assert found._student.table.of(ours) == found._teacher.table.of(other)
    unknown = {"<unk>", "[UNK]"}
    assert not unknown & {*names(found.student_fmt.tokenizer, shared), *names(found.teacher_fmt.tokenizer, theirs)}


def test_shared_vocabulary_keeps_text_and_control_tokens_apart():
    word = next(t for t in sorted(fmt().tokenizer.tokens.values()) if t.isalpha() and t.isascii() and len(t) > 1)
    own = fmt().tokenizer.id(word)
    taken = crossing(fmt(), added("unigram", word, special=True))  # it is never text there
    assert taken.teacher_of_V[own] not in taken.teacher_fmt.guard.control_ids
    for pair in ((fmt("unigram"), added("byte_bpe", "<unk>")), (added("byte_bpe", "<unk>"), fmt("unigram"))):
        named = crossing(*pair)  # an unknown token is no text, whatever it is called
        unknown = next(n for n, name in named.student_fmt.tokenizer.tokens.items() if name == "<unk>")
        assert named.teacher_of_V[unknown] == -1


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [(False, True), (True, False), (True, True)])
def test_A_06_a_bos_on_one_side_and_cut_characters(bos):
    found = crossing(fmt(bos=bos[0]), fmt("unigram", bos=bos[1]))
    ids, seen = read(found, "中 = naïve 😀, 12")
    assert seen.ids.tolist() == [*found.teacher_fmt.answer_ids(QUESTION, "中 = naïve 😀, 12").tolist(), IM_END + 1]
    assert (seen.spans.span_T >= 0).all() and (seen.spans.span_U >= 0).all()
    assert seen.spans.span_T.max() > 12  # and it is no single large span
    assert len(ids) > len(seen.ids) - 6


def test_A_13_bytes_that_are_no_text_are_nobodys_and_the_rest_stays():
    found = to_unigram()
    cut = found.student_fmt.tokenizer.encode("中")[:2]
    ids = [*found.student_fmt.tokenizer.encode("a = "), *cut, *found.student_fmt.tokenizer.encode(" b")]
    _, seen = read(found, ids, ended=False)
    assert found.teacher_fmt.tokenizer.show(seen.ids) == "a = \ufffd b"
    where = ids.index(cut[0])
    lost = seen.spans.span_T == -1
    assert lost[where : where + 2].all() and lost.sum() == 2
    # U+FFFD itself is a character like any other.
    _, seen = read(found, "a = \ufffd b")
    assert (seen.spans.span_T >= 0).all()


def test_A_13_any_byte_beside_any_control_token():
    table = to_unigram()._student.table
    for byte in range(256):
        ids = [IM_START, table.ids_of_bytes[bytes([byte])], IM_END]
        _, seen = read(to_unigram(), ids, ended=False)
        shown = bytes([byte]).decode(errors="replace")
        assert to_unigram().teacher_fmt.tokenizer.show(seen.ids) == f"<|im_start|>{shown}<|im_end|>"
        assert (seen.spans.span_T >= 0).tolist() == [True, byte < 0x80, True]


def test_A_13_ids_that_no_encoder_gives_are_read_as_their_text():
    found = to_unigram()
    encode = found.student_fmt.tokenizer.encode
    letters = [n for letter in "again" for n in encode(letter)]
    assert letters != encode("again")
    for ids, text in ((letters, "again"), (encode(" again"), " again"), ([*encode(" "), *letters], " again")):
        _, seen = read(found, ids, ended=False)
        assert seen.ids.tolist() == found.teacher_fmt.answer_ids(QUESTION, text).tolist()
        assert (seen.spans.span_T >= 0).all() and len(seen.spans.span_T) == len(ids)


@pytest.mark.parametrize("family", ["byte_bpe", "wordpiece"])
@settings(max_examples=20, deadline=None)
@given(asked=HOSTILE, said=HOSTILE)
def test_text_never_becomes_a_control_token(family, asked, said):
    found = crossing(fmt("unigram"), fmt(family))
    ids = found.student_fmt.tokenizer.encode(said)
    _, seen = read(found, ids, asked=row(asked or "?", name=asked), ended=False)
    assert not set(seen.ids.tolist()) & found.teacher_fmt.guard.control_ids


def test_one_space_of_convention_is_no_difference():
    to_bpe = crossing(fmt("unigram"), fmt())
    raw = row("", completion="-", name="raw")
    for asked, text in ((QUESTION, "the fox"), (raw, "the fox")):  # inside a text, and at its start: "▁the"
        _, seen = read(to_bpe, text, asked=asked)
        assert to_bpe.teacher_fmt.decode(seen.ids) == "the fox" and (seen.spans.span_T >= 0).all()
    _, seen = read(to_bpe, " the fox", asked=QUESTION)  # here it is in the text
    assert to_bpe.teacher_fmt.decode(seen.ids) == " the fox"
    to_words = crossing(fmt(), fmt("bert"))
    _, seen = read(to_words, "the fox, again: 12.")
    assert names(to_words.teacher_fmt.tokenizer, seen.ids)[:4] == ["the", "fox", ",", "again"]
    assert (seen.spans.span_T >= 0).all() and (seen.spans.span_U >= 0).all()
    _, seen = read(crossing(fmt("bert"), fmt()), "the fox, again: 12.")
    assert to_bpe.teacher_fmt.decode(seen.ids) == "the fox, again : 12."  # as its own decoder writes it


@pytest.mark.parametrize(
    ("family", "text", "kept"),
    [
        # Upper case and accents, a space that is dropped, a line break that is read as a space.
        ("bert", "the Fox  naïve\nthe end", "thethe end"),
        ("unigram_nfkc", "a ② ﬁ b", "a b"),
        ("wordpiece", "the  fox\n again", "the fox again"),
    ],
)
def test_what_a_normaliser_changes_is_nobodys(family, text, kept):
    found = crossing(edited(lambda state: state["model"].update(merges=[])), fmt(family))  # a token is a byte
    ids, seen = read(found, text, ended=False)
    mapped = [n for n, span in zip(ids, seen.spans.span_T, strict=True) if span >= 0]
    if family == "unigram_nfkc":  # " ②" is one token to the teacher, its space included
        assert found.student_fmt.tokenizer.show(mapped) in (kept, "a  b", "a   b")
    else:
        assert found.student_fmt.tokenizer.show(mapped) == kept


def test_unknown_text_is_nobodys_also_when_it_looks_like_the_unknown_token():
    found = crossing(fmt(), fmt("characters"))
    ids, seen = read(found, "a ж <unk> b", ended=False)
    text = "".join(
        found.student_fmt.tokenizer.show([n]) if s >= 0 else "?" for n, s in zip(ids, seen.spans.span_T, strict=True)
    )
    assert text.startswith("a ") and text.endswith(" b") and "?" in text[2:-2] and "u" not in text
    back = crossing(fmt("characters"), fmt())
    unknown = back.student_fmt.tokenizer.hf.unk_token_id
    ids, seen = read(back, [back.student_fmt.tokenizer.id("a"), unknown, back.student_fmt.tokenizer.id("b")])
    assert back.teacher_fmt.decode(seen.ids) == "ab" and seen.spans.span_T.tolist() == [0, -1, 1]


def test_a_vocabulary_that_cannot_say_something_leaves_it_out():
    """The tokenizer raises for it."""
    teacher = PromptFormat(Tokenizer(sorting.tokenizer()), PLAIN)
    student = fmt(chat=False)
    found = crossing(student, teacher)
    asked = row("ba", name="sort")
    _, seen = read(found, "ab!c<|im_end|>", asked=asked)
    said = "".join(c for c in "ab!c<|im_end|>" if c in sorting.ALPHABET)
    assert teacher.decode(seen.ids) == said and (seen.spans.span_U >= 0).all()
    assert seen.spans.span_T[-1] >= 0 and (seen.spans.span_T == -1).any()


# ---- ends and control tokens ----------------------------------------------------------------------------------------


def test_A_07_the_end_is_the_end_one_to_one():
    found = crossing(fmt("byte_bpe", IM_END, END), fmt("unigram"))
    body = found.student_fmt.tokenizer.encode("19")
    teacher_end = found.teacher_fmt.end_ids[0]
    assert found.teacher_of_V[IM_END] == teacher_end
    for end, same in ((IM_END, True), (END, False)):  # also an end that is the second of the student's
        _, seen = read(found, [*body, end])
        assert seen.ids[-1] == teacher_end and found.teacher_fmt.decode(seen.ids) == "19"
        assert seen.spans.span_T[-1] == seen.spans.span_U[-1] == seen.spans.span_T.max()
        assert (seen.spans.span_T == seen.spans.span_T[-1]).sum() == 1
        assert (seen.spans.span_U == seen.spans.span_U[-1]).sum() == 1
        assert bool(seen.spans.same_T[-1]) is same
    _, seen = read(found, body, ended=False)  # cut off: no end
    assert teacher_end not in seen.ids.tolist()
    _, seen = read(found, [*body, END], ended=False)  # cut off at a token that is a token like any other
    assert found.teacher_fmt.tokenizer.show(seen.ids[-1:]) == "<|endoftext|>"
    _, seen = read(found, body)  # stopped at a token that is no end
    assert teacher_end not in seen.ids.tolist()
    _, seen = read(found, [IM_END])
    assert seen.ids.tolist() == [teacher_end] and seen.spans.same_T.tolist() == [True]
    _, seen = read(found, [])
    assert len(seen.ids) == 0


def test_A_07_ends_of_different_names_are_each_others():
    found = crossing(fmt("byte_bpe", END), fmt("unigram"))
    theirs = {name: number for number, name in found.teacher_fmt.tokenizer.tokens.items()}
    assert found.teacher_of_V[END] == theirs["<|im_end|>"] and found.teacher_of_V[IM_END] == -1
    assert found.teacher_of_V[IM_START] == theirs["<|im_start|>"]
    _, seen = read(found, [*found.student_fmt.tokenizer.encode("19"), END])
    assert seen.ids[-1] == theirs["<|im_end|>"] and seen.spans.same_T[-1]
    line = fmt(chat=False, end_tokens=("\n",))
    found = crossing(line, fmt("unigram"))
    assert "student ends answers with 'Ċ', which is ordinary text" in found.notes[0]
    _, seen = read(found, [*line.tokenizer.encode("19"), line.end_ids[0]])
    assert seen.ids[-1] == theirs["<|im_end|>"] and seen.spans.same_T[-1]


def test_A_09_template_tokens_without_counterpart_are_nobodys():
    def plain_names(state):
        for token in state["added_tokens"]:
            token["content"] = token["content"].replace("im_start", "turn")
        state["model"]["vocab"] = [[n.replace("im_start", "turn"), s] for n, s in state["model"]["vocab"]]

    teacher = edited(plain_names, "unigram")
    teacher = PromptFormat(teacher.tokenizer, replace(PLAIN, kind="plain"))
    encode = fmt().tokenizer.encode
    ids = [*encode("19"), IM_END, *encode("\n"), IM_START, *encode("user\n"), IM_END]
    known = np.isin(ids, [IM_START], invert=True)
    found = crossing(fmt(), teacher)
    _, seen = read(found, ids)
    assert teacher.tokenizer.show(seen.ids) == "19<|im_end|>\nuser\n<|im_end|>"
    assert ((seen.spans.span_T >= 0) == known).all() and not seen.spans.same_T[~known].any()
    _, seen = read(to_unigram(), ids)  # one that has it
    assert to_unigram().teacher_fmt.tokenizer.show(seen.ids) == "19<|im_end|>\n<|im_start|>user\n<|im_end|>"
    assert (seen.spans.span_T >= 0).all() and seen.spans.same_T[ids.index(IM_START)]


def added(family: str, *tokens: str, special: bool = False) -> PromptFormat:
    words = families.hf(family)
    words.add_tokens(list(tokens), special_tokens=special)
    return PromptFormat(Tokenizer(words), PLAIN)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_tag_is_the_tag_of_the_same_name_and_else_text(ours, theirs):
    tag = "<think>"
    student = added("byte_bpe", tag, special=ours)
    teacher = added("unigram", tag, special=theirs)
    own, other = (next(n for n, t in f.tokenizer.tokens.items() if t == tag) for f in (student, teacher))
    found = crossing(student, teacher)
    assert found.teacher_of_V[own] == other
    _, seen = read(found, [*student.tokenizer.encode("a"), own, *student.tokenizer.encode("b")], ended=False)
    assert seen.spans.span_T.tolist() == [0, 1, 2] and seen.spans.same_T[1] and seen.ids[1] == other
    spelt = [n for c in tag for n in student.tokenizer.encode(c)]
    _, seen = read(found, spelt, ended=False)  # text: the teacher's tag, unless that is never text
    assert (other in seen.ids.tolist()) is not theirs and (seen.spans.span_T >= 0).all()
    bare = crossing(student, fmt("unigram"))
    _, seen = read(bare, [own], ended=False)
    assert bare.teacher_fmt.decode(seen.ids) == ("" if ours else tag)
    assert (seen.spans.span_T[0] >= 0) is not ours and bare.teacher_of_V[own] == -1


# ---- answers of the teacher -----------------------------------------------------------------------------------------

EXACT = ("byte_bpe", "byte_bpe_digits", "unigram")


@pytest.mark.parametrize("teacher", EXACT)
@pytest.mark.parametrize("student", EXACT)
@settings(max_examples=10, deadline=None)
@given(text=st.text(max_size=20) | HOSTILE)
def test_A_13_an_answer_of_the_teachers_is_the_students_own_for_that_text(student, teacher, text):
    if student == teacher:
        return
    found = crossing(fmt(student), fmt(teacher))
    prompt = Prompt(row=QUESTION, ids=found.student_fmt.prompt_ids(QUESTION))
    written = found.teacher_fmt.answer_ids(QUESTION, text)
    own = found.student_fmt.answer_ids(QUESTION, text)
    assert found.student_answer(prompt, written, ended=False).tolist() == own.tolist()
    for ids in (written, np.append(written, found.teacher_fmt.end_ids[0])):
        assert found.student_answer(prompt, ids, ended=True).tolist() == [*own, found.student_fmt.end_ids[0]]


def test_a_teachers_answer_keeps_its_thoughts_and_ends_where_the_students_would():
    student = with_template(THINKING, added=("<think>", "</think>"))
    teacher = added("unigram", "<think>", "</think>")
    found = crossing(student, teacher)
    prompt = Prompt(row=QUESTION, ids=student.prompt_ids(QUESTION))
    text = "<think>\n12 + 7\n</think>\n\n19"
    ids = found.student_answer(prompt, teacher.answer_ids(QUESTION, text), ended=True)
    assert student.tokenizer.show(ids) == text + "<|im_end|>"
    assert len([n for n in ids if student.tokenizer.tokens[int(n)] in ("<think>", "</think>")]) == 2
    other = crossing(student, fmt("unigram", 3, 1))  # with a second end, that is no end of the student's
    written = np.append(teacher.answer_ids(QUESTION, "19"), 1)
    assert student.tokenizer.show(other.student_answer(prompt, written, ended=True)) == "19<|im_end|>"
    line = fmt(chat=False, end_tokens=("\n",))
    found = crossing(line, teacher)
    ids = found.student_answer(prompt, teacher.answer_ids(QUESTION, "1\n2"), ended=True)
    assert line.tokenizer.show(ids) == "1\n"


# ---- refusals, notes, bookkeeping -----------------------------------------------------------------------------------


def test_a_tokenizer_that_changes_most_text_is_refused_with_an_example():
    def scrambled(state):
        backend = Backend.from_str(json.dumps(state))
        backend.normalizer = normalizers.Replace(Regex("[^ ]"), "x")
        state["normalizer"] = json.loads(backend.to_str())["normalizer"]

    with pytest.raises(ModelError, match=r"does not keep texts: .*leaves \d+% as they are, changes \d+%, .* to 'x+'"):
        agree(fmt(), edited(scrambled))
    stranger = Backend(models.WordLevel({"<unk>": 0, "<|endoftext|>": 1, "ж": 2}, "<unk>"))
    stranger.pre_tokenizer, stranger.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    with pytest.raises(ModelError, match="leaves 0% as they are"):
        agree(fmt(), PromptFormat(Tokenizer(families.wrapped(stranger, chat=False, unk="<unk>")), PLAIN))


def test_what_is_changed_or_unknown_is_noted():
    assert to_unigram().notes == () and to_unigram().fit.mapped == 1.0
    lower = crossing(fmt(), fmt("bert"))
    assert (
        0.5 < lower.fit.mapped < 0.9 and abs(sum((lower.fit.mapped, lower.fit.unknown, lower.fit.changed)) - 1) < 1e-9
    )
    assert any("changes" in note and "'The' to 'the'" in note for note in lower.notes)
    assert any("has no tokens for" in note for note in crossing(fmt(), fmt("wordpiece")).notes)
    both = crossing(fmt("byte_bpe", END), fmt("unigram", 3, 1))
    assert "student's chat template closes answers" in both.notes[0]
    assert "teacher may also end answers with '<|endoftext|>'" not in both.notes  # the student's end is another
    assert any("the teacher may also end answers with" in note for note in crossing(fmt(), fmt("unigram", 3, 1)).notes)


@settings(max_examples=40, deadline=None)
@given(asked=st.text(min_size=1, max_size=20) | HOSTILE.filter(bool), said=st.text(max_size=20))
def test_the_end_of_a_prompt_is_enough_to_read_an_answer_behind_it(asked, said):
    for family in CROSSED:
        made = fmt(family)
        lead = made.lead(row(asked))
        sealed = made._sealed(row(asked))
        whole = Lead(sealed, tuple(made.guard.encode(sealed)))
        assert len(lead.ids) < len(whole.ids)
        assert made.behind(lead, said).ids.tolist() == made.behind(whole, said).ids.tolist()
        assert made.behind(lead, said).offsets.tolist() == made.behind(whole, said).offsets.tolist()


def test_an_answer_is_read_by_itself_where_a_token_would_reach_into_the_prompt():
    plain = fmt(chat=False)
    encode = plain.tokenizer.encode
    assert encode("see the quick")[: len(encode("see th"))] != encode("see th")
    assert plain.answer_ids(row("see th"), "e quick").tolist() == encode("e quick")
    assert plain.answer_ids(row("see "), "the quick").tolist() == encode("the quick")
    assert plain.answer_ids(row("see"), " the quick").tolist() == encode(" the quick")
    found = crossing(fmt("unigram"), plain)
    _, seen = read(found, "e quick", asked=row("see th"))
    assert seen.ids[:-1].tolist() == encode("e quick") and (seen.spans.span_T >= 0).all()


def test_reading_again_gives_the_same_and_another_prompt_another():
    found = crossing(fmt("unigram"), fmt())
    ids = found.student_fmt.tokenizer.encode("the fox")
    first, second = (read(found, ids, asked=row("a", name="same"))[1] for _ in range(2))
    assert first.ids.tolist() == second.ids.tolist()
    assert first.spans.span_T.tolist() == second.spans.span_T.tolist()
    raw = read(found, ids, asked=row("", completion="-", name="same"))[1]  # the same id, another prompt
    shown = [found.teacher_fmt.tokenizer.show(seen.ids) for seen in (first, raw)]
    assert shown == [" the fox", "the fox"]


def test_the_fingerprint_tells_pairs_and_formats_apart():
    one = to_unigram().fingerprint
    assert one == crossing(fmt(), fmt("unigram")).fingerprint
    others = [crossing(fmt("unigram"), fmt()), crossing(fmt(), fmt("unigram", bos=True)), crossing(fmt(), fmt("bert"))]
    assert len({one, *(other.fingerprint for other in others)}) == 4
