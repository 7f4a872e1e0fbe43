"""Cross-entropy on answers that somebody else wrote."""

from __future__ import annotations

from opd.config.behaviours import DatasetWrites, TeacherWrites
from opd.config.objective import DataTerm
from opd.config.presets.registry import Preset, method
from opd.config.schema import Scorer


@method("supervised fine-tuning")
def sft() -> Preset:
    """- mean over the tokens of the data of log p(y_t)"""
    return Preset(DatasetWrites(), (DataTerm(name="sft"),))


@method("Kim and Rush, Sequence-Level Knowledge Distillation (EMNLP 2016), arXiv 1606.07947, with samples for its beam")
def seqkd() -> Preset:
    """- mean over tokens that the teacher sampled of log p(y_t)"""
    return Preset(TeacherWrites(), (DataTerm(name="seqkd"),))


@method("Thinking Machines, On-Policy Distillation (2025), doi 10.64434/tml.20251026: the control that gets worse")
def self_sft() -> Preset:
    """- mean over tokens that the student sampled before training of log p(y_t): zero in expectation at the start"""
    return Preset(TeacherWrites(), (DataTerm(name="self_sft"),), scorers={"teacher": Scorer(weights="initial")})
