"""What the evidence on the student's answers says: does the teacher read what the student writes, and is there a signal
that can be followed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.doctor import thresholds as line
from opd.doctor.evidence import Tokens
from opd.doctor.findings import Finding
from opd.loop.answers import repeated
from opd.types import Rollout

THIRDS = 3


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the student makes of the teacher's own answers. logprob: mean of a token under the student, unreached: share
    of tokens that it gives less than `thresholds.UNREACHED`."""

    logprob: float
    unreached: float
    tokens: int


def reach(tokens: Tokens) -> Reach | None:
    """Of the teacher's answers as both read them; None where there is no token."""
    known_T = tokens.drawn_p_T[np.isfinite(tokens.drawn_p_T)]
    if not len(known_T):
        return None
    return Reach(
        logprob=float(known_T.mean()), unreached=float((known_T < np.log(line.UNREACHED)).mean()), tokens=len(known_T)
    )


def support_finding(
    name: str, tokens: Tokens, theirs: Reach | None, *, able: bool | None, foreign: bool = False
) -> Finding:
    """Whether student and teacher overlap enough to begin on-policy.

    theirs   the student on the teacher's answers; None where it could not write any.
    able     whether the teacher is known to be the better one; None: nobody graded.
    foreign  it has another tokenizer. What overlaps then tells vocabularies apart as well as models: it is said, and no
             line is drawn through it. Its answers are read in the student's tokens.
    """
    overlap, shared, outside = _mean(tokens.overlap_T), _mean(tokens.shared_T), _mean(tokens.outside_p_T)
    missed = _mean(tokens.outside_q_T)
    figures = {
        "k": tokens.k,
        "resolution": tokens.resolution,
        "overlap": overlap,
        "overlap_mass": shared,
        "student_mass_outside": outside,
        "teacher_mass_outside": missed,
        "unreached": None if theirs is None else theirs.unreached,
        "teacher_answers_logprob": None if theirs is None else theirs.logprob,
    }
    said = []
    if overlap is not None and outside is not None:
        said.append(
            f"top {tokens.k} of both share {100 * overlap:.0f} %; the student puts {100 * outside:.0f} % of its mass "
            f"outside {name}'s"
            + ("" if missed is None else f", and {name} {100 * missed:.0f} % outside the student's")
            + (", where spans begin, among tokens that both have" if foreign else "")
        )
    if theirs is not None:
        said.append(
            f"of {name}'s own answers the student gives {100 * theirs.unreached:.0f} % of the tokens less than "
            f"{line.UNREACHED:g} ({theirs.logprob:.2f} nats a token)"
        )
    if not said:
        return Finding(
            check="support",
            stage=4,
            level="note",
            said=f"{name} gives the drawn token alone, and no answers of its own: support cannot be looked at",
            figures=figures,
        )
    judged = None if foreign else overlap
    far = judged is not None and outside is not None and judged < line.OVERLAP_LOW and outside > line.MASS_OUTSIDE
    if far or (theirs is not None and theirs.unreached > line.UNREACHED_SHARE):
        unsure = "; nobody graded its answers: read a few of them before they are made the goal" if able is None else ""
        return Finding(
            check="support",
            stage=4,
            level="stop",
            said="; ".join(said),
            means=f"what {name} would say is hardly ever drawn, so its scores have nothing to reinforce{unsure}",
            change=("objective.preset=seqkd",),
            figures=figures,
            asks="cold_start",
        )
    if judged is not None and judged < line.OVERLAP_START and tokens.k == line.TOP_K:
        return Finding(
            check="support",
            stage=4,
            level="warn",
            said="; ".join(said),
            means=f"runs that worked began at {100 * line.OVERLAP_START:.0f} % (arXiv 2604.13016): a short SFT on "
            f"{name}'s answers first is worth a try",
            figures=figures,
        )
    unknown = foreign and theirs is None
    return Finding(
        check="support",
        stage=4,
        level="note" if unknown else "ok",
        said="; ".join(said),
        means=f"{name} writes no answers here: whether the student could is not known" if unknown else "",
        figures=figures,
    )


