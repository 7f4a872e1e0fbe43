"""A scorer in this process: a frozen model that reads answers, response positions only.

It reads the prompt in its own format and context, and the answer's own ids, with end tokens exchanged where the two
formats end differently; with another tokenizer than the student's, the answer in its own. Nothing is computed before a
micro-batch pulls it, and nothing is kept after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import ModelError
from opd.models.answer_states import answer_states
from opd.models.causal import CausalLM
from opd.models.sanity import next_token_logits
from opd.objectives.transfer import onto
from opd.teachers.as_read import AsRead, Joint, order, own_logprobs, shared, spread
from opd.teachers.residence import Residence, Resident
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Batch, Head, Prompt, Resolution, Rollout, ScorerRows, Spans, Want


class LocalTeacher:
    """Implements `opd.protocols.Teacher` for one scorer; `opd.teachers.panel` joins several.

    model         a model that stays where it is, or a residence that brings it and lets it go. It is there from the
                  beginning until `check` or `release`.
    temperature   divides its logits before the softmax.
    agreement     with the student's format; a model with another tokenizer is loaded with its own vocabulary.
    chunk_tokens  tokens whose logits exist at the same time where single log-probabilities are asked for.
    share_prompts a prompt of several answers, as this scorer reads it, is read once where that pays.
    """

    def __init__(
        self,
        model: CausalLM | Residence,
        fmt: PromptFormat,
        agreement: Agreement | Crossing,
        *,
        name: str,
        temperature: float,
        chunk_tokens: int,
        share_prompts: bool,
    ) -> None:
        self.name = name
        self.format = fmt
        self.agreement = agreement
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.share_prompts = share_prompts
        self._residence: Residence = Resident(model) if isinstance(model, CausalLM) else model
        first = self._residence.fetch()
        self.vocab_size, self.parameter_count = first.vocab_size, first.parameter_count
        self.fingerprint = self._fingerprint(first)
        self._order_V, self._shared_V = order(agreement), shared(agreement)
        self._there: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        self._copied: tuple[torch.device, Head] | None = None

    @property
    def model(self) -> CausalLM:
        """The model on its device; brings it there, until `release`."""
        return self._residence.fetch()

    def fingerprint_now(self) -> str:
        """Of weights, tokenizer, template, context and temperature as they are at this moment."""
        return self._fingerprint(self.model)

    def _fingerprint(self, model: CausalLM) -> str:
        return f"{model.fingerprint()}-{self.format.fingerprint[:8]}-T{self.temperature:g}"

    @property
    def resolution(self) -> Resolution:
        """Everything can be asked of it."""
        return "full"

    @property
    def most_entries(self) -> int:
        return self.vocab_size

    def evidence(self, rollouts_N: Sequence[Rollout]) -> LocalEvidence:
        """A lazy handle on what this scorer thinks of these rollouts."""
        return LocalEvidence(self, rollouts_N)

    def fetch(self) -> None:
        """Comes to its device, until `release`."""
        self._residence.fetch()

    def release(self) -> None:
        """Leaves the device, when it was asked to."""
        self._copied = None
        self._residence.release()

    @property
    def own_head(self) -> Head:
        """The output layer in the model's own numbering; no gradient reaches it."""
        head = self.model.head
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        return Head(head.weight_VD.detach(), head.vocab_size, bias_V, head.scale, head.softcap)

    def head_on(self, device: torch.device) -> Head:
        """The same over the student's vocabulary, where the student's tiles are made; copied once until `release` when
        that is another device."""
        if self._copied is not None and self._copied[0] == device:
            return self._copied[1]
        own = self.own_head
        if device == own.weight_VD.device:
            return replace(own, order_V=self._on(device)[0])
        bias_V = None if own.bias_V is None else own.bias_V.to(device)
        moved = replace(own, weight_VD=own.weight_VD.to(device), bias_V=bias_V, order_V=self._on(device)[0])
        self._copied = device, moved
        return moved

    def shared_on(self, device: torch.device) -> Tensor | None:
        """`ScorerRows.shared_V` on a device."""
        return self._on(device)[1]

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if device not in self._there:
            order_V, shared_V = self._order_V, self._shared_V
            order_V = None if order_V is None else torch.from_numpy(order_V).to(device)
            self._there[device] = order_V, None if shared_V is None else torch.from_numpy(shared_V).to(device)
        return self._there[device]

    @torch.no_grad()
    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ModelError when the scorer is NaN or knows nothing: caught before anything expensive starts."""
        name = self.model.name
        try:
            logits_NV = next_token_logits(self.model, self.own_head, [self.format.prompt_ids(p.row) for p in prompts])
        finally:
            self.release()
        logq_NV = torch.log_softmax(logits_NV / self.temperature, -1)
        entropy = -(logq_NV.exp() * logq_NV).sum(-1).mean().item()
        highest = math.log(self.vocab_size)
        if entropy > 0.999 * highest:
            raise ModelError(
                f"{name} is uniform: the entropy of its next token is {entropy:.3f} nats of at most "
                f"{highest:.3f} on your first prompts. Its weights were probably not loaded; there is nothing to learn."
            )


class LocalEvidence:
    """Evidence of one scorer on one step's rollouts."""

    def __init__(self, teacher: LocalTeacher, rollouts_N: Sequence[Rollout]) -> None:
        self._teacher = teacher
        self._answers = AsRead(teacher.format, teacher.agreement, rollouts_N)
        self._lengths: list[int] = []

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        """See `protocols.EvidenceHandle`."""
        return self._answers.spans(self._teacher.name)

    def prepare(self, wants: Mapping[str, Want]) -> int:
        """See `protocols.EvidenceHandle`: it reads when it is pulled, and everything at once."""
        return 0

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        """Nothing where the scorer is not wanted; else its rows, see `read`."""
        want = wants.get(self._teacher.name)
        rows = None if want is None else self.read(batch, want)
        return [] if rows is None else [rows]

    def lengths(self) -> Mapping[str, Sequence[int]]:
        """The scorer's name to the lengths of all sequences, prompt and answer, that it has read so far."""
        return {self._teacher.name: self._lengths}

    @torch.no_grad()
    def read(self, batch: Batch, want: Want) -> ScorerRows | None:
        """One forward pass over the wanted rollouts of the micro-batch, in its order; None where there is none.

        "sampled" keeps a number for every token, anything else the hidden states.
        """
        joint = self._answers.joint(batch, want)
        if joint is None:
            return None
        teacher, target = self._teacher, batch.token_T.device
        hidden_UD = self._hidden(joint)
        if want.resolution == "sampled":
            logprobs_T = self._drawn(joint, hidden_UD).to(target)
            valid_T, said = torch.isfinite(logprobs_T), {"logprobs_T": logprobs_T}
        else:
            hidden_TD = joint.of(hidden_UD).to(target)
            valid_T, said = torch.isfinite(hidden_TD).all(-1), {"hidden_TD": hidden_TD}
            if joint.at_R is not None:
                said["own_token_T"] = onto(joint.own_R, target)
            if joint.at_R is not None and want.joined == "gold":
                said["before_T"] = joint.before(self._logprobs(joint.earlier_U, joint, hidden_UD)).to(target)
                valid_T = valid_T & torch.isfinite(said["before_T"])
        return ScorerRows(
            name=teacher.name,
            valid_T=valid_T,
            temperature=teacher.temperature,
            head=None if want.resolution == "sampled" else teacher.head_on(target),
            index_T=None if joint.index_R is None else onto(joint.index_R, target),
            known_index_T=joint.index_R,
            shared_V=teacher.shared_on(target),
            **said,
        )

    def release(self) -> None:
        self._teacher.release()

    def _hidden(self, joint: Joint) -> Tensor:
        """[U, D]: the states that predict the tokens of these answers, one after the other."""
        prompts = [self._answers.prompt_ids(rollout.prompt) for rollout in joint.rollouts]
        answers = [self._answers.ids(rollout) for rollout in joint.rollouts]
        self._lengths += [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return answer_states(self._teacher.model, prompts, answers, share=self._teacher.share_prompts)

    def _drawn(self, joint: Joint, hidden_UD: Tensor) -> Tensor:
        """[R]: log-probabilities of the drawn tokens, or of the spans that they are in."""
        if joint.at_R is None:
            return own_logprobs(hidden_UD, joint.ids_U, *self._head)
        return joint.drawn(self._logprobs(joint.inside_U, joint, hidden_UD))

    def _logprobs(self, places: NDArray[np.int64], joint: Joint, hidden_UD: Tensor) -> Tensor:
        """[U]: log-probabilities of some of the scorer's tokens, NaN at the others."""
        of_UD = hidden_UD.index_select(0, onto(places, hidden_UD.device))
        return spread(own_logprobs(of_UD, joint.ids_U[places], *self._head), places, len(joint.ids_U))

    @property
    def _head(self) -> tuple[Head, float, int]:
        teacher = self._teacher
        return teacher.own_head, teacher.temperature, teacher.chunk_tokens
