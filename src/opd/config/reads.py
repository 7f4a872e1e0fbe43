"""What an objective reads: who may have written the answers of a term, which scorers it asks, and for how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from opd.config.alignments import ALM, Gold, Strict
from opd.config.behaviours import Behaviour, BehaviourKind, Speculative, TeacherMixed, TeacherWrites, writers
from opd.config.objective import DivergenceTerm, Objective, OutcomeTerm, Term
from opd.config.schema import Config, Scorer
from opd.config.shapes import VerifierGatedKL
from opd.config.slots import Sampled, TopK
from opd.config.targets import STUDENT, Delta, Extrapolated, Product, Routed, Single, Target, Veto
from opd.types import Resolution

TEACHER = "teacher"


def kinds(behaviour: Behaviour) -> frozenset[BehaviourKind]:
    """Everybody who may write an answer."""
    return frozenset(writer.kind for writer in writers(behaviour))


def read_by(term: Term, behaviour: Behaviour) -> frozenset[BehaviourKind]:
    """Whose answers the term trains."""
    return kinds(behaviour) & frozenset(term.written_by) if term.written_by else kinds(behaviour)


def is_sampled(term: Term) -> bool:
    """Whether the term is a policy gradient of the drawn token alone, or of its span. ALM is none: it is a loss on the
    text that is there."""
    if isinstance(term, DivergenceTerm):
        return isinstance(term.support, Sampled) and not isinstance(term.alignment, ALM)
    return isinstance(term, OutcomeTerm)


def is_drawn(term: Term) -> bool:
    """Whether the term averages over tokens as they were drawn: sampled ones, and the sampled correction of a tail."""
    support = term.support if isinstance(term, DivergenceTerm) else None
    return is_sampled(term) or (isinstance(support, TopK) and support.tail == "sampled_correction")


def needs_reward(term: Term) -> bool:
    """Whether the term reads the reward of every answer."""
    gated = isinstance(term, DivergenceTerm) and isinstance(term.shape, VerifierGatedKL)
    return gated or isinstance(term, OutcomeTerm)


def is_one_scorer(target: Target) -> bool:
    """Whether the target is some scorer's own distribution at every token, so that it is normalised by itself."""
    return isinstance(target, Single | Routed)


def teachers(target: Single | Routed) -> tuple[str, ...]:
    """The scorers among which a row's own is found."""
    if isinstance(target, Single):
        return (target.scorer,)
    return tuple(dict.fromkeys([*target.routes.values(), *([target.otherwise] if target.otherwise else [])]))


def per_teacher(target: Extrapolated) -> Iterator[tuple[str, str | None, float]]:
    """(teacher, its reference, its lambda); None or 1 where a mapping has no entry for it."""
    for name in teachers(target.teacher):
        reference = target.reference if isinstance(target.reference, str) else target.reference.get(name)
        yield name, reference, target.scale if isinstance(target.scale, int | float) else target.scale.get(name, 1.0)


def scorers_of(target: Target) -> tuple[str, ...]:
    """The scorers with a share in log q~, each once; the student of a Veto is not one of them."""
    if isinstance(target, Single | Routed):
        found = list(teachers(target))
    elif isinstance(target, Product):
        found = [name for name, weight in target.weights.items() if weight]
    elif isinstance(target, Extrapolated):
        parts = list(per_teacher(target))
        found = [name for name, _, scale in parts if scale]
        found += [reference for _, reference, scale in parts if scale != 1 and reference is not None]
    elif isinstance(target, Delta):
        found = [target.strong, target.weak, target.base]
    else:
        assert isinstance(target, Veto)
        found = [target.scorer]
    return tuple(dict.fromkeys(found))


def resolution(term: DivergenceTerm) -> Resolution:
    """What the term needs of every scorer in its target.

    A few entries do for a support of few entries where one scorer is the target: of a mixture neither the most likely
    tokens nor the normaliser follow from those of its parts. Spans are compared by what was written in them, with gold
    by whole distributions at their ends.
    """
    if not isinstance(term.alignment, Strict):
        return "full" if isinstance(term.alignment, Gold) else "sampled"
    by = term.tokens.select.by if term.tokens.select else "entropy"
    if isinstance(term.support, TopK):
        return "entries" if is_one_scorer(term.target) else "full"
    whole = not isinstance(term.support, Sampled) or term.credit.baseline == "exact" or by != "entropy"
    return "full" if whole else "sampled"


def top_k_needed(term: DivergenceTerm) -> tuple[int, int]:
    """How many of the scorer's own most likely tokens a term on few entries compares, and of the student's."""
    support = term.support
    if not isinstance(support, TopK) or resolution(term) != "entries":
        return 0, 0
    theirs, ours = support.kind != "student_top_k", support.kind in ("student_top_k", "union")
    return support.k * theirs, support.k * ours


def evidence(term: Term) -> dict[str, Resolution]:
    """Scorer to what the term needs of it: the drawn tokens' log-probabilities, those of some more, or of all."""
    found: dict[str, Resolution] = {}
    if isinstance(term, DivergenceTerm):
        found = dict.fromkeys(scorers_of(term.target), resolution(term))
    if term.tokens.where is not None and term.tokens.where.of != STUDENT:
        found[term.tokens.where.of] = "full"
    return found


def most(resolutions: Iterable[Resolution]) -> Resolution:
    """The one that has all the others in it."""
    return max(resolutions, key=("sampled", "entries", "full").index)


def writing_scorers(behaviour: Behaviour) -> dict[str, str]:
    """Scorer that writes, or helps to write, to the kind of writer it is."""
    found = [w for w in writers(behaviour) if isinstance(w, TeacherWrites | TeacherMixed | Speculative)]
    return {writer.scorer: writer.kind for writer in found}


def readers(objective: Objective) -> dict[str, str]:
    """Scorer to the first thing that asks it, in words."""
    found: dict[str, str] = {}
    for term in objective.terms:
        for name in evidence(term):
            found.setdefault(name, f"the objective's term {term.name!r} reads it")
    for name, kind in writing_scorers(objective.behaviour).items() if objective.behaviour else ():
        found.setdefault(name, f"objective.behaviour {kind} has it write")
    return found


def scorers(config: Config) -> dict[str, tuple[str, Scorer]]:
    """Name to (option path, scorer), the short form `teacher` first."""
    short = {TEACHER: (TEACHER, config.teacher)} if config.teacher is not None else {}
    return short | {name: (f"scorers.{name}", scorer) for name, scorer in config.scorers.items() if name not in short}
