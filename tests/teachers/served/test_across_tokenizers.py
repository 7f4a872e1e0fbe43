"""A served or cached scorer with another tokenizer says what a local one says, and its failures take whole spans."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.errors import BadService, ConfigError, DataError
from opd.models.causal import CausalLM
from opd.models.packing import pack
from opd.teachers.cached_service import CachedService
from opd.teachers.local_service import LocalService
from opd.teachers.panel import Panel
from opd.teachers.score_cache import ScoreCache
from opd.teachers.served.served import ServedTeacher
from opd.teachers.service import Scores
from opd.text.crossing import agree
from opd.types import Joined, Resolution, Want
from tests import crossing, rooms
from tests.teachers.served.stubs import OwnStub, Stub
from tests.teachers.served.test_served import Here

STUDENT = crossing.fmt("unigram")
WAYS: list[dict] = [
    {"support": "sampled"},
    {"support": "full"},
    {"support": {"kind": "teacher_top_k", "k": 5}},
    {"support": {"kind": "student_top_k", "k": 5}},
    {"support": {"kind": "union", "k": 4}},
    {"support": "sampled", "alignment": "span"},
    {"support": "sampled", "alignment": "alm", "importance": "none"},
    {"support": "full", "alignment": "gold", "shape": "jsd"},
]


@pytest.fixture(scope="module")
def student():
    return crossing.model(STUDENT, seed=0)


@pytest.fixture(scope="module")
def made(student):
    """What it might have written, and what it wrote: end tokens, truncated answers, ids that no encoder gives."""
    return [*crossing.answers(STUDENT)[:4], *rooms.rollouts(student, STUDENT, samples=1)[1:4]]


def served(service, fmt, **what) -> ServedTeacher:
    agreement = agree(STUDENT, fmt)
    assert agreement.foreign
    settings = {"name": "teacher", "temperature": 1.0, "vocab_size": fmt.tokenizer.vocab_size, "parameter_count": 1}
    return ServedTeacher(service, fmt, agreement, **{**settings, "max_invalid": 0.05, **what})


def gradient_of(student, way, made, teacher):
    learner = rooms.learner(student, rooms.objective({"name": "kl", **way}))
    metrics = learner.gradients(made, Panel([teacher]).evidence(made))
    return rooms.gradient(student).clone(), metrics


@pytest.fixture(scope="module")
def local(model, fmt, student, made):
    """For each way the gradient and metrics of a local scorer."""
    teacher = rooms.teacher(model, fmt, STUDENT)
    return [gradient_of(student, way, made, teacher) for way in WAYS]


def want(rollouts, resolution: Resolution = "sampled", joined: Joined = "strict", **k: int) -> Want:
    return Want(resolution, frozenset(r.id for r in rollouts), joined=joined, **k)


@pytest.mark.parametrize("kind", ["vllm", "opd"])
def test_X_4_a_served_scorer_gives_the_gradients_of_a_local_one(kind, connected, student, made, fmt, local):
    ways = [n for n, way in enumerate(WAYS) if kind == "opd" or way["support"] != "full"]  # vLLM gives no states
    service = connected(kind, wants=[want(made, "full" if kind == "opd" else "sampled")])
    for n in ways:
        found, told = gradient_of(student, WAYS[n], made, served(service, fmt))
        expected, said = local[n]
        assert expected.norm() > 0 and rooms.distance(expected, found) < (1e-4 if kind == "vllm" else 1e-5), WAYS[n]
        assert told["scorer/teacher/coverage"] == said["scorer/teacher/coverage"] > 0.4
        assert told["invalid_scores"] == 0 and told["trained_tokens"] == said["trained_tokens"] > 0


def test_X_4_likely_tokens_that_the_student_lacks_keep_their_place_among_the_likeliest(model, fmt, student, made):
    """Two terms ask about both sides' likeliest: what the student named is none of the scorer's for want of others."""
    supports = ({"kind": "teacher_top_k", "k": 12}, {"kind": "student_top_k", "k": 40})
    terms = [{"name": support["kind"], "support": support} for support in supports]
    found = []
    for teacher in (rooms.teacher(model, fmt, STUDENT), served(Here(Stub(model, fmt.tokenizer)), fmt)):
        learner = rooms.learner(student, rooms.objective(*terms))
        learner.gradients(made, Panel([teacher]).evidence(made))
        found.append(rooms.gradient(student).clone())
    assert rooms.distance(*found) < 1e-5


@pytest.mark.parametrize("n", [0, 4, 5, 7])
def test_X_4_scores_that_were_kept_give_the_same_gradients_and_nobody_is_asked_again(
    n, model, student, made, fmt, tmp_path, local
):
    service = LocalService(rooms.teacher(model, fmt, STUDENT))
    first, _ = gradient_of(student, WAYS[n], made, served(CachedService(service, ScoreCache(tmp_path)), fmt))
    assert rooms.distance(local[n][0], first) < 1e-5
    if WAYS[n]["support"] == "full":
        return  # states are not kept
    calls = service.calls
    again = served(CachedService(None, ScoreCache(tmp_path, only=True), only=True, name="teacher"), fmt)
    second, _ = gradient_of(student, WAYS[n], made, again)
    assert torch.equal(first, second) and service.calls == calls > 0
    with pytest.raises(DataError, match="does not hold"):
        gradient_of(student, WAYS[n], crossing.answers(STUDENT, ["a fox"]), again)


def test_A_02_two_students_share_the_scores_of_one_text_and_of_nothing_else(model, student, fmt, tmp_path):
    """The key of a score is the scorer's own ids: what two students wrote is one question where it is one text."""
    other = crossing.fmt("wordpiece")
    texts = ["the lazy dog", "What is 12 + 7"]
    cache = ScoreCache(tmp_path)
    found = []
    for of in (STUDENT, other):
        service = LocalService(rooms.teacher(model, fmt, of))
        asked = ServedTeacher(
            CachedService(service, cache),
            fmt,
            agree(of, fmt),
            name="teacher",
            temperature=1.0,
            vocab_size=fmt.tokenizer.vocab_size,
            parameter_count=1,
            max_invalid=0.0,
        )
        made = crossing.answers(of, texts, cut=())
        evidence = asked.evidence(made)
        rows = evidence.read(pack(made, device=torch.device("cpu")), want(made, joined="span"))
        found.append((service.calls, float(rows.logprobs_T.sum()), len(rows.logprobs_T)))
    assert [calls for calls, _, _ in found] == [2, 0], "the second student's answers are the same text, ends included"
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5) and found[0][2] != found[1][2]


