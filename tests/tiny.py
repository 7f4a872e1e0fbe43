"""Tiny real parts for tests: tokenizers trained on the spot and random transformers models of eight kinds.

Nothing here is mocked: these are the classes users load, only small.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Sort the letters: hgfe. efgh",
    "What is 12 + 7? 12 + 7 = 19. The answer is 19.",
    "user system assistant 0123456789 abcdefghijklmnopqrstuvwxyz",
    "the quick brown fox jumps over the lazy dog, again and again and again",
    "Solve 3 * (4 - 1) step by step: 4 - 1 = 3, 3 * 3 = 9.",
] * 20


@cache
def _backend(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tokenizer(vocab_size: int = 300, *, chat: bool = True, bos: bool = False, eos: str | None = None):
    """A byte-level BPE tokenizer. `chat` adds a ChatML template and ends answers with <|im_end|>."""
    end = eos or ("<|im_end|>" if chat else "<|endoftext|>")
    backend = Tokenizer.from_str(_backend(vocab_size).to_str())
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token="<|endoftext|>",
        bos_token="<|bos|>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    )
    if chat:
        made.chat_template = ("{{ bos_token }}" if bos else "") + CHAT_TEMPLATE
    return made


_COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_SPECIALS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
KINDS: dict[str, tuple[str, dict]] = {
    "qwen3": ("Qwen3Config", dict(_COMMON, num_hidden_layers=2, head_dim=8)),
    "llama": ("LlamaConfig", dict(_COMMON, num_hidden_layers=2)),
    "gemma3": ("Gemma3TextConfig", dict(_COMMON, num_hidden_layers=2, head_dim=8, sliding_window=8)),
    "mistral": ("MistralConfig", dict(_COMMON, num_hidden_layers=2, sliding_window=8)),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "qwen3_moe": ("Qwen3MoeConfig", dict(_COMMON, num_hidden_layers=2, **_MOE)),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(
            _COMMON,
            num_hidden_layers=4,
            shared_expert_intermediate_size=32,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            **_MOE,
        ),
    ),
    "olmo2": ("Olmo2Config", dict(_COMMON, num_hidden_layers=2)),
}


def model(kind: str = "qwen3", *, vocab_size: int = 300, seed: int = 0, scale: float = 3.0, **overrides):
    """A random model of one of `KINDS`. `scale` widens the head so that distributions are far from uniform."""
    name, settings = KINDS[kind]
    config = getattr(transformers, name)(vocab_size=vocab_size, **{**settings, **_SPECIALS, **overrides})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(scale)
    return made.eval()


def save(folder: Path, kind: str = "qwen3", *, chat: bool = True, bos: bool = False, seed: int = 0, **overrides) -> str:
    """Writes a tiny model with its tokenizer as a user would have it on disk; returns the folder as a string."""
    words = tokenizer(chat=chat, bos=bos)
    made = model(kind, vocab_size=overrides.pop("vocab_size", len(words)), seed=seed, **overrides)
    made.generation_config.eos_token_id = words.eos_token_id
    made.config.eos_token_id = words.eos_token_id
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
