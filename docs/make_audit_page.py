"""Writes docs/audit.md: the audit of every loss in examples/audited_losses.py.

python docs/make_audit_page.py
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import audited_losses

from opd.objectives.audit import Findings, audit
from opd.objectives.audit.findings import ZERO
from opd.objectives.audit.references import REVERSE_KL

PAGE = Path(__file__).parent / "audit.md"

MEANING: dict[str, str] = {
    "k1_direct": "A random walk. In expectation nothing moves, and another teacher changes nothing at all.",
    "k2_direct": "Right, on fresh samples only: without an importance weight it is wrong on older ones.",
    "k3_direct": "Called reverse KL in several libraries; it covers modes instead of seeking them.",
    "k1_as_cost": "Right: the policy gradient of the reverse KL. On older samples it needs an importance weight too.",
    "k2_as_cost": "The better estimate of the value is a worse cost: k2 and k3 give every deviation the same sign.",
    "k3_as_cost": "As above, and worse: far from the teacher the direction is nearly unrelated.",
    "naive_top_k": "Not zero where student = teacher: it empties the support, down to 1/e of the teacher's mass.",
    "renormalised_top_k": "The shape inside the set is right; the set's mass gets no gradient and drifts.",
    "top_k_as_advantage": "The same number for every token of a state is a baseline, and a baseline averages to zero.",
    "two_bucket": "The two classes depend on the drawn token; what is missing is the score-function term.",
    "two_bucket_without_tail": "One class alone has probability 1 in both models: a loss of exactly 0.",
    "ours_reverse_kl": "Exact, on samples of any policy (in the states that it visits).",
    "ours_forward_kl": "Exact.",
    "ours_jsd": "Exact, with GKD's scale.",
    "ours_sampled": "Exact on average, and on older samples through the ratio; noisier than the whole vocabulary.",
    "ours_sampled_forward": "Exact on average. The ratio r makes it much noisier than the reverse KL.",
    "ours_top_k": "Exactly the divergence over k + 1 classes, at rest with the teacher's probabilities in the set.",
}

TEXT = """# What loss functions train

`opd audit MODULE:FUNCTION` finds out what a loss function does on average. It runs the function on models so small
that every answer can be written down (five tokens, answers of one to three, three pairs of student and teacher,
float64), adds up its gradient with the probability of every answer, and compares the sum with gradients made from
definitions. There is no sampling in it: what it prints is exact up to rounding.

    opd audit examples/audited_losses.py:k3_direct          a table
    opd audit my_package.losses:loss --json                 everything, for a script

## Your function

    def loss(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
        ...

| argument | what it is |
|---|---|
| `student_logits`, `teacher_logits` | float64 `[N, T, V]`; position t predicts `tokens[:, t]` |
| `tokens` | int64 `[N, T]`, drawn by the student, or by an older one when staleness is looked at |
| `mask` | bool `[N, T]`; False at padding and at tokens that must not be trained |
| `behaviour_logprobs` | float64 `[N, T]`, log-probability of each token under whoever drew it |

Return a scalar, or a loss per token `[N, T]`. A scalar's own mean is found out and undone, so that what is compared is
a large batch. V is 5: let a top-k be 2 or 3. The function must not draw random numbers or keep state.
Bad input (no such function, an exception in it, a wrong shape) exits with 2; any finding exits with 0.

## Results

These losses are typed again from published formulas, in `examples/audited_losses.py`. "Follows" is the field that the
expected gradient equals, up to a positive factor; the next columns compare it with the local field of the reverse KL
(relative error |g - field| / |field|), the last three say what else was seen. This page is written by
`docs/make_audit_page.py`.

{results}

What the rows mean:

{meanings}

## The columns

- **follows** Divergences are compared as *local fields*: the gradient of the sum over states of their divergence, how
  often a state is visited held fixed. The sequence-level reverse KL is among the candidates as well, as are truncations
  to the k most likely tokens of either model. *Noise* means that the expected gradient is zero although single answers
  have one. A loss with the wrong sign is told as *the opposite of* a field.
- **noise** standard deviation of one answer's gradient over the size of its mean. Full-vocabulary terms have some, too:
  answers visit different states.
- **teacher** how much of a typical answer's gradient changes in the mean when the teacher is exchanged.
- **at the teacher** what is left where student = teacher, in the mean, of a typical gradient elsewhere.
- **stale** relative error on answers of another policy, against the same field in the states which that policy visits.
- **masks** what comes through from masked tokens. *NaN* means that a teacher or sampler value that is not finite at a
  masked token makes the whole gradient NaN, even though the token's loss is left out (0 times infinity in the backward
  pass): choose with `torch.where` before the arithmetic, not after it.

## What it does not say

Cosines depend on the pairs of models: those above are examples, not constants. An error of 0 does not depend on them.
And a loss that follows its field exactly can still be a poor choice; that is a question for a training run.
"""


def table(findings: Iterable[Findings]) -> str:
    head = "| loss | follows | cosine to reverse KL | error | noise | teacher | at the teacher | stale | masks |"
    rows = [head, "|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for f in findings:
        reverse = f.match(REVERSE_KL)
        cells = (
            f"`{f.function}`",
            f.verdict,
            "–" if reverse is None else f"{reverse.cosine:.3f}",
            "–" if reverse is None else small(reverse.relative),
            small(f.noise) if f.noise < float("inf") else "all",
            small(f.teacher_in_mean),
            small(f.mean_at_teacher),
            "–" if f.stale is None else small(f.stale),
            masks(f),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def small(value: float) -> str:
    return "0" if value <= ZERO else f"{value:.2g}"


def masks(f: Findings) -> str:
    leaks = [
        name
        for name, leaked in (
            ("a gradient", f.masked_gradient > ZERO),
            ("values", f.masked_values > ZERO),
            ("NaN", f.masked_nan),
        )
        if leaked
    ]
    return ", ".join(leaks) or "tight"


def meanings(losses: Iterable[Callable]) -> str:
    lines = []
    for loss in losses:
        said = (inspect.getdoc(loss) or "").split("\n")[0]
        lines.append(f"- `{loss.__name__}`: {said} {MEANING[loss.__name__]}")
    return "\n".join(lines)


def page() -> str:
    losses = audited_losses.AUDITED
    return TEXT.format(results=table(audit(loss, loss.__name__) for loss in losses), meanings=meanings(losses))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
