"""What a run needs of its student's device, before any weights are loaded, and what that device has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from opd.config.engines import Engine
from opd.config.reads import evidence
from opd.config.schema import Config, Scorer
from opd.config.scorers import COPIED, all_scorers, is_away, loaded_as
from opd.costs.memory import available_memory, need, products_on_host, training_memory
from opd.models.loading import adapter_targets, pick_device
from opd.models.packing import plan
from opd.prompts.mixture import PromptStream
from opd.types import Rollout
from opd.wiring.build import Texts, compute_type, config_size, read_prompts, scorer_role, stored_type
from opd.wiring.foreign_fit import measured

MOST = 2**20  # answered tokens of a step that are planned one by one


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the student's device holds. parts: bytes by part (`costs/memory.py`). device: its name."""

    parts: Mapping[str, int]
    device: str

    @property
    def need(self) -> int:
        """Bytes at the peak of a step."""
        return need(self.parts)


def plan_memory(
    config: Config,
    prompts: PromptStream,
    *,
    tokens_per_micro_batch: int | None = None,
    slots: int | None = None,
    device_bytes: int | None = None,
    texts: Texts | None = None,
) -> Plan:
    """Bytes by part on the student's device, for answers as long as they may get.

    tokens_per_micro_batch, slots   other ones than the config's.
    device_bytes                    as if all models were on one GPU of this size; there, auto means bfloat16.
    texts                           what scorers read: those with another tokenizer have another number of tokens, and
                                    other vocabularies. None: as if all had the student's.
    """
    student, as_gpu = config.student, device_bytes is not None
    device = torch.device("cuda") if as_gpu else pick_device(student.device)
    scorers, copies = {}, []
    for name, scorer in all_scorers(config).items():
        spec = loaded_as(config, scorer)
        if is_away(scorer) or shares(config, scorer) or not (as_gpu or pick_device(spec.device) == device):
            continue
        if scorer.weights in COPIED:
            copies.append(name)
        else:
            scorers[name] = config_size(spec, scorer_role(config, name)), _type(stored_type(spec), spec.dtype, as_gpu)
    answers = config.prompts.per_step * config.sampling.samples_per_prompt
    engine, limit = config.engine, tokens_per_micro_batch or config.learner.tokens_per_micro_batch
    slots, longest = min(slots or engine.slots, answers), prompts.longest + config.sampling.max_tokens
    held, batches = _held(config, prompts, limit)
    # Of a step whose answers are of one length: prompts and answers are rows, and the last micro-batch may be shorter.
    adapted = student.lora is not None
    products = products_on_host(2, min(batches, 2), student_dtype=compute_type(student), adapter=adapted)
    parts = training_memory(
        config_size(student, "student"),
        scorers,
        student_dtype=_type(compute_type(student), student.dtype, as_gpu),
        copies=copies,
        tokens_per_micro_batch=held,
        chunk_tokens=config.learner.chunk_tokens,
        slots=slots,
        max_len=longest,
        gradient_checkpointing=student.gradient_checkpointing,
        adapter=None if student.lora is None else adapter_targets(student).parameters(student.lora.rank),
        student_weights=_type(stored_type(student), student.dtype, as_gpu),
        sampler_dtype=None if engine.dtype == "auto" else engine.dtype,
        on_host=device.type == "cpu",
        whole={name for term in config.objective.terms for name, said in evidence(term).items() if said != "sampled"},
        products=products,
        one_batch=batches == 1,
        foreign=_foreign(config, texts, prompts),
    )
    if not isinstance(engine, Engine):  # a process of its own, which takes its share of a GPU at once
        parts = {part: size for part, size in parts.items() if part not in ("sampler_weights", "kv_cache")}
        if device.type == "cuda" and engine.python is not None:
            whole = device_bytes if device_bytes is not None else torch.cuda.mem_get_info(device)[1]
            parts["engine_while_writing" if engine.sleep else "engine"] = round(engine.memory * whole)
    return Plan(parts=parts, device=str(device))


def _foreign(config: Config, texts: Texts | None, prompts: PromptStream) -> dict[str, tuple[int, float]]:
    """Scorers with another tokenizer: the size of their vocabulary, and how many of their tokens one of the student's
    is."""
    if texts is None or not texts.foreign:
        return {}
    asked = read_prompts(config, prompts.prompts())
    fits = {name: measured(texts, name, asked.get(name, ())) for name in texts.foreign}
    return {name: (texts.scorers[name].tokenizer.vocab_size, fit.rate or 1.0) for name, fit in fits.items()}


def shares(config: Config, scorer: Scorer) -> bool:
    """Whether a scorer reads with the parameters of the student alone."""
    adapted = config.student.lora is not None
    return scorer.weights in ("student", "adapter_off") or (scorer.weights == "initial" and adapted)


def held_tokens(config: Config, prompts: PromptStream, limit: int | None = None) -> int:
    """Padded tokens in the largest micro-batch of a step whose answers are as long as they may get: prompts that are
    read once for several answers count once.

    limit   tokens of a micro-batch; None: the config's.
    """
    return _held(config, prompts, limit or config.learner.tokens_per_micro_batch)[0]


def _held(config: Config, prompts: PromptStream, limit: int) -> tuple[int, int]:
    """And the number of micro-batches."""
    share = config.learner.share_prompts and not config.student.gradient_checkpointing
    answer = np.zeros(config.sampling.max_tokens, np.int64)
    first = prompts.batch(0)[: max(1, MOST // config.sampling.max_tokens)]
    planned = [
        Rollout(
            id=f"{prompt.id}/{n}",
            prompt=prompt,
            response_ids=answer,
            behaviour_logprobs=np.zeros(0, np.float32),
            mask=np.zeros(0, np.bool_),
            policy_version=0,
            behaviour="student",
            finish_reason="length",
        )
        for prompt in first
        for n in range(config.sampling.samples_per_prompt)
    ]
    most, groups = 0, plan(planned, limit, share_prompts=share)
    for group in groups:
        asked = {rollout.prompt.id: len(rollout.prompt.ids) for rollout in group}
        longest = max(asked.values())
        alone = len(group) * (longest + len(answer))
        together = len(asked) * longest + len(group) * len(answer)
        most = max(most, min(together, alone) if share else alone)
    return most, len(groups)


def free_on(device: str) -> int | None:
    """Bytes that are free on the device of a `Plan`; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return available_memory("mps" if device == "mps" else "cpu")


def _type(found: str, asked: str, as_gpu: bool) -> str:
    return "bfloat16" if as_gpu and asked == "auto" and found == "float32" else found
