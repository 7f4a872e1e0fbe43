"""Writes docs/distance.md: how far the field that a preset descends is from the gradient that it stands for.

python docs/make_distance_table.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measures.to_the_sequence import (
    NOISE,
    SIZES,
    TOP_P,
    Field,
    K,
    Models,
    Sizes,
    Table,
    between,
    beyond,
    corrected,
    cut,
    expected_reward,
    from_answers_of,
    gained,
    groups_of_two,
    large_group,
    local,
    minillm,
    models,
    near,
    on_top,
    rescaled_on_top,
    sequence,
    teacher,
    to_the_tilt,
    writer,
)

from opd.objectives.oracle import bias
from opd.objectives.oracle import divergences as d

PAGE = Path(__file__).parent / "distance.md"
SEEDS = ((0, 100), (1, 101), (2, 102))  # of student and teacher, as in the audit
WIDE, LENGTHS = 3, (1, 2, 3, 4, 5)  # tokens and answers of the table by length
MORE_SEEDS = tuple((n, 100 + n) for n in range(10))
NOISES = (0.4, 0.2, 0.1, 0.05, 0.025)
ZERO = 1e-10


@dataclass(frozen=True)
class Row:
    """preset: as it is called, with parameters; target: that a near student is near to; None: there is none."""

    preset: str
    declared: str
    stands_for: str
    field: Field
    gradient: Field
    target: Table | None


JSD = d.jensen_shannon(0.5)
WHOLE_REVERSE = "KL(p(y) ‖ q(y))"
ROWS: tuple[Row, ...] = (
    Row("reverse_kl", "KL(p ‖ q)", WHOLE_REVERSE, local(d.reverse_kl), sequence(d.reverse_kl), teacher),
    Row("forward_kl", "KL(q ‖ p)", "E_p(y) Σ KL(q ‖ p)", local(d.forward_kl), sequence(d.forward_kl), teacher),
    Row(
        "forward_kl, as the KL of answers",
        "KL(q ‖ p)",
        "KL(q(y) ‖ p(y))",
        local(d.forward_kl),
        from_answers_of(teacher),
        teacher,
    ),
    Row("jsd", "JSD(0.5)", "E_p(y) Σ JSD(0.5)", local(JSD), sequence(JSD), teacher),
    Row("tml", "KL(p ‖ q)", WHOLE_REVERSE, local(d.reverse_kl), sequence(d.reverse_kl), teacher),
    Row(
        "tml, discount 1",
        "log(q / p) of a token and all that follow",
        WHOLE_REVERSE,
        to_the_tilt(lambda m: m.log(teacher=1.0)),
        sequence(d.reverse_kl),
        teacher,
    ),
    Row("mopd", "KL(p ‖ q of the row)", WHOLE_REVERSE, local(d.reverse_kl), sequence(d.reverse_kl), teacher),
    Row(
        "gopd, scale 0.5",
        "KL(p ‖ q^½ m^½ / Z(s))",
        "KL(p(y) ‖ q^½ m^½ / Z)",
        local(d.reverse_kl, between),
        to_the_tilt(between),
        between,
    ),
    Row(
        "exopd",
        "KL(p ‖ q^1.25 m^−0.25 / Z(s))",
        "KL(p(y) ‖ q^1.25 m^−0.25 / Z)",
        local(d.reverse_kl, beyond),
        to_the_tilt(beyond),
        beyond,
    ),
    Row(
        "exopd_corrected",
        "the same, m the teacher before its RL",
        "the same",
        local(d.reverse_kl, corrected),
        to_the_tilt(corrected),
        corrected,
    ),
    Row(
        "compass",
        "KL(p ‖ m q / q_weak / Z(s))",
        "KL(p(y) ‖ m q / q_weak / Z)",
        local(d.reverse_kl, gained),
        to_the_tilt(gained),
        gained,
    ),
    Row(
        "minillm",
        "KL(p ‖ q) in the mixture's states, and the discounted mean of what follows",
        WHOLE_REVERSE,
        minillm,
        sequence(d.reverse_kl),
        teacher,
    ),
    Row(
        "lsm",
        f"KL(p ‖ q) rescaled to the teacher's top {K}, in the states of top_p {TOP_P:g}",
        WHOLE_REVERSE,
        local(rescaled_on_top, states_of=cut),
        sequence(d.reverse_kl),
        teacher,
    ),
    Row(
        "span",
        "KL(p ‖ q) of drawn spans, here tokens",
        WHOLE_REVERSE,
        local(d.reverse_kl),
        sequence(d.reverse_kl),
        teacher,
    ),
    Row("gold", "JSD(0.5) at ends of spans, here tokens", "E_p(y) Σ JSD(0.5)", local(JSD), sequence(JSD), teacher),
    Row("opsd", "JSD(0.5)", "E_p(y) Σ JSD(0.5)", local(JSD), sequence(JSD), teacher),
    Row(
        "sdft",
        f"KL(q ‖ p) over the teacher's top {K} and the rest",
        "E_p(y) Σ KL(q ‖ p)",
        local(on_top(d.forward_kl, "teacher")),
        sequence(d.forward_kl),
        teacher,
    ),
    Row(
        "sdpo",
        f"JSD(0.5) over the student's top {K} and the rest",
        "E_p(y) Σ JSD(0.5)",
        local(on_top(JSD, "student")),
        sequence(JSD),
        teacher,
    ),
    Row(
        "sft",
        "−log p on the data",
        "KL(data(y) ‖ p(y))",
        local(d.forward_kl, writer, writer),
        from_answers_of(writer),
        writer,
    ),
    Row(
        "seqkd",
        "−log p on the teacher's answers",
        "KL(q(y) ‖ p(y))",
        local(d.forward_kl, teacher, teacher),
        from_answers_of(teacher),
        teacher,
    ),
    Row(
        "self_sft",
        "−log p on answers of the untrained student p₀",
        "KL(p₀(y) ‖ p(y))",
        local(d.forward_kl, writer, writer),
        from_answers_of(writer),
        writer,
    ),
    Row("grpo", "the advantage in a large group", "−E[reward] / deviation", large_group, expected_reward, None),
    Row("grpo, groups of 2", "the same in a group of two", "the same", groups_of_two, expected_reward, None),
)

TEXT = """# How far the local field is from the sequence-level gradient

