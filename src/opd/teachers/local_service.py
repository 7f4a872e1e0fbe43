"""A model in this process, asked as a served one is: so that its scores can be kept as theirs are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import DataError
from opd.models.answer_states import answer_states
from opd.objectives.head import head_logits
from opd.teachers.local import LocalTeacher
from opd.teachers.service import Capabilities, Question, Scores, ServedHead, finished


class LocalService:
    """Implements `ScoreService` for a `LocalTeacher`, whose model, temperature and chunks it takes.

    A question is read at once, by itself, in the calling thread: its scores then depend on nothing else. `ask` reads
    several in one forward pass, which may change their last bits. The model stays on its device until `close`.

    Ids are the model's own: end tokens are not exchanged here. Scores are over the tokens that it shares with the
    student, or over its own where it has another tokenizer. A named token that it does not know is NaN.
    """

    def __init__(self, teacher: LocalTeacher) -> None:
        self.teacher = teacher
        self.name = teacher.name
        self.calls = 0  # forward passes

    @property
    def fingerprint(self) -> str:
        """The teacher's. Over a part of its vocabulary, that which a student has, its probabilities are others."""
        known, asked = self.teacher.format.tokenizer.vocab_size, self.teacher.vocab_size
        return self.teacher.fingerprint + (f"-V{asked}" if asked < known else "")

    @property
    def capabilities(self) -> Capabilities:
        V = self.teacher.vocab_size
        return Capabilities(top_k=V, chosen=V, hidden=True, temperature=True)

    def submit(self, question: Question) -> Future[Scores]:
        return finished(self.ask([question])[0])

    @torch.no_grad()
    def ask(self, questions: Sequence[Question]) -> list[Scores]:
        """All answers, in order, from one forward pass."""
        for question in questions:
            largest = int(question.answer_ids.max())
            if largest >= self.teacher.vocab_size:
                raise DataError(
                    f"rollout {question.rollout_id}: it holds token {largest}, but {self.name} knows "
                    f"{self.teacher.vocab_size} tokens"
                )
        self.calls += 1
        teacher = self.teacher
        hidden_TD = answer_states(
            teacher.model,
            [question.prompt_ids for question in questions],
            [question.answer_ids for question in questions],
            share=teacher.share_prompts,
        )
        parts = hidden_TD.split([len(question.answer_ids) for question in questions])
        return [self._scores(question, part) for question, part in zip(questions, parts, strict=True)]

    def head(self) -> ServedHead:
        head = self.teacher.own_head
        weight_VD = head.weight_VD[: head.vocab_size]
        bias_V = None if head.bias_V is None else head.bias_V[: head.vocab_size].float().cpu().numpy()
        return ServedHead(
            weight_VD=_as_numbers(weight_VD),
            vocab_size=head.vocab_size,
            bias_V=bias_V,
            scale=head.scale,
            softcap=head.softcap,
        )

    def still_the_same(self) -> bool:
        return self.teacher.fingerprint_now() == self.teacher.fingerprint

    def close(self) -> None:
        self.teacher.release()

    def _scores(self, question: Question, hidden_TD: Tensor) -> Scores:
        """A chunk of logits at a time."""
        teacher, head, device = self.teacher, self.teacher.own_head, hidden_TD.device
        answer_T = torch.from_numpy(question.answer_ids).to(device)
        chosen_TK = None if question.chosen_TK is None else torch.from_numpy(question.chosen_TK).to(device)
        drawn, top, top_ids, chosen = [], [], [], []
        for start in range(0, len(answer_T), teacher.chunk_tokens):
            chunk = slice(start, start + teacher.chunk_tokens)
            logits_CV = head_logits(hidden_TD[chunk], head) / teacher.temperature
            total_C = logits_CV.logsumexp(-1)
            drawn.append(logits_CV.gather(1, answer_T[chunk, None])[:, 0] - total_C)
            if question.top_k:
                values_CK, ids_CK = logits_CV.topk(min(question.top_k, logits_CV.shape[1]), dim=-1)
                top.append(values_CK - total_C[:, None])
                top_ids.append(ids_CK)
            if chosen_TK is not None:
                ids_CK = chosen_TK[chunk]
                known_CK = (ids_CK >= 0) & (ids_CK < logits_CV.shape[1])
                values_CK = logits_CV.gather(1, ids_CK.where(known_CK, torch.zeros_like(ids_CK))) - total_C[:, None]
                chosen.append(values_CK.masked_fill(~known_CK, torch.nan))
        top_TK = _finite(top) if top else None
        top_ids_TK = torch.cat(top_ids).cpu().numpy() if top_ids else None
        if top_TK is not None and top_ids_TK is not None:
            top_ids_TK = np.where(np.isfinite(top_TK), top_ids_TK, -1)
        return Scores(
            logprobs_T=_finite(drawn),
            top_ids_TK=top_ids_TK,
            top_logprobs_TK=top_TK,
            chosen_TK=_finite(chosen) if chosen else None,
            hidden_TD=_as_numbers(hidden_TD) if question.hidden else None,
        )


def _finite(parts: list[Tensor]) -> NDArray[np.float32]:
    """One after the other; what is not finite is NaN."""
    values = torch.cat(parts).float()
    return values.masked_fill(~values.isfinite(), torch.nan).cpu().numpy()


def _as_numbers(values: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """float32, or bfloat16 as its bits."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.uint16).cpu().numpy()
    return values.float().cpu().numpy()
