"""How noisy the gradient is, drawn token against whole vocabulary, and how far one update moves the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm
from opd.config.objective import Objective as ObjectiveSpec
from opd.config.schema import Config
from opd.config.slots import AnySupport, Full, Sampled, TopK
from opd.doctor import thresholds as line
from opd.doctor.alignment import terms_of
from opd.doctor.evidence import Tokens
from opd.doctor.findings import Finding
from opd.doctor.rooms import Models, free_gradients
from opd.learner.learner import LocalLearner
from opd.objectives.objective import Objective
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing
from opd.types import Resolution, Rollout

TOP_K = 32
MOST = 16  # answers, each of which is a backward pass of its own
FEWEST = 4  # answers, below which their spread says nothing


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The gradients of single answers: `square` of their mean and `variance` around it, both summed over parameters."""

    square: float
    variance: float

    @property
    def scale(self) -> float:
        """Answers a step at which noise and gradient are of one size: tr(covariance) / |mean|^2, the simple noise scale
        of McCandlish et al. 2018. inf where the mean is not told from noise."""
        return self.variance / self.square if self.square > 0 else math.inf


def noise(
    config: Config, models: Models, rollouts_N: Sequence[Rollout], name: str, support: AnySupport, alignment: str
) -> Noise | None:
    """Of reverse KL to scorer `name`, mean over tokens; None with fewer than `FEWEST` answers. alignment: its kind, of
    a scorer with another tokenizer.

    With n answers of gradients g_i, each weighted as it is in the step, the variance is n / (n - 1) (mean |g_i|^2 -
    |mean g|^2), and |mean g|^2 is too large by a n-th of that (as `learner.diagnostics.GradientNoise`).
    """
    term = DivergenceTerm.model_validate(
        {
            "name": "probe",
            "target": {"kind": "single", "scorer": name},
            "support": support.model_dump(),
            "alignment": alignment,
        }
    )
    spec = ObjectiveSpec(
        behaviour=StudentWrites(),
        terms=(term,),
        student_temperature=config.objective.student_temperature,
        teacher_temperature=config.objective.teacher_temperature,
    )
    learner = LocalLearner(
        models.student,
        Objective(spec),
        optim=config.optim,
        spec=config.learner,
        total_steps=1,
    )
    count = {r.id: _trained(r, models.members[name].agreement, alignment) for r in rollouts_N}
    written = [rollout for rollout in rollouts_N if count[rollout.id]][:MOST]
    n, tokens = len(written), sum(count[rollout.id] for rollout in written)
    if n < FEWEST:
        return None

    def square(some: Sequence[Rollout]) -> float:
        evidence = models.scorers.panel.evidence(some)
        try:
            learner.gradients(some, evidence)
            parts = [p.grad for p in models.student.module.parameters() if p.grad is not None]
            return float(sum(torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts))
        finally:
            free_gradients(models.student)

    mean_square = square(written)
    each = sum(square([r]) * (n * count[r.id] / tokens) ** 2 for r in written) / n
    models.scorers.panel.release()
    if not (math.isfinite(mean_square) and math.isfinite(each)):
        return None
    variance = max(n / (n - 1) * (each - mean_square), 0.0)
    return Noise(square=max(mean_square - variance / n, 0.0), variance=variance)


def _trained(rollout: Rollout, agreement: Agreement | Crossing, alignment: str) -> int:
    """How many of its tokens the term trains: of one tokenizer all, else what is joined, whole spans alone."""
    if isinstance(agreement, Agreement):
        return int(rollout.mask.sum())
    spans = agreement.read(rollout).spans
    if alignment == "strict":
        return int((rollout.mask & spans.same_T).sum())
    broken = spans.span_T[~rollout.mask]
    return int((rollout.mask & (spans.span_T >= 0) & ~np.isin(spans.span_T, broken)).sum())


def signal_findings(
    config: Config, models: Models, rollouts_N: Sequence[Rollout], name: str, resolution: Resolution
) -> list[Finding]:
    """Sampled, top-k or full; and how many answers a step."""
    asked = [term for term in config.objective.terms if isinstance(term, DivergenceTerm)]
    if not asked:
        return []
    drawn = all(isinstance(term.support, Sampled) for term in asked)
    if models.members[name].agreement.foreign:
        return _across(config, models, rollouts_N, name, resolution, drawn=drawn)
    sampled = noise(config, models, rollouts_N, name, Sampled(), "strict")
    more: Noise | None = None
    kind, preset = "", ""
    if resolution == "full":
        more = noise(config, models, rollouts_N, name, Full(), "strict")
        kind, preset = "the whole vocabulary", "reverse_kl"
    elif resolution == "entries":
        k = models.members[name].most_entries
        support = TopK(kind="teacher_top_k", k=min(TOP_K, k))
        more, kind, preset = (
            noise(config, models, rollouts_N, name, support, "strict"),
            f"the teacher's top {support.k}",
            "ta_opd",
        )
    return _findings(config, name, sampled, more, kind, preset, drawn=drawn)


