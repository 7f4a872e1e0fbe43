"""Terms without a valid gradient, and options of a term that nothing would read. Imports no torch.

Each rule is about one slot of one term, and sees the rest of the config. `docs/objectives.md` has the reasons in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from opd.config.alignment_rules import alignment_rules
from opd.config.alignments import ALM, Gold
from opd.config.behaviours import writers
from opd.config.naming import source_name
from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm, Term
from opd.config.problems import Problem, changed, shown
from opd.config.reads import is_drawn, is_one_scorer, is_sampled, kinds, needs_reward, read_by
from opd.config.schema import Config
from opd.config.shapes import JensenShannon, ReverseKL, VerifierGatedKL
from opd.config.slots import (
    TIS,
    Full,
    IcePop,
    NoImportance,
    PPOClip,
    Ratio,
    Sampled,
    Schedule,
    Tokens,
    TopK,
)

PathTerm = tuple[str, Term]


def objective_rules(config: Config) -> Iterator[Problem]:
    """What terms may be by themselves, with each other, and with who writes the answers."""
    terms = config.objective.terms
    for name, count in Counter(term.name for term in terms).items():
        if count > 1:
            yield Problem("objective.terms", f"{count} terms have the name {name!r}; metrics need different ones")
    yield from _writers_are_read(config)
    yield from _rows_are_read(config)
    for i, term in enumerate(terms):
        for rule in TERM_RULES:
            yield from rule(config, f"objective.terms.{i}", term)


def _writers_are_read(config: Config) -> Iterator[Problem]:
    """Every writer of a mixture writes for some term."""
    objective = config.objective
    assert objective.behaviour is not None
    read = frozenset(kind for term in objective.terms for kind in read_by(term, objective.behaviour))
    for i, writer in enumerate(writers(objective.behaviour)):
        if writer.kind not in read and len(writers(objective.behaviour)) > 1:
            what = f"no term reads the answers of {writer.kind}: every term's written_by leaves it out"
            yield Problem(f"objective.behaviour.of.{i}", what, writer.kind, allowed="a mixture without it")


def _rows_are_read(config: Config) -> Iterator[Problem]:
    """Every domain is trained by some term."""
    terms = config.objective.terms
    if all(term.domains for term in terms):
        for i, source in enumerate(config.prompts.sources):
            name = source_name(source)
            if source.columns.domain is None and not any(name in term.domains for term in terms):
                what = f"no term trains its rows: every term has domains, and none has {name!r}"
                yield Problem(f"prompts.sources.{i}", what, allowed="a term for it; or leave the source out")


# ---- what every term has -----------------------------------------------------------------------------------------


def _coefficient(config: Config, path: str, term: Term) -> Iterator[Problem]:
    size = term.coefficient
    if size == 0 or (isinstance(size, Schedule) and size.start == size.end == 0):
        yield Problem(f"{path}.coefficient", "a term with coefficient 0 trains nothing: remove the term", "0")


def _written_by(config: Config, path: str, term: Term) -> Iterator[Problem]:
    assert config.objective.behaviour is not None
    write = kinds(config.objective.behaviour)
    for kind in term.written_by:
        if kind not in write:
            what = f"nobody of the kind {kind} writes: objective.behaviour has {', '.join(sorted(write))}"
            yield Problem(f"{path}.written_by", what, shown(list(term.written_by)), allowed=", ".join(sorted(write)))
    if term.written_by and write <= set(term.written_by):
        what = "it would do nothing: nobody else writes"
        yield Problem(f"{path}.written_by", what, shown(list(term.written_by)), allowed="leave it out")


def _domains(config: Config, path: str, term: Term) -> Iterator[Problem]:
    known = known_domains(config)
    for domain in term.domains if known else ():
        if domain not in known:
            what = f"no row has the domain {domain!r}: sources without columns.domain have their names as domains"
            yield Problem(f"{path}.domains", what, shown(list(term.domains)), allowed=", ".join(sorted(known)))
    if known and known <= set(term.domains):
        yield Problem(f"{path}.domains", "it would do nothing: there are no others", shown(list(term.domains)))


def known_domains(config: Config) -> frozenset[str]:
    """Every domain that a row can have; empty where a column says it, which is known only once rows are read."""
    sources = config.prompts.sources
    return frozenset(source_name(s) for s in sources) if all(s.columns.domain is None for s in sources) else frozenset()


def _positions(config: Config, path: str, term: Term) -> Iterator[Problem]:
    tokens, limit = term.tokens, config.sampling.max_tokens
    assert config.objective.behaviour is not None
    write = read_by(term, config.objective.behaviour)
    if write & {"dataset", "cached"}:
        if "dataset" in write and term.reduction == "constant":  # a step may have answers of the data alone
            what = "constant divides by sampling.max_tokens, and answers of the data have another limit"
            others = "; or written_by without dataset" if len(write) > 1 else ""
            yield Problem(f"{path}.reduction", what, "constant", allowed=f"token_mean or sequence_mean{others}")
        return
    horizon = config.sampling.horizon
    shortest = limit if horizon is None else round(min(horizon.start, horizon.end))
    if tokens.skip_first >= shortest:
        cut = f"sampling.max_tokens is {limit}" if horizon is None else f"sampling.horizon cuts at {shortest}"
        allowed = f"less than {shortest}"
        yield Problem(
            f"{path}.tokens.skip_first", f"no token is left: {cut}", shown(tokens.skip_first), allowed=allowed
        )
    elif tokens.first is not None and tokens.skip_first + tokens.first >= limit:
        what = f"it would do nothing: sampling.max_tokens is {limit}"
        yield Problem(f"{path}.tokens.first", what, shown(tokens.first), allowed="a smaller number; or leave it out")
    if tokens.truncated == "mask" and horizon is not None:
        what = "sampling.horizon cuts answers on purpose, and this leaves out what is cut"
        yield Problem(f"{path}.tokens.truncated", what, "mask", allowed="train; or no sampling.horizon")


# ---- kinds of terms ----------------------------------------------------------------------------------------------


def _data(config: Config, path: str, term: Term) -> Iterator[Problem]:
    """O-18: cross-entropy on a student's own samples has gradient zero in expectation."""
    if not isinstance(term, DataTerm):
        return
    assert config.objective.behaviour is not None
    write = read_by(term, config.objective.behaviour)
    if own := sorted(write - {"dataset", "teacher"}):
        what = f"cross-entropy has gradient zero in expectation on the student's own samples, and {', '.join(own)} "
        what += "writes what this term reads"
        others = sorted(write & {"dataset", "teacher"})
        allowed = f"written_by: [{', '.join(others)}]" if others else "objective.behaviour: dataset or teacher"
        if not others and len(config.objective.terms) > 1:
            allowed = "a mixture that has dataset or teacher in objective.behaviour, and written_by here"
        yield Problem(f"{path}.kind", what, "data", allowed=f"{allowed}; or kind: divergence")
    yield from _without_target(path, term)


