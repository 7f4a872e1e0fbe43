"""From a config, or from Python, to a finished run: everything that can be checked is checked before models load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import opd
from opd.config.loading import load_config
from opd.config.schema import Config
from opd.config.scorers import COPIED, all_scorers
from opd.costs.ledger import Ledger
from opd.errors import ConfigError
from opd.journal.folder import check as check_folder
from opd.journal.reader import read_summary
from opd.loop.rewards import AnswerRewards
from opd.objectives.kernels.choice import check_kernel
from opd.reports.progress import RunView
from opd.reports.table import results
from opd.reports.trackers import check_tracker
from opd.stopping import Stopping
from opd.wiring.build import (
    check_context,
    config_size,
    load_prompts,
    load_tasks,
    load_texts,
    training_params,
)
from opd.wiring.elsewhere import check_elsewhere
from opd.wiring.result import Run, report
from opd.wiring.session import Session
from opd.wiring.starting import begin, changes, existing, finished, stored
from opd.wiring.vllm import check_engine
from opd.wiring.writing import check_writers, make_rewards

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
        if isinstance(value, Mapping) and set(value) & {"student", "prompts", "objective"}:
            raise ConfigError(
                f"{key}: this is a whole config ({', '.join(map(str, value))}). Give it as opd.distill(**config), or "
                "name its file: opd.distill(config=path)"
            )
        if value is not None:
            given[key] = {"model": str(value)} if isinstance(value, str | Path) else dict(value)
    if isinstance(given.get("objective"), str):
        given["objective"] = {"preset": given["objective"]}
    if prompts is not None:
        given["prompts"] = _prompts(prompts)
    files = [config] if isinstance(config, str | Path) else list(config)
    return execute(load_config([*files, given]).config, console=Console(quiet=quiet))


def resume(folder: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Goes on with the run in `folder` where it was killed or stopped, from its newest good checkpoint.

    overrides   options as on the command line, among those that may change on the way, e.g. "run.steps=400".

    On CPU in float32 the run ends as if it had never stopped, bit for bit; a changed machine is named in a note.
    Raises ConfigError when the folder holds no run, or when data, models or other options changed.
    """
    return execute(stored(folder, overrides), console=Console(quiet=quiet))


def execute(config: Config, *, console: Console | None = None) -> Run:
    """Runs a checked config from start to end, or from where it was left off, showing it on `console`."""
    ledger, stopping = Ledger(), Stopping()
    view = RunView(log_every=config.run.log_every, console=console)
    how = existing(config, view.console)
    if how == "resume":
        changes(config)
        if finished(config):
            return _finished(config, view)
    torch.manual_seed(config.run.seed)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with stopping.signals():
        with ledger.seconds("prepare"):
            check_folder(config.run.folder, existing=how, config=config.model_dump(mode="json"))
            check_tracker(config.tracking)
            check_kernel(config.learner.kernel)
            check_elsewhere(config)
            check_engine(config)
            texts = load_texts(config)
            prompts = load_prompts(config, texts.student)
            tasks = load_tasks(config.evals)
        rewards: AnswerRewards | None = None
        try:
            check_context(config, texts, prompts, tasks)
            check_writers(config, prompts, texts.student)
            rewards = make_rewards(config, prompts, texts.student)
            params = training_params(config, texts)
            start = begin(config, how, environment(config), needed_bytes(config))
            with start.folder, view:
                return Session(config, texts, prompts, tasks, params, rewards, start, view, ledger, stopping).run()
        finally:
            for task in tasks:
                task.grader.close()
            if rewards is not None:
                rewards.close()


def needed_bytes(config: Config) -> int:
    """What a run writes besides its journal: checkpoints (a parameter, its two moments and the copies that scorers keep
    of it) and the student."""
    parameters = config_size(config.student, "student").parameters
    copies = sum(scorer.weights in COPIED for scorer in all_scorers(config).values())
    each = 12 + 4 * copies
    checkpoints = 0 if config.student.lora is not None else (config.checkpoints.keep + 1) * each
    return (checkpoints + 4) * parameters


def _finished(config: Config, view: RunView) -> Run:
    """A run that needs no more steps is left as it is: a scheduler that starts it once more has nothing to do."""
    folder = Path(config.run.folder).expanduser()
    summary = read_summary(folder)
    assert summary is not None
    if unused := changes(config):
        view.message(f"{', '.join(unused)}: not looked at, since nothing is left to do")
    view.message(f"{folder}: all {summary['steps']} steps are done; run.steps=N with a larger N goes on")
    results(summary, view.console, folder=folder)
    if not _is_reported(folder):
        report(folder, view)
    return Run(folder, folder / "final", summary)


def _is_reported(folder: Path) -> bool:
    """Whether the page is of the run's end: a run may be killed between its summary and its page."""
    page = folder / "report.html"
    return page.exists() and page.stat().st_mtime_ns >= (folder / "summary.json").stat().st_mtime_ns


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
