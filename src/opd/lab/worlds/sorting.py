"""A small world that can be checked exactly: put eight letters into alphabetical order.

    sort: hqzaobkc
    abchkoqz

Every row is made from a seed, every answer is verifiable by string equality, and a model of a few hundred thousand
parameters learns it in a minute on a CPU. One wrong letter spoils the whole answer, so a small error rate per token
costs a lot: what on-policy distillation repairs.
"""

from __future__ import annotations

import hashlib
import random
import string
from typing import Literal, TypedDict

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

LETTERS = 8
END = "<|endoftext|>"
ALPHABET = (END, "\n", " ", ":", *string.ascii_lowercase)

Split = Literal["train", "heldout"]


class Problem(TypedDict):
    """One row; `completion` is what SFT trains on, `answer` what the grader compares with. Here they are equal."""

    prompt: str
    completion: str
    answer: str


def split_of(answer: str) -> Split:
    """Which split an answer belongs to: one in ten is held out.

    The sorted letters decide, not the order they are asked in: no held-out answer is an anagram of anything trained on.
    """
    return "heldout" if hashlib.sha256(answer.encode()).digest()[0] % 10 == 0 else "train"


def problems(split: Split, n: int, seed: int = 0) -> list[Problem]:
    """`n` different problems of one split. The first rows of a longer list with the same seed are the same rows."""
    source = random.Random(f"sorting/{split}/{seed}")
    rows: dict[str, Problem] = {}
    while len(rows) < n:
        letters = "".join(source.choices(string.ascii_lowercase, k=LETTERS))
        answer = "".join(sorted(letters))
        if split_of(answer) == split:
            rows[letters] = Problem(prompt=f"sort: {letters}\n", completion=answer, answer=answer)
    return list(rows.values())


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<|endoftext|>` as end and padding, no chat template.

    There is no unknown token on purpose: a character outside the world is an error, not a silent gap.
    """
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(ALPHABET)}))  # type: ignore[call-arg]
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # pyright: ignore
    backend.decoder = decoders.Fuse()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _config(*, width: int, layers: int, heads: int, hidden: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(ALPHABET),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def teacher_config() -> Qwen3Config:
    """243,072 parameters."""
    return _config(width=96, layers=2, heads=4, hidden=288)


def student_config() -> Qwen3Config:
    """108,800 parameters."""
    return _config(width=64, layers=2, heads=4, hidden=192)
