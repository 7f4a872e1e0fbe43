"""What a whole step is measured on: five cases, and the models, tokenizer and prompts that every library reads.

Imports nothing of opd: the workers of other libraries run in environments that do not have it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, PAD = "<end>", "<pad>"
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6}
SHARED = {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 4096}
CONSTANT = 1.0  # of channel 0 of every state: what the end token's logit is made of
LOUDNESS = 1.5  # standard deviation of logits
STEPS = 64  # prompts are made for so many steps


@dataclass(frozen=True)
class Case:
    """One shape of a step.

    prompts       asked in one step, each for `samples` answers.
    prompt_tokens  from the shortest to the longest prompt.
    max_tokens    longest answer.
    hazard        probability of the end token at every position; 0: every answer is as long as it may be.
    """

    name: str
    vocab: int
    prompts: int
    samples: int
    prompt_tokens: tuple[int, int]
    max_tokens: int
    hazard: float
    says: str

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


CASES = {
    case.name: case
    for case in (
        Case("v408", 408, 8, 1, (32, 32), 128, 0.0, "8 x 128 new tokens, V = 408"),
        Case("v32k", 32_768, 8, 1, (32, 32), 128, 0.0, "8 x 128 new tokens, V = 32,768"),
        Case("v152k", 151_936, 8, 1, (32, 32), 128, 0.0, "8 x 128 new tokens, V = 151,936"),
        Case("ragged", 408, 64, 1, (8, 64), 256, 0.02, "64 prompts, answers of 1 to 256 tokens, V = 408"),
        Case("grouped", 408, 4, 8, (512, 512), 64, 0.0, "8 answers of 64 tokens to each of 4 prompts of 512, V = 408"),
    )
}


def make(case: Case, folder: Path, seed: int = 0) -> None:
    """Writes student/, teacher/ and prompts.jsonl: random weights whose logits are about N(0, LOUDNESS)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    tokenizer = _tokenizer(case.vocab)
    for number, (name, shape) in enumerate({"student": STUDENT, "teacher": TEACHER}.items()):
        torch.manual_seed(1000 * seed + number)
        config = Qwen3Config(
            **shape, **SHARED, vocab_size=case.vocab, bos_token_id=None, eos_token_id=0, pad_token_id=1
        )
        model = Qwen3ForCausalLM(config)
        _set_hazard(model, case)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(seed)
    low, high = case.prompt_tokens
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(STEPS * case.prompts):
            length = int(torch.randint(low, high + 1, (), generator=generator))
            ids = torch.randint(2, case.vocab, (length,), generator=generator).tolist()
            file.write(json.dumps({"prompt": " ".join(f"t{i}" for i in ids)}) + "\n")


@torch.no_grad()
def _set_hazard(model: Qwen3ForCausalLM, case: Case) -> None:
    """Logits of standard deviation LOUDNESS, and an end token whose logit is the same at every position, or nearly.

    Channel 0 of the residual stream is CONSTANT for every token, and no layer reads or writes it: behind the final norm
    it is about the same everywhere, so that the end token's own entry there, which differs from the others', moves its
    logit alone. The layers say more than the embedding, or every token would call for itself again.
    """
    body = model.model
    embedding = body.embed_tokens.weight
    embedding.normal_(std=0.02)
    embedding[:, 0] = CONSTANT
    for layer in body.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(2.0)
            projection.weight[0] = 0.0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 0.0
    ids = torch.randint(2, case.vocab, (4, 64), generator=torch.Generator().manual_seed(0))
    body.norm.weight.fill_(1.0)
    logits = model(ids).logits[..., 2:]
    body.norm.weight.mul_(LOUDNESS / logits.std(-1).mean())
    constant = body(ids).last_hidden_state[..., 0].mean()
    usual = (model(ids).logits[..., 2:]).logsumexp(-1) - constant * CONSTANT  # of the others, without what they share
    wanted = usual.mean() + (-30.0 if case.hazard == 0 else math.log(case.hazard / (1 - case.hazard)))
    embedding[:2, 1:] = 0.0
    embedding[0, 0] = CONSTANT + wanted / constant
    embedding[1, 0] = CONSTANT - 30.0 / constant  # padding is never drawn


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word, one token: ids and text are the same thing."""
    words = {END: 0, PAD: 1} | {f"t{i}": i for i in range(2, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
