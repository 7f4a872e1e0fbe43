"""The learner against the exact oracle: a tiny model with an end token whose every answer is enumerated in float64.

The declared objective at discount 0 is J = sum_t E_{s_t} D(q(.|s_t) || p(.|s_t)) with the distribution of states held
fixed. The learner's expected gradient over all answers must be the gradient of J, for the full-vocabulary terms and for
the sampled ones alike; both models are real transformers models that run through the real learner.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opd.models.causal import CausalLM
from opd.teachers.local import LocalTeacher
from opd.text.agreement import Agreement
from opd.types import Prompt, Row
from tests import rooms, tiny

V, END, LONGEST = 5, 2, 3


def models(kind: str):
    """Student and teacher with five tokens; token 2 ends an answer."""
    made = []
    for seed in (0, 1):
        module = tiny.model(kind, vocab_size=8, seed=seed, scale=6.0).double()
        made.append(CausalLM(module, vocab_size=V, compute_dtype=torch.float64, name="tiny"))
    return made


def answers() -> list[tuple[int, ...]]:
    """Every answer: ends with END, or is cut at LONGEST tokens."""
    words = [v for v in range(V) if v != END]
    ended = [(*w, END) for n in range(LONGEST) for w in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=LONGEST))


class BareFormat:
    """Prompt ids handed through: the oracle needs no text."""

    fingerprint = "oracle-format"
    tokenizer = SimpleNamespace(vocab_size=V)

    def __init__(self, ids):
        self.ids = ids

    def prompt_ids(self, row):
        return self.ids


def log_probs(model, prompt: np.ndarray, answer: tuple[int, ...]) -> torch.Tensor:
    """float64 [T, V]: log p(. | state) before each answer token, by the transformers model itself."""
    ids = torch.tensor([[*prompt.tolist(), *answer]])
    logits = model.module(input_ids=ids).logits[0, len(prompt) - 1 : -1, :V]
    return torch.log_softmax(logits, -1)


def divergence(name: str, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """[T]: the local divergence at each state, written from its definition."""
    p, q = logp.exp(), logq.exp()
    if name in ("reverse_kl", "tml"):
        return (p * (logp - logq)).sum(-1)
    if name == "forward_kl":
        return (q * (logq - logp)).sum(-1)
    m = 0.3 * q + 0.7 * p
    return (0.3 * q * (logq - m.log()) + 0.7 * p * (logp - m.log())).sum(-1)


OBJECTIVES = {
    "reverse_kl": {"preset": "reverse_kl"},
    "forward_kl": {"preset": "forward_kl"},
    "jsd": {"preset": "jsd", "parameters": {"beta": 0.3}},
    "tml": {"preset": "tml"},
    "sampled_forward": {
        "behaviour": "student",
        "terms": [{"name": "f", "support": "sampled", "shape": {"kind": "forward_kl"}}],
    },
}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_O_01_O_02_expected_gradient_is_the_exact_local_field(name: str, kind: str) -> None:
    student, other = models(kind)
    prompt = Prompt(row=Row(id="x", domain="x", prompt="x"), ids=np.array([1, 3], dtype=np.int64))
    teacher = LocalTeacher(
        other,
        BareFormat(prompt.ids),
        Agreement(vocab_size=V),
        name="teacher",
        temperature=1.0,
        chunk_tokens=4,
        share_prompts=True,
    )
    exact = expected = torch.zeros(())
    total = 0.0
    for answer in answers():
        logp = log_probs(student, prompt.ids, answer)
        with torch.no_grad():
            logq = log_probs(other, prompt.ids, answer)
        drawn = logp.detach().gather(1, torch.tensor(answer)[:, None])[:, 0]
        chance = drawn.sum().exp().item()
        total += chance
        student.module.zero_grad()
        which = "forward_kl" if name == "sampled_forward" else name
        divergence(which, logp, logq).sum().backward()
        exact = exact + chance * rooms.gradient(student)

        learner = rooms.learner(student, OBJECTIVES[name])
        made = [rooms.answer(prompt, answer, drawn.tolist())]
        learner.gradients(made, teacher.evidence(made))
        expected = expected + chance * len(answer) * rooms.gradient(student)  # the mean over tokens, undone
    assert total == pytest.approx(1.0, abs=1e-12)
    # Weights and behaviour log-probabilities travel as float32; everything else is float64.
    assert rooms.distance(exact, expected) < 2e-7
