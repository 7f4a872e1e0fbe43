"""`opd train` as a person runs it: tiny real models on disk, real data files, exit codes, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.cli import main as cli
from opd.journal.reader import read_evals, read_metrics, read_rollouts, read_summary
from tests import tiny
from tests.wiring import foreign_models


def opd(*items: str) -> int:
    """The exit code of `opd ITEMS...`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["opd", *map(str, items)])
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Two models of one tokenizer, prompts and held-out problems."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save(folder / "student", "qwen3", seed=0)
    tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)
    rows = [{"prompt": f"What is {i} + {j}?", "answer": str(i + j)} for i in range(6) for j in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "completion": f"{row['answer']}."} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def recipe(world: Path, tmp_path: Path, **changes: object) -> list[str]:
    """A short run as overrides; `changes` use `__` for the dots."""
    options = {
        "student.model": world / "student",
        "teacher.model": world / "teacher",
        "prompts.sources": json.dumps([{"kind": "jsonl", "path": str(world / "prompts.jsonl")}]),
        "prompts.per_step": 8,
        "sampling.samples_per_prompt": 2,
        "sampling.max_tokens": 10,
        "optim.lr": 1e-2,
        "run.steps": 3,
        "run.threads": 1,
        "run.folder": tmp_path / "run",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in options.items() if value is not None]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_of_model_trains_and_its_kl_falls(world: Path, tmp_path: Path, kind: str) -> None:
    """Twenty steps on one fixed set of prompts; the last model loads in transformers and gives what was trained."""
    tiny.save(tmp_path / "student", kind, seed=0, scale=1.0)
    tiny.save(tmp_path / "teacher", kind, seed=1, scale=10.0)
    changes = {"student__model": tmp_path / "student", "teacher__model": tmp_path / "teacher"}
    assert opd("train", *recipe(world, tmp_path, **changes, run__steps=16)) == 0
    seen = [line["reverse_kl"] for line in read_metrics(tmp_path / "run")]
    assert np.mean(seen[-3:]) < 0.85 * np.mean(seen[:3])
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert type(after) is type(before)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").eos_token == "<|im_end|>"


def test_sft_trains_on_the_data_without_a_teacher(world: Path, tmp_path: Path) -> None:
    sources = json.dumps([{"kind": "jsonl", "path": str(world / "pairs.jsonl")}])
    changes = {"objective__preset": "sft", "teacher__model": None, "prompts__sources": sources, "run__steps": 12}
    assert opd("train", *recipe(world, tmp_path, **changes)) == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    (rollout, *_) = read_rollouts(tmp_path / "run", 1)
    assert rollout["behaviour"] == "dataset" and rollout["response"].endswith("<|im_end|>")


def test_the_run_folder_tells_the_whole_story(world: Path, tmp_path: Path, capsys) -> None:
    task = {"name": "sums", "grader": {"kind": "numeric"}}
    task["source"] = {"kind": "jsonl", "path": str(world / "prompts.jsonl"), "limit": 6}
    assert opd("train", *recipe(world, tmp_path, evals__tasks=json.dumps([task]), evals__every=2)) == 0
    run = tmp_path / "run"
    summary = read_summary(run)
    assert summary["status"] == "done" and summary["steps"] == 3 and summary["task"] == "sums" and summary["n"] == 6
    assert all(set(summary[who]) == {"mean", "low", "high"} for who in ("student_before", "student_after", "teacher"))
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert summary["tokens"] == sum(line["trained_tokens"] for line in metrics)
    assert [(e["step"], e["model"]) for e in read_evals(run)] == [
        (0, "student"),
        (0, "teacher"),
        (2, "student"),
        (3, "student"),
    ]
    rollouts = list(read_rollouts(run))
    assert len(rollouts) == 3 * 8 * 2 and len({r["id"] for r in rollouts}) == len(rollouts)
    assert (run / "final" / "README.md").read_text().startswith("---")
    printed = capsys.readouterr().out
    assert "student after" in printed and "\x1b" not in printed
    # The resolved config is the run: the same numbers come out again.
    assert opd("train", run / "config.json", f"run.folder={tmp_path / 'again'}") == 0
    assert [line["loss"] for line in read_metrics(tmp_path / "again")] == [line["loss"] for line in metrics]


