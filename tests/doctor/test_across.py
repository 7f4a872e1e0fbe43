"""A scorer with another tokenizer: the figures of stage 4, which are those of one tokenizer where only the ids differ,
and what is said about how the tokens fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd.config.loading import load_config
from opd.doctor import templates
from opd.doctor.alignment import alignment_finding
from opd.doctor.evidence import read, student_reader
from opd.doctor.examine import Options, examine
from opd.doctor.findings import Finding
from opd.doctor.support import divergence_findings, support_finding
from opd.teachers.local import LocalTeacher
from opd.teachers.local_service import LocalService
from opd.teachers.served.served import ServedTeacher
from opd.teachers.service import Capabilities
from opd.text.agreement import compare
from opd.text.crossing import Crossing, agree
from tests import crossing, rooms

SETTINGS = {"chunk_tokens": 7, "temperature": 1.0, "share_prompts": True}
STUDENT = crossing.fmt("byte_bpe")
ANSWERS = crossing.answers(STUDENT)
DISTRIBUTIONS = (
    "reverse_T",
    "forward_T",
    "entropy_p_T",
    "entropy_q_T",
    "overlap_T",
    "shared_T",
    "outside_p_T",
    "outside_q_T",
)


@pytest.fixture(scope="module")
def twins():
    """The student, a teacher with its tokens, and the same one with its ids shuffled."""
    fmt, moved_V = crossing.permuted(STUDENT)
    reader = student_reader(crossing.model(STUDENT), STUDENT, **SETTINGS)
    own = crossing.model(STUDENT, seed=1)
    other = LocalTeacher(crossing.permuted_model(own, moved_V), fmt, agree(STUDENT, fmt), name="teacher", **SETTINGS)
    return reader, rooms.teacher(own, STUDENT), other, moved_V


def test_figures_are_those_of_one_tokenizer_where_only_the_ids_differ(twins):
    reader, same, other, moved_V = twins
    one = read(ANSWERS, reader, same, tokens_per_micro_batch=64)
    two = read(ANSWERS, reader, other, tokens_per_micro_batch=64)
    assert two.resolution == "full" and two.mapped_T.all()
    for name in ("drawn_p_T", "drawn_q_T", *DISTRIBUTIONS):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-3, atol=2e-5, err_msg=name)
    assert (two.first_q_T == moved_V[one.first_q_T]).all(), "in the teacher's own numbering"
    assert (two.row_T == one.row_T).all() and (two.place_T == one.place_T).all()


class Few(LocalService):
    """A server that names a few of its likeliest tokens."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(top_k=50)


def few_of(teacher: LocalTeacher) -> ServedTeacher:
    fmt = teacher.format
    alone = LocalTeacher(teacher.model, fmt, compare(fmt, fmt), name="teacher", **SETTINGS)
    settings = {"name": "teacher", "temperature": 1.0, "vocab_size": teacher.vocab_size, "parameter_count": 1}
    return ServedTeacher(Few(alone), fmt, teacher.agreement, max_invalid=0.5, **settings)


def test_a_few_entries_of_a_server_say_what_they_say_of_one_tokenizer(twins):
    reader, same, other, moved_V = twins
    one, two = (read(ANSWERS, reader, few_of(teacher), tokens_per_micro_batch=64) for teacher in (same, other))
    assert two.resolution == "entries" and two.k == one.k == 16
    for name in ("drawn_q_T", "reverse_T", "forward_T", "overlap_T", "shared_T", "outside_p_T", "entropy_q_T"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-3, atol=2e-5, err_msg=name)
    assert (two.first_q_T == moved_V[one.first_q_T]).all()
    drawn = read(ANSWERS, reader, few_of(other), tokens_per_micro_batch=64, wanted="sampled")
    np.testing.assert_allclose(drawn.drawn_q_T, two.drawn_q_T, atol=2e-5)
    assert drawn.resolution == "sampled" and np.isnan(drawn.overlap_T).all()


@pytest.mark.parametrize("family", ["unigram", "wordpiece"])
def test_A_9_of_other_tokens_spans_add_up_and_the_rest_is_unknown(family: str):
    fmt = crossing.fmt(family)
    agreement = agree(STUDENT, fmt)
    assert isinstance(agreement, Crossing)
    reader = student_reader(crossing.model(STUDENT), STUDENT, **SETTINGS)
    other = LocalTeacher(crossing.model(fmt, seed=1), fmt, agreement, name="teacher", **SETTINGS)
    seen = read(ANSWERS, reader, other, tokens_per_micro_batch=64)
    small = read(ANSWERS, reader, other, tokens_per_micro_batch=1)
    spans = [agreement.read(rollout).spans for rollout in ANSWERS]
    inside_T = np.concatenate([s.span_T >= 0 for s in spans])
    begins_T = np.concatenate([(s.span_T >= 0) & (np.diff(s.span_T, prepend=-1) != 0) for s in spans])
    assert (seen.mapped_T == inside_T).all() and (np.isfinite(seen.drawn_q_T) == inside_T).all()
    for name in ("reverse_T", "forward_T", "entropy_q_T", "overlap_T"):
        assert (np.isfinite(getattr(seen, name)) == begins_T).all(), "where a span begins"
        np.testing.assert_allclose(getattr(small, name), getattr(seen, name), rtol=1e-3, atol=1e-5)
    alone = read(ANSWERS, reader, reader, tokens_per_micro_batch=64)
    at = 0
    for s in spans:
        for n in range(int(s.span_T.max(initial=-1)) + 1):
            of_T = at + np.flatnonzero(s.span_T == n)
            assert seen.drawn_p_T[of_T].sum() == pytest.approx(alone.drawn_p_T[of_T].sum(), abs=1e-5)
            assert np.ptp(seen.log_ratio_T[of_T]) < 1e-9, "equal shares"
        at += len(s.span_T)
    assert (seen.reverse_T[begins_T] >= 0).all() and (seen.forward_T[begins_T] >= 0).all()


