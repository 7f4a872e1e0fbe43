"""The distribution that answers are drawn from, against what the terms assume of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.objective import DataTerm
from opd.config.presets import as_line, expand
from opd.config.problems import Problem, shown
from opd.config.reads import is_drawn, kinds, needs_reward, read_by
from opd.config.schema import Config, Sampling
from opd.config.slots import NoImportance, Schedule

MODELS = frozenset({"student", "teacher", "teacher_mixed", "speculative"})  # writers that draw with `sampling`
STUDENTS = frozenset({"student", "teacher_mixed", "speculative"})  # of these, where the student has a part in it


def sampling_rules(config: Config) -> Iterator[Problem]:
    sampling, objective = config.sampling, config.objective
    assert objective.behaviour is not None
    write = kinds(objective.behaviour)
    yield from _of_the_preset(config)
    yield from _horizon(sampling, draws=bool(write & MODELS))
    if write & STUDENTS and sampling.temperature == 0:
        what = "training samples from the student, and the arg max is one answer, not a sample"
        yield Problem("sampling.temperature", what, "0", allowed="greater than 0, usually 1.0; evals may use 0")
        return
    for i, term in enumerate(objective.terms):
        path, drawn_by = f"objective.terms.{i}", read_by(term, objective.behaviour) & MODELS
        if not is_drawn(term) or not drawn_by:
            continue
        if drawn_by & STUDENTS and sampling.temperature != objective.student_temperature:
            what = f"{path} compares the distribution that was sampled from, but objective.student_temperature is "
            what += f"{objective.student_temperature}"
            yield Problem("sampling.temperature", what, shown(sampling.temperature), allowed="the same number for both")
        for option, whole in (("top_p", 1.0), ("top_k", 0)):
            if (value := getattr(sampling, option)) != whole:
                what = (
                    f"{path} averages over the student's whole distribution, and a cut tail is never drawn: no ratio "
                )
                what += "brings it back"
                yield Problem(f"sampling.{option}", what, shown(value), allowed=f"{whole}; or support: full")
        updates = config.learner.updates_per_batch
        if updates > 1 and not isinstance(term, DataTerm) and isinstance(term.importance, NoImportance):
            what = f"from the second update on the samples of {path} are not the student's any more"
            allowed = f"updates_per_batch: 1; or {path}.importance: ratio"
            yield Problem("learner.updates_per_batch", what, shown(updates), allowed=allowed)


def _of_the_preset(config: Config) -> Iterator[Problem]:
    """What a named method cannot do without."""
    objective = config.objective
    if objective.preset is None:
        return
    for option, value in expand(objective.preset, objective.parameters).sampling.items():
        given = getattr(config.sampling, option)
        line = f"sampling: {{{option}: {as_line(value)}}}"
        if isinstance(value, Schedule) and given is None:
            what = f"this is required: preset {objective.preset!r} is about it"
            yield Problem(f"sampling.{option}", what, allowed=f"for instance {line}")
        elif not isinstance(value, Schedule) and given != value:
            what = f"preset {objective.preset!r} samples with {value}, and does not hold without"
            yield Problem(f"sampling.{option}", what, shown(given), allowed=line)


def _horizon(sampling: Sampling, *, draws: bool) -> Iterator[Problem]:
    horizon = sampling.horizon
    if horizon is None:
        return
    said, limit = shown(horizon.model_dump()), sampling.max_tokens
    if not draws:
        what = "nothing reads it: no model draws the answers that are trained on"
        yield Problem("sampling.horizon", what, said, allowed="leave it out")
    elif min(horizon.start, horizon.end) < 1:
        yield Problem("sampling.horizon", "an answer has at least one token", said, allowed="start and end from 1")
    elif max(horizon.start, horizon.end) > limit:
        what = f"it goes beyond sampling.max_tokens, {limit}"
        yield Problem("sampling.horizon", what, said, allowed=f"at most {limit}; or a larger max_tokens")
    elif min(horizon.start, horizon.end) == limit:
        what = f"it would do nothing: sampling.max_tokens is {limit}"
        yield Problem("sampling.horizon", what, said, allowed="less than that; or leave it out")


def reward_rules(config: Config) -> Iterator[Problem]:
    if config.rewards is not None and not any(needs_reward(term) for term in config.objective.terms):
        what = "nothing reads it: no outcome term, and no verifier_gated shape"
        yield Problem("rewards", what, config.rewards.grader.kind, allowed="leave it out; or a term with kind: outcome")
