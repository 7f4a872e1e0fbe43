"""Families of tokenizers, trained on the spot, all with the special tokens and the chat template of `tiny`."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from opd.text.formats import Format
from opd.text.probes import PROBES
from opd.text.tokenizer import Tokenizer
from opd.types import Row
from tests import tiny

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
FAMILIES = ("byte_bpe", "unigram", "unigram_nfkc", "wordpiece")
# More of them, for pairs with different tokenizers: digits one by one; lower case, without accents; one character each.
CROSSED = ("byte_bpe", "byte_bpe_digits", "unigram", "unigram_nfkc", "wordpiece", "bert", "characters")
PLAIN = Format(kind="auto", plain_template="{prompt}", system_prompt=None, chat_template_kwargs={}, end_tokens=())


def row(prompt="", completion=None, name="world/0") -> Row:
    turns = prompt if isinstance(prompt, str) else tuple({"role": role, "content": text} for role, text in prompt)
    return Row(id=name, domain="world", prompt=turns, completion=completion)


def wrapped(backend: Backend, *, chat: bool = True, bos: bool = False, unk: str | None = None, **settings):
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|bos|>" if bos else None,
        unk_token=unk,
        **settings,
    )
    if chat:
        made.chat_template = ("{{ bos_token }}" if bos else "") + tiny.CHAT_TEMPLATE
    return made


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [*tiny.CORPUS, *PROBES * 10]


# As known models have them: where the space of a word is put and taken off again differs in each.
STYLES = ("llama", "gemma", "t5", "digits_metaspace", "prefix_space")


@cache
def _more(family: str) -> str:
    if family == "characters":
        letters = sorted({character for text in TEXTS for character in text})
        backend = Backend(models.WordLevel({t: n for n, t in enumerate(["<unk>", *SPECIALS, *letters])}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(SPECIALS)
        return backend.to_str()
    settings = {"vocab_size": 600, "show_progress": False}
    if family in ("byte_bpe_digits", "prefix_space"):
        backend = Backend(models.BPE())
        digits = [pre_tokenizers.Digits(individual_digits=True)] if family == "byte_bpe_digits" else []
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=family == "prefix_space")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=SPECIALS, initial_alphabet=alphabet, **settings)
    elif family == "bert":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]", *SPECIALS], **settings | {"vocab_size": 900})
    elif family in ("llama", "gemma"):
        backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        spaces = normalizers.Replace(" ", "▁")
        of_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if family == "llama":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            of_text.append(decoders.Strip(" ", 1, 0))
        else:
            backend.normalizer = spaces
            backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(of_text)
        trainer = trainers.BpeTrainer(special_tokens=["<unk>", *SPECIALS, *BYTES], **settings)
    else:
        backend = Backend(models.Unigram())
        words = pre_tokenizers.WhitespaceSplit() if family == "t5" else pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace()])
        backend.decoder = decoders.Metaspace()
        if family == "t5":
            backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        trainer = trainers.UnigramTrainer(special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", **settings)
    backend.train_from_iterator(TEXTS, trainer)
    return _without_bytes(backend.to_str())


def _without_bytes(trained: str) -> str:
    """Bytes are ordinary tokens of the vocabulary, as SentencePiece has them; a trainer only takes them as special."""
    state = json.loads(trained)
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


@cache
def _trained(family: str) -> str:
    if family in (*STYLES, "characters", "byte_bpe_digits", "bert"):
        return _more(family)
    if family == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIALS], show_progress=False)
        backend.train_from_iterator(tiny.CORPUS, trainer)
        backend.decoder = decoders.WordPiece()
        return backend.to_str()
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    if family == "unigram_nfkc":
        backend.normalizer = normalizers.NFKC()
    # A special token inside the vocabulary has the best score of all: the model would find it in plain text.
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIALS, *BYTES], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(tiny.CORPUS, trainer)
    state = json.loads(_without_bytes(backend.to_str()))
    state["model"]["byte_fallback"] = True
    return json.dumps(state)


def hf(family: str, *, chat: bool = True, bos: bool = False):
    if family == "byte_bpe":
        return tiny.tokenizer(chat=chat, bos=bos)
    if family in ("byte_bpe_digits", "prefix_space"):
        return wrapped(Backend.from_str(_trained(family)), chat=chat, bos=bos)
    unk = "[UNK]" if family in ("wordpiece", "bert") else "<unk>"
    return wrapped(Backend.from_str(_trained(family)), chat=chat, bos=bos, unk=unk)


@cache
def made(family: str = "byte_bpe", chat: bool = True, bos: bool = False) -> Tokenizer:
    return Tokenizer(hf(family, chat=chat, bos=bos))
