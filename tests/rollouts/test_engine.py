import copy

import numpy as np
import pytest
import torch

from opd.errors import BadInput, ModelError
from opd.models.weights import ModuleWeights
from opd.protocols import Sampler
from opd.rollouts.engine import EmbeddedEngine
from opd.types import Rollout, SamplingParams
from tests import tiny
from tests.rollouts.reference import VOCAB, assert_chi_square, causal, distribution, prompts, recomputed

# an engine that falls back to a slower way says so with a warning: here nothing may fall back
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

LEAN_KINDS = ["qwen3", "llama", "mistral", "olmo2", "gemma3"]
WRITERS = [("lean", kind) for kind in LEAN_KINDS] + [("generic", kind) for kind in tiny.KINDS]
STOPS = (2, 7, 11, 13, 17, 19, 23)
LENGTHS = (5, 14, 5, 3, 12)


def _write(model, path: str, params: SamplingParams, asked, *, slots: int = 7, seed: int = 1) -> list[Rollout]:
    return EmbeddedEngine(model, seed=seed, slots=slots, path=path).generate(asked, params, tag="t")  # type: ignore[arg-type]


def _assert_same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    assert [r.id for r in ours] == [r.id for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.behaviour_logprobs, other.behaviour_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "kind"), WRITERS)
def test_T_07_recorded_log_probabilities_are_those_of_a_full_forward_pass(path, kind):
    """Temperature and cuts included; windows of 8 are left behind, slots refilled and prompts shared on the way."""
    model = causal(kind)
    for params in (
        SamplingParams(max_tokens=20, temperature=0.7, top_p=0.8, stop_ids=STOPS, samples_per_prompt=2),
        SamplingParams(max_tokens=6, temperature=1.4, top_k=20, samples_per_prompt=2),
        SamplingParams(max_tokens=6, top_p=0.9, top_k=15),
    ):
        rollouts = _write(model, path, params, prompts(*LENGTHS))
        for rollout in rollouts:
            exact_T = recomputed(model, rollout, params)
            np.testing.assert_allclose(rollout.behaviour_logprobs, exact_T, atol=1e-4)
    assert len({r.response_ids.tobytes() for r in rollouts}) > 1


@pytest.mark.parametrize(
    ("path", "kind"), [("lean", "qwen3"), ("lean", "mistral"), ("generic", "qwen3_next"), ("generic", "gpt2")]
)
def test_slots_shared_prefill_and_the_order_of_prompts_change_nothing(path, kind):
    model, params = causal(kind), SamplingParams(max_tokens=14, stop_ids=STOPS, samples_per_prompt=3)
    asked = prompts(5, 9, 5, 14)
    wide = _write(model, path, params, asked, slots=64)
    assert len({len(r.response_ids) for r in wide}) >= 3  # rows leave at different times
    for slots in (1, 3):
        _assert_same(_write(model, path, params, asked, slots=slots), wide)
    turned = _write(model, path, params, asked[::-1], slots=5)
    _assert_same([turned[(3 - p) * 3 + s] for p in range(4) for s in range(3)], wide)
    alone = [r for prompt in asked for r in _write(model, path, params, [prompt], slots=2)]
    _assert_same(alone, wide)


@pytest.mark.parametrize("kind", LEAN_KINDS)
def test_lean_and_generic_write_the_same(kind):
    """Long enough for the lean cache to grow several times."""
    model, params = causal(kind), SamplingParams(max_tokens=80, stop_ids=(2, 7), samples_per_prompt=2)
    _assert_same(_write(model, "lean", params, prompts(3, 17)), _write(model, "generic", params, prompts(3, 17)))


def test_M_11_prompts_of_different_lengths_keep_their_absolute_positions():
    """GPT-2 learns a vector per position: told the wrong one, its logits move."""
    model, params = causal("gpt2"), SamplingParams(max_tokens=8)
    for rollout in _write(model, "generic", params, prompts(2, 21, 40), slots=8):
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_first_tokens_pass_a_chi_square_test(path):
    model, draws = causal(), 6000
    params = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.95, samples_per_prompt=draws)
    asked = prompts(6)
    counts_V = np.bincount([r.response_ids[0] for r in _write(model, path, params, asked, slots=500)], minlength=VOCAB)
    with torch.no_grad():
        logits_V = model.module(torch.from_numpy(asked[0].ids)[None]).logits[0, -1].numpy()
    exact_V = distribution(logits_V, params)
    assert_chi_square(counts_V, exact_V * draws)


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_A_01_padding_rows_of_the_vocabulary_are_never_drawn(path):
    model = causal(vocab_size=200)
    with torch.no_grad():
        model.module.get_output_embeddings().weight[200:] *= 10  # the padding would win nearly always
    params = SamplingParams(max_tokens=10, samples_per_prompt=4)
    for rollout in _write(model, path, params, prompts(4, 8)):
        assert rollout.response_ids.max() < 200
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_temperature_zero_writes_the_arg_max(path):
    model, params = causal(), SamplingParams(max_tokens=6, temperature=0.0)
    for rollout in _write(model, path, params, prompts(4, 9)):
        assert not rollout.behaviour_logprobs.any()
        assert not recomputed(model, rollout, params).any()  # probability 1 for every token


