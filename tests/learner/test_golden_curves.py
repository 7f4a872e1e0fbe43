"""The first steps of named methods, as numbers that stay: a change of them is a change of the method.

    python -m tests.learner.test_golden_curves --because "REASON"     writes golden_curves.json anew

A test that fails here says that the same config trains differently. Where that is meant, the reason goes into the file
with the new numbers, and into the changelog.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.config.objective import Objective as ObjectiveSpec
from opd.config.presets import expand
from opd.costs.ledger import Ledger
from opd.costs.size import model_size
from opd.loop.rewards import AnswerRewards
from opd.loop.synchronous import Listener, Rooms, train
from opd.models.causal import CausalLM
from opd.protocols import Weights
from opd.teachers.local import LocalTeacher
from opd.teachers.panel import Panel
from opd.text.agreement import Agreement
from opd.types import Grade, Prompt, Rollout, Row, SamplingParams
from tests import rooms, tiny

FILE = Path(__file__).with_name("golden_curves.json")
STEPS, VOCAB, TOKENS = 3, 40, 6
SEEDS = {"student": 0, "teacher": 1, "math": 2, "code": 3, "reference": 4, "weak": 5}
TWO = {"m": "math", "c": "code"}
# Methods whose answers the student writes alone, with the parameters and the updates on a batch that they are run with.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "reverse_kl": ({}, 1),
    "forward_kl": ({}, 1),
    "jsd": ({"beta": 0.1, "normalised": True}, 1),
    "tml": ({"discount": 0.9}, 1),
    "mopd": ({"routes": TWO, "alpha": 0.5}, 2),
    "deepseek_v4": ({"weights": {"math": 0.3, "code": 0.7}}, 1),
    "exopd": ({}, 2),
    "compass": ({"alpha": 0.5}, 1),
    "lsm": ({"k": 6}, 1),  # without its top_p
    "ta_opd": ({"k": 6}, 1),
    "sdpo": ({"k": 6}, 1),
    "eopd": ({"k": 6}, 2),
    "opdvr": ({}, 1),
    "iw_opd": ({}, 1),
    "binary_opd": ({}, 1),
    "grpo": ({"kl": 0.04}, 2),
    "kdrl": ({}, 2),
    "gkd_rl": ({}, 1),
}


class Bare:
    """Prompts that are ids already, so that no tokenizer has a say."""

    fingerprint = "bare"

    def __init__(self, ids: Mapping[str, np.ndarray]) -> None:
        self.ids = ids

    def prompt_ids(self, row: Row) -> np.ndarray:
        return self.ids[row.id]


class Even:
    """Full marks for an answer with more even tokens than odd ones."""

    def grade(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
        odd = [[int(token) % 2 for token in answer.split()] for answer in answers]
        return [Grade(score=float(2 * sum(each) < len(each))) for each in odd]

    def close(self) -> None: ...


@dataclass
class Exact:
    """Draws from the student in float64, so that no rounding of a device decides on a token."""

    student: CausalLM
    version: int = 0

    def load(self, weights: Weights) -> None:
        self.version = weights.version

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        rng = np.random.default_rng(list(tag.encode()))
        return [r for prompt in prompts_P for r in self._answers(prompt, params, tag, rng)]

    def _answers(self, prompt: Prompt, params: SamplingParams, tag: str, rng: np.random.Generator) -> Iterator[Rollout]:
        N = params.samples_per_prompt
        ids_NS = np.tile(prompt.ids, (N, 1))
        logp_NT = np.zeros((N, 0))
        for _ in range(params.max_tokens):
            with torch.no_grad():
                logits_NV = self.student.module(torch.from_numpy(ids_NS)).logits[:, -1]
            logp_NV = torch.log_softmax(logits_NV, -1).numpy()
            drawn_N = (np.exp(logp_NV).cumsum(1) < rng.random((N, 1))).sum(1).clip(max=VOCAB - 1)
            ids_NS = np.concatenate([ids_NS, drawn_N[:, None]], 1)
            logp_NT = np.concatenate([logp_NT, logp_NV[np.arange(N), drawn_N][:, None]], 1)
        for n, row in enumerate(ids_NS[:, len(prompt.ids) :]):
            ends = np.flatnonzero(np.isin(row, params.stop_ids))
            length = int(ends[0]) + 1 if len(ends) else len(row)
            yield Rollout(
                id=f"{tag}/{prompt.id}/{n}", prompt=prompt, response_ids=row[:length],
                behaviour_logprobs=logp_NT[n, :length].astype(np.float32), mask=np.ones(length, np.bool_),
                policy_version=self.version, behaviour="student", finish_reason="stop" if len(ends) else "length",
                sampling=params,
            )  # fmt: skip


@dataclass(frozen=True)
class Questions:
    prompts_P: list[Prompt]

    def batch(self, step: int) -> list[Prompt]:
        return self.prompts_P


def model(name: str) -> CausalLM:
    """float64, with weights from numpy's generator: no initialisation of a library has a say."""
    module = tiny.model("qwen3", vocab_size=VOCAB).double()
    rng = np.random.default_rng(SEEDS[name])
    with torch.no_grad():
        for key, p in sorted(module.named_parameters()):
            spread = 1.0 if p.ndim == 1 else (2.0 if "embed" in key or "lm_head" in key else 1.0) / p.shape[-1] ** 0.5
            drawn = torch.from_numpy(rng.normal(size=p.shape))
            p.copy_(1 + 0.1 * drawn if p.ndim == 1 else spread * drawn)
    return CausalLM(module, vocab_size=VOCAB, compute_dtype=torch.float64, name=name)


