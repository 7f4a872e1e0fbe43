"""Teachers with another tokenizer on the real path: tokenizer, teacher, learner and objective together.

Three kinds of oracle: the same tokenizer with its ids shuffled, which must change nothing; the definitions written down
once more, from whole logits of both models; and the properties that every objective has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from opd.models.packing import plan
from opd.text.crossing import agree
from opd.types import Rollout
from tests import crossing, rooms

SAMPLED, TOP = {"support": "sampled"}, {"kind": "student_top_k", "k": 8}
KINDS: dict[str, dict[str, Any]] = {
    "strict": {"support": "full"},
    "strict top k": {"support": TOP},
    "strict drawn": SAMPLED,
    "span": {**SAMPLED, "alignment": "span"},
    "gold": {"support": "full", "alignment": "gold", "shape": "jsd"},
    "alm": {**SAMPLED, "alignment": "alm", "importance": "none", "shape": "forward_kl"},
}
STUDENT = crossing.fmt("byte_bpe")


def gradient_of(student, way: dict[str, Any], made: Sequence[Rollout], *teachers, **options) -> torch.Tensor:
    target = options.pop("target", {"kind": "single", "scorer": "teacher"})
    learner = rooms.learner(student, rooms.objective({"name": "kl", "target": target, **way}), **options)
    metrics = learner.gradients(made, rooms.panel(*teachers).evidence(made))
    assert np.isfinite(metrics["loss"]) and metrics["invalid_scores"] == 0
    return rooms.gradient(student)


@pytest.fixture(scope="module")
def student():
    return crossing.model(STUDENT, seed=0)


@pytest.fixture(scope="module")
def foreign():
    fmt = crossing.fmt("unigram")
    return rooms.teacher(crossing.model(fmt, seed=1, kind="llama"), fmt, STUDENT)


@pytest.fixture(scope="module")
def made(student):
    """Real text, and what a student writes that knows nothing: cut characters, end tokens in the middle, no words."""
    written = rooms.rollouts(student, STUDENT, samples=1)
    assert len({len(r.response_ids) for r in written}) > 2, "ragged answers are the point"
    return [*crossing.answers(STUDENT), *written]


# ---- another tokenizer that is the same one ------------------------------------------------------------------------

SHUFFLED: list[dict[str, Any]] = [
    {"support": "full"},
    {"support": "full", "shape": "jsd"},
    SAMPLED,
    {"support": TOP},
    {"support": {"kind": "teacher_top_k", "k": 8}},
    {"support": {"kind": "union", "k": 8}},
    {**SAMPLED, "credit": {"discount": 0.9}},
    {**SAMPLED, "alignment": "span"},
    {"support": "full", "alignment": "gold"},
]


@pytest.mark.parametrize("way", SHUFFLED, ids=str)
def test_A_02_a_tokenizer_with_its_ids_shuffled_changes_nothing(student, way) -> None:
    """The whole path against the one without it: no id of one vocabulary is ever read as one of the other."""
    other = crossing.model(STUDENT, seed=1)
    fmt, moved_V = crossing.permuted(STUDENT)
    shuffled = rooms.teacher(crossing.permuted_model(other, moved_V), fmt, STUDENT)
    assert shuffled.agreement.foreign
    made = crossing.answers(STUDENT)
    one = {key: value for key, value in way.items() if key != "alignment"}
    own = gradient_of(student, one, made, rooms.teacher(other, STUDENT))
    assert rooms.distance(own, gradient_of(student, way, made, shuffled)) < 1e-5
    itself = rooms.teacher(crossing.permuted_model(student, moved_V), fmt, STUDENT)
    assert gradient_of(student, way, made, itself).norm() < 1e-5 * own.norm(), "student = teacher"


# ---- the definitions once more -------------------------------------------------------------------------------------


def logprobs(model, prompt_ids, answer_ids) -> torch.Tensor:
    """[T, V] of the tokens of an answer, from a plain forward pass: row t is what predicts token t."""
    ids = torch.tensor(np.concatenate([prompt_ids, answer_ids]))[None]
    logits_TV = model.module(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits_TV, -1)


def naive(student, teacher, kind: str, made: Sequence[Rollout]) -> tuple[torch.Tensor, int]:
    """The loss of one kind of alignment, reverse KL, written for reading; and how many tokens it is a mean over."""
    agreement = teacher.agreement
    places = agreement.teacher_of_V
    shared_V = np.flatnonzero(places >= 0)
    rest_V, rest_U = np.flatnonzero(places < 0), np.setdiff1d(np.arange(teacher.vocab_size), places)
    w, tau = agreement.matched_share, 4.0
    losses, tokens = [], 0
    for rollout in made:
        read = agreement.read(rollout)
        spans = read.spans
        logp_TV = logprobs(student, rollout.prompt.ids, rollout.response_ids)
        with torch.no_grad():
            logq_UV = logprobs(teacher.model, teacher.format.prompt_ids(rollout.prompt.row), read.ids)
        drawn_T = logp_TV[np.arange(len(logp_TV)), rollout.response_ids]
        theirs_U = logq_UV[np.arange(len(logq_UV)), read.ids]
        for number in range(int(spans.span_T.max(initial=-1)) + 1):
            ours, own = np.flatnonzero(spans.span_T == number), np.flatnonzero(spans.span_U == number)
            if kind.startswith("strict") and not spans.same_T[ours].all():
                continue
            tokens += len(ours)
            logp, logq = drawn_T[ours].sum(), theirs_U[own].sum()
            if kind in ("strict drawn", "span"):
                losses.append(-(logq - logp).detach() * logp)
            elif kind == "alm":
                a, b = (logp / tau).exp(), (logq / tau).exp()
                losses.append(a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
            elif kind == "strict":
                p_V, q_U = logp_TV[ours[0]].exp(), logq_UV[own[0]].exp()
                p = torch.cat([p_V[shared_V], p_V[rest_V].sum()[None]])
                q = torch.cat([q_U[places[shared_V]], q_U[rest_U].sum()[None]])
                losses.append((p * (p / q).log()).sum())
            else:
                P_V = (drawn_T[ours[:-1]].sum() + logp_TV[ours[-1]]).exp()
                Q_U = (theirs_U[own[:-1]].sum() + logq_UV[own[-1]]).exp()
                if kind == "uld":
                    losses.append(ranked(P_V, Q_U))
                    continue
                if kind == "gold by tokens" or spans.same_T[ours].all():
                    P, Q, far = P_V[shared_V], Q_U[places[shared_V]], ranked(P_V[rest_V], Q_U[rest_U])
                else:  # behind other beginnings only what was written is one text
                    y, u = rollout.response_ids[ours[-1]], read.ids[own[-1]]
                    others = np.arange(len(P_V)) != y, np.arange(len(Q_U)) != u
                    P, Q, far = P_V[y], Q_U[u], ranked(P_V[others[0]], Q_U[others[1]])
                losses.append(w * (P * (P / Q).log() - P + Q).sum() + (1 - w) * far)
    return torch.stack(losses).sum() / tokens, tokens


def ranked(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    size = max(len(p), len(q))
    p, q = (torch.nn.functional.pad(x, (0, size - len(x))).sort(descending=True).values for x in (p, q))
    return (p - q).abs().sum()


NAIVE = {
    "strict": {"support": "full"},
    "strict drawn": SAMPLED,
    "span": {**SAMPLED, "alignment": "span"},
    "gold": {"support": "full", "alignment": "gold"},
    "gold by tokens": {"support": "full", "alignment": {"kind": "gold", "match": "token"}},
    "uld": {"support": "full", "alignment": {"kind": "gold", "sort": "all"}},
    "alm": {**SAMPLED, "alignment": {"kind": "alm", "tau": 4.0}, "importance": "none"},
}


@pytest.mark.parametrize("kind", NAIVE)
@pytest.mark.parametrize("family", ["unigram", "wordpiece"])
def test_A_05_A_08_the_real_loop_is_what_the_definition_says(family: str, kind: str, made) -> None:
    """float64: nothing is read one token late, no span's credit is split, no token outside of spans is counted."""
    fmt = crossing.fmt(family)
    student = crossing.model(STUDENT, seed=0, dtype=torch.float64)
    teacher = rooms.teacher(crossing.model(fmt, seed=1, kind="llama", dtype=torch.float64), fmt, STUDENT)
    student.module.zero_grad()
    loss, tokens = naive(student, teacher, kind, made)
    loss.backward()
    expected = rooms.gradient(student).clone()
    learner = rooms.learner(student, rooms.objective({"name": "kl", **NAIVE[kind]}))
    metrics = learner.gradients(made, rooms.panel(teacher).evidence(made))
    assert metrics["trained_tokens"] == tokens > 10
    assert rooms.distance(expected, rooms.gradient(student)) < 1e-9
    if kind not in ("strict drawn", "span"):  # these report a surrogate
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)


