"""Run folders as the journal writes them, with numbers made up: of any length, and with hostile text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.config.loading import load_config, resolved
from opd.journal.folder import RunFolder
from opd.journal.records import Status, summary_record
from opd.types import Prompt, Rollout, Row

HOSTILE = (
    '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1"> \' " & \x1b[31mred \u202eabc '
    "\u2028 \ud800 `${x}` <!-- javascript:window.pwned=1"
)
TEACHER = {"mean": 0.99, "low": 0.97, "high": 0.998}


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "student": {"model": "models/student"},
        "teacher": {"model": "models/teacher"},
        "prompts": {"sources": [{"kind": "inline", "name": "letters", "rows": ["a", "b"]}], "per_step": 2},
        "sampling": {"samples_per_prompt": 2, "max_tokens": 12},
        "evals": {
            "tasks": [{"name": "sorting", "source": {"kind": "jsonl", "path": "h.jsonl"}, "grader": {"kind": "exact"}}]
        },
    }
    given = [f"{key}={value}" for key, value in changes.items()]
    return resolved(load_config([], given, base=base).config)


def line(step: int, steps: int) -> dict[str, Any]:
    """A line of metrics with everything a run reports."""
    at, wave = step / max(steps, 2), math.sin(step * 12.9898) * 0.3
    kl = 0.5 * math.exp(-4 * at) * (1 + wave)
    return {
        **{"loss": kl, "term/reverse_kl": kl, "entropy": 0.9 - 0.3 * at, "student_logprob": -0.5, "reverse_kl": kl},
        **{"trained_tokens": 40.0, "masked_tokens": 0.0, "invalid_scores": 0.0, "policy_gap": 1e-7},
        **{"grad_norm": 2 + wave, "lr": 1e-3 * (1 - at), "bad_steps": 0.0, "rollouts": 4.0, "response_tokens": 40.0},
        **{"response_length": 10 + wave, "response_length_max": 12.0, "truncated": max(0.0, wave) / 10},
        **{"flops_student_sampling": 1e9 * step, "tokens_student_sampling": 40 * step},
        **{"flops_teacher_scoring": 3e9 * step, "flops_student_training": 5e9 * step},
        **{"seconds_rollout": 0.3 * step, "seconds_scoring": 0.1 * step, "seconds_update": 0.5 * step},
        **{"seconds_load": 2.0, "tokens_per_second": 44.0, "applied": True},
        **{f"reverse_kl/domain/{name}": kl * (i + 1) for i, name in enumerate(("maths", "code"))},
        **{f"reverse_kl/position/{name}": kl / (i + 1) for i, name in enumerate(("0-3", "4-15"))},
    }


def interval(mean: float, half: float = 0.03) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def evaluation(
    step: int,
    score: Mapping[str, float],
    *,
    task: str = "sorting",
    model: str = "student",
    text: str = "abc",
    problems: int | None = None,
    source: str = "heldout",
    ask: str = "sort",
) -> dict[str, Any]:
    """A line of evals: ten answers of which as many are right as the score says. With a number of `problems` there are
    so many, and their prompts are in the record (`ask` and a number); without, they cannot be paired."""
    n = problems or 10
    answers = [
        {
            **{"id": f"eval/{task}/{i}/0", "problem": f"{source}/{i}", "answer": f"{text} {i} at {step}"},
            **({"prompt": f"{ask} {i}"} if problems else {}),
            **{"score": float(i < n * score["mean"]), "reason": "", "tokens": 9, "finish_reason": "stop"},
        }
        for i in range(n)
    ]
    about = {"n": n, "k": 1, "missing": 0, "ci_method": "wilson", "length": 9.0, "truncated": 0.0}
    return {"step": step, "model": model, "task": task, **score, **about, "answers": answers}


def rollouts(step: int, count: int, tokens: int = 8) -> list[Rollout]:
    made = []
    for i in range(count):
        row = Row(id=f"letters/{i}", domain="letters", prompt="x")
        made.append(
            Rollout(
                id=f"train/{step}/letters/{i}/0",
                prompt=Prompt(row=row, ids=np.arange(4)),
                response_ids=np.arange(tokens),
                behaviour_logprobs=np.full(tokens, -0.5, dtype=np.float32),
                mask=np.ones(tokens, dtype=np.bool_),
                policy_version=step,
                behaviour="student",
                finish_reason="stop" if i % 5 else "length",
            )
        )
    return made


def make_run(
    path: Path,
    *,
    steps: int = 8,
    scores: Sequence[float] = (0.6, 0.9),
    teacher_examined: bool = True,
    done: bool = True,
    rollouts_per_step: int = 4,
    written: int = 2,
    text: str = "abc",
    task: str = "sorting",
    events: Sequence[Mapping[str, Any]] = (),
    views: Mapping[int, Mapping[str, Any]] | None = None,
    change_line: Any = None,
    half: float = 0.03,
    teacher_score: Mapping[str, float] = TEACHER,
    problems: int | None = None,
    source: str = "heldout",
    ask: str = "sort",
    status: Status = "done",
    stopped_by: str | None = None,
    resumes: int = 0,
    **options: Any,
) -> Path:
    """Writes a run. `scores` are spread evenly from step 0 to the last; `written` steps have rollouts, or all of them
    when it is larger; `change_line(step, line)` may change a line of metrics; `options` go into the config."""
    folder = RunFolder.create(
        path, existing="refuse", config=config(**options), config_hash="c0ffee", environment={"opd": "0", "threads": 1}
    )
    asked: Any = {"text": text, "task": task, "problems": problems, "source": source, "ask": ask}
    with folder:
        at = [round(i * steps / max(len(scores) - 1, 1)) for i in range(len(scores))]
        if scores:
            folder.log_eval(evaluation(0, interval(scores[0], half), **asked))
            if teacher_examined:
                folder.log_eval(evaluation(0, teacher_score, model="teacher", **asked))
        for step in range(1, steps + 1):
            numbers = line(step, steps)
            folder.log_step(step, step, change_line(step, numbers) if change_line else numbers)
            if step <= written - 1 or step == steps:
                folder.write_rollouts(step, rollouts(step, rollouts_per_step), lambda ids: text)
            for when, score in list(zip(at, scores, strict=True))[1:]:
                if when == step:
                    folder.log_eval(evaluation(step, interval(score, half), **asked))
        for event in events:
            folder.log_event(**event)
        for step, record in (views or {}).items():
            folder.write_view(step, record)
        if done:
            folder.write_summary(
                summary_record(
                    status=status,
                    preset="reverse_kl",
                    task=task if scores else None,
                    n=(problems or 10) if scores else None,
                    k=1 if scores else None,
                    ci_method="wilson" if scores else None,
                    student_before=interval(scores[0], half) if scores else None,  # pyright: ignore
                    student_after=interval(scores[-1], half) if scores and status == "done" else None,  # pyright: ignore
                    teacher=teacher_score if teacher_examined and scores else None,  # pyright: ignore
                    seconds=steps * 1.0 + 3,
                    seconds_by_phase={"rollout": 0.3 * steps, "update": 0.5 * steps, "load": 2.0},
                    tokens=40 * steps,
                    flops=9e9 * steps,
                    steps=steps,
                    stopped_by=stopped_by,
                    resumes=resumes,
                )
            )
    return path
