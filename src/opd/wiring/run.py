"""From a config, or from Python, to a finished run: everything that can be checked is checked before models load."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import opd
from opd.config.loading import config_hash, load_config, resolved
from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.journal.folder import RunFolder
from opd.journal.folder import check as check_folder
from opd.reports.progress import RunView
from opd.wiring.build import (
    check_context,
    config_size,
    load_prompts,
    load_tasks,
    load_texts,
    training_params,
)
from opd.wiring.session import Run, Session, on_sigterm

Rows = Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, str]]]


def distill(
    student: str | Path | Mapping[str, Any] | None = None,
    teacher: str | Path | Mapping[str, Any] | None = None,
    prompts: str | Path | Rows | Mapping[str, Any] | None = None,
    *,
    config: str | Path | Sequence[str | Path] = (),
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Distils `teacher` into `student` on the student's own answers to `prompts`.

    student, teacher   a folder or hub name, or a mapping as in the config.
    prompts            a JSONL or Parquet file, a list of rows (strings, chats, or mappings with a prompt column), or a
                       mapping as in the config.
    config             config files to start from; the other arguments win over them.
    overrides          sections of the config as mappings, e.g. `optim={"lr": 1e-5}, run={"steps": 50}`; the objective
                       may be a preset's name.
    Raises ConfigError, DataError or ModelError before anything expensive when the input cannot work.
    """
    given: dict[str, Any] = dict(overrides)
    for key, value in (("student", student), ("teacher", teacher)):
        if value is not None:
            given[key] = {"model": str(value)} if isinstance(value, str | Path) else dict(value)
    if isinstance(given.get("objective"), str):
        given["objective"] = {"preset": given["objective"]}
    if prompts is not None:
        given["prompts"] = _prompts(prompts)
    files = [config] if isinstance(config, str | Path) else list(config)
    return execute(load_config([*files, given]).config, console=Console(quiet=quiet))


def execute(config: Config, *, console: Console | None = None) -> Run:
    """Runs a checked config from start to end, showing it on `console`."""
    ledger = Ledger()
    view = RunView(log_every=config.run.log_every, console=console)
    torch.manual_seed(config.run.seed)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with on_sigterm(signal.default_int_handler):  # a scheduler's stop is a Ctrl-C
        with ledger.seconds("prepare"):
            check_folder(config.run.folder, overwrite=config.run.overwrite, config=config.model_dump(mode="json"))
            texts = load_texts(config)
            prompts = load_prompts(config, texts.student)
            tasks = load_tasks(config.evals)
        try:
            check_context(config, texts, prompts, tasks)
            params = training_params(config, texts)
            folder = RunFolder.create(
                config.run.folder,
                overwrite=config.run.overwrite,
                config=resolved(config),
                config_hash=config_hash(config),
                environment=environment(config),
                needed_bytes=4 * config_size(config.student, "student").parameters,
            )
            with folder, view:
                return Session(config, texts, prompts, tasks, params, folder, view, ledger).run()
        finally:
            for task in tasks:
                task.grader.close()


def environment(config: Config) -> dict[str, Any]:
    """What numbers depend on besides the config."""
    return {
        "opd": opd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "seed": config.run.seed,
    }


def _prompts(
    given: str | Path | Rows | Mapping[str, Any],
) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str | Path):
        path = str(given)
        return {"sources": [{"kind": "parquet" if path.endswith(".parquet") else "jsonl", "path": path}]}
    rows = [row if isinstance(row, str | Mapping) else {"prompt": list(row)} for row in given]
    return {"sources": [{"kind": "inline", "name": "prompts", "rows": rows}]}
