"""A configured objective, ready to be evaluated: what it asks of which scorer, and what every step's plan is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opd.config.objective import DivergenceTerm, OutcomeTerm, Term
from opd.config.objective import Objective as ObjectiveSpec
from opd.config.reads import most, resolution, scorers_of, top_k_needed
from opd.config.shapes import ReverseKL
from opd.config.slots import NoImportance, PPOClip, Sampled, at
from opd.config.targets import STUDENT, Routed, Single
from opd.errors import ConfigError, DataError, NothingToTrain
from opd.objectives.importance import needs_look, weighting
from opd.objectives.outcome import advantages, verdicts
from opd.objectives.plan import PlannedTerm, StepPlan, has_credit
from opd.objectives.reduction import token_shares
from opd.objectives.selection import TokenLook, select
from opd.objectives.spans import RolloutSpans, check_alignment, joined, spans_of, takes_spans, unmapped
from opd.objectives.targets import coefficients, scorers
from opd.objectives.tokens import reads, trained_mask
from opd.types import Joined, Resolution, Rollout, Want

Invalid = Mapping[str, Mapping[str, NDArray[np.bool_]]]  # scorer to rollout id to bool [T]


class Objective:
    """A sum of terms (`spec.terms`) with its two temperatures.

    special_ids   the tokenizer's special tokens, for terms that leave them out. Tokens that end an answer may be among
                  them: they are trained all the same.

    ConfigError for combinations of slots that have no meaning at run time.
    """

    def __init__(self, spec: ObjectiveSpec, *, special_ids: frozenset[int] = frozenset()) -> None:
        self.spec = spec
        self.special_ids = special_ids
        for term in spec.terms:
            _check(term)

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.spec.terms

    @property
    def looks(self) -> Literal["none", "batch", "step"]:
        """What must be seen, without a gradient, before the loss is made.

        none   nothing.
        batch  the tokens of a micro-batch: credit from the future, spans of tokens taken as one, weights of whole
               answers or prefixes, the ratio of a proximal anchor.
        step   all tokens of the step, for a selection among them; `looks_at_batches` says whether micro-batches must
               be looked at as well.
        """
        if any(term.tokens.select is not None for term in self.terms):
            return "step"
        return "batch" if self.looks_at_batches else "none"

    @property
    def looks_at_batches(self) -> bool:
        """Whether a micro-batch's tokens must be seen before its loss is made."""
        return any(needs_look(term) or has_credit(term) or takes_spans(term) for term in self.terms)

    @property
    def reads_proximal(self) -> bool:
        """Whether any term compares with the student at the first of several updates on the same answers."""
        for term in self.terms:
            rule = weighting(term)
            if not isinstance(rule, NoImportance) and rule.against == "proximal":
                return True
            if isinstance(term, DivergenceTerm) and term.advantage_under == "proximal":
                return True
        return False

    def wants(self, rollouts_N: Sequence[Rollout]) -> dict[str, Want]:
        """Scorer to what it must say, and about which answers: those that a term with it in its target reads.

        Resolution "full" where a term sums over the vocabulary, subtracts an exact baseline, has a gate on the scorer's
        entropy or selects tokens by divergence; "entries" where it compares a few of one scorer; else "sampled".
        Scorers that nothing reads in this step are left out. `joined` is the alignment of the terms that read one.
        """
        asked: dict[str, set[Resolution]] = {}
        tops: dict[str, set[tuple[int, int]]] = {}
        read: dict[str, set[str]] = {}
        ways: dict[str, Joined] = {}
        for term in self.terms:
            for rollout in rollouts_N:
                if not reads(term, rollout):
                    continue
                needed, gate = target_scorers(term, rollout), gate_scorers(term)
                for name in needed:
                    assert isinstance(term, DivergenceTerm)
                    asked.setdefault(name, set()).add(resolution(term))
                    tops.setdefault(name, set()).add(top_k_needed(term))
                    ways.setdefault(name, joined(term))
                for name in gate:
                    asked.setdefault(name, set()).add("full")
                for name in needed | gate:
                    read.setdefault(name, set()).add(rollout.id)
        return {
            name: Want(
                most(asked[name]),
                frozenset(ids),
                *(max(k) for k in zip(*tops.get(name, {(0, 0)}), strict=True)),
                joined=ways.get(name, "strict"),
            )
            for name, ids in sorted(read.items())
        }

    def plan(
        self,
        step: int,
        rollouts_N: Sequence[Rollout],
        invalid: Invalid,
        looks: Mapping[str, TokenLook] | None = None,
        spans: RolloutSpans | None = None,
    ) -> StepPlan:
        """What every term trains in this step, from all of its answers.

        step      counted from 0, for schedules.
        invalid   tokens that a scorer said nothing usable about: they leave both the loss and its denominator of every
                  term that reads the scorer there.
        looks     rollout id to what a pass without gradients saw; None: the selection of tokens is not made yet.
        spans     scorer to rollout id to how its tokens fit: of scorers with another tokenizer, and of no others. What
                  is not mapped leaves the loss and its denominator, too.

        NothingToTrain when no term has a token to train, DataError when all that a term could train lacks usable
        evidence. ConfigError when terms want the rows of one such scorer joined in two ways.
        """
        spans = {} if spans is None else spans
        self._one_way(spans.keys())
        planned = [self._plan(term, step, rollouts_N, invalid, looks, spans) for term in self.terms]
        if not any(mask.any() for term in planned for mask in term.kept.values()):
            told = "; ".join(f"{p.term.name}: {_told(p)}" for p in planned) or "the objective has no terms"
            raise NothingToTrain(
                f"the objective has no token to train in this step of {len(rollouts_N)} answers ({told}). Check that "
                "prompts have answers, that the terms' written_by and domains name some of them, and that scorers and "
                "graders give something finite. Where tokens.truncated masks all of them, raise sampling.max_tokens; "
                "where few answers are read, raise prompts.per_step."
            )
        return StepPlan(step, tuple(planned))

    def _plan(
        self,
        term: Term,
        step: int,
        rollouts_N: Sequence[Rollout],
        invalid: Invalid,
        looks: Mapping[str, TokenLook] | None,
        spans: RolloutSpans,
    ) -> PlannedTerm:
        read_N = [r for r in rollouts_N if reads(term, r)]
        kept: dict[str, NDArray[np.bool_]] = {}
        cut: dict[str, NDArray[np.int64]] = {}
        lost: dict[str, int] = {}
        for rollout in read_N:
            of_target = target_scorers(term, rollout)
            used = of_target | gate_scorers(term)
            bad = {name: invalid[name][rollout.id] for name in used if rollout.id in invalid.get(name, {})}
            span_T = spans_of(term, rollout, of_target, spans)
            if span_T is not None:
                cut[rollout.id] = span_T
            kept[rollout.id], gone = trained_mask(
                term,
                rollout,
                special_ids=self.special_ids,
                invalid=bad,
                unmapped_T=unmapped(term, rollout, of_target, spans),
                span_T=span_T,
            )
            for rule, count in gone.items():
                lost[rule] = lost.get(rule, 0) + count
        _some_evidence(term, kept, lost, invalid)
        if term.tokens.select is not None and looks is not None:
            before = sum(int(mask.sum()) for mask in kept.values())
            kept = select(term.tokens.select, kept, looks, term.name)
            lost["selection"] = before - sum(int(mask.sum()) for mask in kept.values())
        shares = token_shares(term.reduction, kept, _max_tokens(term, read_N))
        size = at(term.coefficient, step)
        return PlannedTerm(
            term=term,
            kept=kept,
            weight={key: size * share for key, share in shares.items()},
            mix={r.id: coefficients(term.target, r, step) for r in read_N} if isinstance(term, DivergenceTerm) else {},
            advantage=advantages(term, read_N) if isinstance(term, OutcomeTerm) else {},
            right=verdicts(term, read_N),
            lost=lost,
            read=sum(len(r.mask) for r in read_N),
            span=cut if takes_spans(term) else None,
        )

    def _one_way(self, foreign: Collection[str]) -> None:
        ways: dict[str, dict[Joined, str]] = {}
        for term in self.terms:
            for name in scorers_of(term.target) if isinstance(term, DivergenceTerm) else ():
                ways.setdefault(name, {}).setdefault(joined(term), term.name)
        for name in foreign:
            if len(found := ways.get(name, {})) > 1:
                said = " and ".join(f"{kind} (term {term})" for kind, term in found.items())
                raise ConfigError(
                    f"the scorer {name} has another tokenizer, and terms have alignment {said}: its rows are joined in "
                    "one way. Give these terms one alignment, or name the scorer twice."
                )