def test_X_01_a_missing_score_inside_a_span_takes_the_span_and_counts_in_the_students_tokens(model, fmt, student):
    """Neither 0.0 nor the rest of the span: the whole span is as if it were masked, and the step stops when too much is
    missing."""
    made = crossing.answers(STUDENT)
    spans = {r.id: agree(STUDENT, fmt).read(r).spans for r in made}
    counts = {key: [np.bincount(x[x >= 0]) for x in (s.span_T, s.span_U)] for key, s in spans.items()}
    wide = {key: (ours > 1) & (theirs > 1) for key, (ours, theirs) in counts.items()}
    victim = next(r for r in made if wide[r.id].any())
    cut, number = spans[victim.id], int(np.flatnonzero(wide[victim.id])[0])
    hole = int(np.flatnonzero(cut.span_U == number)[0])

    def alter(question, scores: Scores) -> Scores:
        if question.rollout_id != victim.id:
            return scores
        logprobs = scores.logprobs_T.copy()
        logprobs[hole] = np.nan
        return dataclasses.replace(scores, logprobs_T=logprobs)

    way = {"support": "sampled", "alignment": "span"}
    broken = served(Here(Stub(model, fmt.tokenizer), alter=alter), fmt)
    found, metrics = gradient_of(student, way, made, broken)
    masks = {victim.id: victim.mask & (cut.span_T != number)}
    masked = [dataclasses.replace(r, mask=masks.get(r.id, r.mask)) for r in made]
    expected, _ = gradient_of(student, way, masked, rooms.teacher(model, fmt, STUDENT))
    assert rooms.distance(expected, found) < 1e-5
    lost = int((cut.span_T == number).sum())
    assert metrics["scorer/teacher/invalid"] == lost
    mapped = sum(int((s.span_T >= 0).sum()) for s in spans.values())
    for bound, fine in ((lost / mapped, True), (lost / mapped - 1e-9, False)):
        teacher = served(Here(Stub(model, fmt.tokenizer), alter=alter), fmt, max_invalid=bound)
        if fine:
            gradient_of(student, way, made, teacher)
        else:
            with pytest.raises(BadService, match=f"no usable score for {lost} of the step's {mapped} tokens"):
                gradient_of(student, way, made, teacher)