def test_reasoning_gym_prompts_and_grader(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    gym = {"kind": "reasoning_gym", "task": "chain_sum", "size": 16, "settings": {"max_terms": 2, "max_digits": 1}}
    task = {"name": "sums", "source": {**gym, "seed": 1, "size": 4}, "grader": {"kind": "reasoning_gym"}}
    changes = {"prompts__sources": json.dumps([gym]), "evals__tasks": json.dumps([task])}
    assert opd("train", *recipe(world, tmp_path, **changes, run__steps=2)) == 0
    assert read_summary(tmp_path / "run")["student_after"] is not None


def test_dry_run_shows_the_plan_and_writes_nothing(world: Path, tmp_path: Path, capsys) -> None:
    assert opd("train", "--dry-run", *recipe(world, tmp_path)) == 0
    printed = capsys.readouterr().out
    for words in ("Qwen3ForCausalLM", "LlamaForCausalLM", "36 usable", "difference: none", "KL(student || target)"):
        assert words in printed
    assert not (tmp_path / "run").exists()


def test_dry_run_beside_a_run_that_is_there_says_how_to_go_on(world: Path, tmp_path: Path, capsys) -> None:
    items = recipe(world, tmp_path, run__steps=1)
    assert opd("train", *items) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert opd("train", "--dry-run", *items) == 0
    assert "go on with run.existing=resume" in " ".join(capsys.readouterr().out.split())
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_options_may_be_written_with_dashes(world: Path, tmp_path: Path) -> None:
    items = recipe(world, tmp_path, run__steps=1)
    assert opd("train", *items, "--optim.lr", "5e-3", "--sampling.max_tokens=4") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["optim"]["lr"] == 5e-3 and config["sampling"]["max_tokens"] == 4


# ---- bad input: exit code 2, a message that names the way out, before weights are loaded ---------------------------


def refused(capsys, *items: str) -> str:
    """The message of a command that ends with exit code 2."""
    assert opd(*items) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Loading weights is too late for an error."""
    monkeypatch.setattr("opd.wiring.session.load_student", lambda *_: pytest.fail("weights were loaded"))


BAD = {
    "missing model": ({"student__model": "./nowhere"}, "./nowhere"),
    "typo": ({"optim__lrr": 1e-5}, "optim.lr"),
    "missing data": ({"prompts__sources": '[{"kind": "jsonl", "path": "gone.jsonl"}]'}, "gone.jsonl"),
    "missing column": ({"prompts__sources": '[{"kind": "inline", "rows": [{"question": "a"}]}]'}, "question"),
    "context too small": ({"sampling__max_tokens": 10**6}, "positions"),
    "temperature 0": ({"sampling__temperature": 0}, "sampling.temperature"),
    "all filtered": ({"prompts__max_prompt_tokens": 3}, "max_prompt_tokens"),
    "no teacher": ({"teacher__model": None}, "teacher"),
    "unknown preset": ({"objective__preset": "reverse"}, "reverse_kl"),
    "unknown stop token": ({"sampling__stop_tokens": '["not one token"]'}, "stop_tokens"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_weights_are_loaded(world: Path, tmp_path: Path, capsys, name: str) -> None:
    changes, named = BAD[name]
    assert named in refused(capsys, "train", *recipe(world, tmp_path, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("no_weights")
def test_malformed_data_names_file_and_line(world: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "fine"}\n{"prompt": \n')
    sources = json.dumps([{"kind": "jsonl", "path": str(data)}])
    assert f"{data}:2" in refused(capsys, "train", *recipe(world, tmp_path, prompts__sources=sources))


def test_A_02_A_12_a_tokenizer_of_equal_size_with_other_ids_is_told_and_never_read_by_id(
    world: Path, tmp_path: Path, capsys
) -> None:
    """Two ids exchanged: the teacher's text is the student's, so the run starts, says it, and learns."""
    tiny.save(tmp_path / "teacher", "llama", seed=1, scale=10.0)
    path = tmp_path / "teacher" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    a, b = "Ġthe" if "Ġthe" in vocab else "th", "an" if "an" in vocab else "a"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(words))
    items = recipe(world, tmp_path, teacher__model=tmp_path / "teacher", run__steps=1)
    assert opd("train", *items) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "teacher has another tokenizer, of 300 tokens: 300 are also among the student's 300" in printed
    (line,) = read_metrics(tmp_path / "run")
    assert line["applied"] and 0 < line["scorer/teacher/same"] <= line["scorer/teacher/coverage"] <= 1


@pytest.mark.parametrize(
    ("family", "preset"), [pytest.param("unigram", "gold", marks=pytest.mark.slow), ("wordpiece", "span")]
)
def test_A_12_another_tokenizer_is_told_shown_and_learnt_from(
    world: Path, tmp_path: Path, capsys, family: str, preset: str
) -> None:
    foreign_models.save(tmp_path / "teacher", family, scale=10.0)
    items = recipe(world, tmp_path, teacher__model=tmp_path / "teacher", objective__preset=preset, run__steps=1)
    assert opd("train", *items) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "teacher has another tokenizer",
        "are in spans of both",
        "for example (the student's tokens=its own)",
    ):
        assert words in said
    (line,) = read_metrics(tmp_path / "run")
    assert line["applied"] and 0 < line["scorer/teacher/coverage"] <= 1
    before, after = (
        load_file(folder / "model.safetensors") for folder in (world / "student", tmp_path / "run" / "final")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("no_weights")
def test_A_12_what_another_tokenizer_cannot_do_is_refused_before_weights_are_loaded(
    world: Path, tmp_path: Path, capsys
) -> None:
    foreign_models.save(tmp_path / "teacher", "unigram")
    items = recipe(world, tmp_path, teacher__model=tmp_path / "teacher", objective__preset="minillm")
    message = refused(capsys, "train", *items)
    assert "objective.behaviour: teacher has another tokenizer" in message


def test_A_01_padded_vocabularies_of_one_tokenizer_are_fine(world: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "teacher", "llama", seed=1, vocab_size=320)
    assert opd("train", *recipe(world, tmp_path, teacher__model=tmp_path / "teacher", run__steps=1)) == 0
    ids = [token for rollout in read_rollouts(tmp_path / "run") for token in rollout["response_ids"]]
    assert max(ids) < 300


@pytest.mark.parametrize(("value", "said"), [(0.0, "uniform"), (float("nan"), "NaN")])
def test_X_09_a_teacher_that_knows_nothing_is_refused(world, tmp_path, capsys, value: float, said: str) -> None:
    tiny.save(tmp_path / "teacher", "llama", seed=1, tie_word_embeddings=False)
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], value)
    save_file(tensors, path, metadata={"format": "pt"})
    assert said in refused(capsys, "train", *recipe(world, tmp_path, teacher__model=tmp_path / "teacher"))


def test_a_second_run_in_the_same_folder_is_refused(world: Path, tmp_path: Path, capsys) -> None:
    items = recipe(world, tmp_path, run__steps=1)
    assert opd("train", *items) == 0
    assert "run.existing=resume" in refused(capsys, "train", *items)
    assert opd("train", *items, "run.existing=overwrite") == 0


def test_a_character_that_the_tokenizer_does_not_know_names_the_row(tmp_path: Path, capsys) -> None:
    from opd.lab.demo.make_models import MODELS

    rows = '[{"kind": "inline", "name": "mine", "rows": ["sort: abcdefgh\\n", "sort: ABC\\n"]}]'
    items = [f"student.model={MODELS / 'student'}", f"teacher.model={MODELS / 'teacher'}", f"prompts.sources={rows}"]
    assert "row mine/1" in refused(capsys, "train", *items, "sampling.max_tokens=9", f"run.folder={tmp_path / 'run'}")
    task = {"name": "capitals", "source": json.loads(rows)[0], "grader": {"kind": "exact"}}
    task["source"]["rows"] = [{"prompt": "sort: ABC\n", "answer": "ABC"}]
    items = [*items[:2], 'prompts.sources=[{"kind": "inline", "rows": ["sort: abc\\n"]}]', "sampling.max_tokens=9"]
    said = refused(capsys, "train", *items, f"evals.tasks={json.dumps([task])}", f"run.folder={tmp_path / 'run'}")
    assert "row mine/0" in said


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("what", ["training", "task"])
def test_a_context_too_small_for_either_model_is_found_before_weights_are_loaded(
    world: Path, tmp_path: Path, capsys, role: str, what: str
) -> None:
    tiny.save(tmp_path / "short", "gpt2", seed=1, n_positions=64)
    changes = {f"{role}__model": tmp_path / "short"}
    if what == "training":
        changes["sampling__max_tokens"] = 60
    else:
        task = {"name": "sums", "grader": {"kind": "numeric"}, "sampling": {"max_tokens": 60}}
        task["source"] = {"kind": "jsonl", "path": str(world / "prompts.jsonl")}
        changes["evals__tasks"] = json.dumps([task])
    message = refused(capsys, "train", *recipe(world, tmp_path, **changes))
    assert f"{role}.model: {tmp_path / 'short'} has 64 positions" in message


def test_a_student_with_broken_weights_is_refused_before_the_run(world: Path, tmp_path: Path, capsys) -> None:
    tiny.save(tmp_path / "student", "qwen3", seed=0)
    path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    message = refused(capsys, "train", *recipe(world, tmp_path, student__model=tmp_path / "student"))
    assert "student" in message and "NaN" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
