"""Where whole runs end, against optima that are known: G-OPD's lambda, and GKD's three divergences.

One-token answers to fixed prompts: the states do not move, so that the optimum at each of them is a distribution which
is written down here, from the two models' own logits in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import opd
from opd.journal.reader import read_metrics
from tests import tiny

PROMPTS = ["What is 2 + 2?", "3 * 3?", "Solve 3", "hi"]
HINTS = ["hgfe", "0123", "the lazy dog", "12 + 7"]
LAMBDAS = (0.5, 1.0, 1.25)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"student": tiny.save(folder / "student", seed=0, scale=6.0)}
    made["teacher"] = tiny.save(folder / "teacher", seed=1, scale=6.0)
    made["uniform"] = tiny.save(folder / "uniform", seed=0, scale=1.0)
    made["sure"] = tiny.save(folder / "sure", seed=1, scale=100.0)
    narrow = tiny.save(folder / "narrow", "gpt2", seed=0, scale=3.0, n_embd=4, n_head=1, n_layer=1)
    return made | {"narrow": narrow}


@torch.no_grad()
def next_token(folder: str | Path, prompts: Sequence[str]) -> Tensor:
    """float64 [P, V]: log-probabilities of the token after each prompt."""
    tokenizer, module = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = []
    for prompt in prompts:
        turn = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        rows.append(module(ids).logits[0, -1].double().log_softmax(-1))
    return torch.stack(rows)


def entropy(logp_PV: Tensor) -> float:
    return float(-(logp_PV.exp() * logp_PV).sum(-1).mean())


def kl(p_PV: Tensor, q_PV: Tensor) -> float:
    return float((p_PV.exp() * (p_PV - q_PV)).sum(-1).mean())


def trained(
    student: str, teacher: Any, rows: Sequence[Any], folder: Path, objective: Mapping[str, Any], **options: Any
) -> opd.Run:
    sampling = {"max_tokens": 1, "samples_per_prompt": 1, **options.pop("sampling", {})}
    return opd.distill(
        student,
        teacher,
        prompts={"sources": [{"kind": "inline", "rows": list(rows)}], "per_step": len(rows)},
        sampling=sampling,
        objective=objective,
        optim={"lr": options.pop("lr", 2e-2), "schedule": "linear"},
        run={"folder": str(folder), "steps": options.pop("steps")},
        learner={"diagnostics_every": 0},
        views={"answers": 0},
        quiet=True,
        **options,
    )


# ---- lambda: between the student before training and the teacher, and beyond ----------------------------------------


def tilt(logp_PV: Tensor, base_PV: Tensor, teacher_PV: Tensor) -> float:
    """How many times the teacher's log-odds over the base are in log p: the slope of log(p / m) on log(q / m).

    At the optimum log p = log m + lambda log(q / m) - log Z it is lambda, whatever the weights of the regression are.
    """
    weight_PV = ((base_PV + teacher_PV) / 2).softmax(-1)
    x_PV, y_PV = (z - (weight_PV * z).sum(-1, keepdim=True) for z in (teacher_PV - base_PV, logp_PV - base_PV))
    return float((weight_PV * x_PV * y_PV).sum() / (weight_PV * x_PV.square()).sum())


def tilts(models, tmp_path: Path, objectives: Mapping[float, Any], **options: Any) -> dict[float, tuple[float, float]]:
    """lambda to (tilt of the trained student, its KL from the target in nats)."""
    base_PV, teacher_PV = (next_token(models[name], PROMPTS) for name in ("student", "teacher"))
    found = {}
    for scale, objective in objectives.items():
        run = trained(models["student"], models["teacher"], PROMPTS, tmp_path / str(scale), objective, **options)
        after_PV = next_token(run.student, PROMPTS)
        target_PV = (base_PV + scale * (teacher_PV - base_PV)).log_softmax(-1)
        found[scale] = (tilt(after_PV, base_PV, teacher_PV), kl(after_PV, target_PV))
    return found


def test_lambda_orders_the_log_odds_over_the_whole_vocabulary(models, tmp_path: Path) -> None:
    def objective(scale: float) -> dict[str, Any]:
        target = {"kind": "extrapolated", "scale": scale} if scale != 1 else "teacher"
        return {"behaviour": "student", "terms": [{"name": "gopd", "target": target}]}

    found = {}
    for scale in LAMBDAS:
        more = {"scorers": {"reference": {"weights": "initial"}}} if scale != 1 else {}
        found |= tilts(models, tmp_path, {scale: objective(scale)}, steps=30, **more)
    for scale, (slope, distance) in found.items():
        assert slope == pytest.approx(scale, abs=0.03) and distance < 0.02, found


@pytest.mark.slow
def test_lambda_orders_the_log_odds_of_the_preset_gopd(models, tmp_path: Path) -> None:
    """As published: the drawn token's advantage, clipped ratios. Its noise leaves 0.03 of lambda."""
    objectives = {scale: {"preset": "gopd", "parameters": {"scale": scale}} for scale in LAMBDAS}
    found = tilts(models, tmp_path, objectives, steps=50, sampling={"samples_per_prompt": 32})
    for scale, (slope, distance) in found.items():
        assert slope == pytest.approx(scale, abs=0.06) and distance < 0.03, found


