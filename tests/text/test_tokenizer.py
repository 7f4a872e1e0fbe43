"""Loading, identity, and ordinary text that stays ordinary."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd.errors import ModelError
from opd.text.tokenizer import Tokenizer, _reason, load_tokenizer
from tests import tiny
from tests.text import families

HOSTILE = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from([*families.SPECIALS, "<|im_", "end|>", "＜|im_end|＞", "\n", " "])),
    max_size=8,
).map("".join)
# Fuzzing many small texts is quick, but the first call of a family trains its tokenizer.
fuzz = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("family", families.FAMILIES)
@fuzz
@given(text=HOSTILE)
def test_special_token_text_is_encoded_as_ordinary_text(family, text):
    tokenizer = families.made(family)
    ids = tokenizer.encode(text)
    assert not (set(ids) & (tokenizer.special_ids - {tokenizer.hf.unk_token_id}))


@fuzz
@given(text=HOSTILE)
def test_byte_level_text_survives_encoding(text):
    tokenizer = families.made("byte_bpe")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", families.FAMILIES)
@fuzz
@given(text=st.text(max_size=40))
def test_harmless_text_has_the_ids_of_the_original_tokenizer(family, text):
    tokenizer = families.made(family)
    assume(not any(tokenizer.tokens[number] in text for number in tokenizer.added_ids))
    assert tokenizer.encode(text) == tokenizer.hf.encode(text, add_special_tokens=False)


def test_the_unigram_model_itself_would_find_special_tokens_in_plain_text():
    tokenizer = families.made("unigram")  # the reason why names are changed inside the model too
    naive = tokenizer.hf.encode("a<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.hf.convert_tokens_to_ids("<|im_end|>") in naive
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"


def test_a_merge_that_makes_a_special_token_is_not_taken():
    backend = tiny._backend(300).__class__.from_str(tiny._backend(300).to_str())
    state = json.loads(backend.to_str())
    pieces = ["x", "xy"]
    state["model"]["vocab"] |= {"xy": 300, "xyz": 301}
    state["model"]["merges"] += [["x", "y"], ["xy", "z"]]
    state["added_tokens"].append(state["added_tokens"][0] | {"id": 301, "content": "xyz"})
    tokenizer = Tokenizer(families.wrapped(backend.from_str(json.dumps(state))))
    assert tokenizer.hf.encode("xyz") == [301]
    assert [tokenizer.tokens[number] for number in tokenizer.encode("xyz")] == [pieces[1], "z"]


def test_A_01_vocab_size_counts_the_tokens_not_the_models_rows():
    tokenizer = Tokenizer(tiny.tokenizer(300))
    assert tokenizer.vocab_size == 300
    tokenizer.hf.add_tokens(["<think>"])
    assert Tokenizer(tokenizer.hf).vocab_size == 301


def test_special_and_added_tokens():
    plain = tiny.tokenizer(bos=True)
    plain.add_tokens(["<think>"])
    tokenizer = Tokenizer(plain)
    names = {tokenizer.tokens[number] for number in tokenizer.special_ids}
    assert names == set(families.SPECIALS)
    assert {tokenizer.tokens[n] for n in tokenizer.added_ids} == {*names, "<think>"}
    assert tokenizer.tokens[tokenizer.bos_id] == "<|bos|>" and tokenizer.tokens[tokenizer.eos_id] == "<|im_end|>"
    assert tokenizer.encode("<think>") == [300]  # a mark people may write, not a special token
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b")]) == "a b"
    assert tokenizer.show([tokenizer.bos_id, *tokenizer.encode("a b")]) == "<|bos|>a b"


def test_id_knows_one_token_texts_only():
    tokenizer = families.made("byte_bpe")
    assert tokenizer.id("<|im_end|>") == 2
    assert tokenizer.id("\n") == tokenizer.encode("\n")[0]
    assert tokenizer.id("<|nobody|>") is None
    assert families.made("wordpiece").id("日") is None  # it is encoded as the unknown token


@pytest.mark.parametrize("family", families.FAMILIES)
def test_fingerprint_survives_a_round_trip_and_use(family, tmp_path):
    tokenizer = families.made(family)
    before = tokenizer.fingerprint
    tokenizer.hf.save_pretrained(tmp_path)
    tokenizer.hf(["a", "a b c"], padding=True, truncation=True, max_length=2)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == before == Tokenizer(tokenizer.hf).fingerprint
    assert loaded.encode("The answer is 19.") == tokenizer.encode("The answer is 19.")


def test_A_02_fingerprints_tell_tokenizers_apart():
    state = json.loads(tiny._backend(300).to_str())
    a, b = "a", "b"
    vocab = state["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    permuted = Tokenizer(families.wrapped(tiny._backend(300).__class__.from_str(json.dumps(state))))
    prints = [families.made("byte_bpe").fingerprint, permuted.fingerprint, Tokenizer(tiny.tokenizer(310)).fingerprint]
    prints += [families.made(family).fingerprint for family in families.FAMILIES[1:]]
    assert len(set(prints)) == len(prints)
    assert all(x != y for x, y in pairwise(prints))


def test_missing_folder_says_so():
    with pytest.raises(ModelError, match=r"/no/such/folder: no such folder"):
        load_tokenizer("/no/such/folder")
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer("./missing")


def test_folder_without_a_tokenizer_lists_what_is_there(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"tokenizer\.json.*found model\.safetensors.*`tokenizer: "):
        load_tokenizer(str(tmp_path))


def test_unreadable_tokenizer_is_a_model_error(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_hub_name_without_a_network_names_revision_and_token():
    with pytest.raises(ModelError, match=r"nobody/nothing \(revision v1\).*HF_HUB_OFFLINE.*HF_TOKEN"):
        load_tokenizer("nobody/nothing", revision="v1")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError("You are trying to access a gated repo."), "gated or private.*HF_TOKEN"),
        (type("RepositoryNotFoundError", (OSError,), {})("404"), "No such repository.*HF_TOKEN"),
        (type("RevisionNotFoundError", (OSError,), {})("404"), "has no revision 'v9'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_hub_errors_say_what_to_do(error, hint):
    with pytest.raises(ModelError, match=hint):
        raise ModelError(_reason(error, "somebody/something", "v9"))


def test_S_05_trust_remote_code_reaches_the_loader(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "tokenizer_class": "MyTokenizer",
        "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]},
    }
    file.write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(ModelError, match="read it, then set `trust_remote_code: true`"):
        load_tokenizer(str(tmp_path))
    assert type(load_tokenizer(str(tmp_path), trust_remote_code=True).hf).__name__ == "MyTokenizer"


def test_revision_reaches_the_loader(monkeypatch):
    asked = []
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k) or load(*a, **k))
    with pytest.raises(ModelError):
        load_tokenizer("nobody/nothing", revision="v1")
    assert asked == [{"revision": "v1", "trust_remote_code": False}]


def test_pure_python_tokenizer_is_refused():
    with pytest.raises(ModelError, match="pure Python tokenizer"):
        Tokenizer(transformers.ByT5Tokenizer(), "google/byt5")
