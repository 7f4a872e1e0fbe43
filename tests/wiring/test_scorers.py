"""Several scorers in a whole run, from the config to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import opd
from opd.config.loading import load_config
from opd.costs.ledger import reading_cost
from opd.errors import DataError
from opd.journal.reader import read_evals, read_events, read_metrics, read_rollouts, read_views
from opd.wiring.build import config_size
from opd.wiring.dry_run import dry_run
from tests import tiny

TASK = {"name": "sums", "source": {"kind": "inline", "rows": [{"prompt": "1 + 1?", "answer": "2"}]}}
TASK["grader"] = {"kind": "exact"}
SAMPLING = {"max_tokens": 8, "samples_per_prompt": 2}
ROUTED = {"kind": "routed", "routes": {"math": "teacher", "code": "other"}}
MIXED = [
    {"kind": "inline", "name": "math", "rows": ["What is 2 + 2?", "3 * 3?", "Solve 3"]},
    {"kind": "inline", "name": "code", "rows": ["Sort: hgfe", "hi", "jumps over"]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"student": tiny.save(folder / "student", seed=0, scale=1.0)}
    made["one"] = tiny.save(folder / "one", "llama", seed=1, scale=10.0)
    return made | {"two": tiny.save(folder / "two", seed=2, scale=10.0)}


def distill(models, folder: Path, terms: list[dict], **sections: Any):
    objective = {"behaviour": "student", "terms": terms}
    given = {"prompts": {"sources": MIXED, "per_step": 6}, "sampling": SAMPLING, **sections}
    run = {"folder": str(folder), "steps": 2, **given.pop("run", {})}
    return opd.distill(models["student"], objective=objective, run=run, quiet=True, **given)


def two(models, **more) -> dict[str, Any]:
    return {"teacher": {"model": models["one"]}, "scorers": {"other": {"model": models["two"]}, **more}}


@torch.no_grad()
def closeness(student: str, teacher: str, prompts: list[str]) -> float:
    """Mean reverse KL at the token after each prompt."""
    tokenizer = tiny.tokenizer()
    logs = []
    for folder in (student, teacher):
        module = AutoModelForCausalLM.from_pretrained(folder).eval()
        per = []
        for prompt in prompts:
            turn = [{"role": "user", "content": prompt}]
            text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            per.append(torch.log_softmax(module(ids).logits[0, -1].double(), -1))
        logs.append(torch.stack(per))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_E_12_two_teachers_and_two_domains_each_domain_moves_to_its_own(models, tmp_path: Path) -> None:
    run = distill(
        models,
        tmp_path / "run",
        [{"name": "r", "target": ROUTED}],
        **two(models),
        optim={"lr": 1e-2},
        run={"steps": 40},
    )
    found = {}
    for source in MIXED:
        for name in ("one", "two"):
            before = closeness(models["student"], models[name], source["rows"])
            found[source["name"], name] = closeness(str(run.student), models[name], source["rows"]) / before
    assert found["math", "one"] < 0.75 * found["math", "two"], found
    assert found["code", "two"] < 0.75 * found["code", "one"], found
    assert found["math", "one"] < 0.7 and found["code", "two"] < 0.7, found


def test_every_scorer_is_billed_for_what_it_read(models, tmp_path: Path) -> None:
    """Two updates on a batch read everything twice."""
    run = distill(
        models, tmp_path / "run", [{"name": "r", "target": ROUTED}], **two(models), run={"steps": 1},
        learner={"updates_per_batch": 2},
    )  # fmt: skip
    (line,) = read_metrics(run.folder)
    rows = list(read_rollouts(run.folder, 1))
    for name, model, domain in (("teacher", "one", "math"), ("other", "two", "code")):
        lengths = [len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows if r["domain"] == domain]
        module = AutoModelForCausalLM.from_pretrained(models[model])
        spec = load_config([{"student": {"model": models[model]}, "objective": {"preset": "sft"},
                             "prompts": {"sources": MIXED}}]).config.student  # fmt: skip
        cost = reading_cost(lengths, config_size(spec, "student", module.num_parameters()))
        assert line[f"tokens_{name}_scoring"] == 2 * cost.tokens
        assert line[f"flops_{name}_scoring"] == pytest.approx(2 * cost.flops)


def test_views_show_every_scorer_and_the_teacher_takes_the_tasks(models, tmp_path: Path) -> None:
    scorers = two(models, told={"model": models["one"], "context": {"template": "{prompt} {hint}"}})
    rows = [{"prompt": "What is 2 + 2?", "hint": "four", "domain": "math"}, {"prompt": "x", "hint": "y", "domain": "c"}]
    sources = [{"kind": "inline", "rows": rows, "name": "s"}]
    terms = [{"name": name, "target": name} for name in ("teacher", "other", "told")]
    run = distill(models, tmp_path / "run", terms, **scorers, prompts={"sources": sources, "per_step": 2},
                  run={"steps": 1})  # fmt: skip
    view = read_views(run.folder)[0][1]
    assert view["teachers"] == ["teacher", "other", "told"]
    answer = view["answers"][0]
    assert answer["logprobs"]["teacher"] != answer["logprobs"]["told"], "the context is in it"
    run = distill(models, tmp_path / "exam", terms, **scorers, prompts={"sources": sources, "per_step": 2},
                  run={"steps": 1}, evals={"tasks": [TASK]})  # fmt: skip
    view = read_views(run.folder)[0][1]
    assert view["teachers"] == ["teacher", "other"], "a held-out problem has no hint"
    assert list(view["left_out"]) == ["told"] and "'hint'" in view["left_out"]["told"]
    (event,) = [event for event in read_events(run.folder) if event["kind"] == "view"]
    assert event["message"].startswith("the views leave out told: ")
    assert "told is not among the teachers here: " in (run.folder / "report.html").read_text(encoding="utf-8")
    assert [line["model"] for line in read_evals(run.folder)].count("teacher") == 1


def test_views_that_nobody_can_read_are_told(models, tmp_path: Path) -> None:
    told = {"model": models["one"], "context": {"template": "{prompt} {hint}"}}
    sources = [{"kind": "inline", "rows": [{"prompt": "What is 2 + 2?", "hint": "four"}], "name": "s"}]
    run = distill(models, tmp_path / "run", [{"name": "t"}], teacher=told, prompts={"sources": sources, "per_step": 1},
                  run={"steps": 1}, evals={"tasks": [TASK], "teacher": False})  # fmt: skip
    assert not list(read_views(run.folder))
    (event,) = [event for event in read_events(run.folder) if event["kind"] == "view"]
    assert event["message"].startswith("no views are taken, nobody can read them: teacher: row inline/0: ")
    assert "nobody can read them" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_missing_context_column_is_told_before_any_weights_are_loaded(models, tmp_path: Path, monkeypatch) -> None:
    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("opd.models.loading._load", no_weights)
    told = {"model": models["one"], "context": {"template": "{prompt} {solution}"}}
    rows = [{"prompt": "a", "solution": "b"}, {"prompt": "c"}]
    sources = [{"kind": "inline", "name": "s", "rows": rows}]
    with pytest.raises(DataError, match=r"row s/1: .*'solution'"):
        distill(models, tmp_path / "run", [{"name": "r"}], teacher=told, prompts={"sources": sources})


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_scorers_of_the_students_own_weights(models, tmp_path: Path, lora) -> None:
    """In the first step nobody has moved: every divergence from them is zero. Afterwards each has its own distance."""
    scorers = {
        "start": {"weights": "initial"},
        "average": {"weights": "ema", "ema_rate": 0.5},
        "earlier": {"weights": "past", "every": 2},
    }
    terms: list[dict] = [{"name": "pull"}]
    terms += [{"name": name, "target": name, "coefficient": 1e-9} for name in scorers]
    student = {"model": models["student"], "lora": lora}
    run = opd.distill(
        student,
        models["one"],
        prompts={"sources": MIXED, "per_step": 6},
        sampling=SAMPLING,
        scorers=scorers,
        objective={"behaviour": "student", "terms": terms},
        optim={"lr": 5e-3},
        run={"folder": str(tmp_path / "run"), "steps": 5},
        quiet=True,
    )
    kl = {name: [line[f"scorer/{name}/reverse_kl"] for line in read_metrics(run.folder)] for name in scorers}
    for name, values in kl.items():
        assert abs(values[0]) < 1e-6, (name, values)
    assert all(b > a > 0 for a, b in zip(kl["start"][1:], kl["start"][2:], strict=False)), kl
    assert abs(kl["earlier"][2]) < 1e-6 and abs(kl["earlier"][4]) < 1e-6 < kl["earlier"][1], (
        "renewed after step 2 and 4"
    )
    assert 0 < kl["average"][1] < kl["start"][1] and kl["average"][-1] < kl["start"][-1]


def test_a_dry_run_tells_every_scorer(models, tmp_path: Path) -> None:
    scorers = two(models, average={"weights": "ema", "context": {"template": "{prompt} {hint}"}})
    rows = [{"prompt": "p", "hint": "h", "d": "math"}, {"prompt": "q", "hint": "h", "d": "code"}]
    source = {"kind": "inline", "name": "s", "rows": rows, "columns": {"domain": "d"}}
    terms = [{"name": "r", "target": ROUTED}, {"name": "a", "target": "average"}]
    config = {
        "student": {"model": models["student"]},
        **scorers,
        "objective": {"behaviour": "student", "terms": terms},
        "prompts": {"sources": [source]},
        "run": {"folder": str(tmp_path / "run")},
    }  # fmt: skip
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    dry_run(load_config([config]).config, console)
    said = console.export_text()
    for words in (
        "the student's moving average (rate 0.05), in a context of its own: a float32 copy of its weights",
        "with hint in its prompt",
        "other is asked about 1 prompt of them",
        "average is asked about 2 prompts of them",
        "average weights",
        "target = the scorer that domain names (math: teacher, code: other)",
        "+ average",
    ):
        assert words in said, words


def test_a_dry_run_tells_shares_powers_and_weights_and_shows_a_prompt_once(models, tmp_path: Path) -> None:
    config = {
        "student": {"model": models["student"]},
        "teacher": {"model": models["one"]},
        "objective": {"preset": "exopd"},
        "prompts": {"sources": [{"kind": "inline", "rows": [{"prompt": "p", "completion": "c", "answer": "1"}]}]},
        "run": {"folder": str(tmp_path / "run")},
    }  # fmt: skip
    said = _said(config)
    assert "target = teacher^1.25 reference^-0.25" in said and "weights tis (cap 5)" in said
    assert "--- reference reads the same as the student" in said and said.count("--- student reads") == 1
    said = _said({**config, "objective": {"preset": "gkd", "parameters": {"on_policy": 0.25}}})
    assert "student 25.0 % of batches, dataset 75.0 % of batches" in said and "normalised false" in said
    graded = {"objective": {"preset": "grpo"}, "rewards": {"grader": {"kind": "numeric"}}}
    said = _said({**{key: value for key, value in config.items() if key != "teacher"}, **graded})
    assert "rewards: numeric grader" in said


def _said(config: dict) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    dry_run(load_config([config]).config, console)
    return console.export_text()


def test_a_scorer_that_no_prompt_asks_for_stays_away(models, tmp_path: Path, capsys) -> None:
    by = {"kind": "routed", "by": "kind", "routes": {"a": "teacher", "b": "other"}}
    sources = [{"kind": "inline", "name": "s", "rows": [{"prompt": "p", "kind": "a"}]}]
    run = distill(models, tmp_path / "run", [{"name": "r", "target": by}], **two(models),
                  prompts={"sources": sources, "per_step": 1})  # fmt: skip
    (line, *_) = read_metrics(run.folder)
    assert "flops_teacher_scoring" in line and "flops_other_scoring" not in line
    sources[0]["rows"].append({"prompt": "q", "kind": "c"})
    with pytest.raises(DataError, match="row s/1 has kind 'c'"):
        distill(models, tmp_path / "b", [{"name": "r", "target": by}], **two(models), prompts={"sources": sources})
    assert np.isfinite(line["loss"])
