"""A student with an adapter writes with it: every matrix of it, on every path, at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd.config.schema import Lora
from opd.models.adapters import adapter_off_view, add_adapter
from opd.models.causal import CausalLM
from opd.models.weights import ModuleWeights
from opd.rollouts.decoding import disagreement
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.generic import GenericDecoder
from opd.rollouts.lean import LeanDecoder
from opd.rollouts.lean_weights import Linear
from opd.types import SamplingParams
from tests import tiny
from tests.models.adapted import adapted, move
from tests.rollouts.reference import prompts, recomputed

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

LEAN_KINDS = ["qwen3", "llama", "mistral", "olmo2", "gemma3"]
PARAMS = SamplingParams(max_tokens=4)


def written(engine: EmbeddedEngine) -> list[np.ndarray]:
    return [rollout.behaviour_logprobs for rollout in engine.generate(prompts(4, 7), PARAMS, tag="t")]


@pytest.mark.parametrize(
    ("path", "kind"), [("lean", "qwen3"), ("generic", "qwen3"), ("generic", "gpt2"), ("generic", "qwen3_moe")]
)
def test_W_01_every_matrix_of_the_adapter_reaches_the_sampler(path, kind: str) -> None:
    """Each A and each B is moved alone: the log-probabilities of what is written are those of the module, and others
    than before."""
    student = adapted(kind)
    engine = EmbeddedEngine(student, seed=0, slots=4, path=path)
    before = written(engine)
    matrices = [p for p in student.module.parameters() if p.requires_grad]
    assert len(matrices) == 2 * len(student.adapter.layers)  # type: ignore[union-attr]
    for version, matrix in enumerate(matrices, 1):
        kept = matrix.detach().clone()
        with torch.no_grad():
            matrix += 0.5 * torch.randn_like(matrix)
        engine.load(ModuleWeights(student.module, version))
        made = engine.generate(prompts(4, 7), PARAMS, tag="t")
        for rollout, old in zip(made, before, strict=True):
            np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(student, rollout, PARAMS), atol=1e-4)
            assert rollout.policy_version == version and not np.array_equal(rollout.behaviour_logprobs, old)
        with torch.no_grad():
            matrix.copy_(kept)
    assert all(np.array_equal(a, b) for a, b in zip(written(engine), before, strict=True))


@pytest.mark.parametrize("kind", LEAN_KINDS)
@pytest.mark.parametrize("targets", [(), ("v_proj", "gate_proj"), ("o_proj",)], ids=["all", "some", "one"])
def test_the_lean_decoder_adds_the_adapter_of_whichever_layers_have_one(kind: str, targets: tuple[str, ...]) -> None:
    student = adapted(kind, targets=targets)
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    assert disagreement(LeanDecoder(student, slots=3, capacity=40), student) < 1e-5
    view = adapter_off_view(student)
    assert disagreement(LeanDecoder(view, slots=3, capacity=40), view) < 1e-5
    assert disagreement(LeanDecoder(view, slots=3, capacity=40), student) > 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in student.module.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_the_lean_decoder_computes_an_adapter_in_bfloat16_like_autocast(kind: str) -> None:
    student = CausalLM(
        tiny.model(kind, scale=1.0).to(torch.bfloat16), vocab_size=300, compute_dtype=torch.bfloat16, name=kind
    )
    torch.manual_seed(1)
    add_adapter(student, Lora(rank=4, alpha=4), base="base")
    move(student)
    for decoder in (LeanDecoder(student, slots=3, capacity=40), GenericDecoder(student)):
        assert disagreement(decoder, student) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_W_01_an_update_smaller_than_the_steps_of_the_weights_arrives(dtype: torch.dtype) -> None:
    """Steps of bfloat16 are 0.008 at 1: added to such weights, an update of 0.001 is rounded away, and the sampler
    stays the student of before while the learner is another."""
    signs_I = torch.tensor([1.0, -1.0]).repeat(128)
    weight_OI, bias_O = torch.ones(2, 256, dtype=dtype), torch.zeros(2, dtype=dtype)
    project = Linear(weight_OI, bias_O, (signs_I[None], torch.full((2, 1), 1e-3)))
    torch.testing.assert_close(project(signs_I[None].to(dtype)).float(), torch.full((1, 2), 0.256), rtol=1e-2, atol=0)
    assert torch.equal(weight_OI, torch.ones_like(weight_OI)), "the module's own weight must not change"
