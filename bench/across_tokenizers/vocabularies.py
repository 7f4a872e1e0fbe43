"""Three families of tokenizers, trained on the world's own text, each cutting it in its own way."""

from __future__ import annotations

import json
import string
from typing import Any

from across_tokenizers.world import corpus
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def byte_bpe(vocab_size: int) -> Any:
    """Byte-level BPE, as GPT-2 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    return _wrapped(backend, END)


def unigram(vocab_size: int, end: str = "</s>") -> Any:
    """Unigram with byte fallback, as Llama 2 and Gemma have it; another end token and other numbers than the BPE."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", end, *bytes_],
        unk_token="<unk>",
        max_piece_length=4,
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    state = json.loads(backend.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return _wrapped(Backend.from_str(json.dumps(state)), end, unk_token="<unk>")


def wordpiece(vocab_size: int, end: str = "[SEP]") -> Any:
    """WordPiece, as BERT has it: pieces inside a word begin with ##. It has no line end: its text has none."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [c for c in string.printable if not c.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[UNK]", end], initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for letter in letters:  # inside of words as well, so that no word is unknown
        vocabulary.setdefault(f"##{letter}", len(vocabulary))
    backend = Backend.from_str(json.dumps(state))
    backend.decoder = decoders.WordPiece()
    return _wrapped(backend, end, unk_token="[UNK]")


def _wrapped(backend: Any, end: str, **more: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False, **more
    )
