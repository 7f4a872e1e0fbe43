"""A teacher in this process: a frozen model that reads the student's answers, response positions only.

The teacher reads the prompt in its own format and the answer's own ids, with end tokens exchanged where the two formats
end differently. Nothing is computed before a micro-batch pulls it, and nothing is kept after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.models.padding import pad
from opd.models.sanity import next_token_logits
from opd.objectives.head import head_logits
from opd.text.agreement import Agreement
from opd.text.formats import PromptFormat
from opd.types import Batch, Head, Prompt, Resolution, Rollout, ScorerRows


class LocalTeacher:
    """Implements `opd.protocols.Teacher`.

    temperature   divides the teacher's logits before the softmax (objective.teacher_temperature).
    offload       "cpu" keeps the weights in host memory between updates.
    """

    def __init__(
        self,
        model: CausalLM,
        fmt: PromptFormat,
        agreement: Agreement,
        *,
        name: str,
        temperature: float,
        chunk_tokens: int,
        offload: Literal["none", "cpu"] = "none",
    ) -> None:
        self.name = name
        self.model = model
        self.format = fmt
        self.agreement = agreement
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.fingerprint = self.fingerprint_now()
        self._home = model.device
        self._offload = offload == "cpu" and self._home.type != "cpu"
        self._copied: Head | None = None
        self._order_V = _order(agreement, self._home)
        self.release()

    def fingerprint_now(self) -> str:
        """Of weights, tokenizer, template and temperature as they are at this moment."""
        return f"{self.model.fingerprint()}-{self.format.fingerprint[:8]}-T{self.temperature:g}"

    def evidence(self, rollouts_N: Sequence[Rollout]) -> LocalEvidence:
        """A lazy handle on what this teacher thinks of these rollouts."""
        self.fetch()
        return LocalEvidence(self, {r.prompt.id: r.prompt for r in rollouts_N})

    def fetch(self) -> None:
        """Comes to its device, until `release`."""
        self.model.module.to(self._home)

    def release(self) -> None:
        """Leaves the device, when it was asked to."""
        if self._offload:
            self.model.module.to("cpu")

    @property
    def head(self) -> Head:
        """The output layer over the student's vocabulary, end tokens exchanged."""
        head = self.model.head
        return Head(head.weight_VD, head.vocab_size, head.bias_V, head.scale, head.softcap, self._order_V)

    def head_on(self, device: torch.device) -> Head:
        """The head where the student's tiles are made; copied once when that is another device."""
        head = self.head
        if device == head.weight_VD.device:
            return head
        if self._copied is None or self._copied.weight_VD.device != device:
            moved = [None if x is None else x.to(device) for x in (head.weight_VD, head.bias_V, head.order_V)]
            assert moved[0] is not None
            self._copied = Head(moved[0], head.vocab_size, moved[1], head.scale, head.softcap, moved[2])
        return self._copied

    @torch.no_grad()
    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ModelError when the teacher is NaN or knows nothing: caught before anything expensive starts."""
        self.fetch()
        logits_NV = next_token_logits(self.model, self.head, [self.format.prompt_ids(p.row) for p in prompts])
        self.release()
        logq_NV = torch.log_softmax(logits_NV / self.temperature, -1)
        entropy = -(logq_NV.exp() * logq_NV).sum(-1).mean().item()
        highest = math.log(self.head.vocab_size)
        if entropy > 0.999 * highest:
            raise ModelError(
                f"{self.model.name} is uniform: the entropy of its next token is {entropy:.3f} nats of at most "
                f"{highest:.3f} on your first prompts. Its weights were probably not loaded; there is nothing to learn."
            )


class LocalEvidence:
    """Evidence of a local teacher on one step's rollouts."""

    def __init__(self, teacher: LocalTeacher, prompts: dict[str, Prompt]) -> None:
        self._teacher = teacher
        self._prompt_ids: dict[str, NDArray[np.int64]] = {
            key: teacher.format.prompt_ids(prompt.row) for key, prompt in prompts.items()
        }

    @torch.no_grad()
    def pull(self, batch: Batch, resolution: Resolution) -> dict[str, ScorerRows]:
        """One forward pass over the micro-batch; "sampled" keeps a number per token, "full" the hidden states."""
        teacher = self._teacher
        model, device = teacher.model, teacher.model.device
        prompts = [self._prompt_ids[r.prompt.id] for r in batch.rollouts]
        answers = [teacher.agreement.teacher_ids(r.response_ids) for r in batch.rollouts]
        ids_NS, attention_NS, positions_NS = pad(
            [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)], device=device
        )
        first_N = np.array([len(p) - 1 for p in prompts])
        columns = [np.arange(f, f + len(a)) for f, a in zip(first_N, answers, strict=True)]
        rows = [np.full(len(a), n) for n, a in enumerate(answers)]
        row_T, column_T = (torch.from_numpy(np.concatenate(x)).to(device) for x in (rows, columns))
        hidden_TD = model.hidden(ids_NS, attention_NS, positions_NS)[row_T, column_T]
        target = batch.token_T.device
        if resolution == "full":
            finite_T = torch.isfinite(hidden_TD).all(-1)
            scored = ScorerRows(
                name=teacher.name,
                valid_T=finite_T.to(target),
                temperature=teacher.temperature,
                hidden_TD=hidden_TD.to(target),
                head=teacher.head_on(target),
            )
        else:
            logprobs_T = self._sampled(hidden_TD, batch.token_T.to(device)).to(target)
            finite_T = torch.isfinite(logprobs_T)
            scored = ScorerRows(
                name=teacher.name, valid_T=finite_T, temperature=teacher.temperature, logprobs_T=logprobs_T
            )
        return {teacher.name: scored}

    def release(self) -> None:
        self._teacher.release()

    def _sampled(self, hidden_TD: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
        """float32 [T]: the teacher's log-probability of every drawn token, a chunk of logits at a time."""
        teacher = self._teacher
        pieces = []
        for hidden_CD, token_C in zip(
            hidden_TD.split(teacher.chunk_tokens), token_T.split(teacher.chunk_tokens), strict=True
        ):
            logits_CV = head_logits(hidden_CD, teacher.head) / teacher.temperature
            pieces.append(logits_CV.gather(1, token_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
        return torch.cat(pieces)


def _order(agreement: Agreement, device: torch.device) -> torch.Tensor | None:
    order = agreement.order()
    return None if order is None else torch.from_numpy(order).to(device)
