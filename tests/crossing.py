"""Students and teachers with different tokenizers, and answers in real text, for tests of the real loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from opd.models.causal import CausalLM
from opd.text.formats import Format, PromptFormat
from opd.text.tokenizer import Tokenizer
from opd.types import Rollout
from tests import rooms, tiny
from tests.text import families

TEXTS = (
    "efgh, and again: efgh.",
    "12 + 7 = 19. The answer is 19.",
    "4 - 1 = 3, 3 * 3 = 9 step by step",
    "the lazy fox, naïve — über 🦊 jumps",
    " quick  brown\n\ndog 0123456789",
    "x",
)


def fmt(family: str, **changes: Any) -> PromptFormat:
    """The plain format of a tokenizer of `tests.text.families`, which ends answers with <|endoftext|>."""
    return _plain(families.made(family, chat=False), **changes)


def _plain(tokenizer: Tokenizer, **changes: Any) -> PromptFormat:
    settings = {"kind": "plain", "plain_template": "{prompt}", "system_prompt": None}
    return PromptFormat(tokenizer, Format(**{**settings, "chat_template_kwargs": {}, "end_tokens": (), **changes}))


def model(of: PromptFormat, *, seed: int = 0, kind: str = "qwen3", dtype: torch.dtype = torch.float32) -> CausalLM:
    """A random model with the vocabulary of a format, and opinions that differ."""
    size = of.tokenizer.vocab_size
    module = tiny.model(kind, vocab_size=size, seed=seed, scale=12.0).to(dtype)
    return CausalLM(module, vocab_size=size, compute_dtype=dtype, name=f"tiny {kind} of {size}")


def answers(
    of: PromptFormat,
    texts: Sequence[str] = TEXTS,
    *,
    cut: Sequence[int] = (2,),
    domains: Sequence[str] = ("q",),
    samples: int = 1,
) -> list[Rollout]:
    """One answer with each text, in the tokens its tokenizer gives it, to one prompt after the other; those in `cut`
    were truncated and have no end."""
    asked = rooms.prompts(of)
    made = []
    for n, text in enumerate(texts):
        prompt = asked[n % len(asked)]
        ids = [*of.tokenizer.encode(text), *(() if n in cut else (of.end_ids[0],))]
        row = type(prompt.row)(id=prompt.id, domain=domains[n % len(domains)], prompt=prompt.row.prompt)
        prompt = type(prompt)(row=row, ids=prompt.ids)
        for sample in range(samples):
            logprobs = -0.5 - np.random.default_rng(n).random(len(ids))
            made.append(
                rooms.answer(
                    prompt, ids, logprobs.tolist(), n * samples + sample, finish_reason="length" if n in cut else "stop"
                )
            )
    return made


def permuted(of: PromptFormat, seed: int = 0) -> tuple[PromptFormat, np.ndarray]:
    """The same tokenizer with its ids shuffled, and where each id went: another tokenizer that reads just as this one
    does."""
    state = json.loads(of.tokenizer.hf.backend_tokenizer.to_str())
    moved_V = np.random.default_rng(seed).permutation(of.tokenizer.vocab_size)
    state["model"]["vocab"] = {token: int(moved_V[n]) for token, n in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = int(moved_V[token["id"]])
    backend = Backend.from_str(json.dumps(state))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **of.tokenizer.hf.special_tokens_map)
    return _plain(Tokenizer(made)), moved_V


def permuted_model(of: CausalLM, moved_V: np.ndarray) -> CausalLM:
    """The same model in the shuffled numbering."""
    module = copy.deepcopy(of.module)
    place_V = torch.from_numpy(np.argsort(moved_V))
    with torch.no_grad():
        ours, theirs = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        ours.copy_(ours[place_V])
        if theirs.data_ptr() != ours.data_ptr():
            theirs.copy_(theirs[place_V])
    return CausalLM(module, vocab_size=of.vocab_size, compute_dtype=of.compute_dtype, name="shuffled")


def save(folder: Path, family: str, kind: str = "qwen3", *, seed: int = 0, **overrides: Any) -> str:
    """A model with the tokenizer of a family as a user would have it on disk, ChatML template included."""
    words = families.hf(family)
    module = tiny.model(kind, vocab_size=len(words), seed=seed, **{"scale": 12.0, **overrides})
    for config in (module.config, module.generation_config):
        config.eos_token_id = words.eos_token_id
    module.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
