"""Scorers that follow the student: an average of its weights, or a copy from some steps ago."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.models.copies import copied_tensors, copy_of, trained_tensors


class Moving:
    """Keeps a copy of a student's weights up to date, and in the checkpoint.

    ema    after every step: copy <- copy + rate (student - copy), float32. The first copy is the untrained student.
    past   the student after steps 0, every, 2 every, ...

    `model` is the copy; of a student with an adapter only A and B are copied, and averaged each by itself.
    """

    def __init__(
        self, name: str, student: CausalLM, *, kind: Literal["ema", "past"], rate: float = 1.0, every: int = 1
    ) -> None:
        self.name = name
        self.kind: Literal["ema", "past"] = kind
        self.model = copy_of(student)
        self._student, self._rate, self._every = student, rate, every

    @torch.no_grad()
    def after_update(self, step: int, *, applied: bool = True) -> None:
        """After `step` steps are done, of which the last changed the student, or did not.

        A past copy is renewed by the number of steps alone; an average takes only what was applied.
        """
        if not applied if self.kind == "ema" else step % self._every:
            return
        rate = self._rate if self.kind == "ema" else 1.0
        now = trained_tensors(self._student)
        for name, tensor in copied_tensors(self.model, now).items():
            student = now[name].to(tensor.device, tensor.dtype)
            if rate == 1.0:
                tensor.copy_(student)
            else:
                tensor.lerp_(student, rate)

    @property
    def state_bytes(self) -> int:
        """Size of the file."""
        return sum(4 * tensor.numel() for tensor in trained_tensors(self._student).values()) + 2**16

    def save(self, folder: Path) -> None:
        """Writes `scorer_NAME.safetensors`."""
        tensors = copied_tensors(self.model, trained_tensors(self._student))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(folder))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Puts the copy where `save` left it; ModelError when the file is missing or of another student."""
        file = self._file(folder)
        if not file.is_file():
            raise ModelError(f"{folder} holds no weights of the scorer {self.name!r}: it was written by another run")
        saved, own = load_file(file), copied_tensors(self.model, trained_tensors(self._student))
        for name in sorted({*saved, *own}):
            theirs, ours = saved.get(name), own.get(name)
            if theirs is None or ours is None or theirs.shape != ours.shape:
                raise ModelError(f"{file.name} in {folder} was written by another student: {name} does not fit")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def _file(self, folder: Path) -> Path:
        return folder / f"scorer_{self.name}.safetensors"
