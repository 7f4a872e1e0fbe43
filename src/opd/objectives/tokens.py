"""Which answers a term reads and which of their tokens it trains, and how many tokens each rule takes away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm, Term
from opd.config.shapes import VerifierGatedKL
from opd.config.slots import NoImportance, Sampled, TopK
from opd.objectives.spans import whole_spans
from opd.types import Rollout

BoolArray = NDArray[np.bool_]


def reads(term: Term, rollout: Rollout) -> bool:
    """Whether the term reads this answer at all: by writer and by domain.

    A data term never reads the student's own samples: on them cross-entropy has gradient zero in expectation.
    """
    if isinstance(term, DataTerm) and rollout.behaviour == "student":
        return False
    written = not term.written_by or rollout.behaviour in term.written_by
    return written and (not term.domains or rollout.domain in term.domains)


def trained_mask(
    term: Term,
    rollout: Rollout,
    *,
    special_ids: frozenset[int],
    invalid: Mapping[str, BoolArray],
    unmapped_T: BoolArray | None = None,
    span_T: NDArray[np.int64] | None = None,
) -> tuple[BoolArray, dict[str, int]]:
    """bool [T], the tokens of an answer that the term trains; and rule to the number of tokens that it took away.

    A token that several rules take away is counted for the first:

        environment  the writer did not choose it (tools, turns of others)
        special      a special token that does not end an answer           (tokens.special)
        truncated    the answer was cut off                                (tokens.truncated)
        position     before skip_first, or after `first` more; counted in tokens that the writer chose
        reward       the term needs a reward, and nobody could give one
        behaviour    the term needs the log-probability at drawing, and there is none
        unmapped     a scorer with another tokenizer reads nothing there that could be compared  (`unmapped_T`)
        NAME         the scorer NAME gave nothing usable at the token      (`invalid`: scorer to bool [T])
        span         one of the rules above took another token of its span: spans are trained whole (`span_T`: the span
                     of each token, -1 where there is none; None: no token depends on another)
    """
    rules = term.tokens
    T = len(rollout.mask)
    taken: list[tuple[str, BoolArray]] = [("environment", ~rollout.mask)]
    if rules.special == "mask":
        taken.append(("special", _special(rollout, special_ids)))
    if rules.truncated == "mask" and rollout.finish_reason == "length":
        taken.append(("truncated", np.ones(T, np.bool_)))
    if rules.skip_first or rules.first is not None:
        place_T = np.cumsum(rollout.mask) - 1
        last = np.inf if rules.first is None else rules.skip_first + rules.first
        taken.append(("position", (place_T < rules.skip_first) | (place_T >= last)))
    if needs_reward(term) and rollout.reward is None:
        taken.append(("reward", np.ones(T, np.bool_)))
    if needs_behaviour(term):
        taken.append(("behaviour", ~np.isfinite(rollout.behaviour_logprobs)))
    if unmapped_T is not None:
        taken.append(("unmapped", unmapped_T))
    taken += sorted(invalid.items())
    kept_T, lost = np.ones(T, np.bool_), {}
    for rule, gone_T in taken:
        if count := int((kept_T & gone_T).sum()):
            lost[rule] = lost.get(rule, 0) + count
        kept_T &= ~gone_T
    if span_T is not None:
        whole_T = whole_spans(kept_T, span_T)
        if count := int((kept_T & ~whole_T).sum()):
            lost["span"] = lost.get("span", 0) + count
        kept_T = whole_T
    return kept_T, lost


def needs_reward(term: Term) -> bool:
    """Whether the term cannot train an answer that nobody could grade."""
    return isinstance(term, OutcomeTerm) or (
        isinstance(term, DivergenceTerm) and isinstance(term.shape, VerifierGatedKL)
    )


def needs_behaviour(term: Term) -> bool:
    """Whether the term uses the log-probability that was recorded when a token was drawn."""
    if isinstance(term, DataTerm) or not on_drawn_tokens(term):
        return False
    under = term.advantage_under if isinstance(term, DivergenceTerm) else "student"
    return not isinstance(term.importance, NoImportance) or under == "sampler"


def on_drawn_tokens(term: Term) -> bool:
    """Whether any part of the term's gradient is a policy gradient of the drawn token."""
    if not isinstance(term, DivergenceTerm):
        return isinstance(term, OutcomeTerm)
    support = term.support
    return isinstance(support, Sampled) or (isinstance(support, TopK) and support.tail == "sampled_correction")


def _special(rollout: Rollout, special_ids: frozenset[int]) -> BoolArray:
    """bool [T]: special tokens, except those that end an answer or a turn."""
    ends = rollout.sampling.stop_ids if rollout.sampling is not None else ()
    special_T = np.isin(rollout.response_ids, sorted(special_ids.difference(ends)))
    if rollout.finish_reason == "stop" and len(special_T):
        special_T[-1] = False
    return special_T
