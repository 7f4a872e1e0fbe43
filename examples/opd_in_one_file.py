"""On-policy distillation from scratch, in one file.

    python examples/opd_in_one_file.py          makes its own two small models; under a minute on a CPU
    python examples/opd_in_one_file.py --student A --teacher B --prompts prompts.jsonl --max-tokens 256 --lr 1e-5

The whole method is one sentence: the student writes, the teacher scores every token of what was written, the student
moves towards the teacher on those very tokens, and then it writes again. Read from top to bottom.

Left out, so that nothing stands between you and the method:
- Padding. Prompts of one length are answered together, which needs none; every sequence is scored alone. Slow, and
  there is no attention mask, padding side or position offset to get wrong.
- Temperature and top-p. The student is sampled from its own distribution, and that same distribution is trained.
- Different tokenizers or chat formats. Both models read the same ids, so both must have one vocabulary.
- Logits in chunks. The [tokens, vocabulary] matrix of a sequence is built whole: simple, and heavy for long answers.
- Discounted returns, baselines, clipping of the importance ratio: on fresh samples the ratio is 1.
- Checkpoints and resuming, more than one device, bfloat16.

Needs torch and transformers only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

# One answer: the prompt's ids, the answer's ids, and the log-probability each answer token had when it was drawn.
Written = tuple[Sequence[int], Sequence[int], Sequence[float]]
OBJECTIVES = ("reverse_kl", "forward_kl", "jsd", "tml")


# ---- 1. the student writes --------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    max_tokens: int,
    end_ids: set[int],
    generator: torch.Generator,
) -> list[Written]:
    """One answer to each prompt, drawn token by token. The prompts must have equal lengths.

    The end token belongs to the answer: stopping is a choice of the student, and it is trained like every other one.
    """
    read = torch.tensor(prompt_ids, device=model.device)
    answers: list[list[int]] = [[] for _ in prompt_ids]
    logprobs: list[list[float]] = [[] for _ in prompt_ids]
    ended = [False] * len(prompt_ids)
    cache = None
    for _ in range(max_tokens):
        out = model(input_ids=read, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        log_mu_NV = out.logits[:, -1].float().log_softmax(-1)
        token_N = torch.multinomial(log_mu_NV.exp().cpu(), 1, generator=generator).to(model.device)
        chosen = log_mu_NV.gather(-1, token_N)
        for n, (token, logprob) in enumerate(zip(token_N[:, 0].tolist(), chosen[:, 0].tolist(), strict=True)):
            if not ended[n]:
                answers[n].append(token)
                logprobs[n].append(logprob)
                ended[n] = token in end_ids
        if all(ended):
            break
        read = token_N
    return [(list(p), a, lp) for p, a, lp in zip(prompt_ids, answers, logprobs, strict=True)]


# ---- 2. the teacher reads, 3. the student is compared -----------------------------------------------------------


def response_logprobs(model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Tensor:
    """[T, V]: the model's log-probabilities of every token of the vocabulary at the T positions of the response.

    The logits at position i predict token i + 1: those for the response start one position before it.
    """
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)


def kl(log_a_TV: Tensor, log_b_TV: Tensor) -> Tensor:
    """[T]: KL(a || b), exactly, summed over the vocabulary."""
    return (log_a_TV.exp() * (log_a_TV - log_b_TV)).sum(-1)


def token_losses(
    log_pi_TV: Tensor, log_q_TV: Tensor, response_T: Tensor, log_mu_T: Tensor, objective: str, beta: float
) -> Tensor:
    """[T]: the loss of every response token; pi is the student (with gradient), q the teacher, mu the sampler."""
    if objective == "reverse_kl":
        return kl(log_pi_TV, log_q_TV)
    if objective == "forward_kl":
        return kl(log_q_TV, log_pi_TV)
    if objective == "jsd":  # as in GKD (arXiv 2306.13649): beta is the teacher's share of the mixture
        log_m_TV = torch.logaddexp(log_q_TV + math.log(beta), log_pi_TV + math.log1p(-beta))
        return beta * kl(log_q_TV, log_m_TV) + (1 - beta) * kl(log_pi_TV, log_m_TV)
    if (
        objective == "tml"
    ):  # Thinking Machines, On-Policy Distillation: a policy gradient that sees only the drawn token
        log_pi_T = log_pi_TV.gather(-1, response_T[:, None])[:, 0]
        log_q_T = log_q_TV.gather(-1, response_T[:, None])[:, 0]
        advantage_T = -(log_mu_T - log_q_T)
        return -(log_pi_T - log_mu_T).exp() * advantage_T
    raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")


def compare(
    student: PreTrainedModel, teacher: PreTrainedModel, sequence: Written, objective: str, beta: float
) -> tuple[Tensor, Tensor]:
    """The losses [T] of one sequence, with gradient, and its exact reverse KL per token [T], without."""
    prompt_ids, response_ids, behaviour_logprobs = sequence
    log_pi_TV = response_logprobs(student, prompt_ids, response_ids)
    with torch.no_grad():
        log_q_TV = response_logprobs(teacher, prompt_ids, response_ids).to(log_pi_TV)
    response_T = torch.tensor(response_ids, device=log_pi_TV.device)
    log_mu_T = torch.tensor(behaviour_logprobs, device=log_pi_TV.device, dtype=log_pi_TV.dtype)
    losses_T = token_losses(log_pi_TV, log_q_TV, response_T, log_mu_T, objective, beta)
    return losses_T, kl(log_pi_TV.detach(), log_q_TV)


def loss_on(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Sequence[Written],
    objective: str = "reverse_kl",
    beta: float = 0.5,
) -> Tensor:
    """The loss of a batch: the mean over all response tokens of all sequences; a scalar that autograd can follow."""
    return torch.cat([compare(student, teacher, one, objective, beta)[0] for one in sequences]).mean()


# ---- 4. the student changes, and writes again -------------------------------------------------------------------


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    lr: float,
    prompts_per_step: int,
    samples: int,
    max_tokens: int,
    end_ids: set[int],
    objective: str,
    beta: float,
    seed: int,
) -> list[float]:
    """Trains the student in place; returns the exact reverse KL per token of every step, before its update."""
    student.eval()  # no dropout: the student that is trained must be the student that wrote
    teacher.eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    history = []
    for step in range(steps):
        asked = order.sample(prompts, min(prompts_per_step, len(prompts)))
        asked = sorted(asked * samples, key=len)
        sequences = []
        for _, same_length in groupby(asked, key=len):
            sequences += sample(student, list(same_length), max_tokens, end_ids, generator)
        tokens = sum(len(response_ids) for _, response_ids, _ in sequences)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        optimiser.zero_grad()
        loss = reverse_kl = 0.0
        for sequence in sequences:
            # Backward one sequence at a time, each divided by the tokens of the whole batch: the gradient of
            # `loss_on(student, teacher, sequences)` exactly, with the memory of a single sequence.
            losses_T, kl_T = compare(student, teacher, sequence, objective, beta)
            (losses_T.sum() / tokens).backward()
            loss += losses_T.sum().item() / tokens
            reverse_kl += kl_T.sum().item() / tokens
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        history.append(reverse_kl)
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            length = tokens / len(sequences)
            print(f"step {step:4d}   loss {loss:8.4f}   reverse KL {reverse_kl:.4f}   {length:.1f} tokens an answer")
    return history


# ---- models and prompts from disk or the hub --------------------------------------------------------------------


def load(student_name: str, teacher_name: str, prompts_path: str):
    """Two models of one vocabulary, and prompts as ids. Each JSONL line has a `prompt`, a string or a chat."""
    names = (student_name, teacher_name)
    tokenizer, other = (AutoTokenizer.from_pretrained(name) for name in names)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names)
    widths = student.config.vocab_size, teacher.config.vocab_size
    if tokenizer.get_vocab() != other.get_vocab() or widths[0] != widths[1]:
        sizes = f"{len(tokenizer)} and {len(other)} tokens, {widths[0]} and {widths[1]} logits"
        raise SystemExit(f"student and teacher need the same vocabulary, but have {sizes}: choose two of one family")
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = []
    for line in Path(prompts_path).read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str) and not tokenizer.chat_template:
            prompts.append(tokenizer(prompt)["input_ids"])
        else:  # rendered and turned into ids in one go: the template brings the special tokens, nothing adds them twice
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    ends = student.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return student.to(device), teacher.to(device), prompts, {ends} if isinstance(ends, int) else set(ends)


# ---- a world of its own, for when no models are given -----------------------------------------------------------

ARROW, END = 10, 11  # 0 to 9 are the digits; "3 1 4 1 >" is answered by "1 1 3 4 <end>"


def sorting_prompts(n: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[*source.choices(range(10), k=4), ARROW] for _ in range(n)]


def small_model(width: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "head_dim": width // 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    config = Qwen3Config(vocab_size=12, eos_token_id=END, pad_token_id=END, bos_token_id=None, **shape, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


def teach(model: PreTrainedModel, prompts: list[list[int]], steps: int) -> None:
    """Ordinary supervised training on the right answers to these prompts."""
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    order = random.Random(0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        ids = torch.tensor([[*p, *sorted(p[:-1]), END] for p in order.choices(prompts, k=128)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, 4:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def accuracy(model: PreTrainedModel) -> float:
    """Share of 500 problems whose sampled answer is right."""
    answers = sample(model, sorting_prompts(500, seed=7), 8, {END}, torch.Generator().manual_seed(0))
    return sum(answer == [*sorted(prompt[:-1]), END] for prompt, answer, _ in answers) / len(answers)


# ---- the command ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="on-policy distillation in one file")
    parser.add_argument("--student", help="folder or hub name; without it, two small models are made on the spot")
    parser.add_argument("--teacher", help="folder or hub name, same vocabulary as the student")
    parser.add_argument("--prompts", help="JSONL file with a `prompt` in every line")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, help="default: 1e-5, or 1e-3 for the two small models")
    parser.add_argument("--prompts-per-step", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--max-tokens", type=int, help="default: 256, or 8 for the two small models")
    parser.add_argument("--objective", choices=OBJECTIVES, default="reverse_kl")
    parser.add_argument("--beta", type=float, default=0.5, help="of jsd, strictly between 0 and 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder to save the distilled student in")
    args = parser.parse_args(arguments)
    given = [name for name in ("student", "teacher", "prompts") if getattr(args, name)]
    if len(given) not in (0, 3):
        parser.error(f"--student, --teacher and --prompts belong together; only {', '.join(given)} given")
    args.lr = args.lr or (1e-5 if given else 1e-3)
    args.max_tokens = args.max_tokens or (256 if given else 8)
    if given:
        student, teacher, prompts, end_ids = load(args.student, args.teacher, args.prompts)
    else:
        student, teacher = small_model(48, seed=1), small_model(64, seed=2)
        prompts, end_ids = sorting_prompts(5000, seed=0), {END}
        teach(teacher, prompts, steps=300)
        teach(student, prompts[:150], steps=200)  # too few problems to learn from: it will need the teacher
        print(f"answers right before: {accuracy(student):.1%}, teacher {accuracy(teacher):.1%}")
    options = ("steps", "lr", "prompts_per_step", "samples", "max_tokens", "objective", "beta", "seed")
    history = distil(student, teacher, prompts, end_ids=end_ids, **{name: getattr(args, name) for name in options})
    if not given:
        print(f"answers right after: {accuracy(student):.1%}")
    if args.output:
        student.save_pretrained(args.output)
    return history


if __name__ == "__main__":
    main()
