"""The states that predict answers are the same whether a prompt is read once or for each of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from opd.config.schema import Lora
from opd.models import answer_states as room
from opd.models.adapters import adapter_off_view, add_adapter
from opd.models.answer_states import answer_states, can_share
from opd.models.causal import CausalLM
from opd.models.copies import copy_of
from opd.models.families import Padded, families
from tests import rooms, tiny

SHARING = set(tiny.KINDS) - {"qwen3_next"}  # linear attention has no keys and values to read again
PROMPTS = (20, 13, 17)  # longer than the sliding windows of the tiny models
ANSWERS = ((0, 5), (1, 7), (0, 12), (0, 1), (2, 0), (2, 6), (0, 2), (2, 1))  # prompt, tokens


def sequences(answers: Sequence[tuple[int, int]] = ANSWERS, seed: int = 0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 290, length) for length in PROMPTS]
    return [prompts[p].copy() for p, _ in answers], [rng.integers(1, 290, length) for _, length in answers]


def read(model: CausalLM, *, share: bool, answers: Sequence[tuple[int, int]] = ANSWERS, side: room.Side = "right"):
    """States, and the gradient of a mean of random directions of them."""
    model.module.zero_grad()
    states_TD = answer_states(model, *sequences(answers), share=share, side=side)
    weight_TD = torch.from_numpy(np.random.default_rng(1).normal(size=states_TD.shape)).to(states_TD)
    (states_TD * weight_TD).mean().backward()
    return states_TD.detach(), rooms.gradient(model)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of every rectangle that goes through a body."""
    found: list[tuple[int, ...]] = []
    hidden = CausalLM.hidden

    def noted(self, ids_NS, *more):
        found.append(tuple(ids_NS.shape))
        return hidden(self, ids_NS, *more)

    monkeypatch.setattr(CausalLM, "hidden", noted)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_states_and_gradients_are_those_of_the_plain_rectangle(kind: str, side, passes) -> None:
    """Ragged families of three sizes, answers of one token and of none; windows shorter than the prompts."""
    model = rooms.causal(kind)
    assert can_share(model) == (kind in SHARING)
    passes.clear()
    plain_TD, plain = read(model, share=False, side=side)
    assert passes == [(8, 32)]
    shared_TD, shared = read(model, share=True, side=side)
    if kind in SHARING:
        assert passes[1:] == [(3, 20), (5, 11)], "prompts, and the answers of more than one token without their last"
    else:
        held = Padded.of([PROMPTS[p] for p, _ in ANSWERS], [a for _, a in ANSWERS], 3).held
        assert len(passes) > 2 and all(rows * width <= held for rows, width in passes[1:]), "in pieces"
    assert plain_TD.shape == shared_TD.shape == (sum(a for _, a in ANSWERS), 32)
    torch.testing.assert_close(shared_TD, plain_TD, rtol=1e-5, atol=1e-5)
    assert rooms.distance(plain, shared) < 1e-5


def test_in_float64_the_gradients_agree_to_rounding() -> None:
    model = rooms.causal("gpt2", dtype=torch.float64)
    (_, plain), (_, shared) = read(model, share=False), read(model, share=True)
    assert rooms.distance(plain, shared) < 1e-9


