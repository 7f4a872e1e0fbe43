"""Refuses rows that do not fit together, before the first tile: a wrong join would train quietly on nonsense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opd.config.objective import DivergenceTerm, OutcomeTerm
from opd.config.slots import Sampled, TopK
from opd.config.targets import STUDENT
from opd.objectives.kernels.rows import TermRows, TokenRows, merges
from opd.types import ScorerRows


def check_rows(
    tokens: int, rows: TokenRows, terms: Sequence[TermRows], scorers: Sequence[ScorerRows], *, widths: Mapping[str, int]
) -> None:
    """Raises ValueError when sizes disagree, a name is unknown or twice there, or a term lacks evidence it needs.

    terms, scorers  with everything known to the host: no device is asked.
    widths          scorer to the size of its vocabulary, and that of the student.
    """
    _unique("terms", [t.term.name for t in terms])
    _unique("scorers", [s.name for s in scorers])
    _size("token_T", rows.token_T, tokens)
    _size("behaviour_T", rows.behaviour_T, tokens)
    if rows.proximal_T is not None:
        _size("proximal_T", rows.proximal_T, tokens)
    by_name = {s.name: s for s in scorers}
    for scorer in scorers:
        _scorer(scorer, tokens, widths)
        if scorer.shared_V is not None:
            _size(f"scorer {scorer.name}: shared_V", scorer.shared_V, widths[STUDENT])
    for term in terms:
        _term(term, tokens, by_name)


def _scorer(scorer: ScorerRows, tokens: int, widths: Mapping[str, int]) -> None:
    if scorer.name == STUDENT:
        raise ValueError(f"{STUDENT!r} is the student itself in a target; give the scorer another name")
    there = len(scorer.valid_T)
    if scorer.index_T is None:
        _size(f"scorer {scorer.name}: valid_T", scorer.valid_T, tokens)
    else:
        _size(f"scorer {scorer.name}: index_T", scorer.index_T, there)
        index_T = scorer.known_index_T
        assert index_T is not None and len(index_T) == there, f"scorer {scorer.name}: known_index_T is not its index_T"
        if there and ((np.diff(index_T) <= 0).any() or index_T[0] < 0 or index_T[-1] >= tokens):
            raise ValueError(f"scorer {scorer.name}: index_T must ascend within 0 to {tokens - 1}")
    if scorer.hidden_TD is not None and scorer.head is not None:
        _size(f"scorer {scorer.name}: hidden_TD", scorer.hidden_TD, there)
        if scorer.shared_V is not None:
            _foreign_head(scorer, there, widths)
        elif widths[scorer.name] != widths[STUDENT]:
            raise ValueError(
                f"scorer {scorer.name} has {widths[scorer.name]} tokens and the student {widths[STUDENT]}: set "
                "vocab_size of both heads to the tokens that the tokenizers share; rows of a scorer with another "
                "tokenizer have shared_V, own_token_T and an order in their head"
            )
    elif scorer.logprobs_T is None:
        raise ValueError(f"scorer {scorer.name} has neither hidden states with a head nor log-probabilities")
    else:
        _size(f"scorer {scorer.name}: logprobs_T", scorer.logprobs_T, there)
        if (scorer.entry_ids_TK is None) != (scorer.entries_TK is None):
            raise ValueError(f"scorer {scorer.name}: entry_ids_TK and entries_TK come together")
        for what in ("entry_ids_TK", "entries_TK"):
            if (values := getattr(scorer, what)) is not None:
                _size(f"scorer {scorer.name}: {what}", values, there)


def _foreign_head(scorer: ScorerRows, there: int, widths: Mapping[str, int]) -> None:
    """Whole distributions over another vocabulary come with all that says how they are told in the student's."""
    assert scorer.head is not None and scorer.shared_V is not None
    order_V = scorer.head.order_V
    if order_V is None or scorer.own_token_T is None:
        raise ValueError(
            f"scorer {scorer.name} has another tokenizer (shared_V): it needs own_token_T, its own token at each row, "
            "and head.order_V, its token for each of the student's"
        )
    _size(f"scorer {scorer.name}: own_token_T", scorer.own_token_T, there)
    _size(f"scorer {scorer.name}: head.order_V", order_V, widths[STUDENT])
    if scorer.before_T is not None:
        _size(f"scorer {scorer.name}: before_T", scorer.before_T, there)