def curve(name: str) -> dict[str, list[float]]:
    """What the real loop reports in its first steps."""
    parameters, updates = METHODS[name]
    preset = expand(name, parameters)
    ids = {f"q/{n}": np.arange(3 + n, 6 + 2 * n, dtype=np.int64) for n in range(4)}
    rows = [Row(id=key, domain="mc"[n % 2], prompt="?") for n, key in enumerate(ids)]
    fmt, student = Bare(ids), model("student")
    others = [
        LocalTeacher(
            model(key),
            fmt,  # pyright: ignore[reportArgumentType]
            Agreement(vocab_size=VOCAB),
            name=key,
            temperature=1.0,
            chunk_tokens=16,
            share_prompts=False,
        )
        for key in SEEDS
        if key != "student"
    ]
    learner = rooms.learner(
        student,
        ObjectiveSpec(behaviour=preset.behaviour, terms=preset.terms),
        tokens_per_micro_batch=60,
        learner={"updates_per_batch": updates, "share_prompts": False},
        optim={"lr": 1e-2},
    )
    params = SamplingParams(max_tokens=TOKENS, samples_per_prompt=3, stop_ids=tuple(range(0, VOCAB, 9)))
    size = model_size(student.module.config.to_dict())
    parts = Rooms(
        prompts=Questions([Prompt(row=row, ids=ids[row.id]) for row in rows]),
        sampler=Exact(student),
        teacher=Panel(others),
        learner=learner,
        params=params,
        rewards=AnswerRewards(Even(), lambda tokens: " ".join(map(str, tokens))),
        student_size=size,
        scorer_sizes=dict.fromkeys(SEEDS, size),
    )
    lines: list[dict[str, float]] = []
    listener = Listener(
        on_step=lambda report, rollouts, numbers: lines.append(numbers), on_phase=lambda name: None,
        look=lambda step: None,
    )  # fmt: skip
    train(parts, steps=STEPS, ledger=Ledger(), listener=listener)
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm", "trained_tokens", "response_length")}


@pytest.mark.parametrize("name", METHODS)
def test_O_25_O_27_the_same_config_trains_the_same(name: str) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    found = curve(name)
    for key, expected in golden["curves"][name].items():
        assert found[key] == pytest.approx(expected, rel=1e-6), f"{key} of {name}; last meant: {golden['because']}"


def test_O_27_every_method_that_is_run_is_pinned_and_every_one_is_different() -> None:
    curves = json.loads(FILE.read_text(encoding="utf-8"))["curves"]
    assert curves.keys() == METHODS.keys()
    assert len({tuple(each["loss"]) for each in curves.values()}) == len(METHODS)
    assert all(len(each[key]) == STEPS and np.isfinite(each[key]).all() for each in curves.values() for key in each)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--because", required=True, help="why the numbers may change")
    made = {"because": parser.parse_args().because, "curves": {name: curve(name) for name in METHODS}}
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