def test_A_01_scores_over_a_part_of_the_vocabulary_are_not_kept_as_those_over_all_of_it(model, fmt):
    """A student with its tokenizer but fewer added tokens, and one with another tokenizer, share a cache folder."""
    part = CausalLM(model.module, vocab_size=model.vocab_size - 3, compute_dtype=torch.float32, name="part")
    teachers = [rooms.teacher(model, fmt, STUDENT), rooms.teacher(model, fmt), rooms.teacher(part, fmt)]
    foreign, own, cut = (LocalService(teacher).fingerprint for teacher in teachers)
    assert foreign == own != cut


@pytest.mark.parametrize("poison", [0.0, np.nan, -1e30])
@pytest.mark.parametrize("n", [4, 5])
def test_A_09_what_is_said_outside_of_spans_changes_no_bit(n, poison, model, student, made, fmt):
    """Template tokens, cut characters, changed text: whatever number stands there."""
    agreement = agree(STUDENT, fmt)
    reads = {r.id: agreement.read(r) for r in made}
    outside = {key: read.spans.span_U < 0 for key, read in reads.items()}
    assert sum(int(out.sum()) for out in outside.values()) > 5

    def alter(question, scores: Scores) -> Scores:
        def poisoned(values):
            at = outside[question.rollout_id]
            return None if values is None else np.where(at if values.ndim == 1 else at[:, None], poison, values)

        changed = {name: poisoned(getattr(scores, name)) for name in ("logprobs_T", "top_logprobs_TK", "chosen_TK")}
        changed = {name: None if x is None else x.astype(np.float32) for name, x in changed.items()}
        return dataclasses.replace(scores, **changed)

    stub = Stub(model, fmt.tokenizer)
    clean, _ = gradient_of(student, WAYS[n], made, served(Here(stub), fmt))
    found, metrics = gradient_of(student, WAYS[n], made, served(Here(stub, alter=alter), fmt))
    assert torch.equal(clean, found) and metrics["invalid_scores"] == 0


def test_the_student_names_its_likely_tokens_in_the_scorers_ids_where_both_are_one_token(model, fmt, student):
    here = Here(Stub(model, fmt.tokenizer))
    made = crossing.answers(STUDENT)
    gradient_of(student, {"support": {"kind": "student_top_k", "k": 5}}, made, served(here, fmt))
    agreement = agree(STUDENT, fmt)
    asked = {question.rollout_id: question for question in here.asked}
    for rollout in made:
        read = agreement.read(rollout)
        chosen_UK = asked[rollout.id].chosen_TK
        at_U = np.isin(read.spans.span_U, read.spans.span_T[read.spans.same_T]) & (read.spans.span_U >= 0)
        assert chosen_UK.shape == (len(read.ids), 5) and (chosen_UK[~at_U] == -1).all()
        assert (chosen_UK < fmt.tokenizer.vocab_size).all()
    assert any((question.chosen_TK >= 0).any() for question in asked.values())
    assert any((question.chosen_TK[:, 0] >= 0).any() for question in asked.values())


def test_a_server_of_the_students_own_tokenizer_in_place_of_the_scorers_is_refused(connected, fmt):
    small = crossing.model(STUDENT, seed=3)
    assert small.vocab_size > fmt.tokenizer.vocab_size
    with pytest.raises(ConfigError, match="tokenizer"):
        connected("opd", OwnStub(small, tokenizer_hash="another"))
