"""Which layers of a model an adapter stands beside: names and shapes, from a module that may lie on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from opd.errors import ModelError


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, by full name.

    layers   linear layer to (in, out).
    experts  fused weights of a layer's experts, an `nn.Parameter` [experts, ., .], to its shape.
    without  linear layers that peft cannot reach; `opd` says so and leaves them as they are.
    """

    layers: dict[str, tuple[int, int]]
    experts: dict[str, tuple[int, int, int]]
    without: tuple[str, ...]

    def parameters(self, rank: int) -> int:
        """Numbers in the adapter."""
        dense = sum(rank * (a + b) for a, b in self.layers.values())
        return dense + sum(rank * count * (a + b) for count, a, b in self.experts.values())


def find_targets(module: Any, wanted: Sequence[str], *, unreachable: Sequence[str] = (), role: str) -> Targets:
    """The layers that `wanted` names, all linear layers and experts but the output head when it is empty.

    wanted       a layer's full name, or the end of it after a dot: `q_proj`, `mlp.down_proj`.
    unreachable  names of linear layers that cannot have an adapter.

    Raises ModelError for a name that is no layer's, that is the output head's, or whose layers are all unreachable.
    """
    head = module.get_output_embeddings()
    linear = {name: layer for name, layer in module.named_modules() if is_linear(layer)}
    heads = {name for name, layer in linear.items() if layer is head}
    experts = _experts(module)
    names = [name for name in (*linear, *experts) if name not in heads]
    chosen = set(names) if not wanted else set()
    for target in wanted:
        found = {name for name in (*linear, *experts) if _ends(name, target)}
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names if name not in unreachable}))
        if found & heads:
            raise ModelError(
                f"{role}.lora.targets: {target!r} is the output head, which stays frozen: it is shared with the loss, "
                f"and often with the embedding. Choose from {there}."
            )
        if not found:
            raise ModelError(f"{role}.lora.targets: no linear layer of the model is called {target!r}. It has {there}.")
        if found <= set(unreachable):
            raise ModelError(
                f"{role}.lora.targets: peft takes {target!r} of {type(module).__name__} for the name that its experts "
                f"had in older checkpoints, so these layers cannot have an adapter. Choose from {there}."
            )
        chosen |= found
    return Targets(
        layers={name: _shape(linear[name]) for name in names if name in linear and name in chosen - set(unreachable)},
        experts={name: shape for name, shape in experts.items() if name in chosen},
        without=tuple(name for name in unreachable if name in chosen),
    )


def short_names(module: Any, chosen: Sequence[str]) -> list[str]:
    """`q_proj` for all layers of that name where that names the chosen ones and no others; else their full names."""
    last = {name.rpartition(".")[2] for name in chosen}
    named = {name for name, _ in module.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if named == set(chosen) else sorted(chosen)


def is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"  # GPT-2's linear layer


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def _experts(module: Any) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim == 3 and owner.rpartition(".")[2] == "experts":
            count, *sides = parameter.shape
            assert prod(sides), f"{name} is empty"
            found[name] = (count, sides[0], sides[1])
    return found


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
