"""Combinations that run at a stated price, and those that are probably not what was meant. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.objective import DataTerm, DivergenceTerm, Term
from opd.config.reads import evidence, is_drawn, is_sampled, read_by, scorers
from opd.config.schema import Config, Context
from opd.config.slots import NoImportance, TopK, Weighting
from opd.config.sources import InlineSource, ReasoningGymSource, Source

_TAILS = {
    "renormalise": "changes the optimum: the set's mass gets no gradient and may drift out, and entropy rise",
    "drop": "ends where bucket does, but later: nothing pulls at what is outside the set",
}


def prices(config: Config) -> Iterator[str]:
    """What runs at a price."""
    for i, term in enumerate(config.objective.terms):
        yield from _of_a_term(config, f"objective.terms.{i}", term)
    yield from _temperatures(config)


def _of_a_term(config: Config, path: str, term: Term) -> Iterator[str]:
    objective, updates = config.objective, config.learner.updates_per_batch
    assert objective.behaviour is not None
    write = read_by(term, objective.behaviour)
    if is_sampled(term) and term.reduction == "sequence_mean":
        yield (
            f"{path}.reduction: sequence_mean on a sampled term is biased, because 1 / length depends on the "
            "tokens drawn; token_mean is not"
        )
    if not isinstance(term, DataTerm) and _of_whole_answers(term.importance):
        yield (
            f"{path}.importance.level: sequence takes the geometric mean of the answer's ratios, not their product: "
            "less variance, and biased even where nothing is cut"
        )
    if not isinstance(term, DivergenceTerm):
        return
    if isinstance(term.support, TopK) and term.support.tail in _TAILS:
        yield f"{path}.support.tail: {term.support.tail} {_TAILS[term.support.tail]}. Take bucket"
    if not is_drawn(term) and updates > 1 and "student" in write:
        yield (
            f"learner.updates_per_batch: {updates} updates on the same answers: from the second on, {path} is exact at "
            "states that an older student visited"
        )
    stale = [f"{updates} updates on the same answers"] if updates > 1 else []
    stale += [f"{kind} wrote answers" for kind in sorted(write - {"student"})]
    if term.credit.discount > 0 and stale:
        yield (
            f"{path}.credit.discount: the ratio of one token stands for that of a whole return ({', '.join(stale)}): "
            "an approximation"
        )
    if term.advantage_under == "sampler" and (updates > 1 or "cached" in write):
        yield (
            f"{path}.advantage_under: log p of the sampler is the student's at the first update on fresh answers "
            "alone; later the fixed point is not the target. student is exact"
        )


def _of_whole_answers(weights: Weighting) -> bool:
    return not isinstance(weights, NoImportance) and weights.level == "sequence"


def _temperatures(config: Config) -> Iterator[str]:
    objective = config.objective
    read = {name for term in objective.terms if not isinstance(term, DataTerm) for name in evidence(term)}
    for name, (path, scorer) in scorers(config).items():
        meant = scorer.temperature is not None and scorer.weights != "model"  # sharpening a copy of the student
        temperature = scorer.temperature or objective.teacher_temperature
        if name in read and not meant and temperature != objective.student_temperature:
            option = "objective.teacher_temperature" if scorer.temperature is None else f"{path}.temperature"
            yield (
                f"{option}: {temperature} and student_temperature {objective.student_temperature} differ: a student "
                "equal to its teacher is not at the optimum"
            )


def looks(config: Config) -> Iterator[str]:
    """What runs, and is probably not what was meant."""
    student = config.student
    for path, scorer in scorers(config).values():
        same = (scorer.model, scorer.revision, scorer.format) == (student.model, student.revision, student.format)
        if scorer.weights == "model" and same and scorer.context == Context():
            called = "teacher" if path == "teacher" else f"the scorer {path.partition('.')[2]}"
            said = f"{called} and student are the same model, {student.model}"
            yield f"{path}.model: {said}: their divergence starts at zero"
    trained = {_data(source) for source in config.prompts.sources} - {None}
    for i, task in enumerate(config.evals.tasks):
        if _data(task.source) in trained:
            yield f"evals.tasks.{i}.source: {task.name} takes the rows that are trained on; its score is not held out"


def _data(source: Source) -> tuple[str, ...] | None:
    """What tells two sources apart that were given different names; None where rows stand in the config."""
    if isinstance(source, InlineSource):
        return None
    if isinstance(source, ReasoningGymSource):
        return (source.task, str(source.seed), str(source.settings))
    return (source.path, getattr(source, "config", None) or "", getattr(source, "split", ""))
