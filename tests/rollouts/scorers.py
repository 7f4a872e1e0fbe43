"""A scorer with prompts of its own, as `opd.rollouts.scorer.WritingScorer` describes it, around a tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from opd.models.causal import CausalLM
from opd.text.agreement import Agreement
from opd.types import Row


@dataclass
class Scorer:
    """It reads `prefix` before what the student reads, and more of it where the row's number is odd."""

    net: CausalLM
    prompts: dict[str, np.ndarray]
    end_map: tuple[tuple[int, int], ...] = ()
    prefix: tuple[int, ...] = (9, 8, 7)
    end_ids: tuple[int, ...] = ()
    name: str = "teacher"
    temperature: float = 1.0
    log: list[str] = field(default_factory=list)

    @property
    def model(self) -> CausalLM:
        assert self.log and self.log[-1] == "fetch", "the model was read while it was away"
        return self.net

    @property
    def agreement(self) -> Agreement:
        return Agreement(vocab_size=self.net.vocab_size, end_map=self.end_map)

    @property
    def format(self) -> Any:
        return SimpleNamespace(prompt_ids=self.prompt_ids, end_ids=self.end_ids)

    def prompt_ids(self, row: Row) -> np.ndarray:
        times = 1 + int(row.id.rpartition("/")[2]) % 2
        return np.concatenate([np.array(self.prefix * times, dtype=np.int64), self.prompts[row.id]])

    def fetch(self) -> None:
        self.log.append("fetch")

    def release(self) -> None:
        self.log.append("release")


def scorer_for(net: CausalLM, asked, **settings) -> Scorer:
    return Scorer(net, {prompt.id: prompt.ids for prompt in asked}, **settings)
