"""The README.md of a trained model: what it is, what made it, how good it is, how to load it.

A card leaves the machine. Paths are therefore reduced to their last part, and every value from outside is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from opd.reports.figures import closed, count, counted, duration, interval, percent
from opd.reports.objective import formula, is_data, scorer_model, scorers
from opd.reports.printable import printable

LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
LOAD_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
WRITERS = {
    "student": "the student's own answers",
    "dataset": "the answers of the data",
    "teacher": "a teacher's answers",
    "teacher_mixed": "answers that teacher and student wrote together, token by token",
    "speculative": "the student's answers as a teacher accepted them, token by token",
    "cached": "answers of an earlier run",
}
REDUCTIONS = {
    "token_mean": "averaged over all trained tokens of a step",
    "sequence_mean": "averaged over the answers of a step, each by its own mean over tokens",
    "constant": "summed over the answers of a step, divided by their number times the most tokens one may have",
}


def model_card(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    config_hash: str,
    version: str,
    form: Literal["merged", "adapter"] = "merged",
) -> str:
    """Markdown with YAML front matter.

    summary   as `opd.journal.records.summary_record` makes it
    config    the resolved config as a plain dict
    version   of opd
    form      what the folder holds: a whole model, or an adapter alone
    """
    student, objective = config["student"], config["objective"]
    writers = _writers(objective)
    on_policy = bool({"student", "teacher_mixed", "speculative"} & set(writers))
    distilled = "teacher" in writers or any(
        term.get("kind", "divergence") == "divergence" for term in objective["terms"]
    )
    tags = [
        "opd",
        *(["distillation"] if distilled else []),
        *(["on-policy-distillation"] if on_policy and distilled else []),
    ]
    front = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": printable(public_name(student["model"])),
        "tags": tags,
    }
    made = "distilled on its own answers" if on_policy and distilled else "distilled" if distilled else "fine-tuned"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {escape(public_name(student['model']))}, {made}",
        f"Made with opd {escape(version)}.",
        "## Models",
        "\n".join([*_model("Student", student), *(_scorers(config) or ["- Teacher: none"])]),
        "## Scores",
        _scores(summary),
        "## Training",
        "\n".join(_training(summary, config, config_hash)),
        "## Data",
        "\n".join(f"- {_source(source)}" for source in config["prompts"]["sources"]),
        "## Load it",
        LOAD_ADAPTER if form == "adapter" else LOAD,
    ]
    return "\n\n".join(parts) + "\n"


def public_name(name: str) -> str:
    """A hub name as it is; of a path only the last part."""
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..", "~")]
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and name[0] not in "./~" and not Path(name).exists()
    return name if is_hub_name or not parts else parts[-1]


def escape(text: object) -> str:
    """Foreign text inside a line of Markdown: no markup, no HTML, no line break."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", printable(text))