def _outcome(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if not isinstance(term, OutcomeTerm):
        return
    samples = config.sampling.samples_per_prompt
    if term.advantage != "plain" and samples == 1:
        what = f"{term.advantage} compares the answers to one prompt, and sampling.samples_per_prompt is 1: every "
        what += "advantage would be 0"
        yield Problem(f"{path}.advantage", what, term.advantage, allowed="plain; or samples_per_prompt above 1")
    yield from _without_target(path, term)


def _without_target(path: str, term: Term) -> Iterator[Problem]:
    tokens = term.tokens
    if tokens.importance_of_prefix:
        what = f"nothing reads it: a {term.kind} term has no target to differ from"
        yield Problem(f"{path}.tokens.importance_of_prefix", what, shown(tokens.importance_of_prefix), allowed="0")
    if tokens.select is not None and tokens.select.by != "entropy":
        what = f"a {term.kind} term has no target to differ from"
        yield Problem(f"{path}.tokens.select.by", what, tokens.select.by, allowed="entropy")


def _rewards(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if needs_reward(term) and config.rewards is None:
        why = "an outcome term" if isinstance(term, OutcomeTerm) else "the shape verifier_gated"
        what = f"this is required: {path} is {why}, which reads the reward of every answer"
        yield Problem("rewards", what, allowed="rewards: {grader: {kind: math}}, or another grader")


# ---- shape, target, support --------------------------------------------------------------------------------------


def _shape(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if not isinstance(term, DivergenceTerm):
        return
    shape, whole = term.shape, isinstance(term.support, Full) and term.credit.discount == 0
    if isinstance(shape, JensenShannon) and "normalised" not in shape.model_fields_set:
        what = f"say which: JSD_{shape.beta:g} as GKD writes it goes to 0 with beta (1 - beta), and libraries differ"
        yield Problem(
            f"{path}.shape.normalised", what, allowed="false (GKD's form), or true (divided by beta (1 - beta))"
        )
    of_spans = isinstance(term.alignment, Gold | ALM)  # these need one scorer for every shape: alignment_rules
    if not isinstance(shape, ReverseKL) and not is_one_scorer(term.target) and not whole and not of_spans:
        what = f"a target of kind {term.target.kind} is known up to a factor, which only log r can bear: another shape "
        what += "needs the whole vocabulary, and discount 0"
        where = f"{path}.support.kind" if not isinstance(term.support, Full) else f"{path}.credit.discount"
        given = term.support.kind if not isinstance(term.support, Full) else shown(term.credit.discount)
        yield Problem(where, what, given, allowed="support: full; or shape: {kind: reverse_kl}")


def _support(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if isinstance(term, DivergenceTerm) and isinstance(term.support, TopK):
        for option, value in changed(term.support, "floor") if term.support.tail in ("renormalise", "drop") else ():
            what = f"nothing reads it: the tail {term.support.tail} has no mass to bound"
            yield Problem(f"{path}.support.{option}", what, shown(value), allowed="leave it out; or tail: bucket")


# ---- credit ------------------------------------------------------------------------------------------------------


def _credit(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if not isinstance(term, DivergenceTerm):
        return
    credit = term.credit
    if not isinstance(term.support, Sampled):
        for option, value in changed(credit, "discount", "now", "length_norm", "baseline"):
            what = f"on support {term.support.kind} it is the same for every entry, so its gradient is exactly zero"
            yield Problem(f"{path}.credit.{option}", what, shown(value), allowed="support: sampled; or leave it out")
        return
    if credit.discount == 0:
        for option, value in changed(credit, "now", "length_norm"):
            what = "there is no future: credit.discount is 0"
            yield Problem(f"{path}.credit.{option}", what, shown(value), allowed="a discount above 0; or leave it out")
    if credit.baseline == "exact":
        for why, allowed in _spoils_baseline(term):
            what = f"the baseline drops out of the mean only where no weight depends on the token drawn: {why}"
            yield Problem(f"{path}.credit.baseline", what, "exact", allowed=f"none; or {allowed}")


def _spoils_baseline(term: DivergenceTerm) -> Iterator[tuple[str, str]]:
    tokens: Tokens = term.tokens
    if not term.credit.now:
        yield "and it is the mean of the present, which credit.now leaves out", "now: true"
    if isinstance(term.importance, TIS | IcePop | PPOClip):
        yield f"importance {term.importance.kind} cuts by its ratio", "importance: ratio"
    elif isinstance(term.importance, Ratio) and term.importance.level == "sequence":
        yield "importance.level sequence takes a mean over the tokens of the answer", "level: token"
    if tokens.special == "mask":
        yield "tokens.special masks by the token", "special: train"
    if tokens.truncated == "mask":
        yield "tokens.truncated masks by the rest of the answer", "truncated: train"
    if tokens.importance_of_prefix:
        yield "tokens.importance_of_prefix divides by a sum over the answer", "importance_of_prefix: 0"
    if tokens.select is not None:
        yield "tokens.select ranks against the tokens of all answers", "no select"
    if term.reduction == "sequence_mean":
        yield "sequence_mean divides by the answer's length", "reduction: token_mean"
    if isinstance(term.shape, VerifierGatedKL):
        yield "verifier_gated takes its side by the verdict on the whole answer", "shape: {kind: reverse_kl}"


# ---- weights of drawn tokens -------------------------------------------------------------------------------------


def _importance(config: Config, path: str, term: Term) -> Iterator[Problem]:
    """Weights where somebody reads them, and where they cannot be left out."""
    if isinstance(term, DataTerm):
        return
    assert config.objective.behaviour is not None
    weights, write = term.importance, read_by(term, config.objective.behaviour)
    if not is_drawn(term):
        is_alm = isinstance(term, DivergenceTerm) and isinstance(term.alignment, ALM)  # which says so itself
        if not isinstance(weights, NoImportance) and not is_alm:
            what = "it would do nothing: the sum over the vocabulary has no drawn token to weight"
            yield Problem(f"{path}.importance", what, weights.kind, allowed="none; or support: sampled")
        return
    if "dataset" in write:
        what = "a sampled term averages over tokens that a model drew with a known probability, and here the dataset "
        what += "wrote some of them"
        allowed = "support: full; or written_by without dataset, which another term then reads"
        yield Problem(f"{path}.{_kind_of(term)}", what, _kind_said(term), allowed=allowed)
    others = sorted(write - {"student", "dataset"})
    if others and isinstance(weights, NoImportance):
        what = f"it averages over the student's own tokens, and {', '.join(others)} wrote them: the ratio to who drew "
        what += "them is needed"
        yield Problem(f"{path}.importance", what, "none", allowed="ratio, tis, icepop or ppo; or support: full")
    if isinstance(weights, NoImportance):
        return
    if others and weights.against == "proximal":
        what = f"{', '.join(others)} wrote the answers, and the student at the first update is somebody else"
        yield Problem(f"{path}.importance.against", what, "proximal", allowed="sampler")
    elif weights.against == "proximal" and config.learner.updates_per_batch == 1:
        what = "nothing reads it: learner.updates_per_batch is 1, so the student now is that student"
        yield Problem(f"{path}.importance.against", what, "proximal", allowed="sampler; or updates_per_batch above 1")
    if weights.level == "sequence" and not is_sampled(term):
        what = "the answer's ratio would also weight the exact part of the divergence"
        yield Problem(f"{path}.importance.level", what, "sequence", allowed="token; or support: sampled")


def _kind_of(term: Term) -> str:
    if isinstance(term, OutcomeTerm):
        return "kind"
    return "support" if is_sampled(term) else "support.tail"


def _kind_said(term: Term) -> str:
    if isinstance(term, DivergenceTerm):
        return term.support.tail if isinstance(term.support, TopK) else term.support.kind
    return term.kind


def _advantage_under(config: Config, path: str, term: Term) -> Iterator[Problem]:
    if not isinstance(term, DivergenceTerm) or term.advantage_under == "student" or isinstance(term.alignment, ALM):
        return
    assert config.objective.behaviour is not None
    where, said = f"{path}.advantage_under", term.advantage_under
    others = sorted(read_by(term, config.objective.behaviour) - {"student", "cached"})
    if not isinstance(term.support, Sampled):
        what = "it would do nothing: only sampled terms have the log-ratio of a drawn token as advantage"
        yield Problem(where, what, said, allowed="student; or support: sampled")
    elif said == "proximal" and config.learner.updates_per_batch == 1:
        what = "nothing reads it: learner.updates_per_batch is 1, so the student now is that student"
        yield Problem(where, what, said, allowed="student; or updates_per_batch above 1")
    elif said == "sampler" and others:
        what = f"{', '.join(others)} drew the tokens, and its log-probability is not the student's"
        yield Problem(where, what, said, allowed="student")


TERM_RULES: tuple[Callable[[Config, str, Term], Iterator[Problem]], ...] = (
    _coefficient,
    _written_by,
    _domains,
    _positions,
    _data,
    _outcome,
    _rewards,
    _shape,
    _support,
    _credit,
    _importance,
    _advantage_under,
    alignment_rules,
)
