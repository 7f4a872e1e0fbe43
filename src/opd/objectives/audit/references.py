"""The gradients that a loss function is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from opd.objectives.oracle import divergences
from opd.objectives.oracle.divergences import Divergence
from opd.objectives.oracle.fields import local_field, sequence_field
from opd.objectives.oracle.tabular import Tree

Field = Callable[[Tree, Tensor, Tensor, Tensor | None], Tensor]  # (tree, student, teacher, whose states) -> [S, V]
SEQUENCE = "sequence-level reverse KL"
REVERSE_KL = "reverse KL"


def references(vocab_size: int) -> Mapping[str, Field]:
    """Name to gradient: the divergences, then what truncating them to k tokens follows, k up to vocab_size - 2.

    With k = vocab_size - 1 a class for the rest holds one token, and nothing is truncated.
    """
    named: dict[str, Field] = {name: _local(divergence) for name, divergence in divergences.NAMED.items()}
    named[SEQUENCE] = lambda tree, student, teacher, states_of: sequence_field(
        tree, student, teacher, divergences.reverse_kl
    )
    for k in range(1, vocab_size - 1):
        for who in ("teacher", "student"):
            for name, value in TRUNCATED.items():
                named[name.format(set=f"{who}'s top {k}")] = _local(_on_top_k(value, who, k))
    return named


TRUNCATED: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reverse KL truncated to the {set}": divergences.naive_truncation,
    "reverse KL on the {set}, the rest left alone": divergences.unnormalised_kl,
    "reverse KL on the {set}, rescaled": divergences.renormalised(divergences.reverse_kl),
    "reverse KL on the {set}, the rest one class": divergences.bucketed(divergences.reverse_kl),
    "forward KL truncated to the {set}": lambda logp, logq, kept: divergences.naive_truncation(logq, logp, kept),
    "forward KL on the {set}, rescaled": divergences.renormalised(divergences.forward_kl),
    "forward KL on the {set}, the rest one class": divergences.bucketed(divergences.forward_kl),
}


def _local(divergence: Divergence) -> Field:
    return lambda tree, student, teacher, states_of: local_field(tree, student, teacher, divergence, states_of)


def _on_top_k(value: Callable[[Tensor, Tensor, Tensor], Tensor], who: str, k: int) -> Divergence:
    def divergence(logp: Tensor, logq: Tensor) -> Tensor:
        return value(logp, logq, divergences.top_k_mask(logq if who == "teacher" else logp, k))

    return divergence
