"""What a served scorer says about the answers of one step, joined by rollout id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import BadService
from opd.net.waiting import result_of
from opd.objectives.transfer import onto
from opd.teachers.as_read import AsRead, Joint, own_logprobs, spread
from opd.teachers.served.probe import flat
from opd.teachers.service import Question, Scores
from opd.types import Batch, Rollout, ScorerRows, Spans, Want

if TYPE_CHECKING:
    from opd.teachers.served.served import ServedTeacher

_ENOUGH = 64  # drawn tokens of a step, to call its scores flat


@dataclass(frozen=True)
class _Asked:
    """What is asked about one rollout that does not depend on the student's weights."""

    rollout_id: str
    top_k: int
    hidden: bool


class ServedEvidence:
    """Evidence of one served scorer on one step's rollouts.

    Questions that need nothing of the student are under way from `prepare` on, all of them; those about the student's
    most likely tokens are asked when a micro-batch is read. Answers stay until `release`: a step may be read twice.
    """

    def __init__(self, teacher: ServedTeacher, rollouts_N: Sequence[Rollout]) -> None:
        self._teacher = teacher
        self._answers = AsRead(teacher.format, teacher.agreement, rollouts_N)
        self._asked: dict[_Asked, Future[Scores]] = {}
        self._named: dict[str, tuple[NDArray[np.int64], Future[Scores]]] = {}
        self._lengths: list[int] = []
        self._drawn: dict[str, NDArray[np.float32]] = {}
        self._invalid: dict[str, int] = {}

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        """See `protocols.EvidenceHandle`."""
        return self._answers.spans(self._teacher.name)

    def prepare(self, wants: Mapping[str, Want]) -> int:
        """See `protocols.EvidenceHandle`: begins with what does not depend on the student."""
        want = wants.get(self._teacher.name)
        if want is None:
            return 0
        by_states = self._teacher.by_states(want)
        if by_states or want.top_k or not want.student_top_k:
            for rollout in self._answers.wanted(want):
                self._ask(rollout, want)
        return 0 if by_states or want.resolution != "entries" else want.student_top_k

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        """Nothing where the scorer is not wanted; else its rows, see `read`."""
        want = wants.get(self._teacher.name)
        rows = None if want is None else self.read(batch, want)
        return [] if rows is None else [rows]

    def lengths(self) -> Mapping[str, Sequence[int]]:
        """The scorer's name to the lengths of all sequences, prompt and answer, that it was asked about so far."""
        return {self._teacher.name: self._lengths}

    def read(self, batch: Batch, want: Want) -> ScorerRows | None:
        """The rows of the wanted rollouts of the micro-batch, in its order; None where there is none. Waits for them.

        Raises ServiceUnavailable or BadService where an answer did not come, BadService where too many tokens of the
        step have no usable score: one rollout that fails fails the step.
        """
        joint = self._answers.joint(batch, want)
        if joint is None:
            return None
        teacher, target = self._teacher, batch.token_T.device
        if teacher.by_states(want):
            rows = self._states(joint, want, target)
        elif want.resolution == "entries":
            named = self._ask_named(batch, joint, want) if want.student_top_k else {}
            rows = self._entries(joint, want, named)
        else:
            rows = self._drawn_tokens(joint, want)
        self._guard(want)
        made = {name: None if value is None else value.to(target) for name, value in rows.items()}
        return ScorerRows(
            name=teacher.name,
            temperature=teacher.temperature,
            head=teacher.head_on(target) if teacher.by_states(want) else None,
            index_T=None if joint.index_R is None else onto(joint.index_R, target),
            known_index_T=joint.index_R,
            shared_V=teacher.shared_on(target),
            **made,  # pyright: ignore[reportArgumentType]
        )

    def release(self) -> None:
        """Forgets the answers, and ends what nobody is going to read."""
        for future in [*self._asked.values(), *(future for _, future in self._named.values())]:
            future.cancel()
        self._asked.clear()
        self._named.clear()
        self._teacher.release()

    # ---- questions ---------------------------------------------------------------------------------------------------

    def _ask(self, rollout: Rollout, want: Want) -> Future[Scores]:
        hidden = self._teacher.by_states(want)
        asked = _Asked(rollout.id, 0 if hidden else want.top_k, hidden)
        if asked not in self._asked:
            self._asked[asked] = self._submit(rollout, top_k=asked.top_k, hidden=hidden)
        return self._asked[asked]

    def _ask_named(self, batch: Batch, joint: Joint, want: Want) -> dict[str, tuple[NDArray[np.int64], Future[Scores]]]:
        """Rollout id to the student's most likely tokens at the rows there, and what is asked about them. All are asked
        before the first is waited for."""
        assert batch.student_top_TK is not None, "the learner was told to name the student's tokens, and named none"
        top_RK = batch.student_top_TK[:, : want.student_top_k].cpu().numpy().astype(np.int64)
        top_RK = top_RK if joint.index_R is None else top_RK[joint.index_R]
        for rollout, rows, mine_RK in zip(joint.rollouts, joint.rows, joint.parts(top_RK), strict=True):
            known = self._named.get(rollout.id)
            if known is None or not np.array_equal(known[0], mine_RK):
                chosen_UK = np.full((len(self._answers.ids(rollout)), mine_RK.shape[1]), -1)
                chosen_UK[rows.at_R] = self._teacher.in_its_ids(mine_RK)
                self._named[rollout.id] = mine_RK, self._submit(rollout, chosen_TK=chosen_UK)
        return {rollout.id: self._named[rollout.id] for rollout in joint.rollouts}

    def _submit(self, rollout: Rollout, **what: Any) -> Future[Scores]:
        """A question in the scorer's own words: its prompt, and the answer in its ids."""
        question = Question(
            rollout_id=rollout.id,
            prompt_ids=self._answers.prompt_ids(rollout.prompt),
            answer_ids=self._answers.ids(rollout),
            **what,
        )
        self._lengths.append(len(question.prompt_ids) + len(question.answer_ids))
        return self._teacher.service.submit(question)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _drawn_tokens(self, joint: Joint, want: Want) -> dict[str, Tensor]:
        scored = [result_of(self._ask(rollout, want)).logprobs_T for rollout in joint.rollouts]
        logprobs_R = joint.drawn(torch.from_numpy(np.concatenate(scored)))
        valid_R = torch.isfinite(logprobs_R)
        self._note(joint, valid_R.numpy(), scored)
        return {"logprobs_T": logprobs_R, "valid_T": valid_R}

    def _entries(
        self,
        joint: Joint,
        want: Want,
        named: Mapping[str, tuple[NDArray[np.int64], Future[Scores]]],
    ) -> dict[str, Tensor]:
        """Log-probabilities of the scorer's most likely tokens and the student's, in the student's numbering."""
        assert joint.at_R is None or want.joined == "strict", "entries are compared token by token"
        width = want.top_k + want.student_top_k
        scored, ids, entries, valid = [], [], [], []
        for rollout, rows in zip(joint.rollouts, joint.rows, strict=True):
            parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
            good_R = np.ones(len(rows.at_R), np.bool_)
            drawn_U = None
            if want.top_k:
                scores = result_of(self._ask(rollout, want))
                assert scores.top_ids_TK is not None and scores.top_logprobs_TK is not None
                theirs_RK, likely_RK = scores.top_ids_TK[rows.at_R], scores.top_logprobs_TK[rows.at_R]
                ids_RK = self._teacher.in_student_ids(theirs_RK)
                if joint.at_R is None:  # with one tokenizer, what it knows beyond the student's is left out
                    likely_RK = np.where(ids_RK < 0, np.float32(np.nan), likely_RK)
                parts.append((ids_RK, likely_RK))
                good_R &= (theirs_RK >= 0).any(-1)
                drawn_U = scores.logprobs_T
            if rollout.id in named:
                mine_RK, future = named[rollout.id]
                scores = result_of(future)
                assert scores.chosen_TK is not None
                known_RK = np.where(self._teacher.in_its_ids(mine_RK) < 0, -1, mine_RK)
                parts.append((known_RK, np.where(known_RK < 0, np.float32(np.nan), scores.chosen_TK[rows.at_R])))
                drawn_U = scores.logprobs_T if drawn_U is None else drawn_U
            assert drawn_U is not None, "entries were wanted, and none of anybody"
            ids_RK, entries_RK = _union(parts, width)
            good_R &= np.isfinite(drawn_U[rows.at_R]) & (np.isfinite(entries_RK) | (ids_RK < 0)).all(-1)
            scored.append(drawn_U)
            ids.append(ids_RK)
            entries.append(entries_RK)
            valid.append(good_R)
        self._note(joint, np.concatenate(valid), scored)
        return {
            "logprobs_T": joint.of(torch.from_numpy(np.concatenate(scored))),
            "entry_ids_TK": torch.from_numpy(np.concatenate(ids)),
            "entries_TK": torch.from_numpy(np.concatenate(entries)),
            "valid_T": torch.from_numpy(np.concatenate(valid)),
        }

    def _states(self, joint: Joint, want: Want, target: torch.device) -> dict[str, Tensor]:
        teacher = self._teacher
        head = teacher.head_on(target)
        scored = [result_of(self._ask(rollout, want)) for rollout in joint.rollouts]
        pieces = [as_tensor(scores.hidden_TD) for scores in scored if scores.hidden_TD is not None]
        assert len(pieces) == len(scored), "states were asked for"
        hidden_UD = torch.cat(pieces).to(head.weight_VD.dtype)
        made = {"hidden_TD": joint.of(hidden_UD)}
        valid_R = torch.isfinite(made["hidden_TD"]).all(-1)
        if joint.at_R is not None:
            made["own_token_T"] = torch.from_numpy(joint.own_R)
            if want.joined == "gold":
                places = joint.earlier_U
                of_UD, own = hidden_UD[torch.from_numpy(places)].to(target), replace(head, order_V=None)
                logprobs_M = own_logprobs(of_UD, joint.ids_U[places], own, teacher.temperature).cpu()
                made["before_T"] = joint.before(spread(logprobs_M, places, len(joint.ids_U)))
                valid_R &= torch.isfinite(made["before_T"])
        self._note(joint, valid_R.numpy(), [scores.logprobs_T for scores in scored])
        return made | {"valid_T": valid_R}

    # ---- guards ------------------------------------------------------------------------------------------------------

    def _note(self, joint: Joint, good_R: NDArray[np.bool_], scored: Sequence[NDArray[np.float32]]) -> None:
        """What came of the answers of a micro-batch: `scored` is [U] of each, in the scorer's own tokens."""
        goods = joint.parts(good_R)
        for rollout, rows, good, logprobs_U in zip(joint.rollouts, joint.rows, goods, scored, strict=True):
            self._invalid[rollout.id] = int(rows.trained_R[~good].sum())
            self._drawn[rollout.id] = logprobs_U

    def _guard(self, want: Want) -> None:
        """BadService as soon as it is certain that the step cannot be trained on: before its gradient is used. Tokens
        are the student's, and those of them that the scorer should have said something about."""
        teacher = self._teacher
        asked = self._answers.wanted(want)
        tokens = sum(int(self._answers.rows(rollout, want.joined).trained_R.sum()) for rollout in asked)
        invalid = sum(self._invalid.values())
        if invalid > teacher.max_invalid * tokens:
            raise BadService(
                f"{teacher.name} gave no usable score for {invalid} of the step's {tokens} tokens (server.max_invalid "
                f"is {teacher.max_invalid:g}). The step is not trained; the run can be resumed when it is mended"
            )
        if len(self._drawn) < len(asked):
            return
        drawn_T = np.concatenate(list(self._drawn.values())).astype(np.float64)
        if np.isfinite(drawn_T).sum() >= _ENOUGH and (why := flat(drawn_T, teacher.vocab_size)) is not None:
            raise BadService(
                f"{teacher.name} {why}. Has the server lost its weights? The step is not trained; the run can be "
                "resumed"
            )