# ---- GKD: a student that cannot be its teacher -----------------------------------------------------------------------

GKD = {
    "forward": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.5},
    "reverse": {"divergence": "reverse_kl"},
}


def best(loss, size: int) -> Tensor:
    """float64 [1, V]: the distribution with the smallest loss."""
    logit_V = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logit_V], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(logit_V.log_softmax(-1))
        value.backward()
        return value

    search.step(closure)  # pyright: ignore[reportArgumentType]
    return logit_V.detach().log_softmax(-1)[None]


def test_the_three_divergences_of_gkd_end_at_their_own_optima_with_ordered_entropies(models, tmp_path: Path) -> None:
    """The teacher reads a hint that the student does not see: one distribution has to stand for four.

    Forward KL: their arithmetic mean; reverse KL: their geometric mean, normalised; JSD: found numerically.
    """
    prompt = "Solve 3"
    q_KV = next_token(models["sure"], [f"{prompt} {hint}" for hint in HINTS])

    def jsd(logp_V: Tensor) -> Tensor:
        middle_KV = torch.logaddexp(logp_V.expand_as(q_KV), q_KV) - math.log(2)
        halves = (x.exp() * (x - middle_KV) for x in (q_KV, logp_V))
        return sum(half.sum(-1).mean() / 2 for half in halves)  # pyright: ignore[reportReturnType]

    optima = {
        "forward": (torch.logsumexp(q_KV, 0) - math.log(len(HINTS)))[None],
        "jsd": best(jsd, q_KV.shape[1]),
        "reverse": q_KV.mean(0).log_softmax(-1)[None],
    }
    teacher = {"model": models["sure"], "context": {"template": "{prompt} {hint}"}}
    rows = [{"prompt": prompt, "hint": hint} for hint in HINTS]
    found: dict[str, Tensor] = {}
    for name, parameters in GKD.items():
        objective = {"preset": "gkd", "parameters": {"on_policy": 1, **parameters}}
        run = trained(models["uniform"], teacher, rows, tmp_path / name, objective, steps=60)
        found[name] = next_token(run.student, [prompt])
    said = {name: (entropy(found[name]), entropy(optima[name])) for name in GKD}
    assert said["forward"][0] > said["jsd"][0] + 0.03 and said["jsd"][0] > said["reverse"][0] + 0.08, said
    for name, p_1V in found.items():
        away = {other: kl(p_1V, optimum_1V) for other, optimum_1V in optima.items()}
        assert min(away, key=lambda other: away[other]) == name and away[name] < 0.01, (name, away)
        assert said[name][0] == pytest.approx(said[name][1], abs=0.05), said


@pytest.mark.slow
def test_a_student_that_is_too_narrow_covers_or_seeks(models, tmp_path: Path) -> None:
    """Four numbers wide, answers of four tokens: no optimum is known. Mean entropy on the student's own answers."""
    prompts = [*PROMPTS, "Sort the letters: hgfe", "jumps over", "quick brown", "0123", "lazy dog", "zyx"]
    teacher = tmp_path / "teacher"
    tiny.save(teacher, seed=1, scale=60.0)
    own = {}
    for name, parameters in GKD.items():
        objective = {"preset": "gkd", "parameters": {"on_policy": 1, **parameters}}
        sampling = {"max_tokens": 4}
        run = trained(models["narrow"], str(teacher), prompts, tmp_path / name, objective, steps=100, sampling=sampling)
        own[name] = sum(line["entropy"] for line in read_metrics(run.folder)[-10:]) / 10
    assert own["forward"] > own["jsd"] + 0.2 and own["jsd"] > own["reverse"] + 0.2, own
