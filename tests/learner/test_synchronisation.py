"""How often a step would make the host wait for its device: a fixed number of times, whatever it is cut into.

There is no device here. Counted are the calls that wait on one: numbers that are read, sizes that hang on values, and
arrays that are sent in any other way than `transfer.onto`. The models' own bodies are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opd.models.answer_states import can_share
from opd.models.causal import CausalLM
from opd.models.packing import plan
from opd.objectives import transfer
from opd.objectives.kernels import block
from tests import rooms
from tests.learner.kinds import KINDS, SPECIAL, gradient, step

# Which tokens these train is only found out on the device: a gate looks at entropies in every block; ratios are in the
# weights of a micro-batch.
GATED = "entropy gate"
RATIOS = {"answer ratio", "answer clip", "anchor", "prefix weights", "outcome, clipped"}

FEW = 7  # of these a step makes: metrics, scores, what is invalid, the norm of the gradient, looks at a whole step
READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
SIZED_BY_VALUES = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts calls by name while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.paused = False
        self._functions = _Functions(self)

    def __enter__(self) -> Waits:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._functions.__exit__(*reason)

    def note(self, name: str) -> None:
        if not self.paused:
            self.found[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in SIZED_BY_VALUES or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self._waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    made, hidden = Waits(), CausalLM.hidden

    def body(self: CausalLM, *inputs: Any, **named: Any) -> torch.Tensor:
        made.paused = True
        try:
            return hidden(self, *inputs, **named)
        finally:
            made.paused = False

    def sent(name: str) -> Any:
        send = getattr(torch, name)

        def counted(*inputs: Any, **named: Any) -> torch.Tensor:
            where = sys._getframe(1).f_globals["__name__"]
            if where.startswith("opd.") and where != transfer.__name__:
                made.note(f"{name} in {where}")
            return send(*inputs, **named)

        return counted

    monkeypatch.setattr(CausalLM, "hidden", body)
    for name in ("from_numpy", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, sent(name))
    monkeypatch.setattr(transfer, "free_to_look", lambda device: False)
    return made


@pytest.fixture(scope="module")
def parts():
    fmt = rooms.prompt_format()
    models = [rooms.causal(kind, seed=n) for n, kind in enumerate(("qwen3", "llama", "gpt2"), 1)]
    names = ("teacher", "reference", "weak")
    for model in models:
        can_share(model)  # tried once in a process
    panel = rooms.panel(*(rooms.teacher(m, fmt, name=name) for name, m in zip(names, models, strict=True)))
    return panel, step(rooms.causal(seed=0), fmt)


def counted(name: str, waits: Waits, parts: Any, *, tokens_per_micro_batch: int, chunk_tokens: int) -> Counter[str]:
    teacher, made = parts
    student = rooms.causal(seed=0)
    can_share(student)  # likewise
    learner = rooms.learner(
        student,
        rooms.objective({"name": "t", **KINDS[name]}),
        special_ids=SPECIAL,
        tokens_per_micro_batch=tokens_per_micro_batch,
        learner={"chunk_tokens": chunk_tokens, "diagnostics_every": 0},
    )
    waits.found.clear()
    with waits:
        learner.update(made, teacher.evidence(made))
    return waits.found.copy()


@pytest.mark.parametrize("name", [name for name in KINDS if name != GATED])
def test_waits_do_not_grow_with_tiles_and_micro_batches(name: str, parts, waits: Waits, monkeypatch) -> None:
    _, made = parts
    assert len(plan(made, 10_000)) == 1 and len(plan(made, 60)) > 4
    assert sum(len(r.response_ids) for r in made) > 5 * 8
    found = []
    for tokens_per_micro_batch, tile in ((10_000, 1024), (10_000, 8), (60, 1024), (60, 8)):
        monkeypatch.setattr(block, "NUMBERS_HOST", 300 * tile)  # tiles and blocks of so many tokens
        found.append(counted(name, waits, parts, tokens_per_micro_batch=tokens_per_micro_batch, chunk_tokens=tile))
    whole, whole_in_tiles, cut, cut_in_tiles = found
    assert whole == whole_in_tiles and cut == cut_in_tiles, found
    more = sum(cut.values()) - sum(whole.values())
    assert 0 < more < len(plan(made, 60)) if name in RATIOS else cut == whole, found
    assert 0 < sum(whole.values()) <= FEW, whole


@pytest.mark.parametrize("name", KINDS)
def test_what_is_done_to_avoid_a_wait_changes_nothing(name: str, parts, waits: Waits, monkeypatch) -> None:
    """The way of a device, on the host: treatments that are only needed for some values are given to all."""
    teacher, made = parts
    student = rooms.causal(seed=0)
    theirs = gradient(student, KINDS[name], made, teacher)
    monkeypatch.setattr(transfer, "free_to_look", lambda device: True)
    assert rooms.distance(theirs, gradient(student, KINDS[name], made, teacher)) < 1e-6