Without a discount, distillation on the student's own answers descends a *local field*: the gradient of the sum over
positions of a divergence, the states that are visited held fixed. No gradient goes through which states a token leads
to. That is the declared objective of every such preset, and the estimators follow it exactly (`tests/oracle/presets`
proves it for each preset, on the real learner). It is not the gradient of the divergence between whole answers. This
table says how far the two are apart, on models so small that both can be written down: {V} tokens, answers of one to
{T}, three pairs of student and teacher, float64, no sampling. It is written by `docs/make_distance_table.py`.

- **far** student and teacher are independent random tables.
- **near** the student is the target (the teacher, or what the preset makes of several scorers) with normal noise of
  {noise:g} on its logits.
- **error** |g − G| / |G|, g the declared field, G the gradient of what it stands for; **cosine** of the two. Both are
  sums over positions: a mean over tokens has one more factor, the same in both.

Samples are fresh (the writer's weights are the student's), so that importance ratios are 1. E_p(y) Σ D is the sum of D
over the positions of the student's answers, with the gradient through those answers.

{table}

## Nearer and longer

The error of `reverse_kl` where the noise on the near student's logits is smaller and smaller:

{nearer}

And with longer answers ({W} tokens of which none ends an answer, {pairs} pairs):

{lengths}

## What it says

- What the local field leaves out is the divergence of later positions, as credit for earlier tokens. Near the target
  the field is proportional to the distance of student and target, and that credit to its square: the field *is* the
  sequence-level gradient to first order, and half the distance is half the error ("Nearer and longer"). Far away it is
  a direction of its own.
- Supervised presets and the outcome reward of a large group have no gap. A group of two knows which answer is better,
  but not by how much: another advantage, hence another direction.
- Discount 1 closes the gap of `tml` on fresh answers, at the price of variance. On older answers it needs the product
  of ratios over the prefix, which a ratio per token is not: `tests/oracle/presets/test_biases.py` has the numbers.
- With a scale other than 1 (`gopd`, `exopd`, `compass`) the normalisers Z(s) of states are part of a sequence's reward,
  and do not get small near the target. At the local fixed point the field is zero and the sequence-level gradient is
  not: the fixed points differ, and the error goes to 1 instead of 0 as the student gets there.
- `lsm`, `sdft` and `sdpo` are compared with the divergence over the whole vocabulary: what a truncated support leaves
  out is in the number, too. Rescaling (`lsm`) has the lowest cosines: mass outside of the support gets no gradient.
- These numbers are examples; that some are zero is not. They do not say which of the two trains better.
"""


def compared(row: Row, pairs: Mapping[int, Models]) -> tuple[str, str]:
    """Cosine and error over all pairs, flattened."""
    field, gradient = (torch.cat([f(m).flatten() for m in pairs.values()]) for f in (row.field, row.gradient))
    found = bias(field, gradient)
    return f"{found.cosine:.3f}", "0" if found.relative < ZERO else f"{found.relative:.2g}"


def measured(row: Row, sizes: Sizes = SIZES, seeds: Sequence[tuple[int, int]] = SEEDS) -> list[str]:
    """The four cells of a row."""
    far = {student: models(student, other, sizes) for student, other in seeds}
    cells = [*compared(row, far)]
    if row.target is None:
        return [*cells, "–", "–"]
    return [*cells, *compared(row, {seed: near(m, row.target, 500 + seed) for seed, m in far.items()})]


def table() -> str:
    lines = [
        "| preset | declared field | stands for | far: cosine | error | near: cosine | error |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        lines.append("| " + " | ".join([f"`{row.preset}`", row.declared, row.stands_for, *measured(row)]) + " |")
    return "\n".join(lines)


def by_noise() -> str:
    """Of the first row."""
    errors = []
    for noise in NOISES:
        pairs = {n: near(models(n, other), teacher, 500 + n, noise) for n, other in SEEDS}
        errors.append(compared(ROWS[0], pairs)[1])
    lines = [" | ".join(["| noise", *(f"{noise:g}" for noise in NOISES)]), "|---|" + "---:|" * len(NOISES)]
    return "\n".join([f"{lines[0]} |", lines[1], " | ".join(["| error", *errors]) + " |"])


def by_length() -> str:
    lines = ["| tokens in an answer | far: cosine | error | near: cosine | error |", "|---:|---:|---:|---:|---:|"]
    for longest in LENGTHS:
        lines.append("| " + " | ".join([str(longest), *measured(ROWS[0], (WIDE, longest, None), MORE_SEEDS)]) + " |")
    return "\n".join(lines)


def page() -> str:
    vocabulary, longest, _ = SIZES
    made = {"table": table(), "nearer": by_noise(), "lengths": by_length()}
    return TEXT.format(V=vocabulary, T=longest, W=WIDE, noise=NOISE, pairs=len(MORE_SEEDS), **made)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