# ---- what holds for every objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_M_01_M_05_M_07_accumulation_order_padding_and_tiles_change_nothing(student, foreign, made, name: str) -> None:
    way = KINDS[name]
    whole = gradient_of(student, way, made, foreign)
    assert whole.norm() > 0
    for budget in (1, 60):
        assert len(plan(made, budget)) > 2
        assert rooms.distance(whole, gradient_of(student, way, made, foreign, tokens_per_micro_batch=budget)) < 1e-5
    shuffled = [made[i] for i in np.random.default_rng(0).permutation(len(made))]
    assert rooms.distance(whole, gradient_of(student, way, shuffled, foreign)) < 1e-5
    small = {"chunk_tokens": 3, "share_prompts": False}  # spans lie across tiles
    assert rooms.distance(whole, gradient_of(student, way, made, foreign, learner=small, padding_side="left")) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_O_19_swapping_the_teacher_changes_the_gradient(student, foreign, made, name: str) -> None:
    other = rooms.teacher(crossing.model(foreign.format, seed=5), foreign.format, STUDENT)
    ours = gradient_of(student, KINDS[name], made, foreign)
    assert rooms.distance(ours, gradient_of(student, KINDS[name], made, other)) > 0.05


@pytest.mark.parametrize("name", KINDS)
def test_A_07_the_end_of_an_answer_is_learned_from_the_teachers_own_end(student, foreign, name: str) -> None:
    """An answer that is nothing but its end; without one there is nothing to learn about stopping."""
    ended = crossing.answers(STUDENT, ["efgh"], cut=())
    (rollout,) = ended
    only = [dataclasses.replace(rollout, mask=np.arange(len(rollout.mask)) == len(rollout.mask) - 1)]
    assert agree(STUDENT, foreign.format).read(rollout).ids[-1] == foreign.format.end_ids[0]
    assert gradient_of(student, KINDS[name], only, foreign).norm() > 0
    empty = [dataclasses.replace(r, response_ids=r.response_ids[-1:], mask=r.mask[-1:]) for r in ended]
    empty = [dataclasses.replace(r, behaviour_logprobs=r.behaviour_logprobs[-1:]) for r in empty]
    assert gradient_of(student, KINDS[name], empty, foreign).norm() > 0