def code(text: object) -> str:
    """Foreign text as inline code; not for tables, where a bar would end the cell."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _model(role: str, model: Mapping[str, Any]) -> list[str]:
    revision = f", revision {code(model['revision'])}" if model.get("revision") else ""
    return [f"- {role}: {code(public_name(model['model']))}{revision}"]


def _scorers(config: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, scorer in scorers(config).items():
        role = "Teacher" if name == "teacher" else f"Scorer {code(name)}"
        own = scorer.get("weights", "model") == "model"
        lines += _model(role, scorer) if own else [f"- {role}: {scorer_model(scorer)}"]
    return lines


def _writers(objective: Mapping[str, Any]) -> list[str]:
    """Kinds of those who wrote the answers."""
    behaviour = objective.get("behaviour") or {}
    kind = behaviour.get("kind", "student")
    return [part["writer"]["kind"] for part in behaviour["of"]] if kind == "mixture" else [kind]


def _scores(summary: Mapping[str, Any]) -> str:
    arms = (("student before", "student_before"), ("student after", "student_after"), ("teacher", "teacher"))
    scored = [(name, summary[key]) for name, key in arms if summary[key] is not None]
    if not scored:
        return "No held-out task was taken."
    lines = ["| | accuracy | interval |", "|---|---:|---:|"]
    lines += [f"| {name} | {percent(score['mean'])} | {interval(score)} |" for name, score in scored]
    taken = f"{counted(summary['n'], 'held-out problem')}, {counted(summary['k'], 'answer')} each"
    lines += ["", f"{code(summary['task'])}: {taken}; intervals: {escape(summary['ci_method'])}."]
    if (gap := summary["gap_closed"]) is not None:
        means = [summary[key]["mean"] for key in ("student_before", "student_after")]
        what = "The student" if gap < 0 else "Gap to the teacher closed:"
        lines[-1] += f" {what} {closed(gap, *means)}."
    return "\n".join(lines)


def _training(summary: Mapping[str, Any], config: Mapping[str, Any], config_hash: str) -> list[str]:
    objective, prompts, sampling, optim = (config[key] for key in ("objective", "prompts", "sampling", "optim"))
    writers = _writers(objective)
    on_policy = writers != ["dataset"]
    preset = f"{code(objective['preset'])}, " if objective.get("preset") else ""
    answers = " and ".join(dict.fromkeys(WRITERS.get(kind, kind) for kind in writers))
    lines = [f"- Objective: {preset}minimised on {answers}:", *(f"  - {_term(t)}" for t in objective["terms"])]
    heat = [f"{who} {objective[key]}" for who in ("student", "teacher") if objective[key := f"{who}_temperature"] != 1]
    if heat:
        lines.append(f"- Temperature inside the objective: {', '.join(heat)}")
    step = f"{prompts['per_step']} prompts a step"
    if on_policy:
        step += (
            f", {sampling['samples_per_prompt']} answers each, at most {sampling['max_tokens']} tokens, "
            f"sampled at temperature {sampling['temperature']}"
        )
    spent = f"{count(summary['tokens'])} trained tokens, {count(summary['flops'])} FLOPs"
    if lora := config["student"].get("lora"):
        lines.append(f"- LoRA adapter of rank {lora['rank']}; the other weights were not trained")
    return [
        *lines,
        f"- {summary['steps']} steps, {step}",
        f"- AdamW, learning rate {optim['lr']}, {escape(optim['schedule'])} schedule, seed {config['run']['seed']}",
        f"- {spent}, {duration(summary['seconds'])}; the run ended as {code(summary['status'])}",
        f"- Config hash: {code(config_hash)}",
    ]


def _term(term: Mapping[str, Any]) -> str:
    if is_data(term):
        what = "cross-entropy, minus the log-probability of every token of the answer"
    elif term.get("kind") == "outcome":
        what = f"policy gradient of the reward, advantage {escape(term['advantage'])}"
    else:
        what = escape(formula(term))
        if term["support"]["kind"] == "sampled":
            under = {"sampler": "the sampler that wrote it", "student": "the student as it is"}
            under["proximal"] = "the student at the first update on its answer"
            what += f"; its log-ratio is taken under {under[term['advantage_under']]}"
    if (weights := (term.get("importance") or {"kind": "none"})["kind"]) != "none":
        what += f", weighted by the student's probability over that at drawing ({escape(weights)})"
    size = term["coefficient"]
    share = "" if size == 1 else f"{_number(size)} x "
    return f"{share}{what}; {REDUCTIONS.get(term['reduction']) or code(term['reduction'])}"


def _number(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return f"({value['start']} to {value['end']} over {value['steps']} steps)"


def _source(source: Mapping[str, Any]) -> str:
    kind = source["kind"]
    if kind == "inline":
        what = f"{counted(len(source['rows']), 'row')} given in the config"
    elif kind in ("jsonl", "parquet"):
        what = code(re.split(r"[/\\]+", source["path"])[-1])
    else:
        what = code(public_name(source["path"])) if "path" in source else code(source.get("task", kind))
    facts = [escape(kind.replace("_", " "))]
    facts += [f"{key} {code(source[key])}" for key in ("config", "split", "revision", "limit") if source.get(key)]
    facts += [f"weight {source['weight']}"] if source.get("weight", 1) != 1 else []
    return f"{what} ({', '.join(facts)})"