def divergence_findings(
    name: str, tokens: Tokens, vocab_size: int, *, drawn: bool, foreign: bool = False
) -> list[Finding]:
    """KL in both directions, entropies, tails of the log-ratio, and where in the answer they sit. drawn: the run takes
    the log-ratio of drawn tokens, in which a tail is a weight. vocab_size: the scorer's. foreign: with another
    tokenizer."""
    ratio_T = tokens.log_ratio_T[np.isfinite(tokens.log_ratio_T)]
    if not len(ratio_T):
        return []
    reverse, forward = _mean(tokens.reverse_T), _mean(tokens.forward_T)
    sampled = float(-ratio_T.mean())
    entropy_p, entropy_q = _mean(tokens.entropy_p_T), _mean(tokens.entropy_q_T)
    gap_T = np.sort(np.abs(ratio_T))
    tail = {f"p{q}": float(gap_T[round(q / 1000 * (len(gap_T) - 1))]) for q in (500, 950, 999)}
    figures = {
        "reverse_kl": reverse,
        "forward_kl": forward,
        "reverse_kl_drawn": sampled,
        "entropy_student": entropy_p,
        "entropy_teacher": entropy_q,
        "log_ratio": {**tail, "max": float(gap_T[-1])},
    }
    kl = f"reverse KL {sampled:.3g} nats a token at the drawn tokens"
    if reverse is not None and forward is not None:
        kind = "" if tokens.resolution == "full" else f" (at least; top {tokens.k} and one class for the rest)"
        if foreign:
            what = "shared tokens" if tokens.resolution == "full" else f"those of its top {tokens.k} that are shared"
            kind = f" (where spans begin, over {what} and one class for the rest)"
        kl = f"reverse KL {reverse:.3g}, forward {forward:.3g} nats a token{kind}"
    found = []
    most = float(np.log(vocab_size))
    drawn_T = tokens.drawn_q_T[np.isfinite(tokens.drawn_q_T)]
    alike = drawn_T.mean() < -line.FLAT * most and drawn_T.std() < line.FLAT_SPREAD
    if entropy_q is None and alike:
        found.append(
            Finding(
                check="flat_teacher",
                stage=4,
                level="stop",
                said=f"{name} gives every drawn token about the same, {drawn_T.mean():.2f} nats in the mean and "
                f"{drawn_T.std():.2f} around it; a uniform one gives {-most:.2f}",
                means="it says next to nothing about the next token: were its weights loaded?",
                figures=figures,
                asks="another_teacher",
            )
        )
    if entropy_q is not None and entropy_q > line.FLAT * most:
        found.append(
            Finding(
                check="flat_teacher",
                stage=4,
                level="stop",
                said=f"the entropy of {name} is {entropy_q:.2f} nats a token, of at most {most:.2f}",
                means="it says next to nothing about the next token: wrong weights, or a temperature far too high",
                figures=figures,
                asks="another_teacher",
            )
        )
    heavy = drawn and float((gap_T > line.TAIL).mean()) > line.TAIL_SHARE
    found.append(
        Finding(
            check="divergence",
            stage=4,
            level="warn" if heavy else "ok",
            said=f"{kl}; |log-ratio| {tail['p500']:.2g} in the median, {tail['p950']:.2g} at 95 %, {tail['p999']:.2g} "
            "nats at 99.9 %"
            + (
                "" if entropy_q is None else f"; entropy {entropy_p:.2g} nats of the student, {entropy_q:.2g} of {name}"
            ),
            means=f"more than {100 * line.TAIL_SHARE:g} % of the tokens are past {line.TAIL:g} nats and outweigh the "
            "others: bound them"
            if heavy
            else "",
            change=("objective.preset=jsd",) if heavy else (),
            figures=figures,
        )
    )
    found += _position_finding(name, tokens)
    return found