def test_in_bfloat16_they_are_as_near_as_its_digits() -> None:
    model = rooms.causal("llama", dtype=torch.bfloat16)
    assert can_share(model)
    (plain_TD, _), (shared_TD, _) = read(model, share=False), read(model, share=True)
    assert shared_TD.dtype == torch.bfloat16
    torch.testing.assert_close(shared_TD, plain_TD, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("answers", [((0, 1),) * 4, ((0, 1),) * 3 + ((1, 0),) * 3], ids=["one token", "one or none"])
def test_answers_of_one_token_need_the_prompt_alone(answers, passes) -> None:
    model = rooms.causal()
    can_share(model)
    passes.clear()
    shared_TD, shared = read(model, share=True, answers=answers)
    assert len(passes) == 1 and passes[0][0] == len({p for p, _ in answers})
    plain_TD, plain = read(model, share=False, answers=answers)
    torch.testing.assert_close(shared_TD, plain_TD, rtol=1e-5, atol=1e-5)
    assert rooms.distance(plain, shared) < 1e-5


@pytest.mark.parametrize(
    "answers",
    [((0, 5), (1, 5), (2, 5)), ((0, 90), (0, 90)), ((0, 3), (0, 2), (1, 100))],
    ids=["families of one", "answers much longer than the prompt", "one answer much longer"],
)
def test_where_it_saves_less_than_a_quarter_the_rectangle_stays(answers, passes) -> None:
    model = rooms.causal()
    passes.clear()
    plain_TD, _ = read(model, share=False, answers=answers)
    shared_TD, _ = read(model, share=True, answers=answers)
    assert passes[0] == passes[1] and len(passes) == 2
    assert torch.equal(plain_TD, shared_TD)


def test_of_answers_without_a_token_there_are_no_states() -> None:
    states_TD = answer_states(rooms.causal(), *sequences(((0, 0), (0, 0))), share=True)
    assert states_TD.shape == (0, 32)


def test_a_prompt_is_known_by_its_ids() -> None:
    prompts = [np.array(ids, dtype=np.int64) for ids in ([1, 2], [3], [1, 2], [1], [3])]
    family_N, firsts = families(prompts)
    assert family_N.tolist() == [0, 1, 0, 2, 1] and firsts == [0, 1, 3]


def test_what_a_trial_cannot_repeat_is_not_shared(monkeypatch) -> None:
    """A body that does not look at the cache, and one that fails on it."""
    hidden = CausalLM.hidden

    def forgets(self, ids_NS, attention_NS, positions_NS, cache=None):
        return hidden(self, ids_NS, attention_NS[:, -ids_NS.shape[1] :], positions_NS)

    def fails(self, ids_NS, attention_NS, positions_NS, cache=None):
        if cache is not None:
            raise TypeError("a cache of another kind is needed")
        return hidden(self, ids_NS, attention_NS, positions_NS)

    for wrong in (forgets, fails):
        model = rooms.causal()
        monkeypatch.setattr(CausalLM, "hidden", wrong)
        plain_TD, _ = read(model, share=False)
        shared_TD, _ = read(model, share=True)
        assert not can_share(model)
        torch.testing.assert_close(plain_TD, shared_TD, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_it_is_tried_once_and_running_out_of_memory_is_no_answer(monkeypatch) -> None:
    model, tried = rooms.causal(), []

    def full(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(room, "_plain", full)
    with pytest.raises(torch.OutOfMemoryError):
        can_share(model)
    monkeypatch.undo()
    monkeypatch.setattr(room, "_same_states", lambda model: bool(tried.append(1)) or True)
    assert can_share(model) and can_share(model) and len(tried) == 2


def test_recomputed_layers_keep_no_cache_and_read_plainly() -> None:
    model = rooms.causal()
    assert can_share(model)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model.module, name) for name in names if hasattr(model.module, name))()
    assert not can_share(model)
    _, recomputed = read(model, share=True)
    assert rooms.distance(recomputed, read(rooms.causal(), share=False)[1]) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_an_adapter_is_trained_alike_and_its_views_read_alike(kind: str) -> None:
    student = rooms.causal(kind)
    add_adapter(student, Lora(rank=4), base="base")
    with torch.no_grad():
        for name, p in student.module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    (plain_TD, plain), (shared_TD, shared) = read(student, share=False), read(student, share=True)
    assert can_share(student) and plain.norm() > 0
    torch.testing.assert_close(shared_TD, plain_TD, rtol=1e-5, atol=1e-5)
    assert rooms.distance(plain, shared) < 1e-5
    for view in (adapter_off_view(student), copy_of(student)):
        with torch.no_grad():
            plain_TD, shared_TD = (answer_states(view, *sequences(), share=share) for share in (False, True))
        assert can_share(view)
        torch.testing.assert_close(shared_TD, plain_TD, rtol=1e-5, atol=1e-5)