def target_scorers(term: Term, rollout: Rollout) -> frozenset[str]:
    """The models whose log-probabilities make the term's target on this answer."""
    return scorers(term.target, rollout) if isinstance(term, DivergenceTerm) else frozenset()


def gate_scorers(term: Term) -> frozenset[str]:
    """The model whose entropy decides where the term trains, when it is not the student's own."""
    return frozenset() if term.tokens.where is None else frozenset({term.tokens.where.of}) - {STUDENT}


def _max_tokens(term: Term, read_N: Sequence[Rollout]) -> int | None:
    """The most tokens that the answers might have had, for the reduction constant."""
    if term.reduction != "constant" or not read_N:
        return 1 if not read_N else None
    limits = [r.sampling.max_tokens for r in read_N if r.sampling is not None]
    if not limits:
        raise DataError(
            f"objective term {term.name!r} has reduction constant, which divides by sampling.max_tokens, and none of "
            f"its {len(read_N)} answers was sampled. Take token_mean or sequence_mean."
        )
    return max(limits)


def _some_evidence(
    term: Term, kept: Mapping[str, NDArray[np.bool_]], lost: Mapping[str, int], invalid: Invalid
) -> None:
    """DataError when a scorer took the last token away: a term that silently trains nothing is a broken scorer."""
    broken = [name for name in lost if name in invalid]
    if broken and not any(mask.any() for mask in kept.values()):
        raise DataError(
            f"objective term {term.name!r} has no token to train in this step: {', '.join(sorted(broken))} gave "
            f"nothing finite for {sum(lost[name] for name in broken)} tokens, which were all that it could train. "
            "Check the scorer's weights and dtype."
        )


