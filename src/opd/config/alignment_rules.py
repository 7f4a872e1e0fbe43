"""What a term may be that joins tokens in spans: with alignment span, gold or alm. Imports no torch.

A span is one thing that happens, at several tokens at once. What looks at tokens one by one has no meaning inside it,
and each kind reads the scorers in one way alone. `docs/across_tokenizers.md` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.alignments import ALM, Gold, Strict
from opd.config.objective import DivergenceTerm, Term
from opd.config.problems import Problem, changed, shown
from opd.config.reads import is_one_scorer
from opd.config.schema import Config
from opd.config.shapes import ReverseKL
from opd.config.slots import Full, NoImportance, Sampled


def alignment_rules(config: Config, path: str, term: Term) -> Iterator[Problem]:
    """One term; `path` is its option path."""
    if not isinstance(term, DivergenceTerm) or isinstance(term.alignment, Strict):
        return
    yield from _support(path, term)
    yield from _target(path, term)
    yield from _tokens(path, term)
    yield from _credit(path, term)
    if isinstance(term.alignment, Gold):
        yield from _gold(path, term, term.alignment)
    elif isinstance(term.alignment, ALM):
        yield from _alm(path, term)


def _support(path: str, term: DivergenceTerm) -> Iterator[Problem]:
    kind = term.alignment.kind
    if isinstance(term.alignment, Gold):
        if not isinstance(term.support, Full):
            what = "gold compares whole distributions at the last token of a span"
            allowed = "full; or alignment: strict, which takes every support"
            yield Problem(f"{path}.support", what, term.support.kind, allowed=allowed)
    elif not isinstance(term.support, Sampled):
        what = f"{kind} compares the probabilities of the text that was written, and of no other token"
        allowed = "sampled; or alignment: gold (whole distributions) or strict (every support)"
        yield Problem(f"{path}.support", what, term.support.kind, allowed=allowed)


def _target(path: str, term: DivergenceTerm) -> Iterator[Problem]:
    kind = term.alignment.kind
    if kind == "span" or is_one_scorer(term.target):
        return
    what = f"{kind} needs probabilities, and a target of kind {term.target.kind} is known up to a factor"
    yield Problem(f"{path}.target", what, term.target.kind, allowed="single or routed; or alignment: span")


def _tokens(path: str, term: DivergenceTerm) -> Iterator[Problem]:
    kind, tokens = term.alignment.kind, term.tokens
    for option in ("where", "select"):
        if (value := getattr(tokens, option)) is not None:
            what = f"it chooses single tokens, and {kind} trains a span whole or not at all"
            yield Problem(f"{path}.tokens.{option}", what, shown(value.model_dump()), allowed="alignment: strict")
    if tokens.importance_of_prefix:
        what = f"it weights single tokens, and the tokens of a span share one advantage with {kind}"
        yield Problem(
            f"{path}.tokens.importance_of_prefix",
            what,
            shown(tokens.importance_of_prefix),
            allowed="0; or alignment: strict",
        )


def _credit(path: str, term: DivergenceTerm) -> Iterator[Problem]:
    """For drawn tokens; elsewhere no credit can be given at all, which another rule says."""
    if not isinstance(term.support, Sampled):
        return
    kind, credit = term.alignment.kind, term.credit
    if credit.discount:
        what = f"{kind} gives the tokens of a span what the span is worth, and nothing for what comes after it"
        yield Problem(f"{path}.credit.discount", what, shown(credit.discount), allowed="0; or alignment: strict")
    if credit.baseline != "none":
        what = f"the mean of a span's worth is over all texts that it could have been, which nobody has ({kind})"
        yield Problem(f"{path}.credit.baseline", what, credit.baseline, allowed="none; or alignment: strict")


def _gold(path: str, term: DivergenceTerm, gold: Gold) -> Iterator[Problem]:
    if gold.sort != "all":
        return
    whole = "nothing reads it: with alignment.sort all, everything is compared by rank"
    for _, value in changed(gold, "matched_weight"):
        yield Problem(f"{path}.alignment.matched_weight", whole, shown(value), allowed="leave it out; or sort: rest")
    if term.shape != ReverseKL():
        yield Problem(f"{path}.shape", whole, term.shape.kind, allowed="leave it out; or alignment.sort: rest")


def _alm(path: str, term: DivergenceTerm) -> Iterator[Problem]:
    if not isinstance(term.importance, NoImportance):
        what = "it would do nothing: alm is a loss on the text as it is, whoever wrote it"
        yield Problem(f"{path}.importance", what, term.importance.kind, allowed="none; or alignment: span")
    if term.advantage_under != "student":
        what = "nothing reads it: alm has no advantage, it moves the student's own probability of a span"
        yield Problem(f"{path}.advantage_under", what, term.advantage_under, allowed="student; or alignment: span")
