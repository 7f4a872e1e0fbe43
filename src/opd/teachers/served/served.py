"""A scorer that is served elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import BadService, ConfigError, ModelError
from opd.teachers.as_read import order, shared
from opd.teachers.served.evidence import ServedEvidence, as_tensor
from opd.teachers.served.probe import flat
from opd.teachers.service import Capabilities, Question, ScoreService, ask_all
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Head, Prompt, Resolution, Rollout, Want


class ServedTeacher:
    """What a panel needs of a member, over any `ScoreService`.

    temperature   the service was made for it: it divides the logits there, or those that are made of states here.
    vocab_size    real tokens of the student; of a scorer with another tokenizer its own.
    max_invalid   share of a step's tokens without a usable score above which the run stops.
    """

    def __init__(
        self,
        service: ScoreService,
        fmt: PromptFormat,
        agreement: Agreement | Crossing,
        *,
        name: str,
        temperature: float,
        vocab_size: int,
        parameter_count: int,
        max_invalid: float,
    ) -> None:
        self.service = service
        self.name, self.format, self.agreement = name, fmt, agreement
        self.temperature = temperature
        self.vocab_size, self.parameter_count = vocab_size, parameter_count
        self.max_invalid = max_invalid
        self.fingerprint = service.fingerprint
        self._order_V, self._shared_V = order(agreement), shared(agreement)
        self._student_of_V = None if isinstance(agreement, Agreement) else _inverse(agreement.teacher_of_V, vocab_size)
        self._heads: dict[torch.device, Head] = {}
        self._shared: dict[torch.device, Tensor] = {}

    @property
    def resolution(self) -> Resolution:
        """The most that it says about a token."""
        can = self.service.capabilities
        return "full" if can.hidden else "entries" if can.top_k else "sampled"

    @property
    def most_entries(self) -> int:
        """Of its most likely tokens at a position."""
        return min(self.service.capabilities.top_k, self.vocab_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found when it was tried out, and does not stop the run."""
        return tuple(getattr(self.service, "notes", ()))

    def metrics(self) -> dict[str, float]:
        """How it was asked since the beginning, where its service counts that."""
        counted = getattr(self.service, "metrics", None)
        return {} if counted is None else counted()

    def fingerprint_now(self) -> str:
        """Another one than at the start where another model answers, or this one scores a fixed text otherwise."""
        return self.fingerprint if self.service.still_the_same() else f"{self.fingerprint}-changed"

    def evidence(self, rollouts_N: Sequence[Rollout]) -> ServedEvidence:
        """A lazy handle on what this scorer thinks of these rollouts."""
        return ServedEvidence(self, rollouts_N)

    def fetch(self) -> None:
        """It is where it is."""

    def release(self) -> None:
        """Frees the copies of its head on other devices than the host."""
        self._heads = {device: head for device, head in self._heads.items() if device.type == "cpu"}

    def close(self) -> None:
        """Ends what is under way; it cannot be asked any more."""
        self.service.close()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ModelError when the scorer knows nothing, or nothing about these prompts: caught before anything
        expensive starts."""
        questions = []
        for prompt in prompts:
            ids = self.format.prompt_ids(prompt.row)
            if len(ids) >= 2:
                at = len(ids) // 2
                questions.append(Question(rollout_id=prompt.id, prompt_ids=ids[:at], answer_ids=ids[at:]))
        if not questions:
            return
        logprobs_T = np.concatenate([scores.logprobs_T for scores in ask_all(self.service, questions)]).astype(
            np.float64
        )
        if np.isnan(logprobs_T).all():
            raise ModelError(f"{self.name} gives no usable score on your first prompts")
        if (why := flat(logprobs_T, self.vocab_size)) is not None:
            raise ModelError(f"{self.name} {why}, on your first prompts; there is nothing to learn")

    # ---- what it can say ---------------------------------------------------------------------------------------------

    def check_wants(self, wants: Iterable[Want]) -> None:
        """ConfigError, with the reason, when the service cannot say what is wanted. Nothing takes its place."""
        can = self.service.capabilities
        for want in wants:
            if self.by_states(want):
                continue
            if want.resolution == "full":
                raise self._cannot("give whole distributions, for which its hidden states are needed", can, "hidden")
            if self.temperature != 1.0 and not can.temperature:
                raise self._cannot(f"score at temperature {self.temperature:g}", can, "temperature")
            if want.top_k > can.top_k:
                most = f", but {can.top_k}" if can.top_k else ""
                raise self._cannot(f"give its {want.top_k} most likely tokens{most}", can, "top_k")
            if want.student_top_k > can.chosen:
                raise self._cannot(f"score the student's {want.student_top_k} most likely tokens", can, "chosen")

    def _cannot(self, what: str, can: Capabilities, field: str) -> ConfigError:
        reason = f": {can.reasons[field]}" if field in can.reasons else ""
        return ConfigError(
            f"{self.name} cannot {what}{reason}. Change objective's support (sampled needs least, teacher_top_k named "
            "tokens of its own), or take a server that can: `opd serve-teacher MODEL` gives all of it"
        )

    def by_states(self, want: Want) -> bool:
        """Whether a want is met by hidden states: whole distributions, and what the service cannot say otherwise."""
        can = self.service.capabilities
        if not can.hidden:
            return False
        if want.resolution == "full":
            return True
        return want.resolution == "entries" and (want.top_k > can.top_k or want.student_top_k > can.chosen)

    # ---- its head ----------------------------------------------------------------------------------------------------

    def head_on(self, device: torch.device) -> Head:
        """The output layer over the student's vocabulary, end tokens exchanged; asked for once."""
        if device not in self._heads:
            served = self.service.head()
            if served.vocab_size < self.vocab_size:
                raise BadService(
                    f"{self.name}: its head knows {served.vocab_size} tokens, and {self.vocab_size} are compared"
                )
            self._heads[device] = Head(
                as_tensor(served.weight_VD).to(device),
                self.vocab_size,
                None if served.bias_V is None else as_tensor(served.bias_V).to(device),
                served.scale,
                served.softcap,
                None if self._order_V is None else torch.from_numpy(self._order_V).to(device),
            )
        return self._heads[device]

    # ---- its tokens, and the student's -------------------------------------------------------------------------------

    def shared_on(self, device: torch.device) -> Tensor | None:
        """`ScorerRows.shared_V` on a device."""
        if self._shared_V is None:
            return None
        if device not in self._shared:
            self._shared[device] = torch.from_numpy(self._shared_V).to(device)
        return self._shared[device]

    def in_its_ids(self, ids_TK: NDArray[np.int64]) -> NDArray[np.int64]:
        """The student's tokens in its numbering; -1 for what it lacks."""
        return ids_TK if self._order_V is None else np.where(ids_TK < 0, -1, self._order_V[ids_TK])

    def in_student_ids(self, ids_TK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Its tokens in the student's numbering; -1 for what the student lacks. With one tokenizer the same two tokens
        are exchanged in either direction."""
        if isinstance(self.agreement, Agreement):
            mapped_TK = self.agreement.teacher_ids(ids_TK)
            return np.where(mapped_TK < self.agreement.vocab_size, mapped_TK, -1)
        assert self._student_of_V is not None
        known_TK = (ids_TK >= 0) & (ids_TK < len(self._student_of_V))
        return np.where(known_TK, self._student_of_V[np.where(known_TK, ids_TK, 0)], -1)


def _inverse(teacher_of_V: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """int64 [size]: the student's token of each of the scorer's; -1 for none."""
    student_of_V = np.full(size, -1, dtype=np.int64)
    shared_V = np.flatnonzero(teacher_of_V >= 0)
    student_of_V[teacher_of_V[shared_V]] = shared_V
    return student_of_V
