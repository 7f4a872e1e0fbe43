"""Stage 3: is every model what it should be? Repeatable, zero divergence from itself, the same here as where it is
served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.config.schema import Evals
from opd.config.scorers import all_scorers
from opd.doctor import thresholds as line
from opd.doctor.evidence import Tokens, read
from opd.doctor.findings import Finding
from opd.doctor.rooms import Inputs, Models
from opd.errors import OpdError
from opd.teachers.local import LocalTeacher
from opd.types import Rollout
from opd.wiring.scorers import Scorers


def sanity_findings(
    rollouts_N: Sequence[Rollout],
    student: LocalTeacher,
    members: dict[str, Any],
    *,
    tokens_per_micro_batch: int,
    exact_draws: bool,
) -> list[Finding]:
    """Looks at a few answers. exact_draws: nothing was cut from what the answers were drawn from, at the temperature
    that is trained."""
    found = []
    own = read(rollouts_N, student, student, tokens_per_micro_batch=tokens_per_micro_batch)
    again = read(rollouts_N, student, student, tokens_per_micro_batch=1, wanted="full")
    self_kl = max(abs(_mean(own.reverse_T)), abs(_mean(again.drawn_q_T - own.drawn_p_T)))
    gap = None
    if exact_draws:
        drawn_T = np.concatenate([r.behaviour_logprobs for r in rollouts_N if len(r.response_ids)])
        gap = float(np.abs(drawn_T - own.drawn_p_T).mean())
    figures = {"self_kl": self_kl, "sampler_gap": gap}
    said = f"the student against itself: {self_kl:.2g} nats a token"
    said += "" if gap is None else f"; its sampler and its learner differ by {gap:.2g} nats"
    bad = not self_kl <= line.SELF_KL
    found.append(
        Finding(
            check="self",
            stage=3,
            level="stop" if bad else "ok",
            said=said,
            means="it should be 0: what is scored is not what was sampled" if bad else "",
            change=("student.dtype=float32",) if bad else (),
            figures=figures,
            asks="mend_config" if bad else None,
        )
    )
    for name, member in members.items():
        found.append(_repeats(name, rollouts_N, student, member, tokens_per_micro_batch))
    return found


def _repeats(
    name: str, rollouts_N: Sequence[Rollout], student: LocalTeacher, member: Any, tokens_per_micro_batch: int
) -> Finding:
    first = read(rollouts_N, student, member, tokens_per_micro_batch=tokens_per_micro_batch, wanted="sampled")
    second = read(rollouts_N, student, member, tokens_per_micro_batch=tokens_per_micro_batch, wanted="sampled")
    read_T = np.isfinite(first.drawn_q_T)[first.mapped_T]  # what it does not read it cannot score
    lost = float(1 - read_T.mean()) if len(read_T) else 0.0
    if not len(read_T):
        return Finding(check="teacher", stage=3, level="note", said=f"{name} reads none of the first answers' tokens")
    gap_T = np.abs(first.drawn_q_T - second.drawn_q_T)
    gap = float(np.nanmax(gap_T)) if np.isfinite(gap_T).any() else None
    figures = {"largest_gap": gap, "without_score": lost}
    if gap is None or lost > 0.5:
        return Finding(
            check="teacher",
            stage=3,
            level="stop",
            said=f"{name} gives no finite score for {100 * lost:.0f} % of the tokens",
            means="NaN or infinite scores: a broken checkpoint, or a dtype that it was not made for",
            figures=figures,
            asks="another_teacher",
        )
    wobbles = gap > line.REPEATS
    return Finding(
        check="teacher",
        stage=3,
        level="warn" if wobbles or lost > 0 else "ok",
        said=f"{name} read twice: scores differ by at most {gap:.2g} nats"
        + (f"; {100 * lost:.1f} % of the tokens have no score" if lost else ""),
        means="its noise is part of every update" if wobbles else "",
        figures=figures,
    )


def server_findings(
    inputs: Inputs, models: Models, student: LocalTeacher, rollouts_N: Sequence[Rollout]
) -> list[Finding]:
    """Where a served scorer's model is a folder with weights on this machine: the same answers read by both."""
    config, found = inputs.config, []
    for name, scorer in all_scorers(config).items():
        if scorer.server is None or scorer.model is None or name not in models.members:
            continue
        if not any(Path(scorer.model).expanduser().glob("*.safetensors")):
            continue
        here = scorer.model_copy(update={"server": None, "cache": None})
        changed = {"teacher": here} if name == "teacher" else {"scorers": {**config.scorers, name: here}}
        alone = config.model_copy(update={"scorers": {}, "teacher": None, "evals": Evals(), **changed})
        twin = Scorers(alone, inputs.texts, models.student, {name: inputs.asked[name]})
        try:
            local, budget = twin.here()[name], config.learner.tokens_per_micro_batch
            found.append(server_finding(name, rollouts_N, student, models.members[name], local, budget))
            local.release()
        finally:
            twin.close()
    return found


def server_finding(
    name: str,
    rollouts_N: Sequence[Rollout],
    student: LocalTeacher,
    served: Any,
    local: LocalTeacher,
    tokens_per_micro_batch: int,
) -> Finding:
    """The same weights here and where they are served, on the same answers."""
    settings = {"tokens_per_micro_batch": tokens_per_micro_batch, "wanted": "sampled"}
    there: Tokens = read(rollouts_N, student, served, **settings)
    here: Tokens = read(rollouts_N, student, local, **settings)
    gap_T = np.abs(there.drawn_q_T - here.drawn_q_T)
    gap_T = gap_T[np.isfinite(gap_T)]
    if not len(gap_T):
        raise OpdError(f"{name}: neither the server nor the model here gave a score")
    mean, largest = float(gap_T.mean()), float(gap_T.max())
    far = mean > line.SERVER_GAP
    return Finding(
        check="server",
        stage=3,
        level="stop" if far else "ok",
        said=f"{name} as it is served and the same model here differ by {mean:.2g} nats a token, {largest:.2g} at most",
        means="the server has other weights, another tokenizer, or reads another prompt" if far else "",
        figures={"mean": mean, "largest": largest, "tokens": len(gap_T)},
        asks="another_teacher" if far else None,
    )


def _mean(values_T: np.ndarray) -> float:
    known_T = values_T[np.isfinite(values_T)]
    return float(known_T.mean()) if len(known_T) else float("nan")
