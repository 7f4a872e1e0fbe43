"""The audit of a loss function: what its gradient is on average, found by writing down every answer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd.errors import BadInput
from opd.objectives.audit.averaging import Averaging, averaging
from opd.objectives.audit.calling import LossFunction, answer, gradient, masked, padded, teacher_gradient
from opd.objectives.audit.findings import ZERO, Findings, Match
from opd.objectives.audit.references import SEQUENCE, references
from opd.objectives.oracle.estimators import Drawn, bias, over_answers
from opd.objectives.oracle.tabular import Tree, tree

VOCABULARY, LONGEST, END = 5, 3, 0
PAIRS = ((0, 100), (1, 101), (2, 102))  # seeds of student and teacher: agreeing on all of them by chance is unlikely
OTHER_TEACHER, WRITER = 200, 300


@dataclass(frozen=True)
class Average:
    """Over all pairs, flattened: the expected gradient, and the mean squared size of one answer's."""

    mean: Tensor
    second_moment: float

    @property
    def typical(self) -> float:
        return math.sqrt(self.second_moment)


@dataclass(frozen=True)
class Subject:
    """A loss function on the audit's models."""

    loss: LossFunction
    tree: Tree
    averaging: Averaging

    def table(self, seed: int) -> Tensor:
        return self.tree.random_table(seed)

    def average(self, *, teacher: int | None = None, equal: bool = False, writer: int | None = None) -> Average:
        """The exact expectation over answers of the student (or of a writer), for every pair.

        teacher   seed of another teacher for all pairs; equal: the student itself is the teacher.
        """
        means: list[Tensor] = []
        second = 0.0
        for student_seed, teacher_seed in PAIRS:
            student_SV = self.table(student_seed)
            teacher_SV = student_SV if equal else self.table(teacher_seed if teacher is None else teacher)
            writer_SV = student_SV if writer is None else self.table(writer)
            grad_NTV = self.every_answer(student_SV, teacher_SV, writer_SV)
            made = over_answers(self.tree, grad_NTV, self.tree.chances(writer_SV))
            means.append(made.mean_SV.flatten())
            second += made.variance + float(made.mean_SV.square().sum())
        return Average(torch.cat(means), second)

    def every_answer(self, student_SV: Tensor, teacher_SV: Tensor, writer_SV: Tensor) -> Tensor:
        """[N, T, V]: the gradient that each answer gives in a call of its own, as it counts in a large batch."""
        lengths_N = self.tree.mask_NT.sum(-1)
        grad_NTV = torch.zeros(*self.tree.token_NT.shape, self.tree.vocab_size, dtype=torch.float64)
        for n, length in enumerate(lengths_N.tolist()):
            made = gradient(self.loss, answer(self.tree, n, student_SV, teacher_SV, writer_SV))[0]
            grad_NTV[n, :length] = made * length if self.averaging.by_length else made
        return grad_NTV


def audit(loss: LossFunction, name: str = "loss") -> Findings:
    """Finds out what a loss function trains, on models with five tokens and answers of one to three.

    loss   called as loss(student_logits [N, T, V], teacher_logits [N, T, V], tokens int64 [N, T], mask bool [N, T],
           behaviour_logprobs [N, T]) with float64 values; logits at t predict tokens[:, t]. It returns a scalar, or a
           loss per token [N, T], and is called many times: it must not keep state or draw random numbers.
    Raises BadInput when the function raises, returns something else, or is not a function of its arguments.
    """
    world = tree(VOCABULARY, LONGEST, END)
    student, teacher = (world.random_table(seed) for seed in PAIRS[0])
    subject = Subject(loss, world, averaging(loss, world, student, teacher))
    average = subject.average()
    _finite_and_fixed(subject, average)
    zero = float(average.mean.norm()) <= ZERO * average.typical
    matches = () if zero else _matches(subject, average)
    swapped = subject.average(teacher=OTHER_TEACHER)
    equal = subject.average(equal=True)
    typical = average.typical or 1.0
    spread = math.sqrt(max(average.second_moment - float(average.mean.square().sum()), 0.0))
    findings = Findings(
        function=name,
        averaging=subject.averaging.name,
        splits=subject.averaging.splits,
        expected=float(average.mean.norm()) / typical,
        noise=spread / float(average.mean.norm()) if not zero else math.inf if spread else 0.0,
        matches=matches,
        stale=None,
        teacher_in_mean=float((average.mean - swapped.mean).norm()) / typical,
        teacher_in_answers=_in_answers(subject),
        teacher_held=not teacher_gradient(loss, _long(subject)).nan_to_num(1.0).any(),
        mean_at_teacher=float(equal.mean.norm()) / typical,
        answers_at_teacher=equal.typical / typical,
        **_masks(subject),
        finite=_infinities(subject),
    )
    return dataclasses.replace(findings, stale=_stale(subject, findings))