def _told(planned: PlannedTerm) -> str:
    if not planned.kept:
        return "reads none of the answers"
    gone = ", ".join(f"{rule} {count}" for rule, count in planned.lost.items())
    return f"{planned.read} tokens, masked by {gone or 'nothing'}"


def _check(term: Term) -> None:
    """Slots that contradict each other. The config's checks say so earlier and better; a Python user may skip them."""
    rule = weighting(term)
    level = None if isinstance(rule, NoImportance) else rule.level
    if not isinstance(term, DivergenceTerm):
        if term.tokens.importance_of_prefix or (term.tokens.select and term.tokens.select.by != "entropy"):
            raise ConfigError(
                f"objective term {term.name!r} is a {term.kind} term without a target, so there is no divergence to "
                "weight or select its tokens by. Leave tokens.importance_of_prefix out, and select by entropy."
            )
        return
    check_alignment(term)
    sampled, credit = isinstance(term.support, Sampled), term.credit
    mixed = not isinstance(term.target, Single | Routed)
    if sampled and mixed and not isinstance(term.shape, ReverseKL) and (credit.baseline != "exact" or credit.discount):
        raise ConfigError(
            f"objective term {term.name!r} has shape {term.shape.kind} on drawn tokens and a target of kind "
            f"{term.target.kind}, which is known there up to a factor: only log r can bear it. Take support full, or "
            "shape reverse_kl."
        )
    if not sampled and (credit.discount or not credit.now or credit.length_norm or credit.baseline == "exact"):
        raise ConfigError(
            f"objective term {term.name!r} has support {term.support.kind}: credit is about drawn tokens, and on a sum "
            "over the vocabulary the future is a constant. Take support sampled, or leave credit out."
        )
    if not credit.now and (credit.discount == 0 or credit.baseline == "exact"):
        raise ConfigError(
            f"objective term {term.name!r} has credit.now false, with discount {credit.discount:g} and baseline "
            f"{credit.baseline}: the future needs a discount above 0, and the exact baseline is that of the present."
        )
    if level == "sequence" and not sampled:
        raise ConfigError(
            f"objective term {term.name!r} has importance.level sequence and tail {getattr(term.support, 'tail', '')}: "
            "the ratio would also weight the exact part. Take level token."
        )
    if level == "sequence" and isinstance(rule, PPOClip) and credit.baseline == "exact":
        raise ConfigError(
            f"objective term {term.name!r} has an exact baseline and a clip that depends on the action: the baseline "
            "would not be free of bias. Take baseline none."
        )
