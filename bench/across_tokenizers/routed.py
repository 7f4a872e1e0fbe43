"""One run with three teachers: of a Unigram, of a WordPiece, and of the student's own BPE; each teaches one task.

All three know all tasks, and each writes its answers in its own style: between the words stand commas, arrows or
`and`. The student starts with all styles, by chance. So style tells, answer by answer, whose student it has become.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from across_tokenizers import world
from across_tokenizers.models import ALL, MAX_TOKENS, MODELS, tasks, write
from transformers import AutoModelForCausalLM

import opd
from opd.config.schema import Student
from opd.journal.reader import read_evals
from opd.types import Row
from opd.wiring.build import load_format

TEACHERS = {"order": "routed_unigram", "turn": "routed_wordpiece", "down": "routed_bpe"}
STYLES = {"routed_unigram": "comma", "routed_wordpiece": "arrow", "routed_bpe": "and"}
ALIGNMENT = {"kind": "alm", "tau": 1}  # with reverse KL on the student's own text: what did best with one teacher
STEPS, PER_STEP, SAMPLES, LR = 100, 96, 3, 5e-4
PROBLEMS = 500  # held out, of each task
READ = 200  # answers that a divergence is estimated on


def measure(work: Path) -> dict[str, Any]:
    """Runs it; accuracies, styles and divergences before and after."""
    started = time.monotonic()
    folder = work / "runs" / "routed"
    run = opd.distill(**config(work, folder), quiet=True)
    seconds = time.monotonic() - started
    evals = [line for line in read_evals(folder) if line["model"] == "student"]
    first, last = min(line["step"] for line in evals), max(line["step"] for line in evals)
    found: dict[str, Any] = {"seconds": seconds, "steps": STEPS, "alignment": ALIGNMENT, "tasks": {}}
    for when, step, student in (("before", first, work / "routed_student"), ("after", last, Path(run.student))):
        for line in evals:
            if line["step"] == step:
                task = line["task"].split("_")[0]
                found["tasks"].setdefault(task, {})[when] = read(line, task, student, work)
    found["teachers"] = {name: own_scores(work, name) for name in TEACHERS.values()}
    return found


def config(work: Path, folder: Path) -> dict[str, Any]:
    sources = []
    for task in ALL:
        path = work / f"routed-prompts-{task}.jsonl"
        rows = world.problems("train", STEPS * PER_STEP // 2, task=task, seed=2_000)
        write(path, [{"prompt": row["prompt"]} for row in rows])
        sources.append({"kind": "jsonl", "path": str(path), "name": task})
    data = [(task, STYLES[teacher]) for task, teacher in TEACHERS.items()]
    term = {
        "kind": "divergence",
        "name": "routed",
        "target": {"kind": "routed", "routes": {task: name.removeprefix("routed_") for task, name in TEACHERS.items()}},
        "shape": "reverse_kl",
        "support": "sampled",
        "alignment": ALIGNMENT,
    }
    return {
        "student": {"model": str(work / "routed_student")},
        "scorers": {name.removeprefix("routed_"): {"model": str(work / name)} for name in TEACHERS.values()},
        "prompts": {"sources": sources, "per_step": PER_STEP},
        "sampling": {"samples_per_prompt": SAMPLES, "max_tokens": MAX_TOKENS},
        "engine": {"slots": PER_STEP * SAMPLES},
        "objective": {"terms": [term]},
        "optim": {"lr": LR, "schedule": "cosine", "warmup_steps": 10},
        "evals": {"tasks": tasks(work, data, problems=PROBLEMS), "teacher": False},
        "views": {"answers": 0},
        "run": {"folder": str(folder), "steps": STEPS, "threads": 1, "log_every": 50, "existing": "overwrite"},
    }


def read(line: Mapping[str, Any], task: str, student: Path, work: Path) -> dict[str, Any]:
    """What one evaluation says. accuracy: in the style of the task's own teacher; solved: in whatever style.

    from   teacher to (mean, its standard error) of log p - log q of whole answers in nats: the student's and the
           teacher's chance of the text, each through its own tokenizer.
    """
    answers = [(answer["prompt"], answer["answer"]) for answer in line["answers"]]
    styles = [style_of(text) for _, text in answers]
    ended = [(a["prompt"], a["answer"]) for a in line["answers"] if a["finish_reason"] == "stop" and a["answer"]]
    log_p = log_probabilities(student, ended[:READ])
    away = {}
    for name in TEACHERS.values():
        gaps = [p - q for p, q in zip(log_p, log_probabilities(work / name, ended[:READ]), strict=True)]
        away[name] = (statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)))
    return {
        "accuracy": {key: line[key] for key in ("mean", "low", "high")},
        "solved": statistics.fmean(solved(task, prompt, text) for prompt, text in answers),
        "styles": {style: styles.count(style) / len(styles) for style in world.SEPARATORS},
        "from": away,
        "read": len(log_p),
    }


def style_of(text: str) -> str | None:
    """The one style that all of an answer is in."""
    used = [style for style, separator in world.SEPARATORS.items() if separator in text]
    return used[0] if len(used) == 1 else None


def solved(task: str, prompt: str, text: str) -> bool:
    words = tuple(prompt.split(": ")[1].strip().split(", "))
    return text in [separator.join(world.solve(task, words)) for separator in world.SEPARATORS.values()]


@torch.no_grad()
def log_probabilities(folder: Path, answers: Sequence[tuple[str, str]]) -> list[float]:
    """Of every answer and its end, to its prompt, in the model's own tokens: transformers alone."""
    fmt = load_format(Student(model=str(folder)), "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt, text in answers:
        row = Row(id="0", domain="0", prompt=prompt, completion=text)
        start, answer = fmt.prompt_ids(row), fmt.completion_ids(row)
        assert answer is not None
        ids = torch.tensor([[*start.tolist(), *answer.tolist()]])
        log_q_TV = model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
        found.append(float(log_q_TV.gather(1, torch.as_tensor(answer)[:, None]).sum()))
    return found


def own_scores(work: Path, name: str) -> dict[str, Any]:
    """What a teacher scored when it was made, in its own style, task by task."""
    steps = MODELS[name].steps
    return {
        line["task"].split("_")[0]: {key: line[key] for key in ("mean", "low", "high")}
        for line in read_evals(work / f"{name}.work" / "run")
        if line["step"] == steps
    }
