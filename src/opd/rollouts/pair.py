"""Two models that write one answer together: each reads its own prompt, then both read every token that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import ModelError
from opd.rollouts.joint import Joint
from opd.rollouts.writing import Decoder
from opd.types import SamplingParams


@dataclass(frozen=True)
class PromptPair:
    """One row as each model reads it, int64 [T]; as long as the longer one."""

    student: NDArray[np.int64]
    teacher: NDArray[np.int64]

    def __len__(self) -> int:
        return max(len(self.student), len(self.teacher))


class PairDecoder:
    """A `Decoder` whose "logits" are the logarithm of what student and teacher draw from together.

    The two keep caches of their own, on devices of their own; rows come, go and move in both alike. Tokens are the
    student's; the law of the next one is made on the student's device.

    joint     from both models' logits to the probabilities of the next token.
    params    how each model's own distribution is made of its logits.
    order_V   int64 [V] on the host: the teacher's id for each of the student's tokens; None: the same.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        joint: Joint,
        params: SamplingParams,
        *,
        order_V: NDArray[np.int64] | None,
        teacher_device: torch.device,
        teacher_name: str,
    ) -> None:
        self.joins = student.joins and teacher.joins
        self.pads = student.pads and teacher.pads
        self._student, self._teacher = student, teacher
        self._joint, self._params = joint, params
        self._device, self._name = teacher_device, teacher_name
        self._order_V = None if order_V is None else torch.from_numpy(order_V).to(teacher_device)

    def prefill_size(self, lengths: Sequence[int]) -> int:
        """One at a time where either side reads only prompts of one length together: prompts that are of one length
        for one model need not be so for the other."""
        if not self.pads:
            return 1
        return min(self._student.prefill_size(lengths), self._teacher.prefill_size(lengths))

    def prefill(self, prompts: Sequence[PromptPair]) -> tuple[Any, Tensor]:
        ours, student_PV = self._student.prefill([pair.student for pair in prompts])
        theirs, teacher_PV = self._teacher.prefill([pair.teacher for pair in prompts])
        return (ours, theirs), self._together(student_PV, teacher_PV)

    def join(self, prefilled: Any, prompt_n: list[int]) -> None:
        ours, theirs = prefilled
        self._student.join(ours, prompt_n)
        self._teacher.join(theirs, prompt_n)

    def step(self, token_N: Tensor) -> Tensor:
        read_N = token_N.to(self._device)
        if self._order_V is not None:
            read_N = self._order_V[read_N]
        return self._together(self._student.step(token_N), self._teacher.step(read_N))

    def keep(self, row_n: list[int]) -> None:
        self._student.keep(row_n)
        self._teacher.keep(row_n)

    def _together(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        """float32 [N, V]: log-probabilities of the next token. NaN of the student's are left to the drawing, which
        knows the place; the teacher's are told here, so that the right model is named."""
        if not bool(torch.isfinite(teacher_NV.amax(-1)).all()):
            raise ModelError(
                f"the logits of scorer {self._name} are not finite while it writes together with the student. Its "
                "weights are broken, or its dtype overflows."
            )
        if self._order_V is not None:
            teacher_NV = teacher_NV[:, self._order_V]
        return self._joint(student_NV, teacher_NV.to(student_NV.device), self._params).log()
