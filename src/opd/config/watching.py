"""Which guards have nothing to look at in a run, and why."""

from __future__ import annotations

from opd.config.schema import Config

_ABOUT_ANSWERS = ("length_blowup", "truncation", "end_slide", "repetition", "entropy_collapse")
_ABOUT_THE_TEACHER = ("entropy_collapse", "kl_rising", "uniform_teacher", "changed_teacher")


def blind(config: Config) -> dict[str, str]:
    """From a guard's name to the reason that it cannot see anything. The objective's terms must be written out."""
    objective, sampling = config.objective, config.sampling
    found: dict[str, str] = {}
    if objective.behaviour == "dataset":
        found |= dict.fromkeys((*_ABOUT_ANSWERS, "policy_gap"), "objective.behaviour is dataset, no model writes")
    elif config.learner.updates_per_batch > 1:
        found["policy_gap"] = "with learner.updates_per_batch above 1 the two differ as they should"
    elif (sampling.temperature, sampling.top_p, sampling.top_k) != (objective.student_temperature, 1.0, 0):
        found["policy_gap"] = "tokens are drawn with another temperature, top_p or top_k than the objective scores with"
    if not any(term.target == "teacher" for term in objective.terms):
        found |= dict.fromkeys(_ABOUT_THE_TEACHER, "no term has target: teacher")
    return found
