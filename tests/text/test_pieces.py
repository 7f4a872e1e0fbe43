"""Every token's own part of a text, in every family of tokenizers."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from opd.lab.worlds import sorting
from opd.text.pieces import piece_alone, pieces
from opd.text.tokenizer import Tokenizer
from tests.text import families

KINDS = (*families.FAMILIES, "llama", "words")
fuzz = settings(max_examples=60, deadline=None)


@cache
def made(kind: str) -> Tokenizer:
    if kind == "words":
        return Tokenizer(sorting.tokenizer())
    if kind != "llama":
        return families.made(kind)
    backend = Backend.from_str(families._trained("unigram"))  # its vocabulary, with the decoder that Llama 2 has
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return Tokenizer(families.wrapped(backend, unk="<unk>"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if tokenizer is made("words"):
        text = "".join(c for c in text if c in sorting.ALPHABET)
    return tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(text=st.text(max_size=30))
def test_the_pieces_of_a_text_are_the_text(kind: str, text: str) -> None:
    tokenizer = made(kind)
    ids = encode(tokenizer, text)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.show(ids)


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_the_pieces_of_any_ids_are_what_is_shown(kind: str, data: st.DataObject) -> None:
    """Also of what only a bad model writes: halves of characters, special tokens anywhere, ids of no token."""
    tokenizer = made(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.show(ids)


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "llama"])
@fuzz
@given(text=st.text(min_size=1, max_size=12), before=st.sampled_from(["", "the quick ", "<|im_end|>"]))
def test_a_cut_character_stands_at_the_token_that_completes_it(kind: str, text: str, before: str) -> None:
    tokenizer = made(kind)
    ids = [*tokenizer.encode(before), *tokenizer.encode(text)]
    for n in range(len(ids)):
        # What was complete before this token, seen by decoding the prefix alone: the slow definition.
        so_far = tokenizer.show(ids[: n + 1])
        if "\ufffd" not in tokenizer.show(ids) and "\ufffd" not in so_far:
            assert "".join(pieces(tokenizer, ids)[: n + 1]) == so_far


def test_a_character_over_three_tokens_and_one_that_never_ends() -> None:
    for kind in ("byte_bpe", "unigram", "llama"):
        tokenizer = made(kind)
        ids = tokenizer.encode("a中")
        assert pieces(tokenizer, ids)[-3:] == ["", "", "中"]
        assert pieces(tokenizer, [ids[-3], ids[-2]])[-1] == "\ufffd"
        special = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
        assert pieces(tokenizer, [*ids, special])[-2:] == ["中", "<|im_end|>"]


def test_an_added_token_of_other_letters_and_a_space_in_front() -> None:
    hf = families.hf("byte_bpe")
    hf.add_tokens(["<｜begin of text｜>"])  # none of these bars is in the alphabet of bytes
    tokenizer = Tokenizer(hf)
    number = next(n for n, name in tokenizer.tokens.items() if name == "<｜begin of text｜>")
    assert pieces(tokenizer, [number, *tokenizer.encode("中")]) == ["<｜begin of text｜>", "", "", "中"]
    llama = made("llama")  # takes one space off the start of a text, also one that is a byte
    ids = [next(n for n, name in llama.tokens.items() if name == f"<0x{byte:02X}>") for byte in " 中".encode()]
    assert pieces(llama, ids) == ["", "", "", "中"]
    assert pieces(llama, [*llama.encode("a"), *ids])[-4:] == [" ", "", "", "中"]


def test_a_decoder_that_rewrites_across_tokens_moves_borders_but_loses_nothing() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("bc", "-long-")])
    tokenizer = Tokenizer(families.wrapped(backend, chat=False))
    ids = [0, 1, 2, 0]
    assert tokenizer.show(ids) == "a-long-a" == "".join(pieces(tokenizer, ids))
    assert len(pieces(tokenizer, ids)) == 4


@pytest.mark.parametrize("kind", ["byte_bpe", "llama"])
def test_the_time_grows_with_the_length_also_for_bytes_that_are_no_text(kind: str) -> None:
    tokenizer = made(kind)
    lost = tokenizer.encode("中")[-1]

    def seconds(length: int) -> float:
        began = time.process_time()
        assert len(pieces(tokenizer, [lost] * length)) == length
        return time.process_time() - began

    seconds(1000)
    assert seconds(40_000) < 25 * max(seconds(4_000), 0.004)  # 100 times, were every prefix decoded again


def test_a_token_alone_keeps_its_space_and_shows_bytes_as_hex() -> None:
    for kind in ("byte_bpe", "unigram", "llama"):
        tokenizer = made(kind)
        number, name = next((n, t) for n, t in sorted(tokenizer.tokens.items()) if t[0] in "Ġ▁" and t[1:].isalpha())
        assert piece_alone(tokenizer, number) == f" {name[1:]}"
        assert piece_alone(tokenizer, tokenizer.encode("中")[-1]) == "<0xAD>"
    assert piece_alone(made("words"), 7) == sorting.ALPHABET[7]
    assert piece_alone(made("words"), 0) == sorting.END
    assert piece_alone(made("words"), 999) == "<id 999>"
