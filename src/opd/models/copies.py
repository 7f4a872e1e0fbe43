"""A student's weights of another time, as a model that is only read: before training, averaged, or some steps old."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from opd.models.adapters import LowRank, Within
from opd.models.causal import CausalLM, digest


def copy_of(student: CausalLM) -> CausalLM:
    """A frozen copy that shares nothing with what is trained: of the whole module, float32, or of the adapter alone
    where the rest stays as it is."""
    if student.adapter is not None:
        return AdapterCopy(student)
    module = copy.deepcopy(student.module)
    module.requires_grad_(False)
    return CausalLM(
        module, vocab_size=student.vocab_size, compute_dtype=student.compute_dtype, name=f"{student.name} (copy)"
    )


def trained_tensors(student: CausalLM) -> dict[str, Tensor]:
    """What training changes, by name, live."""
    return {name: p.detach() for name, p in student.module.named_parameters() if p.requires_grad}


def copied_tensors(copied: CausalLM, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors of a copy, live, where the copy has them now."""
    if isinstance(copied, AdapterCopy):
        return {name: copied.own[name] for name in names}
    own = dict(copied.module.named_parameters())
    return {name: own[name].detach() for name in names}


class AdapterCopy(CausalLM):
    """A student with an adapter of another time: the same frozen parameters, and A and B of its own.

    own   name to A or B, float32. They stand in the place of the student's for every call.
    """

    def __init__(self, student: CausalLM) -> None:
        assert student.adapter is not None, f"{student.name} has no adapter"
        self._student = student
        self._module = student.module
        self._places = {name: p for name, p in student.module.named_parameters() if p.requires_grad}
        self.own = {name: p.detach().clone() for name, p in self._places.items()}
        super().__init__(
            Within(student.module, self.in_place),  # pyright: ignore[reportArgumentType]
            vocab_size=student.vocab_size,
            compute_dtype=student.compute_dtype,
            name=f"{student.name} (copy of its adapter)",
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The student with this adapter, for a while; undone when something raises. Graphs that were made before keep
        the tensors that they were made with."""
        theirs = {name: p.data for name, p in self._places.items()}
        try:
            for name, parameter in self._places.items():
                parameter.data = self.own[name]
            yield
        finally:
            for name, parameter in self._places.items():
                parameter.data = theirs[name]

    @torch.no_grad()
    def hidden(
        self, ids_NS: Tensor, attention_NS: Tensor | None, positions_NS: Tensor | None, cache: Any = None
    ) -> Tensor:
        with self.in_place():
            return super().hidden(ids_NS, attention_NS, positions_NS, cache)

    def autocast(self) -> AbstractContextManager[Any]:
        return self._student.autocast()

    @property
    def architecture(self) -> type:
        return type(self._module)

    @property
    def trainable_count(self) -> int:
        return 0

    def linear_parts(self, layer: Any) -> tuple[Any, LowRank | None]:
        with self.in_place():
            return self._student.linear_parts(layer)

    def fingerprint(self) -> str:
        with self.in_place():
            return digest(self._module.state_dict())