def _position_finding(name: str, tokens: Tokens) -> list[Finding]:
    value_T = tokens.reverse_T if np.isfinite(tokens.reverse_T).any() else -tokens.log_ratio_T
    known_T = np.isfinite(value_T)
    longest = int(tokens.place_T.max()) + 1 if len(tokens) else 0
    if longest < 4 * THIRDS or not known_T.any():
        return []
    third_T = np.minimum(tokens.place_T * THIRDS // longest, THIRDS - 1)
    means, counts = [], []
    for third in range(THIRDS):
        here_T = known_T & (third_T == third)
        counts.append(int(here_T.sum()))
        means.append(float(value_T[here_T].mean()) if here_T.any() else None)
    figures = {f"tokens_{n * longest // THIRDS}_on": mean for n, mean in enumerate(means)}
    first, last = means[0], means[-1]
    if first is None or last is None or counts[-1] < 50:
        return []
    late = last > line.LATE * max(first, 1e-6)
    cut = 2 * longest // THIRDS
    said = f"KL by thirds of {longest} tokens: " + ", ".join("-" if m is None else f"{m:.3g}" for m in means)
    return [
        Finding(
            check="position",
            stage=4,
            level="warn" if late else "ok",
            said=said,
            means=f"the two part ways late in the answer, where {name} reads what it would not have written: train the "
            "beginning first"
            if late
            else "",
            change=tuple(f"sampling.horizon.{key}={n}" for key, n in (("start", cut), ("end", longest), ("steps", 100)))
            if late
            else (),
            figures=figures,
        )
    ]


def answers_findings(rollouts_N: Sequence[Rollout], *, cut: int, limit: int) -> list[Finding]:
    """Lengths, truncation and loops.

    cut   tokens at which the doctor cut answers; limit: sampling.max_tokens.
    """
    length_N = np.array([len(r.response_ids) for r in rollouts_N])
    cut_N = np.array([r.finish_reason == "length" for r in rollouts_N])
    truncated = float(cut_N.mean())
    figures = {
        "answers": len(length_N),
        "tokens": int(length_N.sum()),
        "length_mean": float(length_N.mean()),
        "length_median": float(np.median(length_N)),
        "length_max": int(length_N.max()),
        "truncated": truncated,
        "cut_at": cut,
    }
    said = (
        f"{len(length_N)} answers, {length_N.mean():.0f} tokens in the mean, {length_N.max()} the longest; "
        f"{100 * truncated:.0f} % did not end by {cut} tokens"
        + ("" if cut == limit else f" (the doctor's own cut; {limit})")
    )
    level, means, change = "ok", "", ()
    if cut == limit and truncated > line.TRUNCATED_WARN:
        level, change = "warn", (f"sampling.max_tokens={2 * limit}",)
        means = "answers without an end teach no end; look at the end tokens before the limit is raised"
    found = [
        Finding(check="length", stage=4, level=level, said=said, means=means, change=change, figures=figures)  # pyright: ignore
    ]
    loops_T = repeated(np.concatenate([r.response_ids for r in rollouts_N]), length_N)
    share = float(loops_T.mean()) if len(loops_T) else 0.0
    if share > line.REPETITION:
        found.append(
            Finding(
                check="repetition",
                stage=4,
                level="warn",
                said=f"{100 * share:.0f} % of the student's tokens repeat what it wrote before",
                means="a student that runs in circles is rewarded for going on: a teacher finds loops likely",
                change=("guards.repetition.action=stop",),
                figures={"repetition": share},
            )
        )
    return found


def control_finding(
    who: str,
    rollouts_N: Sequence[Rollout],
    special: frozenset[int],
    ends: Sequence[int],
    shown: dict[int, str],
    option: str,
) -> Finding | None:
    """Control tokens inside answers that are none of the ends: the model ends its answers with another one."""
    inside = [[int(t) for t in r.response_ids if int(t) in special and int(t) not in ends] for r in rollouts_N]
    share = float(np.mean([bool(tokens) for tokens in inside])) if inside else 0.0
    if share <= line.CONTROL:
        return None
    counts: dict[int, int] = {}
    for tokens in inside:
        for token in tokens:
            counts[token] = counts.get(token, 0) + 1
    most = max(counts, key=lambda token: counts[token])
    return Finding(
        check="end_tokens",
        stage=4,
        level="stop",
        said=f"{100 * share:.0f} % of the answers of {who} have {shown[most]!r} inside and go on behind it; their ends "
        f"are {', '.join(repr(shown[end]) for end in ends)}",
        means=f"{who} ends its answers with {shown[most]!r}, and nobody stops it there",
        change=(f"{option}.format.end_tokens=[{shown[most]!r}]",),
        figures={"share": share, "token": shown[most]},
        asks="mend_template",
    )


def end_finding(
    name: str,
    rollouts_N: Sequence[Rollout],
    tokens: Tokens,
    special: frozenset[int],
    ends: Sequence[int],
    shown: dict[int, str],
    option: str,
) -> Finding | None:
    """What the teacher would say where the student ends its answers. `ends` in the student's numbering."""
    last = {n: len(r.response_ids) - 1 for n, r in enumerate(rollouts_N) if r.finish_reason == "stop"}
    at_T = np.array([last.get(int(n)) == int(t) for n, t in zip(tokens.row_T, tokens.place_T, strict=True)], dtype=bool)
    first_E = tokens.first_q_T[at_T] if len(at_T) else np.empty(0, np.int64)
    first_E = first_E[first_E >= 0]
    if len(first_E) < line.AUC_FEWEST:
        return None
    other_E = np.array([int(t) in special and int(t) not in ends for t in first_E])
    share = float(other_E.mean())
    if share < line.END_MISSED:
        return None
    values, counts = np.unique(first_E[other_E], return_counts=True)
    most = int(values[counts.argmax()])
    return Finding(
        check="end_tokens",
        stage=4,
        level="stop",
        said=f"where the student ends its answers, {name}'s first choice is {shown[most]!r} in {100 * share:.0f} % of "
        "the cases",
        means="the two end answers differently: every end would be scored as a mistake, and answers grow",
        change=(f"{option}.format.end_tokens=[{shown[most]!r}]",),
        figures={"share": share, "token": shown[most]},
        asks="mend_template",
    )


def _mean(values_T: NDArray[np.float64]) -> float | None:
    known_T = values_T[np.isfinite(values_T)]
    return float(known_T.mean()) if len(known_T) else None
