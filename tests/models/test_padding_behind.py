"""Right-padded answers without a mask, as devices read them: the states are those that a mask gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd.models import answer_states as module
from opd.models.causal import CausalLM
from tests import rooms, tiny

LENGTHS = ((9, 5), (3, 11), (12, 1), (1, 20))  # of prompt and answer; windows of the tiny models are 8


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_padding_behind_needs_no_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = rooms.causal(kind), np.random.default_rng(0)
    prompts, answers = zip(*[[rng.integers(0, 300, n) for n in pair] for pair in LENGTHS], strict=True)
    masks, hidden = [], CausalLM.hidden

    def seen(self, ids_NS, attention_NS, positions_NS, *more):
        masks.append(attention_NS)
        return hidden(self, ids_NS, attention_NS, positions_NS, *more)

    monkeypatch.setattr(CausalLM, "hidden", seen)
    with torch.no_grad():
        expected = module.answer_states(model, prompts, answers, share=False)
        monkeypatch.setattr(module, "free_to_look", lambda device: False)
        ours = module.answer_states(model, prompts, answers, share=False)
        padded_left = module.answer_states(model, prompts, answers, share=False, side="left")
    assert [mask is None for mask in masks] == [False, True, False]
    assert rooms.distance(expected.double(), ours.double()) < 1e-5
    assert rooms.distance(expected.double(), padded_left.double()) < 1e-5
