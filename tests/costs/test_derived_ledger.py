"""The published compute ratios of on-policy distillation come out of our ledger (methods 1.9)."""

from __future__ import annotations

import pytest

from opd.costs.ledger import Cost, Ledger, forward
from opd.costs.size import ModelSize

STEPS, PROMPTS, SAMPLES, TOKENS = 150, 512, 4, 4096
STUDENT = ModelSize(parameters=int(8.19e9), active_parameters=int(8.19e9))  # no attention, no prefill: 2 N per token
TEACHER = ModelSize(parameters=int(32.8e9), active_parameters=int(32.8e9))
SFT_TRAINING, SFT_DATA, PUBLISHED_TEACHER, PUBLISHED_STUDENT = 1.5e21, 3.4e21, 8.4e19, 8.2e19


@pytest.fixture
def ledger() -> Ledger:
    tokens = STEPS * PROMPTS * SAMPLES * TOKENS
    assert tokens == pytest.approx(1.258e9, rel=1e-3)
    made = Ledger()
    once = Cost(2.0 * STUDENT.active_parameters * tokens, tokens)
    assert once.flops == pytest.approx(forward(STUDENT, tokens).flops)
    made.add_cost("student_sampling", forward(STUDENT, tokens))
    made.add_cost("student_training", Cost(3 * forward(STUDENT, tokens).flops, tokens))
    made.add_cost("teacher_scoring", forward(TEACHER, tokens))
    made.add("sft_training", SFT_TRAINING, 0)
    made.add("sft_data", SFT_DATA, 0)
    return made


OPD = ("student_sampling", "student_training", "teacher_scoring")
SFT = ("sft_training", "sft_data")


def test_operations_of_student_and_teacher(ledger: Ledger) -> None:
    tokens = STEPS * PROMPTS * SAMPLES * TOKENS
    student = ledger.total(without=(*SFT, "teacher_scoring")).flops
    assert student == pytest.approx(8 * 8.19e9 * tokens)  # 2 for sampling and 6 for training
    assert student == pytest.approx(8.24e19, rel=1e-3) and student == pytest.approx(PUBLISHED_STUDENT, rel=0.01)
    teacher = ledger.parts["teacher_scoring"].flops
    assert teacher == pytest.approx(2 * 32.8e9 * tokens)
    assert teacher == pytest.approx(8.25e19, rel=1e-3) and teacher == pytest.approx(PUBLISHED_TEACHER, rel=0.03)


def test_the_three_ratios_are_three_ways_of_billing(ledger: Ledger) -> None:
    published = Ledger()
    published.add("student", PUBLISHED_STUDENT, 0)
    published.add("teacher_scoring", PUBLISHED_TEACHER, 0)
    published.add("sft_training", SFT_TRAINING, 0)
    published.add("sft_data", SFT_DATA, 0)
    opd = published.total(without=SFT).flops
    sunk = published.total(without=("student", "teacher_scoring", "sft_data")).flops
    billed = published.total(without=("student", "teacher_scoring")).flops
    free_teacher = published.total(without=("teacher_scoring", *SFT)).flops
    assert round(sunk / opd, 2) == 9.04
    assert round(billed / opd, 1) == 29.5
    assert round(sunk / free_teacher, 1) == 18.3
    # With our own counts of the same run, the ratios stay where they are to two per cent.
    ours = ledger.total(without=SFT).flops
    assert SFT_TRAINING / ours == pytest.approx(9.04, rel=0.02)
    assert (SFT_TRAINING + SFT_DATA) / ours == pytest.approx(29.5, rel=0.02)
