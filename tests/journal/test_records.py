from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.journal.records import gap_closed, line, plain, rollout_row, summary_record, to_json
from opd.types import TokenScores
from tests.journal.parts import rollouts

# fmt: off
SUMMARY_KEYS = [
    "schema_version", "status", "preset", "task", "n", "k", "ci_method", "student_before", "student_after", "teacher",
    "gap_closed", "seconds", "seconds_by_phase", "tokens", "flops", "steps", "resumes", "stopped_by",
    "limit",
]
# fmt: on
scores = st.floats(0, 1)


def make_summary(**changes):
    given = {
        "status": "done",
        "preset": "reverse_kl",
        "task": "sort",
        "n": 500,
        "k": 1,
        "ci_method": "wilson 95%",
        "student_before": {"mean": 0.742, "low": 0.702, "high": 0.779},
        "student_after": {"mean": 0.95, "low": 0.93, "high": 0.966},
        "teacher": {"mean": 0.99, "low": 0.977, "high": 0.996},
        "seconds": 112,
        "seconds_by_phase": {"sampling": 60.0},
        "tokens": 3_123_456,
        "flops": 1.2e15,
        "steps": 300,
    }
    return summary_record(**{**given, **changes})


def test_metrics_line_turns_what_json_lacks_into_null_and_names_it():
    numbers = {"step": 3, "loss": math.nan, "grad_norm": np.float32("inf"), "lr": np.float64(1e-5), "ok": np.True_}
    made = json.loads(to_json(line(numbers)))
    assert made["non_finite"] == ["loss", "grad_norm"]
    assert made["loss"] is None and made["grad_norm"] is None
    assert made["lr"] == 1e-5 and made["ok"] is True and made["step"] == 3 and made["schema_version"] == 1
    assert "non_finite" not in line({"loss": 1.0})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=9,
    )
)
def test_every_plain_value_is_one_line_of_strict_json(value):
    data = to_json(plain(value))
    assert data.count(b"\n") == 1 and data.endswith(b"\n")
    assert json.loads(data, parse_constant=pytest.fail) == plain(value)


def test_lone_surrogate_of_a_model_can_be_written():
    assert json.loads(to_json({"text": "a\ud800b"}))["text"] == "a\ud800b"


def test_dump_values_spell_non_finite_numbers_and_take_tensors():
    value = {"loss": math.nan, "top": torch.tensor([math.inf, 1.5], dtype=torch.bfloat16), "ids": np.arange(3)}
    assert plain(value) == {"loss": "NaN", "top": ["Infinity", 1.5], "ids": [0, 1, 2]}
    with pytest.raises(TypeError, match=r"a\.0.*object"):
        plain({"a": [object()]})


def test_rollout_row_keeps_ids_and_float32_logprobs_exactly():
    rollout = rollouts(tokens=200)[0]
    row = json.loads(to_json(rollout_row(rollout, "prompt", "answer")))
    assert np.array_equal(np.array(row["behaviour_logprobs"], np.float32), rollout.behaviour_logprobs)
    assert max(len(repr(x)) for x in row["behaviour_logprobs"]) <= 15, "float32's own digits, not float64's"
    assert row["response_ids"] == rollout.response_ids.tolist() and row["prompt_ids"] == rollout.prompt.ids.tolist()
    assert row["mask"] == [0] + [1] * 199 and row["turns"] == [[0, 200]]
    data = replace(rollout, behaviour_logprobs=np.full(200, np.nan, np.float32), behaviour="dataset")
    assert rollout_row(data, "", "")["behaviour_logprobs"] == [None] * 200


def test_rollout_row_has_scores_to_four_decimals_where_there_are_any():
    rollout = rollouts(tokens=5)[0]
    teacher = np.array([np.nan, -1.23456789, -0.00004, -np.inf, -100.0], np.float32)
    scores = TokenScores(student_logprobs=teacher, teacher_logprobs=teacher, reverse_kl=np.float32([0, 1, 2, 3, 4]) / 3)
    row = json.loads(to_json(rollout_row(rollout, "", "", scores)))
    assert row["teacher_logprobs"] == [None, -1.2346, 0.0, None, -100.0]
    assert row["reverse_kl"] == [0, 0.3333, 0.6667, 1, 1.3333], "decimals of the number, not of float32"
    assert {"teacher_logprobs", "reverse_kl"}.isdisjoint(rollout_row(rollout, "", ""))


def test_summary_has_exactly_the_keys_of_the_contract():
    summary = make_summary()
    assert list(summary) == SUMMARY_KEYS
    assert summary["gap_closed"] == pytest.approx((0.95 - 0.742) / (0.99 - 0.742))
    nothing = make_summary(student_before=None, student_after=None, teacher=None, task=None, n=None, k=None)
    assert nothing["gap_closed"] is None and nothing["teacher"] is None and list(nothing) == SUMMARY_KEYS


def test_summary_takes_fractions_and_forgives_rounding_only():
    assert make_summary(teacher={"mean": 0.0, "low": 1e-18, "high": 0.01})["teacher"]["low"] == 0.0
    with pytest.raises(AssertionError):
        make_summary(teacher={"mean": 95.0, "low": 93.0, "high": 96.0})
    with pytest.raises(AssertionError):
        make_summary(teacher={"mean": 0.9, "low": 0.95, "high": 0.8})


@given(scores, scores, scores)
def test_gap_closed_is_null_unless_the_teacher_is_above(before, after, teacher):
    gap = gap_closed(before, after, teacher)
    if teacher > before:
        assert gap is not None and before + gap * (teacher - before) == pytest.approx(after, abs=1e-9)
    else:
        assert gap is None


def test_gap_closed_values():
    assert gap_closed(0.5, 0.9, 0.9) == 1.0
    assert gap_closed(0.5, 0.4, 0.9) == pytest.approx(-0.25)
    assert gap_closed(0.5, 0.95, 0.9) == pytest.approx(1.125)
    assert gap_closed(None, 0.9, 0.9) is gap_closed(0.5, None, 0.9) is gap_closed(0.5, 0.9, None) is None