def test_a_rollout_says_how_it_was_made():
    model, asked = causal(), prompts(4, 6)
    params = SamplingParams(max_tokens=12, stop_ids=STOPS, samples_per_prompt=6)
    seen: list[int] = []
    engine = EmbeddedEngine(model, seed=0, slots=5, path="auto", progress=seen.append)
    assert isinstance(engine, Sampler) and engine.path == "lean"
    rollouts = engine.generate(asked, params, tag="train/4")
    assert [r.id for r in rollouts] == [f"train/4/rows/{p}/{s}" for p in range(2) for s in range(6)]
    assert [r.prompt for r in rollouts] == [asked[0]] * 6 + [asked[1]] * 6
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        length = len(r.response_ids)
        ended = [token in STOPS for token in r.response_ids]
        assert not any(ended[:-1])  # the first end token is the last token, and it is there
        assert r.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or length == 12
        assert r.mask.tolist() == [True] * length and r.turns == ((0, length),)
        assert r.behaviour_logprobs.dtype == np.float32 and r.behaviour == "student" and r.policy_version == 0
        assert r.sampling is params
    assert seen == sorted(seen) and seen[-1] == 12
    assert engine.generate([], params, tag="train/5") == []


def test_seed_and_tag_make_other_answers():
    model, params = causal(), SamplingParams(max_tokens=8)
    first, again, other = (_write(model, "auto", params, prompts(5), seed=seed)[0] for seed in (1, 1, 2))
    assert first.response_ids.tolist() == again.response_ids.tolist() != other.response_ids.tolist()


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_W_01_new_weights_are_those_that_write(path):
    """Both ways: the learner changes the shared module, or hands over tensors of its own."""
    model, params = causal(), SamplingParams(max_tokens=8)
    engine = EmbeddedEngine(model, seed=0, slots=4, path=path)
    before = engine.generate(prompts(5, 7), params, tag="t")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.1)
    engine.load(ModuleWeights(model.module, version=1))
    shared = engine.generate(prompts(5, 7), params, tag="t")
    elsewhere = copy.deepcopy(model.module)
    with torch.no_grad():
        for parameter in elsewhere.parameters():
            parameter.mul_(1.1)
    engine.load(ModuleWeights(elsewhere, version=2))
    copied = engine.generate(prompts(5, 7), params, tag="t")
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), elsewhere.parameters(), strict=True))
    for version, rollouts in ((1, shared), (2, copied)):
        assert {r.policy_version for r in rollouts} == {version}
    for rollout in copied:
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)
    assert not np.array_equal(before[0].behaviour_logprobs, shared[0].behaviour_logprobs)


def test_W_01_weights_that_lack_a_tensor_are_not_taken():
    model = causal()
    engine = EmbeddedEngine(model, seed=0, slots=4, path="generic")

    class Partial:
        version = 1

        def tensors(self):
            return {k: v for k, v in model.module.state_dict().items() if "layers.1.mlp" not in k}

    with pytest.raises(AssertionError, match=r"layers\.1\.mlp"):
        engine.load(Partial())


def test_T_11_one_token_at_a_time_also_while_training_recomputes_activations():
    model = causal()
    model.module.activation_checkpointing_enable()
    model.module.train()
    fed: list[int] = []
    engine = EmbeddedEngine(model, seed=0, slots=4, path="generic")
    hook = model.module.get_input_embeddings().register_forward_hook(
        lambda _m, given, _o: fed.append(given[0].shape[1])
    )
    engine.generate(prompts(6), SamplingParams(max_tokens=5), tag="t")
    hook.remove()
    assert fed == [6, 1, 1, 1, 1]
    assert model.module.training


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (prompts(200), ["rows/0", "200", "60", "260", "256"]),
        (prompts(0), ["rows/0", "no tokens"]),
        (prompts(4) * 2, ["rows/0", "twice"]),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(asked, said):
    model = causal("gpt2")
    with pytest.raises(BadInput) as raised:
        _write(model, "auto", SamplingParams(max_tokens=60), asked)
    assert all(word in str(raised.value) for word in said)


def test_logits_that_are_not_finite_are_an_error_with_a_place():
    model = causal()
    engine = EmbeddedEngine(model, seed=0, slots=4, path="auto")
    with torch.no_grad():
        model.module.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ModelError, match="position 0 of rollout t/rows/0/0"):
        engine.generate(prompts(5), SamplingParams(max_tokens=2), tag="t")
