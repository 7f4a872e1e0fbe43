"""The demo: a small student learns to sort from a small teacher, on its own answers; two other ways beside it.

Three arms with the same prompts, batch and number of updates:

    full      reverse KL over the whole vocabulary, on the student's own answers
    sampled   the same divergence at the drawn tokens only (Thinking Machines' form)
    self_sft  cross-entropy on answers that the student itself wrote before the run: more training without a teacher

`full` is shown as it runs; the other two run beside it in a second process, so that the demo takes two cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import traceback
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.errors import BadInput, OpdError
from opd.lab.worlds import sorting

HELDOUT_PROBLEMS = 1000
EVALS = 4  # evaluations on the way, the last one included: so that `opd compare` can say what a score cost
QUICK_SHARE = 10  # --quick takes this share of the steps and of the problems
MADE_HERE = {"prompts.jsonl", "heldout.jsonl", "own_answers.jsonl", "others.log", "full", "sampled", "self_sft"}

Overrides = dict[str, dict[str, Any]]


def run_demo(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Runs the three arms below `folder`, prints their scores, and returns them as rows of the table."""
    from opd.reports.progress import say
    from opd.reports.table import comparison

    console = Console()
    if folder.exists():
        if not folder.is_dir() or any(entry.name not in MADE_HERE for entry in folder.iterdir()):
            raise BadInput(f"{folder} holds something that is no demo of opd; choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_data(folder, quick=quick)
    say(console, "Task: put eight letters into order. Teacher and student are tiny models made by `make demo-models`.")
    beside = multiprocessing.get_context("spawn").Process(target=_others, args=(folder, quick), daemon=True)
    beside.start()
    try:
        summaries = {"full": run_arm("full", folder, quick=quick, console=console)}
        say(console, "waiting for the two arms that run beside it ...")
        beside.join()
    finally:
        beside.terminate()
    if beside.exitcode != 0:
        raise OpdError(f"the other arms failed:\n{(folder / 'others.log').read_text()[-2000:]}")
    for arm in ("sampled", "self_sft"):
        summaries[arm] = json.loads((folder / arm / "summary.json").read_text())
    rows = table(summaries)
    say(console, "")
    comparison(rows, console, title=f"{HELDOUT_PROBLEMS // (QUICK_SHARE if quick else 1)} held-out problems")
    say(console, f"The trained student: {folder / 'full' / 'final'}")
    say(console, f"The run as a page:   {folder / 'full' / 'report.html'}")
    say(console, f"Side by side:        opd compare {folder / 'full'} {folder / 'sampled'}")
    return rows


def write_data(folder: Path, *, quick: bool) -> None:
    """Prompts without answers to train on, and held-out problems with theirs."""
    recipe = load_recipe(folder, "full", quick=quick)
    train = sorting.problems("train", recipe["run"]["steps"] * recipe["prompts"]["per_step"], seed=1)
    heldout = sorting.problems("heldout", HELDOUT_PROBLEMS // (QUICK_SHARE if quick else 1), seed=1)
    _write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in train])
    _write(folder / "heldout.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in heldout])


def load_recipe(folder: Path, arm: str, *, quick: bool) -> Overrides:
    """The arm's config as plain sections: the shared recipe, then what the arm changes."""
    import yaml

    text = files("opd.lab.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    shared, changes = recipe["shared"], recipe["arms"][arm]
    merged = {section: {**shared.get(section, {}), **changes.get(section, {})} for section in {*shared, *changes}}
    models = files("opd.lab.demo").joinpath("models")
    merged["student"] = {"model": str(models.joinpath("student"))}
    if arm != "self_sft":
        merged["teacher"] = {"model": str(models.joinpath("teacher"))}
    data = "prompts.jsonl" if arm != "self_sft" else "own_answers.jsonl"
    merged["prompts"]["sources"] = [{"kind": "jsonl", "path": str(folder / data), "name": "sorting"}]
    task = {"name": "sorting", "grader": {"kind": "exact"}}
    task["source"] = {"kind": "jsonl", "path": str(folder / "heldout.jsonl"), "name": "heldout"}
    merged["run"] = {**merged["run"], "folder": str(folder / arm)}
    if quick:
        merged["run"]["steps"] //= QUICK_SHARE
    merged["evals"] = {"tasks": [task], "every": merged["run"]["steps"] // EVALS}
    return merged


def run_arm(arm: str, folder: Path, *, quick: bool, console: Console) -> dict[str, Any]:
    """One arm from start to end; its summary."""
    from opd.config.loading import load_config
    from opd.wiring.run import execute

    recipe = load_recipe(folder, arm, quick=quick)
    if arm == "self_sft":
        write_own_answers(folder, load_recipe(folder, "full", quick=quick))
    return dict(execute(load_config([], base=recipe).config, console=console).summary)


def write_own_answers(folder: Path, recipe: Overrides) -> None:
    """One answer of the untrained student to every training prompt, as data for SFT."""
    from opd.config.loading import load_config
    from opd.models.loading import load_student
    from opd.wiring.build import load_format, load_prompts, sampling_params
    from opd.wiring.writing import student_engine

    config = load_config([], base=recipe).config
    fmt = load_format(config.student, "student")
    engine = student_engine(config, load_student(config.student, fmt.tokenizer.vocab_size), seed=config.run.seed + 1)
    prompts = load_prompts(config, fmt)
    rows = []
    for step in range(config.run.steps):
        asked = prompts.batch(step)
        rollouts = engine.generate(asked, sampling_params(config.sampling, fmt), tag=f"own/{step}")
        ended = [r for r in rollouts if r.finish_reason == "stop"]  # an answer that was cut off has no end to learn
        rows += [{"prompt": r.prompt.row.prompt, "completion": fmt.decode(r.response_ids)} for r in ended]
    _write(folder / "own_answers.jsonl", [row for row in rows if row["completion"]])


def table(summaries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the comparison: where the student started, what each arm made of it, the teacher."""
    full = summaries["full"]
    names = {
        "full": "on-policy, full vocabulary",
        "sampled": "on-policy, sampled tokens",
        "self_sft": "SFT on its own answers",
    }
    rows = [{"name": "student before", **full["student_before"]}]
    for arm, name in names.items():
        arm_summary = summaries[arm]
        spent = {"tokens": arm_summary["tokens"], "seconds": arm_summary["seconds"]}
        rows.append({"name": name, **arm_summary["student_after"], **spent})
    rows.append({"name": "teacher", **full["teacher"]})
    return rows


def _others(folder: Path, quick: bool) -> None:
    """The second process: its words go to a file, which is shown only when it fails."""
    with (folder / "others.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        try:
            for arm in ("sampled", "self_sft"):
                run_arm(arm, folder, quick=quick, console=Console(file=log))
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
            sys.exit(1)


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
