"""A prompt with several answers is read once, and nothing but the time shows it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from opd.models.packing import pack
from opd.types import Want
from tests import rooms

QUESTIONS = ("What is 12 + 7? Think step by step.", "Sort the letters: hgfe, and then again and again", "hi")
OBJECTIVES = {
    "exact": None,
    "sampled": {"preset": "tml"},
    "a look at the step": rooms.objective(
        {"name": "t", "target": "teacher", "tokens": {"select": {"by": "entropy", "share": 0.4}}}
    ),
}


def tokens_through(module, counted: Counter, name: str):
    """Counts the padded tokens that go through a body's embedding."""
    table = module.get_input_embeddings()
    return table.register_forward_hook(lambda layer, given, out: counted.update({name: given[0].numel()}))


@pytest.fixture(scope="module")
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0)
    made = rooms.rollouts(student, fmt, samples=5, max_tokens=9, questions=QUESTIONS)
    assert len({len(r.response_ids) for r in made}) > 3
    return fmt, student, made


@pytest.mark.parametrize("budget", [10_000, 120])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_a_step_is_the_same_and_fewer_tokens_are_read(name: str, kind: str, budget: int, parts) -> None:
    """The scorer reads another prompt than the student, and shares it too where it can."""
    fmt, student, made = parts
    model = rooms.causal(kind, seed=1)
    found, metrics, counted = {}, {}, {share: Counter() for share in (False, True)}
    for share in (False, True, True):  # the first time with sharing tries it out
        counted[share].clear()
        teacher = rooms.teacher(model, rooms.told_more(), fmt, share_prompts=share)
        learner = rooms.learner(
            student, OBJECTIVES[name], tokens_per_micro_batch=budget, learner={"share_prompts": share}
        )
        hooks = [tokens_through(m.module, counted[share], who) for who, m in (("own", student), ("teacher", model))]
        metrics[share] = learner.gradients(made, teacher.evidence(made))
        found[share] = rooms.gradient(student)
        for hook in hooks:
            hook.remove()
    assert rooms.distance(found[False], found[True]) < 1e-5
    assert metrics[True] == pytest.approx(metrics[False], rel=1e-4, abs=1e-6)
    assert counted[True]["own"] < 0.6 * counted[False]["own"]
    if kind != "qwen3_next":
        assert counted[True]["teacher"] < 0.6 * counted[False]["teacher"]


@pytest.mark.parametrize("resolution", ["sampled", "full"])
def test_evidence_is_the_same_and_comes_in_the_order_of_the_batch(resolution, parts) -> None:
    fmt, _, made = parts
    model = rooms.causal("llama", seed=1)
    batch = pack(made[::-1], device=torch.device("cpu"))
    wanted = frozenset(r.id for n, r in enumerate(made) if n % 4)
    plain, shared = (
        rooms.teacher(model, rooms.told_more(), fmt, share_prompts=share).evidence(made).read(
            batch, Want(resolution, wanted)
        )
        for share in (False, True)
    )  # fmt: skip
    assert plain is not None and shared is not None and torch.equal(plain.valid_T, shared.valid_T)
    ours, theirs = (rows.logprobs_T if resolution == "sampled" else rows.hidden_TD for rows in (shared, plain))
    assert ours is not None and theirs is not None and not torch.equal(ours, theirs), "two ways were taken"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
