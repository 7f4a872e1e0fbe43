"""Three families of tokenizers, trained on the spot, all with the special tokens and the chat template of `tiny`."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.text.formats import Format
from opd.text.tokenizer import Tokenizer
from opd.types import Row
from tests import tiny

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
FAMILIES = ("byte_bpe", "unigram", "unigram_nfkc", "wordpiece")
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


@cache
def _trained(family: str) -> str:
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
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIALS, *bytes_], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(tiny.CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


def hf(family: str, *, chat: bool = True, bos: bool = False):
    if family == "byte_bpe":
        return tiny.tokenizer(chat=chat, bos=bos)
    unk = "[UNK]" if family == "wordpiece" else "<unk>"
    return wrapped(Backend.from_str(_trained(family)), chat=chat, bos=bos, unk=unk)


@cache
def made(family: str = "byte_bpe", chat: bool = True, bos: bool = False) -> Tokenizer:
    return Tokenizer(hf(family, chat=chat, bos=bos))
