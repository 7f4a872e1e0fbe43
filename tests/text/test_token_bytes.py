"""The bytes of tokens are what decoders show, in every family, whatever the tokens are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from opd.text.token_bytes import TokenBytes
from opd.text.tokenizer import Tokenizer
from tests.text import families
from tests.text.test_pieces import made as made_piece

KINDS = (*families.CROSSED, *families.STYLES, "words", "rewriting")
fuzz = settings(max_examples=30, deadline=None)


def rewriting() -> Tokenizer:
    """Its decoder changes what several tokens are together."""
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("bc", "-long-")])
    return Tokenizer(families.wrapped(backend, chat=False))


@cache
def table(kind: str) -> TokenBytes:
    if kind == "rewriting":
        return TokenBytes(rewriting())
    return TokenBytes(made_piece(kind) if kind == "words" else families.made(kind))


def shown_behind(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    return tokenizer.show([*before, *ids])[len(tokenizer.show(before)) :]


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_A_13_bytes_of_any_ids_are_what_is_shown_behind_a_text(kind: str, data: st.DataObject) -> None:
    made = table(kind)
    ids = data.draw(st.lists(st.sampled_from(sorted(made.tokenizer.tokens)), max_size=20))
    raw, length_T = made.read(np.array(ids, dtype=np.int64))
    assert length_T.sum() == len(raw) and len(length_T) == len(ids)
    if "\ufffd" in raw.tobytes().decode(errors="replace"):
        raw = made.spoiled(np.array(ids, dtype=np.int64), length_T, raw)
    before = [made.tokenizer.id("a") or 0]
    assert raw.tobytes().decode(errors="replace") == shown_behind(made.tokenizer, before, ids)


def test_tables_are_enough_but_for_decoders_that_rewrite() -> None:
    assert [kind for kind in KINDS if not table(kind).exact] == ["rewriting"]
    raw, length_T = table("rewriting").read(np.array([0, 1, 2, 0]))
    assert raw.tobytes() == b"a-long-a" and length_T.sum() == 8


def test_each_token_has_its_own_bytes() -> None:
    def of(kind: str, name: str) -> bytes:
        vocabulary = {token: number for number, token in table(kind).tokenizer.tokens.items()}
        return table(kind).of(vocabulary[name])

    assert of("byte_bpe", "Ġthe") == b" the" and of("byte_bpe", "ä") == b"\xe4"
    for kind in ("unigram", "llama", "gemma"):
        word = next(t for t in sorted(table(kind).tokenizer.tokens.values()) if t[0] == "▁" and t[1:].isalpha())
        assert of(kind, "<0xE4>") == b"\xe4" and of(kind, word) == f" {word[1:]}".encode()
    assert of("wordpiece", "the") == b" the" and of("wordpiece", "##o") == b"o"
    assert of("bert", "the") == b" the" and of("bert", ".") == b"."  # it puts no space before a full stop
    assert of("characters", "中") == "中".encode() and table("characters").of(10_000) == b""


def test_a_token_that_is_no_text_is_one_byte() -> None:
    made = table("byte_bpe")
    ids = np.array([made.tokenizer.id("a"), 2, made.tokenizer.id("b")], dtype=np.int64)
    raw, length_T = made.read(ids, np.array([False, True, False]))
    assert length_T.tolist() == [1, 1, 1] and bytes(raw[[0, 2]]) == b"ab"


def test_of_tokens_with_the_same_bytes_the_one_counts_that_an_encoder_takes() -> None:
    found = table("unigram").ids_of_bytes
    tokens = table("unigram").tokenizer.tokens
    assert tokens[found[b"a"]] == "a" and tokens[found[b" "]] == "▁" and tokens[found[b"\xe4"]] == "<0xE4>"
    assert not table("bert").unknown_ids & set(table("bert").ids_of_bytes.values())


def test_bytes_that_are_only_named_so_are_names() -> None:
    backend = Backend(models.WordLevel({"a": 0, "<0x41>": 1}, unk_token="a"))
    backend.decoder = decoders.Fuse()
    made = TokenBytes(Tokenizer(families.wrapped(backend, chat=False)))
    assert made.of(1) == b"<0x41>" and made.exact