def _across(
    config: Config, models: Models, rollouts_N: Sequence[Rollout], name: str, resolution: Resolution, *, drawn: bool
) -> list[Finding]:
    """Of a scorer with another tokenizer, joined as the run's terms join it. What another alignment trains is something
    else, so strict alone is compared with itself: drawn tokens with the shared vocabulary."""
    kind = next((term.alignment.kind for term in terms_of(config, name)), "strict")
    if kind == "strict":
        sampled = noise(config, models, rollouts_N, name, Sampled(), kind)
        more = noise(config, models, rollouts_N, name, Full(), kind) if resolution == "full" else None
        return _findings(config, name, sampled, more, "the shared vocabulary", "shared_top_k", drawn=drawn)
    found = noise(config, models, rollouts_N, name, Full() if kind == "gold" else Sampled(), kind)
    return (
        [] if found is None else [_batch(found, config.prompts.per_step * config.sampling.samples_per_prompt, config)]
    )


def _findings(
    config: Config, name: str, sampled: Noise | None, more: Noise | None, kind: str, preset: str, *, drawn: bool
) -> list[Finding]:
    """kind, preset: what `more` was measured with, in words, and who takes it."""
    answers = config.prompts.per_step * config.sampling.samples_per_prompt
    times = sampled.variance / more.variance if sampled and more and more.variance > 0 else None
    figures = {
        "variance_ratio": times,
        "noise_scale_sampled": _finite(sampled),
        "noise_scale_more": _finite(more),
        "more": kind,
        "answers": answers,
    }
    if sampled is None:
        return []
    if times is None:
        found = Finding(
            check="resolution",
            stage=4,
            level="ok",
            said=f"{name} gives drawn tokens alone, noise scale {_scale(sampled)} answers a step",
            figures=figures,
        )
    else:
        pays = times > line.FULL_PAYS
        said = f"an answer's gradient varies {times:.2g} times as much with drawn tokens as with {kind}"
        means, change = f"{kind} is the right choice: as good as {times:.2g} times the answers", ()
        if drawn and pays:
            means = f"{kind} would be as good as {times:.2g} times the answers, on the same rollouts"
            change = (f"objective.preset={preset}",)
        elif not pays:
            means = "drawn tokens alone do about as well" + ("" if drawn else ", and may be had from any server (tml)")
        level = "note" if change else "ok"
        found = Finding(
            check="resolution", stage=4, level=level, said=said, means=means, change=change, figures=figures
        )
    return [found, _batch(sampled if drawn or more is None else more, answers, config)]


def _batch(found: Noise, answers: int, config: Config) -> Finding:
    """Against the noise scale of the kind of evidence that the config asks for."""
    scale = found.scale
    figures = {"noise_scale": _finite(found), "answers": answers}
    said = f"{answers} answers a step, noise scale {_scale(found)}"
    rough = (
        "a few dozen answers give the scale to a factor of two or three at best, and it grows as the student improves"
    )
    each = max(config.sampling.samples_per_prompt, 1)
    if answers < scale:
        change = (f"prompts.per_step={math.ceil(scale / each)}",) if math.isfinite(scale) else ()
        means = f"more answers a step would be worth nearly what they cost; {rough}"
    elif answers > line.NOISE_BATCH * scale:
        change = (f"prompts.per_step={max(1, math.ceil(line.NOISE_BATCH * scale / each))}",)
        means = f"fewer answers and more steps would go further for the same tokens now; {rough}"
    else:
        return Finding(check="batch", stage=4, level="ok", said=said, figures=figures)
    return Finding(check="batch", stage=4, level="note", said=said, means=means, change=change, figures=figures)


def moved_finding(config: Config, before: Tokens, after: Tokens) -> Finding | None:
    """How far one update at the configured rate moved the student, on the answers it was not trained on alone."""
    ratio_T = after.drawn_p_T - before.drawn_p_T
    ratio_T = ratio_T[np.isfinite(ratio_T)]
    if not len(ratio_T):
        return None
    moved = float((np.exp(ratio_T) - 1 - ratio_T).mean())  # k3: never negative, and unbiased for KL(before || after)
    lr = config.optim.lr
    said = f"one update at optim.lr={lr:g} moves the student by {moved:.2g} nats a token"
    figures = {"moved": moved, "lr": lr}
    if moved > line.MOVED_MOST:
        smaller = lr * math.sqrt(line.MOVED_MOST / moved) / 2
        return Finding(
            check="learning_rate",
            stage=5,
            level="warn",
            said=said,
            means="far for one update (a KL grows with the square of the rate); Adam's first step is its largest, and "
            "a warm-up softens it",
            change=(f"optim.lr={smaller:.1g}", "optim.warmup_steps=20"),
            figures=figures,
        )
    if moved < line.MOVED_LEAST:
        default = "1e-4 (LoRA)" if config.student.lora is not None else "5e-5 (all weights)"
        return Finding(
            check="learning_rate",
            stage=5,
            level="note",
            said=said,
            means=f"hardly at all; Thinking Machines' recipe for 8B has {default}",
            change=(f"optim.lr={10 * lr:.1g}",),
            figures=figures,
        )
    return Finding(check="learning_rate", stage=5, level="ok", said=said, figures=figures)


def _scale(found: Noise) -> str:
    return f"{found.scale:.2g}" if math.isfinite(found.scale) else "beyond what these answers can tell"


def _finite(found: Noise | None) -> float | None:
    return found.scale if found is not None and math.isfinite(found.scale) else None