def _term(rows: TermRows, tokens: int, scorers: Mapping[str, ScorerRows]) -> None:
    term = rows.term
    _size(f"term {term.name}: weight_T", rows.weight_T, tokens)
    trained_T = rows.trained_T
    _size(f"term {term.name}: known.trained_T", trained_T, tokens)
    gate = term.tokens.where
    if gate is not None and gate.of != STUDENT:
        _covered(f"term {term.name}: tokens.where", gate.of, trained_T, scorers)
        if scorers[gate.of].hidden_TD is None:
            raise ValueError(
                f"term {term.name}: tokens.where needs the entropy of {gate.of}, which scores drawn tokens alone"
            )
        if scorers[gate.of].shared_V is not None:
            raise ValueError(
                f"term {term.name}: tokens.where reads the entropy of {gate.of}, which has another tokenizer: it says "
                "something about fewer tokens than the term trains. Gate by the student's entropy"
            )
    if isinstance(term, OutcomeTerm) and rows.extra_T is None:
        raise ValueError(f"outcome term {term.name}: extra_T, its advantage, is missing")
    if not isinstance(term, DivergenceTerm):
        return
    whole = not isinstance(term.support, Sampled) or term.credit.baseline == "exact"
    if merges(term):
        if rows.spans is None:
            raise ValueError(f"term {term.name} merges the distributions of spans, and its rows have none (spans)")
        _size(f"term {term.name}: spans", rows.spans.last_T, tokens)
        trained_T = trained_T & rows.spans.last_T
    read_T = np.zeros_like(trained_T)
    for name, c_T in rows.known_mix.items():
        _size(f"term {term.name}: mix[{name}]", c_T, tokens)
        used_T = trained_T & (c_T != 0)
        read_T |= used_T
        if name == STUDENT or not used_T.any():
            continue
        _covered(f"term {term.name}", name, used_T, scorers)
        if scorers[name].shared_V is not None:
            _foreign(rows, name, scorers[name])
        if whole and scorers[name].hidden_TD is None:
            _few(rows, name, scorers[name])
    if (trained_T & ~read_T).any():
        missing = int((trained_T & ~read_T).sum())
        raise ValueError(
            f"term {term.name}: no scorer in its mix at {missing} of {int(trained_T.sum())} trained tokens"
        )


def _foreign(rows: TermRows, name: str, scorer: ScorerRows) -> None:
    """What a scorer with another tokenizer cannot be in."""
    term = rows.term
    assert isinstance(term, DivergenceTerm)
    if term.credit.baseline == "exact":
        raise ValueError(
            f"term {term.name} has an exact baseline, and {name} another tokenizer: which tokens it can judge depends "
            "on what was drawn, so the baseline would not be free of bias. Take baseline none"
        )
    if not isinstance(term.support, Sampled) and not rows.unit:
        raise ValueError(
            f"term {term.name} compares vocabularies with a mixture of scorers, of which {name} has another tokenizer: "
            "the mixture is known on shared tokens alone. Take one scorer, or support sampled"
        )
    if merges(term) and scorer.hidden_TD is None:
        raise ValueError(f'term {term.name} merges distributions: ask {name} for resolution "full"')


def _few(rows: TermRows, name: str, scorer: ScorerRows) -> None:
    """Whether log-probabilities at a few entries are enough for a term that compares more than drawn tokens."""
    term = rows.term
    assert isinstance(term, DivergenceTerm)
    if scorer.entry_ids_TK is None:
        raise ValueError(
            f"term {term.name} compares whole distributions, but {name} scores drawn tokens alone: ask it for "
            'resolution "full", or use support "sampled" without an exact baseline'
        )
    if not isinstance(term.support, TopK) or not rows.unit:
        raise ValueError(
            f"term {term.name} compares whole distributions, but {name} scores {scorer.entry_ids_TK.shape[1]} entries: "
            'ask it for resolution "full", or take a top-k support and one scorer as the target'
        )


def _covered(who: str, name: str, used_T: NDArray[np.bool_], scorers: Mapping[str, ScorerRows]) -> None:
    if name not in scorers:
        raise ValueError(f"{who} reads the scorer {name}, but rows came from {sorted(scorers) or 'none'}")
    index_T = scorers[name].known_index_T
    if index_T is None:
        return
    there_T = np.zeros_like(used_T)
    there_T[index_T] = True
    if (used_T & ~there_T).any():
        raise ValueError(
            f"{who} reads the scorer {name} at {int(used_T.sum())} tokens, of which {int((used_T & ~there_T).sum())} "
            "have no row from it"
        )


def _size(what: str, values: Tensor | NDArray[Any], expected: int) -> None:
    if len(values) != expected:
        raise ValueError(f"{what} has {len(values)} rows where {expected} were expected")


def _unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{what} must have names of their own; there are {sorted(names)}")