def test_overlap_across_tokenizers_is_said_and_judged_by_nobody(twins):
    reader, _, other, _ = twins
    seen = read(ANSWERS, reader, other, tokens_per_micro_batch=64)
    apart = replace(seen, overlap_T=np.zeros(len(seen)), outside_p_T=np.ones(len(seen)))
    assert support_finding("teacher", apart, None, able=True).level == "stop"
    across = support_finding("teacher", apart, None, able=True, foreign=True)
    assert across.level == "note" and "among tokens that both have" in across.said
    findings = {f.check: f for f in divergence_findings("teacher", seen, 300, drawn=False, foreign=True)}
    assert "where spans begin, over shared tokens" in findings["divergence"].said


# ---- how tokens fit -------------------------------------------------------------------------------------------------


def found(family: str, kind: str = "strict", texts=crossing.TEXTS) -> Finding:
    agreement = agree(STUDENT, crossing.fmt(family))
    assert isinstance(agreement, Crossing)
    return alignment_finding("teacher", agreement, crossing.answers(STUDENT, texts), kind)


def test_what_differs_is_named_and_strict_is_warned_of_where_little_is_the_same():
    finding = found("wordpiece", texts=["the quick brown fox, again and again", "12 + 7 = 19"])
    assert finding.figures["same"] < 0.7 < finding.figures["coverage"]
    assert finding.level == "warn" and finding.change == ("objective.preset=span",)
    assert "alone; span, gold or alm all" in finding.means
    assert sum(finding.figures["differ"].values()) == pytest.approx(1) and finding.figures["spans"]
    assert finding.figures["spans"][0] in finding.said and "words" in finding.said
    fine = found("wordpiece", "span", texts=["the quick brown fox, again and again", "12 + 7 = 19"])
    assert fine.level == "ok" and not fine.change


def test_text_that_the_teacher_does_not_read_is_named_and_stops_when_it_is_most_of_it():
    finding = found("wordpiece", "span", texts=["the fox, naïve — über", "x"])
    assert finding.level == "warn" and 1 / 3 < finding.figures["coverage"] < 0.8
    assert "are not trained, and nothing keeps the student from writing more of them" in finding.means
    assert "Not in a span, most often" in finding.said and finding.figures["unmapped"]
    stop = found("wordpiece", "span", texts=["中文分词，日本語のテキスト", "한국어 문장"])
    assert stop.level == "stop" and stop.asks == "another_teacher" and stop.change == ("teacher.model=...",)


def test_A_7_an_answer_of_a_foreign_teacher_becomes_the_students_with_its_end():
    fmt = crossing.fmt("unigram", end_tokens=("<|endoftext|>", "<|im_end|>"))
    agreement = agree(STUDENT, fmt)
    (prompt, *_) = rooms.prompts(STUDENT)
    theirs = [
        rooms.answer(prompt, [*fmt.tokenizer.encode("12 + 7"), fmt.end_ids[1]], [], n=0),
        rooms.answer(prompt, fmt.tokenizer.encode("12 + 7"), [], n=1, finish_reason="length"),
    ]
    ended, cut = templates.as_student(theirs, [prompt, prompt], agreement)
    assert [STUDENT.decode(r.response_ids).strip() for r in (ended, cut)] == ["12 + 7", "12 + 7"]
    assert ended.response_ids[-1] == STUDENT.end_ids[0] and cut.response_ids[-1] != STUDENT.end_ids[0]
    assert len(ended.mask) == len(ended.behaviour_logprobs) == len(ended.response_ids)


def test_a_run_with_other_tokens_is_looked_at_to_the_end(tmp_path: Path):
    """Random models: what is advised says nothing, but every check has its say."""
    config = load_config(
        [],
        base={
            "student": {"model": crossing.save(tmp_path / "student", "byte_bpe")},
            "teacher": {"model": crossing.save(tmp_path / "teacher", "unigram", seed=1)},
            "prompts": {"sources": [{"kind": "inline", "rows": ["What is 12 + 7?", "hi"]}], "per_step": 2},
            "sampling": {"max_tokens": 12, "samples_per_prompt": 4},
            "objective": {"preset": "span"},
            "run": {"steps": 2, "threads": 1},
        },
    ).config
    report = examine(config, Options(rollouts=8, updates=False))
    checks = {finding.check: finding for finding in report.findings}
    assert {"agreement", "memory", "self", "teacher", "length", "alignment", "support", "divergence"} <= checks.keys()
    assert 0 < checks["alignment"].figures["coverage"] < 1, "random bytes are no whole characters"
    assert checks["teacher"].level == "ok" and checks["teacher"].figures["without_score"] == 0, "unread is not lost"
