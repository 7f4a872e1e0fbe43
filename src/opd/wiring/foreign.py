"""Scorers with another tokenizer than the student's: what no run can do with them, and what is worth a word.

Known from the config and the tokenizers alone, before any data is read or weights are loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from opd.config.alignments import Strict
from opd.config.behaviours import Speculative, TeacherMixed, TeacherWrites, writers
from opd.config.objective import DivergenceTerm
from opd.config.problems import Problem, config_error
from opd.config.reads import is_drawn, is_one_scorer, per_teacher, read_by, scorers_of
from opd.config.schema import Config
from opd.config.slots import Sampled
from opd.config.targets import Extrapolated, Target

if TYPE_CHECKING:
    from opd.wiring.build import Texts


def check_foreign(config: Config, texts: Texts) -> None:
    """Raises ConfigError that lists all that the config asks of a scorer with another tokenizer and cannot have."""
    if texts.foreign and (found := list(_problems(config, texts))):
        raise config_error(found)


def foreign_notes(config: Config, texts: Texts) -> list[str]:
    """What runs and is worth a word: an alignment that nobody needs, costs that can be avoided."""
    notes = []
    for i, term in enumerate(config.objective.terms):
        if not isinstance(term, DivergenceTerm):
            continue
        read = scorers_of(term.target)
        kind, has_foreign = term.alignment.kind, any(name in texts.foreign for name in read)
        if kind != "strict" and read and not has_foreign:
            notes.append(
                f"objective.terms.{i}.alignment is {kind}, and every scorer that it reads has the student's tokenizer: "
                "each token is a span of its own, and all vocabulary is shared"
            )
        if has_foreign and term.credit.discount > 0:  # with strict: others have no future
            notes.append(
                f"objective.terms.{i}.credit.discount: tokens that are not the same to both cost nothing, so that a "
                "student may prefer them to what costs something; discount 0 does not pay for that"
            )
    return notes


def _problems(config: Config, texts: Texts) -> Iterator[Problem]:
    yield from _one_kind_for_each(config, texts)
    yield from _writers(config, texts)
    for i, term in enumerate(config.objective.terms):
        path = f"objective.terms.{i}"
        gate = term.tokens.where
        if gate is not None and gate.of in texts.foreign:
            what = f"{gate.of} has another tokenizer, so that its entropy is not one of the student's positions"
            yield Problem(f"{path}.tokens.where.of", what, gate.of, allowed="student; or a scorer with its tokenizer")
        if isinstance(term, DivergenceTerm):
            yield from _target(path, term, texts)
            yield from _baseline(path, term, texts)


def _one_kind_for_each(config: Config, texts: Texts) -> Iterator[Problem]:
    """A scorer gives rows of one kind: tokens, or spans, or ends of spans."""
    asked: dict[str, dict[str, int]] = defaultdict(dict)  # scorer to alignment to the first term that has it
    for i, term in enumerate(config.objective.terms):
        if isinstance(term, DivergenceTerm):
            for name in set(scorers_of(term.target)) & set(texts.foreign):
                asked[name].setdefault(term.alignment.kind, i)
    for name, kinds in asked.items():
        if len(kinds) > 1:
            (first, i), (other, j) = list(kinds.items())[:2]
            what = f"{name} has another tokenizer, and objective.terms.{i} joins its tokens as {first}"
            yield Problem(f"objective.terms.{j}.alignment", what, other, allowed=f"{first} in all terms that read it")


def _writers(config: Config, texts: Texts) -> Iterator[Problem]:
    """Who writes, and terms that need to know how likely it was that they wrote it."""
    assert config.objective.behaviour is not None
    for writer in writers(config.objective.behaviour):
        if isinstance(writer, TeacherWrites) and writer.scorer in texts.foreign:
            for i, term in enumerate(config.objective.terms):
                if is_drawn(term) and writer.kind in read_by(term, config.objective.behaviour):
                    what = "a sampled term averages over tokens that a model drew with a known probability, and "
                    what += f"nobody drew those that stand for what {writer.scorer} writes in another tokenizer's"
                    others = "support: full, alignment: gold or alm, or kind: data; or written_by without teacher"
                    yield Problem(f"objective.terms.{i}", what, term.name, allowed=others)
        if isinstance(writer, TeacherMixed | Speculative) and writer.scorer in texts.foreign:
            what = f"{writer.scorer} has another tokenizer, and {writer.kind} takes the next token from both of them"
            allowed = "student; or teacher, which writes whole answers"
            yield Problem("objective.behaviour", what, writer.kind, allowed=allowed)


def _target(path: str, term: DivergenceTerm, texts: Texts) -> Iterator[Problem]:
    """Products of distributions need one set of things to be about: a vocabulary, or with span the same spans."""
    foreign = [name for name in scorers_of(term.target) if name in texts.foreign]
    if is_one_scorer(term.target) or not foreign:
        return
    if isinstance(term.alignment, Strict):
        what = f"a target of kind {term.target.kind} multiplies distributions over one vocabulary, and "
        what += f"{', '.join(foreign)} {'has' if len(foreign) == 1 else 'have'} another tokenizer"
        allowed = "single or routed; or shape: reverse_kl, support: sampled, alignment: span"
        yield Problem(f"{path}.target", what, term.target.kind, allowed=allowed)
        return
    for together in _read_together(term.target):
        kinds: dict[str, str] = {}  # fingerprint of a tokenizer to its first scorer
        for name in together:
            if name in texts.foreign:
                kinds.setdefault(texts.scorers[name].tokenizer.fingerprint, name)
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            what = f"{one} and {other} have different tokenizers, so that their spans are not the same"
            allowed = "scorers of one tokenizer beside those with the student's; or single or routed"
            yield Problem(f"{path}.target", what, term.target.kind, allowed=allowed)
            return


def _read_together(target: Target) -> list[tuple[str, ...]]:
    """Scorers that read the same rows: routed teachers do not, each has only its reference beside it."""
    if isinstance(target, Extrapolated):
        pairs = per_teacher(target)
        return [
            (name, reference) if reference is not None and scale != 1 else (name,) for name, reference, scale in pairs
        ]
    return [scorers_of(target)]


def _baseline(path: str, term: DivergenceTerm, texts: Texts) -> Iterator[Problem]:
    foreign = [name for name in scorers_of(term.target) if name in texts.foreign]
    if foreign and isinstance(term.support, Sampled) and term.credit.baseline == "exact":
        what = "the baseline drops out of the mean only where no weight depends on the token drawn, and which tokens "
        what += f"{foreign[0]}, with another tokenizer, has in common with the student depends on it"
        yield Problem(f"{path}.credit.baseline", what, "exact", allowed="none; or support: full")