def _union(
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[T, width] ids and log-probabilities of all parts. An id that comes twice in a row is -1 from the second on; one
    that was -1 keeps its log-probability: a token that the student lacks is likely all the same."""
    ids_TK = np.concatenate([ids for ids, _ in parts], axis=1)
    entries_TK = np.concatenate([logprobs for _, logprobs in parts], axis=1).astype(np.float32)
    order_TK = np.argsort(ids_TK, axis=1, kind="stable")
    sorted_TK = np.take_along_axis(ids_TK, order_TK, 1)
    again_TK = np.zeros_like(ids_TK, dtype=np.bool_)
    again_TK[:, 1:] = (sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)
    repeated_TK = np.zeros_like(again_TK)
    np.put_along_axis(repeated_TK, order_TK, again_TK, axis=1)
    ids_TK = np.where(repeated_TK, -1, ids_TK)
    entries_TK = np.where(repeated_TK, np.float32(np.nan), entries_TK)
    missing = width - ids_TK.shape[1]
    if missing > 0:
        ids_TK = np.pad(ids_TK, ((0, 0), (0, missing)), constant_values=-1)
        entries_TK = np.pad(entries_TK, ((0, 0), (0, missing)), constant_values=np.nan)
    return ids_TK, entries_TK


def as_tensor(values: NDArray[Any]) -> torch.Tensor:
    """A tensor of its own memory; uint16 is bfloat16."""
    found = np.array(values)
    bits = found.dtype == np.uint16
    return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(found)
