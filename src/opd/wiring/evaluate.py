"""Scoring a model on held-out tasks, without training it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from opd.config.loading import load_config
from opd.config.schema import Config, Grader
from opd.errors import ConfigError
from opd.evals.tasks import EvalResult, run_task
from opd.models.loading import load_frozen
from opd.reports.progress import RunView
from opd.reports.table import scores
from opd.wiring.build import check_task_context, load_format, load_tasks
from opd.wiring.writing import student_engine

SHORT = ("task", "grader", "samples", "max_tokens", "temperature", "answer_column")


def evaluate_model(
    model: str, files: Sequence[str | Path] = (), overrides: Sequence[str] = (), console: Console | None = None
) -> list[EvalResult]:
    """Takes the tasks of a recipe, or the one that `task=...` names, and prints a table.

    overrides   `task=FILE` (.jsonl or .parquet) or `task=reasoning_gym:NAME`, with `grader=KIND`, `samples=K`,
                `max_tokens=N`, `temperature=T`, `answer_column=NAME`; with a recipe `task=NAME` picks one of its tasks.
                All other options as in `opd train`, e.g. `student.format.kind=plain`.
    """
    config = _config(model, files, overrides)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if not config.evals.tasks:
        raise ConfigError(
            "evals.tasks is empty, so there is nothing to take: name a task in the recipe, or use task=FILE"
        )
    fmt = load_format(config.student, "student")
    tasks = load_tasks(config.evals)
    try:
        check_task_context(config, "student", config.student, fmt, tasks)
        student = load_frozen(config.student, fmt.tokenizer.vocab_size, role="student")
        engine = student_engine(config, student, seed=config.run.seed)
        results = []
        with RunView(console=console) as view:
            view.start(0, [f"model {model}"])
            for task in tasks:
                view.phase(task.spec.name)
                bound = task.bind(fmt, config.sampling)
                tag = f"eval/{task.spec.name}"
                results.append(run_task(bound, engine, fmt.decode, tag=tag, confidence=config.evals.confidence))
    finally:
        for task in tasks:
            task.grader.close()
    scores(results, console)
    return results


def _config(model: str, files: Sequence[str | Path], overrides: Sequence[str]) -> Config:
    """A config in which only student, tasks and sampling are read."""
    short = {key: value for key, eq, value in (item.partition("=") for item in overrides) if eq and key in SHORT}
    rest = [item for item in overrides if item.partition("=")[0] not in SHORT]
    rest.append(f"student.model={model}")
    if files:
        config = load_config(files, rest).config
        unread = sorted(short.keys() - {"task"})
        if unread:
            raise ConfigError(
                f"{unread[0]}=... goes with task=FILE; a recipe says it itself: evals.tasks.0.{unread[0]}"
            )
        return _one_task(config, short["task"]) if "task" in short else config
    if "task" not in short:
        raise ConfigError(
            "opd eval needs something to take: a recipe with evals.tasks, task=FILE grader=KIND, or "
            "task=reasoning_gym:NAME"
        )
    kind, _, name = short["task"].partition(":")
    if kind == "reasoning_gym":
        source: dict[str, Any] = {"kind": "reasoning_gym", "task": name, "size": 100}
        grader: dict[str, Any] = {"kind": short.get("grader", "reasoning_gym")}
    else:
        source = {"kind": "parquet" if short["task"].endswith(".parquet") else "jsonl", "path": short["task"]}
        if "grader" not in short:
            kinds = [cls.model_fields["kind"].default for cls in get_args(get_args(Grader)[0])]
            raise ConfigError(f"opd eval task=FILE needs grader=KIND, one of {', '.join(kinds)}")
        grader = {"kind": short["grader"]}
    if "answer_column" in short:
        grader["answer_column"] = short["answer_column"]
    task: dict[str, Any] = {"name": name or Path(short["task"]).stem, "source": source, "grader": grader}
    base: dict[str, Any] = {
        "student": {"model": model},
        "objective": {"preset": "sft"},  # needs no teacher and puts no rule on sampling
        "prompts": {"sources": [{"kind": "inline", "rows": ["none"]}]},  # nothing is trained
        "evals": {"tasks": [task]},
    }
    lengths = {"samples": "evals.tasks.0.samples", "max_tokens": "sampling.max_tokens"}
    lengths["temperature"] = "sampling.temperature"
    rest += [f"{option}={short[key]}" for key, option in lengths.items() if key in short]
    return load_config((), rest, base=base).config


def _one_task(config: Config, name: str) -> Config:
    chosen = tuple(task for task in config.evals.tasks if task.name == name)
    if not chosen:
        known = ", ".join(task.name for task in config.evals.tasks) or "none"
        raise ConfigError(f"task={name}: the recipe's tasks are: {known}")
    return config.model_copy(update={"evals": config.evals.model_copy(update={"tasks": chosen})})