def test_metrics_say_how_much_of_the_text_the_teacher_reads(student, foreign, made) -> None:
    learner = rooms.learner(student, rooms.objective({"name": "kl", **KINDS["span"]}))
    metrics = learner.gradients(made, rooms.panel(foreign).evidence(made))
    reads = [foreign.agreement.read(r) for r in made]
    tokens = sum(len(r.response_ids) for r in made)
    inside = sum(int((r.spans.span_T >= 0).sum()) for r in reads)
    count = sum(int(r.spans.span_T.max(initial=-1)) + 1 for r in reads)
    assert metrics["scorer/teacher/coverage"] == pytest.approx(inside / tokens) and inside < tokens
    assert metrics["scorer/teacher/same"] == pytest.approx(sum(int(r.spans.same_T.sum()) for r in reads) / tokens)
    assert metrics["scorer/teacher/span_tokens"] == pytest.approx(inside / count)
    own = sum(int((r.spans.span_U >= 0).sum()) for r in reads)
    assert metrics["scorer/teacher/span_own_tokens"] == pytest.approx(own / count)
    assert metrics["trained_tokens"] == inside and metrics["term/kl/masked/unmapped"] == pytest.approx(
        1 - inside / tokens
    )


def test_A_09_tokens_outside_of_spans_show_no_score_and_cost_no_second_pass(student, foreign, made) -> None:
    passes = []

    class Counted:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def pull(self, batch, wants):
            passes.append(len(batch.rollouts))
            return self.inner.pull(batch, wants)

    learner = rooms.learner(student, rooms.objective({"name": "kl", **KINDS["span"]}))
    report = learner.update(made, Counted(rooms.panel(foreign).evidence(made)))
    assert sum(passes) <= len(made), "each answer is read once"
    for rollout in made:
        span_T = foreign.agreement.read(rollout).spans.span_T
        assert (np.isfinite(report.scores[rollout.id].teacher_logprobs) == (span_T >= 0)).all()


