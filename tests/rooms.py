"""Live rooms around tiny models, for tests that run the real loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from opd.config.checks import check
from opd.config.objective import Objective as ObjectiveSpec
from opd.config.schema import Config
from opd.learner.learner import LocalLearner
from opd.models.causal import CausalLM
from opd.objectives.objective import Objective
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.local import LocalTeacher
from opd.teachers.panel import Panel
from opd.text.contexts import PromptContext
from opd.text.crossing import agree
from opd.text.formats import Format, PromptFormat
from opd.text.tokenizer import Tokenizer
from opd.types import Prompt, Rollout, Row, SamplingParams
from tests import tiny

QUESTIONS = ("Sort: hgfe", "What is 12 + 7?", "Solve 3 * (4 - 1) step by step", "hi", "the quick brown fox jumps")


def prompt_format(*, chat: bool = False, **kwargs) -> PromptFormat:
    settings = {"kind": "auto", "plain_template": "{prompt}", "system_prompt": None}
    settings |= {"chat_template_kwargs": {}, "end_tokens": ()}
    return PromptFormat(Tokenizer(tiny.tokenizer(chat=chat)), Format(**{**settings, **kwargs}))


def told_more(template: str = "Think twice. {prompt}") -> PromptFormat:
    """The plain format of a scorer that reads another prompt."""
    fmt = prompt_format()
    return PromptFormat(fmt.tokenizer, fmt.format, context=PromptContext(template))


def causal(kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> CausalLM:
    module = tiny.model(kind, seed=seed, **overrides).to(dtype)
    return CausalLM(module, vocab_size=len(tiny.tokenizer()), compute_dtype=dtype, name=f"tiny {kind}")


def prompts(fmt: PromptFormat, questions: Sequence[str] = QUESTIONS) -> list[Prompt]:
    rows = [Row(id=f"q/{n}", domain="q", prompt=text) for n, text in enumerate(questions)]
    return [Prompt(row=row, ids=fmt.prompt_ids(row)) for row in rows]


def rollouts(
    student: CausalLM,
    fmt: PromptFormat,
    *,
    samples: int = 2,
    max_tokens: int = 12,
    questions: Sequence[str] = QUESTIONS,
) -> list[Rollout]:
    """Ragged answers: besides its end token the student also stops at one token in three."""
    stops = tuple(range(0, student.vocab_size, 8))
    params = SamplingParams(max_tokens=max_tokens, samples_per_prompt=samples, stop_ids=(*fmt.end_ids, *stops))
    engine = EmbeddedEngine(student, seed=0, slots=8, path="auto")
    return engine.generate(prompts(fmt, questions), params, tag="test")


def config(objective: dict | None = None, **sections) -> Config:
    """A checked config; models and data in it are names only."""
    base = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "prompts": {"sources": [{"kind": "inline", "rows": ["x"]}]},
        "objective": objective or {"preset": "reverse_kl"},
    }
    return check(Config.model_validate({**base, **sections}))


def objective(*terms: dict, **changes: Any) -> ObjectiveSpec:
    """An objective of these terms as it is, past the checks of a whole config: for the parts that come after them."""
    return ObjectiveSpec.model_validate({"behaviour": "student", "terms": terms, **changes})


def teacher(
    model: CausalLM,
    fmt: PromptFormat,
    student_fmt: PromptFormat | None = None,
    *,
    temperature: float = 1.0,
    name: str = "teacher",
    share_prompts: bool = True,
) -> LocalTeacher:
    agreement = agree(student_fmt or fmt, fmt)
    return LocalTeacher(
        model,
        fmt,
        agreement,
        name=name,
        temperature=temperature,
        chunk_tokens=16,
        share_prompts=share_prompts,
    )


def panel(*teachers: LocalTeacher) -> Panel:
    return Panel(teachers)


def learner(
    model: CausalLM,
    objective: dict | ObjectiveSpec | None = None,
    *,
    special_ids: frozenset[int] = frozenset(),
    tokens_per_micro_batch: int = 10_000,
    padding_side: Literal["left", "right"] = "right",
    **sections,
) -> LocalLearner:
    spec = {"tokens_per_micro_batch": tokens_per_micro_batch, "chunk_tokens": 16, **sections.pop("learner", {})}
    given = isinstance(objective, ObjectiveSpec)
    made = config(None if given else objective, learner=spec, **sections)
    return LocalLearner(
        model,
        Objective(objective if given else made.objective, special_ids=special_ids),
        optim=made.optim,
        spec=made.learner,
        total_steps=made.run.steps,
        padding_side=padding_side,
    )


def gradient(model: CausalLM) -> torch.Tensor:
    """All gradients of a model as one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.module.parameters() if p.grad is not None])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the larger of the two."""
    return float((a - b).norm() / max(a.norm(), b.norm()))


def answer(prompt: Prompt, ids: Sequence[int], logprobs: Sequence[float], n: int = 0, **changes: Any) -> Rollout:
    """A rollout written by hand; `changes` are its other fields."""
    made = Rollout(
        id=f"hand/{prompt.id}/{n}",
        prompt=prompt,
        response_ids=np.array(ids, dtype=np.int64),
        behaviour_logprobs=np.array(logprobs, dtype=np.float32),
        mask=np.ones(len(ids), dtype=np.bool_),
        policy_version=0,
        behaviour="student",
        finish_reason="stop",
    )
    return dataclasses.replace(made, **changes)
