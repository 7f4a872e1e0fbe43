"""A served scorer in a panel: joined by rollout id, asked once, guarded, and the same as a local one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import BadService, ConfigError, ModelError
from opd.models.packing import pack
from opd.objectives.head import head_logits
from opd.teachers.local import LocalTeacher
from opd.teachers.panel import Panel
from opd.teachers.served.evidence import _union
from opd.teachers.served.served import ServedTeacher
from opd.teachers.service import Capabilities, Question, Scores, ScoreService, ServedHead, finished
from opd.text.agreement import compare
from opd.types import ScorerRows, Want
from tests import rooms
from tests.teachers.served.stubs import OwnStub, Stub


class Here:
    """A `ScoreService` in this process over a tiny model, with what a test wants to go wrong."""

    name, fingerprint = "here", "f"

    def __init__(
        self, stub: Stub, capabilities: Capabilities | None = None, alter=lambda question, scores: scores
    ) -> None:
        self.stub, self.alter = stub, alter
        self.capabilities = capabilities or Capabilities(top_k=1000, chosen=1000)
        self.asked: list[Question] = []
        self.closed = False

    def submit(self, question: Question) -> Future[Scores]:
        self.asked.append(question)
        ids = np.concatenate([question.prompt_ids, question.answer_ids])
        logp_TV = self.stub.logprobs(ids)[len(question.prompt_ids) - 1 : -1]
        found: dict[str, Any] = {"logprobs_T": logp_TV[np.arange(len(logp_TV)), question.answer_ids]}
        if question.top_k:
            found["top_ids_TK"] = np.argsort(-logp_TV, axis=1, kind="stable")[:, : question.top_k]
            found["top_logprobs_TK"] = np.take_along_axis(logp_TV, found["top_ids_TK"], 1)
        if question.chosen_TK is not None:
            found["chosen_TK"] = np.take_along_axis(logp_TV, question.chosen_TK, 1)
        made = self.alter(question, Scores(**found))
        return made if isinstance(made, Future) else finished(made)

    def head(self) -> ServedHead:
        raise AssertionError("it has none")

    def still_the_same(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def served(service: ScoreService, fmt, student_fmt=None, *, max_invalid: float = 0.05, **what: Any) -> ServedTeacher:
    return ServedTeacher(
        service,
        fmt,
        compare(student_fmt or fmt, fmt),
        name="teacher",
        vocab_size=fmt.tokenizer.vocab_size,
        parameter_count=1,
        max_invalid=max_invalid,
        **{"temperature": 1.0, **what},
    )


@pytest.fixture(scope="module")
def student():
    return rooms.causal(seed=0)


@pytest.fixture(scope="module")
def made(student, fmt):
    return rooms.rollouts(student, fmt)


@pytest.fixture
def stub(model, fmt) -> Stub:
    return Stub(model, fmt.tokenizer)


def want(rollouts, resolution: Any = "sampled", **k: int) -> Want:
    return Want(resolution, frozenset(r.id for r in rollouts), **k)


def rows_of(teacher, rollouts, wanted: Want, batch=None, top=None) -> ScorerRows:
    evidence = teacher.evidence(rollouts)
    evidence.prepare({"teacher": wanted})
    batch = batch or pack(rollouts, device=torch.device("cpu"))
    rows = evidence.read(batch if top is None else replace(batch, student_top_TK=top), wanted)
    assert rows is not None
    return rows


# ---- the same as a local one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "opd"])
@pytest.mark.parametrize(
    "support",
    [
        "sampled",
        {"kind": "teacher_top_k", "k": 5},
        {"kind": "student_top_k", "k": 5},
        {"kind": "union", "k": 4},
        "full",
    ],
)
def test_X_4_gradients_are_those_of_a_local_teacher(kind, support, connected, model, student, made, fmt) -> None:
    if kind == "vllm" and support == "full":
        pytest.skip("vLLM gives no whole distributions, and is refused")
    objective = {"behaviour": "student", "terms": [{"name": "kl", "support": support}]}
    found = []
    service = connected(kind, wants=[want(made, "full" if support == "full" else "sampled")])
    for teacher in (rooms.teacher(model, fmt), served(service, fmt)):
        learner = rooms.learner(student, objective)
        learner.gradients(made, Panel([teacher]).evidence(made))
        found.append(rooms.gradient(student).clone())
    assert found[0].norm() > 0
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.9999
    assert rooms.distance(found[0], found[1]) < 1e-3


def test_X_4_states_in_bfloat16_say_what_the_head_makes_of_them(connected, model, made, fmt) -> None:
    wanted = want(made, "full")
    teacher = served(connected("opd", OwnStub(model, bfloat16=True), wants=[wanted]), fmt)
    rows, local = rows_of(teacher, made, wanted), rows_of(rooms.teacher(model, fmt), made, wanted)
    assert rows.hidden_TD is not None and rows.hidden_TD.dtype == torch.bfloat16 and rows.head is not None
    ours = torch.log_softmax(head_logits(rows.hidden_TD, rows.head).float(), -1)
    theirs = torch.log_softmax(head_logits(local.hidden_TD, local.head), -1)
    assert (ours - theirs).abs().max() < 0.2 and bool(rows.valid_T.all())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_honoured_by_our_own_server(temperature, connected, model, made, fmt) -> None:
    service = connected("opd", temperature=temperature)
    for resolution in ("sampled", "full"):
        teacher = served(service, fmt, temperature=temperature)
        rows = rows_of(teacher, made, want(made, resolution))
        local = rows_of(rooms.teacher(model, fmt, temperature=temperature), made, want(made, resolution))
        assert rows.temperature == temperature
        if resolution == "sampled":
            torch.testing.assert_close(rows.logprobs_T, local.logprobs_T, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(rows.hidden_TD, local.hidden_TD, atol=1e-5, rtol=1e-5)


def test_A_16_ends_are_exchanged_on_the_way_there_and_back(model) -> None:
    """The student ends in 0, the teacher in 2."""
    ours, theirs = rooms.prompt_format(), rooms.prompt_format(chat=True)
    local = rooms.teacher(model, theirs, ours)
    teacher = served(Here(Stub(model, theirs.tokenizer)), theirs, ours)
    rollout = rooms.answer(rooms.prompts(ours)[0], [5, 2, 7, 0], [-1.0] * 4)
    vocabulary = torch.arange(ours.tokenizer.vocab_size).repeat(4, 1)
    size = vocabulary.shape[1]
    for wanted in (want([rollout], "entries", top_k=size), want([rollout], "entries", student_top_k=size)):
        rows = rows_of(teacher, [rollout], wanted, top=vocabulary)
        full = rows_of(local, [rollout], want([rollout], "full"))
        logp_TV = torch.log_softmax(head_logits(full.hidden_TD, full.head), -1)
        assert rows.entry_ids_TK is not None and rows.entries_TK is not None
        torch.testing.assert_close(rows.entries_TK, logp_TV.gather(1, rows.entry_ids_TK), atol=1e-5, rtol=1e-5)
        sampled = rows_of(local, [rollout], want([rollout]))
        torch.testing.assert_close(rows.logprobs_T, sampled.logprobs_T, atol=1e-5, rtol=1e-5)


def test_tokens_that_the_student_does_not_know_are_dropped(stub, made, fmt) -> None:
    size = fmt.tokenizer.vocab_size

    def alter(question: Question, scores: Scores) -> Scores:
        assert scores.top_ids_TK is not None
        ids_TK = scores.top_ids_TK.copy()
        ids_TK[:, 1] = size + 3
        return replace(scores, top_ids_TK=ids_TK)

    rows = rows_of(served(Here(stub, alter=alter), fmt), made, want(made, "entries", top_k=3))
    assert rows.entry_ids_TK is not None and rows.entry_ids_TK.max() < size
    assert bool((rows.entry_ids_TK >= 0).sum(-1).eq(2).all()) and bool(rows.valid_T.all())


@given(st.data())
def test_the_union_of_entries_has_every_token_once(data) -> None:
    def part():
        rows = [data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3, unique=True)) for _ in range(4)]
        ids = np.array(rows)
        ids[np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))).reshape(4, 3)] = -1
        return ids, np.where(ids < 0, np.nan, -ids).astype(np.float32)

    parts = [part() for _ in range(data.draw(st.integers(1, 2)))]
    ids_TK, entries_TK = _union(parts, 6)
    assert ids_TK.shape == (4, 6)
    for t in range(4):
        expected = {int(n) for ids, _ in parts for n in ids[t] if n >= 0}
        found = [n for n in ids_TK[t].tolist() if n >= 0]
        assert len(found) == len(set(found)) and set(found) == expected
        assert np.array_equal(entries_TK[t][ids_TK[t] >= 0], -ids_TK[t][ids_TK[t] >= 0].astype(np.float32))
        assert np.isnan(entries_TK[t][ids_TK[t] < 0]).all()


# ---- joined by rollout id --------------------------------------------------------------------------------------------


def test_X_12_answers_are_joined_by_rollout_id_in_whatever_order_they_come(stub, made, fmt) -> None:
    """Micro-batches in another order, with rollouts left out, and answers that arrive late and turned around."""
    late: list[tuple[Future[Scores], Scores]] = []

    def alter(question: Question, scores: Scores) -> Future[Scores]:
        future: Future[Scores] = Future()
        late.append((future, scores))
        return future

    straight = rows_of(served(Here(stub), fmt), made, want(made)).logprobs_T
    assert straight is not None
    by_id = dict(zip([r.id for r in made], straight.split([len(r.response_ids) for r in made]), strict=True))
    wanted = want(made[::2])
    evidence = served(Here(stub, alter=alter), fmt).evidence(made)
    evidence.prepare({"teacher": wanted})
    threading.Timer(0.05, lambda: [future.set_result(scores) for future, scores in reversed(late)]).start()
    batch = pack(list(reversed(made)), device=torch.device("cpu"))
    rows = evidence.read(batch, wanted)
    assert rows is not None and rows.logprobs_T is not None and rows.index_T is not None
    expected = torch.cat([by_id[r.id] for r in reversed(made) if r.id in wanted.rollouts])
    assert torch.equal(rows.logprobs_T, expected)
    read_T = torch.repeat_interleave(
        torch.tensor([r.id in wanted.rollouts for r in batch.rollouts]),
        torch.tensor([len(r.response_ids) for r in batch.rollouts]),
    )
    assert torch.equal(rows.index_T, torch.where(read_T)[0])
    assert rows.known_index_T is not None and np.array_equal(rows.known_index_T, rows.index_T.numpy())


def test_a_batch_without_a_wanted_rollout_has_no_rows(stub, made, fmt) -> None:
    evidence = served(Here(stub), fmt).evidence(made)
    assert evidence.read(pack(made[:1], device=torch.device("cpu")), want(made[1:])) is None
    assert evidence.pull(pack(made[:1], device=torch.device("cpu")), {"other": want(made)}) == []


def test_all_questions_are_under_way_before_the_first_answer_is_waited_for(stub, made, fmt) -> None:
    service = Here(stub, alter=lambda question, scores: Future())
    evidence = served(service, fmt).evidence(made)
    start = time.monotonic()
    assert evidence.prepare({"teacher": want(made, "entries", top_k=3)}) == 0
    assert len(service.asked) == len(made) and time.monotonic() - start < 2
    assert sorted(evidence.lengths()["teacher"]) == sorted(len(r.prompt.ids) + len(r.response_ids) for r in made)


def test_a_step_that_is_read_twice_is_asked_about_once(stub, made, fmt) -> None:
    service = Here(stub)
    evidence = served(service, fmt).evidence(made)
    batch = pack(made, device=torch.device("cpu"))
    top_TK = torch.topk(torch.rand(len(batch.token_T), 50), 3).indices
    wanted = want(made, "entries", top_k=2, student_top_k=3)
    assert evidence.prepare({"teacher": wanted}) == 3
    for _ in range(2):
        evidence.prepare({"teacher": wanted})
        evidence.read(replace(batch, student_top_TK=top_TK), wanted)
    assert len(service.asked) == 2 * len(made)
    evidence.read(replace(batch, student_top_TK=top_TK + 1), wanted)  # the student has moved on
    assert len(service.asked) == 3 * len(made)


def test_what_nobody_is_going_to_read_is_ended(stub, made, fmt) -> None:
    futures: list[Future[Scores]] = []

    def alter(question: Question, scores: Scores) -> Future[Scores]:
        futures.append(Future())
        return futures[-1]

    evidence = served(Here(stub, alter=alter), fmt).evidence(made)
    evidence.prepare({"teacher": want(made)})
    evidence.release()
    assert futures and all(future.cancelled() for future in futures)


# ---- no value, and no step, of a failure -----------------------------------------------------------------------------


def test_X_14_one_rollout_that_fails_fails_the_step_and_none_is_skipped(stub, student, made, fmt) -> None:
    def alter(question: Question, scores: Scores) -> Any:
        future: Future[Scores] = Future()
        if question.rollout_id != made[3].id:
            return scores
        future.set_exception(BadService("wrong ids"))
        return future

    before = [p.detach().clone() for p in student.module.parameters()]
    objective = {"behaviour": "student", "terms": [{"name": "kl", "support": "sampled"}]}
    learner = rooms.learner(student, objective)
    with pytest.raises(BadService, match="wrong ids"):
        learner.update(made, Panel([served(Here(stub, alter=alter), fmt)]).evidence(made))
    assert all(torch.equal(a, b) for a, b in zip(before, student.module.parameters(), strict=True))
    assert learner.updates == 0


def test_X_1_a_token_without_a_score_is_masked_and_its_gradient_is_that_of_a_masked_token(
    stub, student, made, fmt
) -> None:
    victim, at = max(made, key=lambda rollout: len(rollout.response_ids)), 1
    assert len(victim.response_ids) > 2

    def alter(question: Question, scores: Scores) -> Scores:
        if question.rollout_id != victim.id:
            return scores
        logprobs_T = scores.logprobs_T.copy()
        logprobs_T[at] = np.nan
        return replace(scores, logprobs_T=logprobs_T)

    objective = {"behaviour": "student", "terms": [{"name": "kl", "support": "sampled"}]}
    mask = victim.mask.copy()
    mask[at] = False
    masked = [replace(r, mask=mask) if r is victim else r for r in made]
    found = []
    for service, rollouts in ((Here(stub, alter=alter), made), (Here(stub), masked)):
        teacher = served(service, fmt, max_invalid=0.5)
        rooms.learner(student, objective).gradients(rollouts, Panel([teacher]).evidence(rollouts))
        found.append(rooms.gradient(student).clone())
    assert rooms.distance(*found) < 1e-6


@pytest.mark.parametrize("resolution", ["sampled", "entries"])
def test_too_many_tokens_without_a_score_stop_the_run(resolution, stub, made, fmt) -> None:
    def alter(question: Question, scores: Scores) -> Scores:
        logprobs_T = scores.logprobs_T.copy()
        logprobs_T[::3] = np.nan
        return replace(scores, logprobs_T=logprobs_T)

    wanted = want(made, resolution, top_k=2 if resolution == "entries" else 0)
    with pytest.raises(BadService, match=r"teacher gave no usable score for \d+ of the step's \d+ tokens"):
        rows_of(served(Here(stub, alter=alter), fmt), made, wanted)
    rows = rows_of(served(Here(stub, alter=alter), fmt, max_invalid=0.9), made, wanted)
    expected = [n % 3 != 0 for r in made for n in range(len(r.response_ids))]
    assert rows.valid_T.tolist() == expected


def test_a_named_token_without_a_score_makes_its_token_invalid(stub, made, fmt) -> None:
    def alter(question: Question, scores: Scores) -> Scores:
        assert scores.chosen_TK is not None
        chosen_TK = scores.chosen_TK.copy()
        chosen_TK[0, 1] = np.nan
        return replace(scores, chosen_TK=chosen_TK)

    batch = pack(made[:1], device=torch.device("cpu"))
    top_TK = torch.tensor([[4, 5, 6]] * len(batch.token_T))
    teacher = served(Here(stub, alter=alter), fmt, max_invalid=1.0)
    rows = rows_of(teacher, made[:1], want(made[:1], "entries", student_top_k=3), batch, top_TK)
    assert rows.valid_T.tolist() == [False] + [True] * (len(batch.token_T) - 1)


def test_X_9_scores_that_become_flat_while_the_run_goes_on_stop_it(stub, student, fmt) -> None:
    many = rooms.rollouts(student, fmt, samples=4)
    assert sum(len(r.response_ids) for r in many) >= 64
    flat = -float(np.log(fmt.tokenizer.vocab_size))
    for value, why in ((flat, "is uniform"), (0.0, "which is certainty")):

        def alter(question: Question, scores: Scores, value=value) -> Scores:
            return replace(scores, logprobs_T=np.full_like(scores.logprobs_T, value))

        with pytest.raises(BadService, match=f"{why}.*lost its weights"):
            rows_of(served(Here(stub, alter=alter), fmt), many, want(many))


# ---- before the run --------------------------------------------------------------------------------------------------


def test_X_6_what_a_service_cannot_say_is_refused_with_the_reason(stub, made, fmt) -> None:
    few = Capabilities(top_k=5, reasons={"chosen": "it scores its own tokens alone", "hidden": "it has none"})
    teacher = served(Here(stub, few), fmt)
    teacher.check_wants([want(made), want(made, "entries", top_k=5)])
    for wanted, why in (
        (want(made, "entries", top_k=6), "cannot give its 6 most likely tokens, but 5"),
        (
            want(made, "entries", student_top_k=2),
            "score the student's 2 most likely tokens: it scores its own tokens alone",
        ),
        (want(made, "full"), "cannot give whole distributions.*: it has none"),
    ):
        with pytest.raises(ConfigError, match=f"teacher {why}" if why.startswith("cannot") else why):
            teacher.check_wants([wanted])
    with pytest.raises(ConfigError, match=r"cannot score at temperature 0\.7"):
        served(Here(stub, few), fmt, temperature=0.7).check_wants([want(made)])
    served(Here(stub, Capabilities(hidden=True)), fmt).check_wants([want(made, "entries", student_top_k=9)])


def test_X_11_every_teacher_scores_a_prompt_before_the_run(stub, fmt, prompts) -> None:
    services = [Here(stub), Here(stub)]
    for service in services:
        served(service, fmt).check(prompts)
    assert all(len(service.asked) == len(prompts) for service in services)


@pytest.mark.parametrize(("value", "why"), [(np.nan, "no usable score"), (-5.7, "is uniform"), (0.0, "certainty")])
def test_X_9_a_teacher_that_knows_nothing_is_refused(value, why, stub, fmt, prompts) -> None:
    def alter(question: Question, scores: Scores) -> Scores:
        return replace(scores, logprobs_T=np.full_like(scores.logprobs_T, value))

    with pytest.raises(ModelError, match=why):
        served(Here(stub, alter=alter), fmt).check(prompts)


def test_a_model_that_changes_has_another_fingerprint(stub, fmt) -> None:
    service = Here(stub)
    teacher = served(service, fmt)
    assert teacher.fingerprint_now() == teacher.fingerprint and not Panel([teacher]).changed(["teacher"])["teacher"]
    service.still_the_same = lambda: False
    assert Panel([teacher]).changed(["teacher"])["teacher"]
    teacher.close()
    assert service.closed


def test_a_served_and_a_local_teacher_stand_side_by_side(stub, model, made, fmt) -> None:
    local = rooms.teacher(model, fmt, name="local")
    assert isinstance(local, LocalTeacher)
    evidence = Panel([served(Here(stub), fmt), local]).evidence(made)
    wants = {"teacher": want(made[:3]), "local": want(made[2:])}
    assert evidence.prepare(wants) == 0
    batch = pack(made, device=torch.device("cpu"))
    assert [rows.name for rows in evidence.pull(batch, wants)] == ["teacher", "local"]