def test_X_01_states_that_are_missing_at_the_end_of_a_span_take_all_of_it(student, foreign, made) -> None:
    """With gold there is one row for a span: its other tokens go with it, and are counted."""
    rollout = max(made, key=lambda r: np.bincount(foreign.agreement.read(r).spans.span_T + 1)[1:].max(initial=0))
    span_T = foreign.agreement.read(rollout).spans.span_T
    number = int(np.bincount(span_T[span_T >= 0]).argmax())
    tokens = int((span_T == number).sum())
    assert tokens > 1
    at = int(np.flatnonzero(span_T == number)[-1])

    class Broken:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def pull(self, batch, wants):
            (rows,) = self.inner.pull(batch, wants)
            ids = [r.id for r in batch.rollouts]
            if rollout.id in ids:
                place = sum(len(r.response_ids) for r in batch.rollouts[: ids.index(rollout.id)]) + at
                bad_T = rows.index_T == place
                rows.valid_T[bad_T] = False
                rows.hidden_TD[bad_T] = torch.nan
            return [rows]

    learner = rooms.learner(student, rooms.objective({"name": "kl", **KINDS["gold"]}))
    metrics = learner.gradients(made, Broken(rooms.panel(foreign).evidence(made)))
    found = rooms.gradient(student).clone()
    assert metrics["scorer/teacher/invalid"] == tokens
    masked = [dataclasses.replace(r, mask=r.mask & (span_T != number)) if r is rollout else r for r in made]
    assert rooms.distance(found, gradient_of(student, KINDS["gold"], masked, foreign)) < 1e-5


# ---- routing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_X_12_each_domain_learns_from_its_own_teacher_whatever_tokens_that_has(student, name: str) -> None:
    """Two families and the student's own tokenizer in one batch: the gradient is the sum of what each domain gives by
    itself, in the share of its tokens."""
    domains = ("sums", "words", "own")
    teachers = [
        rooms.teacher(crossing.model(fmt, seed=n + 1), fmt, STUDENT, name=f"t{n}")
        for n, fmt in enumerate([crossing.fmt("unigram"), crossing.fmt("wordpiece"), STUDENT])
    ]
    assert [t.agreement.foreign for t in teachers] == [True, True, False]
    made = crossing.answers(STUDENT, domains=domains)
    target = {"kind": "routed", "routes": dict(zip(domains, ("t0", "t1", "t2"), strict=True))}
    parts, counts = [], []
    for n, domain in enumerate(domains):
        alone = [r for r in made if r.domain == domain]
        single = {"kind": "single", "scorer": f"t{n}"}
        parts.append(gradient_of(student, KINDS[name], alone, teachers[n], target=single).clone())
        learner = rooms.learner(student, rooms.objective({"name": "kl", "target": single, **KINDS[name]}))
        evidence = rooms.panel(teachers[n]).evidence(alone)
        planned = learner.objective.plan(0, alone, {}, spans=evidence.spans())
        counts.append(planned.metrics()["term/kl/tokens"])
    expected = sum(count * part for count, part in zip(counts, parts, strict=True)) / sum(counts)
    for budget in (10_000, 1):
        found = gradient_of(student, KINDS[name], made, *teachers, target=target, tokens_per_micro_batch=budget)
        assert rooms.distance(expected, found) < 1e-5