def _finite_and_fixed(subject: Subject, average: Average) -> None:
    if not average.mean.isfinite().all():
        raise BadInput(
            "the loss function's gradient is not finite on ordinary logits; every token has a probability here, so "
            "look for log(0), 0 * inf or a division by a count that can be 0"
        )
    row = _long(subject)
    first, second = gradient(subject.loss, row), gradient(subject.loss, row)
    if not torch.equal(first, second):
        raise BadInput(
            "the loss function gave two gradients for the same rows; it must be a function of its arguments alone, "
            "without random numbers or running averages"
        )


def _matches(subject: Subject, average: Average) -> tuple[Match, ...]:
    made: list[Match] = []
    for name, wanted in _fields().items():
        if wanted.norm() > ZERO:
            found = bias(average.mean, wanted)
            scale = float((average.mean * wanted).sum() / wanted.square().sum())
            residual = float((average.mean - scale * wanted).norm() / average.mean.norm())
            made.append(Match(name, found.cosine, scale, found.relative, residual))
    return tuple(sorted(made, key=lambda match: -round(match.cosine, 9)))


@cache
def _fields() -> dict[str, Tensor]:
    """Name to the reference gradients of all pairs, flattened; the same for every function."""
    world = tree(VOCABULARY, LONGEST, END)
    pairs = [(world.random_table(student), world.random_table(teacher)) for student, teacher in PAIRS]
    return {
        name: torch.cat([field(world, student, teacher, None).flatten() for student, teacher in pairs])
        for name, field in references(VOCABULARY).items()
    }


def _stale(subject: Subject, findings: Findings) -> float | None:
    match = findings.follows
    if match is None or match.name == SEQUENCE:
        return None
    field = references(VOCABULARY)[match.name]
    writer = subject.table(WRITER)
    wanted = torch.cat([field(subject.tree, subject.table(s), subject.table(t), writer).flatten() for s, t in PAIRS])
    return bias(subject.average(writer=WRITER).mean, match.scale * wanted).relative


def _in_answers(subject: Subject) -> float:
    """Change of single answers' gradients when the teacher is another one, root mean square over answers."""
    student, one, other = (subject.table(seed) for seed in (*PAIRS[0], OTHER_TEACHER))
    grads = [subject.every_answer(student, teacher, student) for teacher in (one, other)]
    chance_N = subject.tree.chances(student)
    change, size = (float((chance_N * value.square().sum((1, 2))).sum()) for value in (grads[0] - grads[1], grads[0]))
    return math.sqrt(change / size) if size else 0.0


def _long(subject: Subject) -> Drawn:
    n = int(subject.tree.mask_NT.sum(-1).argmax())
    return answer(subject.tree, n, *(subject.table(seed) for seed in PAIRS[0]))


def _masks(subject: Subject) -> dict[str, Any]:
    """What masked tokens do: padding behind the answer, and a token within it that the writer did not choose."""
    row = _long(subject)
    length = row.token_NT.shape[1]
    plain = gradient(subject.loss, row)
    size = float(plain.norm()) or 1.0
    longer = gradient(subject.loss, padded(row, 2 * length))
    other = gradient(subject.loss, padded(row, 2 * length, fill=3.0))
    spoilt = padded(row, 2 * length)
    spoilt.teacher_NTV[:, length:] = math.nan
    spoilt.behaviour_NT[:, length:] = math.nan
    poisoned = gradient(subject.loss, spoilt)
    inner = masked(row, torch.tensor([[True] + [False] * (length - 2) + [True]]))
    within = gradient(subject.loss, inner)
    changed = dataclasses.replace(inner, teacher_NTV=inner.teacher_NTV.clone())
    changed.teacher_NTV[:, 1 : length - 1] += torch.arange(VOCABULARY)
    kept = [0, length - 1]
    trained = within[:, kept]
    return {
        "masked_gradient": max(float(longer[:, length:].norm()), float(within[:, 1 : length - 1].norm())) / size,
        "masked_values": max(
            float((other[:, :length] - longer[:, :length]).norm()),
            float((gradient(subject.loss, changed)[:, kept] - trained).norm()),
        )
        / size,
        "masked_nan": not bool(poisoned.isfinite().all()),
        "padding": float((longer[:, :length] * plain).sum()) / size**2,
    }


def _infinities(subject: Subject) -> dict[str, bool]:
    """One token that is nowhere drawn has logit -inf; is the gradient finite?"""
    student, teacher = (subject.table(seed) for seed in PAIRS[0])
    tree_ = subject.tree
    n = next(n for n in range(tree_.answers - 1, -1, -1) if not (tree_.token_NT[n] == 1).any())
    row = answer(tree_, n, student, teacher)
    none_TV = torch.zeros_like(row.student_NTV)
    none_TV[..., 1] = -math.inf
    cases = {
        "both": dataclasses.replace(row, student_NTV=row.student_NTV + none_TV, teacher_NTV=row.teacher_NTV + none_TV),
        "student": dataclasses.replace(row, student_NTV=row.student_NTV + none_TV),
        "teacher": dataclasses.replace(row, teacher_NTV=row.teacher_NTV + none_TV),
    }
    return {name: bool(gradient(subject.loss, case).isfinite().all()) for name, case in cases.items()}
