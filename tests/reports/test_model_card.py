from __future__ import annotations

from typing import Any

import pytest
import yaml

from opd.config.presets import METHODS, expand
from opd.config.schema import Config
from opd.reports.model_card import code, escape, model_card, public_name
from tests.journal.test_records import make_summary
from tests.reports.parts import HOSTILE

SOURCES = [
    {"kind": "jsonl", "path": "/home/someone/secret/train.jsonl"},
    {"kind": "dataset", "path": "open-r1/DAPO-Math-17k", "revision": "abc", "weight": 2.0},
    {"kind": "reasoning_gym", "task": "basic_arithmetic"},
    {"kind": "inline", "rows": ["private prompt"]},
]


def resolved(preset: str = "reverse_kl", student: str = "Qwen/Qwen3-0.6B", sources=SOURCES) -> dict[str, Any]:
    config = Config.model_validate(
        {
            "student": {"model": student, "revision": "v1"},
            "teacher": {"model": "/home/someone/models/my-teacher/"},
            "prompts": {"sources": sources},
            "run": {"folder": "/home/someone/runs/a"},
        }
    ).model_dump(mode="json")
    made = expand(preset, METHODS[preset].example)
    terms = [term.model_dump(mode="json") for term in made.terms]
    config["objective"] |= {"preset": preset, "behaviour": made.behaviour.model_dump(mode="json"), "terms": terms}
    return config


def card(config: dict[str, Any], **changes) -> str:
    return model_card(make_summary(**changes), config, config_hash="c0ffee", version="0.1.0")


def front_matter(text: str) -> dict[str, Any]:
    empty, front, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front)


def test_card_says_what_it_is_and_how_good():
    text = card(resolved())
    front = front_matter(text)
    assert front["library_name"] == "transformers" and front["base_model"] == "Qwen/Qwen3-0.6B"
    assert front["tags"] == ["opd", "distillation", "on-policy-distillation"]
    for fact in (
        "- Student: `Qwen/Qwen3-0.6B`, revision `v1`",
        "- Teacher: `my-teacher`",
        "| student before | 74.2 % | [70.2, 77.9] |",
        "| teacher | 99.0 % | [97.7, 99.6] |",
        "Gap to the teacher closed: 84 %",
        "KL\\(student \\|\\| target\\) over the whole vocabulary",
        "`c0ffee`",
        "`train.jsonl`",
        "`open-r1/DAPO-Math-17k` (dataset, split `train`, revision `abc`, weight 2.0)",
        "`basic_arithmetic` (reasoning gym)",
        "1 row given in the config",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert fact in text, fact


def test_machine_paths_and_prompts_stay_at_home():
    text = card(resolved(student="/home/someone/models/student-0.5b"))
    assert "someone" not in text and "secret" not in text and "/home" not in text and "private prompt" not in text
    assert front_matter(text)["base_model"] == "student-0.5b"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/mnt/models/qwen", "qwen"),
        ("~/qwen/", "qwen"),
        ("./runs/final", "final"),
        ("../final", "final"),
        ("a/b/c", "c"),
        (r"C:\Users\someone\model", "model"),
    ],
)
def test_public_name(name, shown):
    assert public_name(name) == shown


def test_existing_relative_folder_is_a_path_though_it_looks_like_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("runs/final") == "runs/final"
    (tmp_path / "runs" / "final").mkdir(parents=True)
    assert public_name("runs/final") == "final"


@pytest.mark.parametrize("preset", sorted(METHODS))
def test_every_preset_is_put_in_words(preset):
    text = card(resolved(preset))
    words = {
        "reverse_kl": "KL(student || target) over the whole vocabulary",
        "forward_kl": "KL(target || student) over the whole vocabulary",
        "jsd": "JSD(target, student) (beta 0.5, normalised false) over the whole vocabulary",
        "tml": "its log-ratio is taken under the sampler that wrote it, weighted by",
        "sft": "minimised on the answers of the data",
        "seqkd": "minimised on a teacher's answers",
        "mopd": "of the scorer that domain names (math: math_teacher, code: code_teacher)",
        "sdpo": "over student top k 100 (bucket)",
        "grpo": "policy gradient of the reward, advantage group",
    }
    assert words.get(preset, "- Objective: ") in text.replace("\\", "")
    assert ("on-policy-distillation" in front_matter(text)["tags"]) == (
        preset not in ("sft", "seqkd", "self_sft", "grpo")
    )


def test_S_6_hostile_values_stay_text():
    config = resolved(student=HOSTILE, sources=[{"kind": "reasoning_gym", "task": HOSTILE}])
    text = card(config, task=HOSTILE, ci_method=HOSTILE)
    assert isinstance(front_matter(text)["base_model"], str)
    for harm in ("\x1b", "\u202e", "\x07", "\U000e0041", "\u2028", "\r"):
        assert harm not in text
    assert escape("<img onerror=x> [a](b) *c* | d") == r"\<img onerror=x\> \[a\]\(b\) \*c\* \| d"
    assert escape("---\n# x") == r"\-\-\-\\n\# x"
    assert code("a`b``c") == "```a`b``c```" and code("`") == "`` ` ``"


def test_card_without_teacher_or_scores():
    config = resolved("sft")
    config["teacher"] = None
    text = card(config, student_before=None, student_after=None, teacher=None, task=None, n=None, k=None)
    assert "- Teacher: none" in text and "No held-out task was taken." in text and "None" not in text


def test_a_student_that_got_worse_lost_points() -> None:
    text = card(resolved(), student_after={"mean": 0.7, "low": 0.6, "high": 0.8})
    assert "The student lost 4.2 points." in text and "closed" not in text


def test_the_card_of_an_adapter_says_how_to_load_it() -> None:
    config = resolved()
    config["student"]["lora"] = {"rank": 8}
    made = model_card(make_summary(), config, config_hash="c0ffee", version="0.1.0", form="adapter")
    assert yaml.safe_load(made.split("---")[1])["library_name"] == "peft" and "AutoPeftModelForCausalLM" in made
    assert "LoRA adapter of rank 8" in made
    whole = card(config)
    assert "AutoModelForCausalLM" in whole and "Peft" not in whole and "rank 8" in whole
