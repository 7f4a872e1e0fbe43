"""Comparing student and target on a few entries of the vocabulary, and what is done about all the others.

With S the k entries, P_S and Q_S the masses on it, and h the field of the shape:

    bucket        the rest is one more class: h(r_v) on S, h(r_tail) off it, r_tail = (1 - Q_S) / (1 - P_S). The
                  target's tail is held above the floor; where both tails lie below it, the tail has no field.
    drop          h(r_v) on S and 0 off it, as a policy gradient: never the truncated sum differentiated, whose optimum
                  is q / e.
    renormalise   both distributions are scaled to S: p^_v (h(r^_v) - E[h]) on S, and nothing about P_S itself.

Tail masses are summed over the complement: 1 - P_S would be rounding.

A target that lacks some of the student's tokens (`Partial`) is compared on those that it has, whatever the support. The
support full is then a bucket around all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.config.slots import TopK
from opd.objectives.shapes import Pair, ShapeMaths

MOST = 0.5  # of the student's probability
FLOOR = float(TopK.model_fields["floor"].default)  # of the bucket around all that is shared


@dataclass(frozen=True)
class Entries:
    """The entries of the support, [K, S].

    inside   the entry belongs to the support.
    counted  and has not come before in its row.
    """

    ids: Tensor
    inside: Tensor
    counted: Tensor

    def holds(self, token_K: Tensor) -> Tensor:
        """bool [K]: the support has the token."""
        return ((self.ids == token_K[:, None]) & self.inside).any(-1)


@dataclass(frozen=True)
class Partial:
    """What a target says that does not know all of the student's tokens, at K rows.

    shared_KV   bool: the tokens that it has a log-probability for; at the others log q is -inf. [1, V] where these are
                the same at all rows.
    outside_K   its probability of all that is no token of the student's.
    theirs_KS   its most likely tokens, -1 where the student has not got one.
    """

    shared_KV: Tensor
    outside_K: Tensor
    theirs_KS: Tensor | None = None


@dataclass(frozen=True)
class TopKField:
    """What a term on a few entries does at K tokens, before its weight.

    A constant c taken off h changes no centred field. It is h of the tail where that holds most of the student, else
    0: the difference of two nearly equal numbers is then never what is left.

    entries        the support.
    at_entries_KS  the field p (h - c) at these entries. Entries that come twice have the same number; count them once.
    elsewhere_K    h - c of everything else; None where it is 0.
    mean_K         E_p[h - c], whose multiple of p is taken off everywhere; None where the field is centred already.
    tail_h_K       h of everything else, without c; None where it is 0.
    value_K        the divergence.
    """

    entries: Entries
    at_entries_KS: Tensor
    elsewhere_K: Tensor | None
    mean_K: Tensor | None
    tail_h_K: Tensor | None
    value_K: Tensor
    student_mass_K: Tensor
    target_mass_K: Tensor
    unresolved_K: Tensor


def entries(
    spec: TopK, logp_KV: Tensor, logq_KV: Tensor, student_KS: Tensor | None = None, partial: Partial | None = None
) -> Entries:
    """The support of each row; there is no gradient through the choice.

    student_KS  the student's most likely tokens, first the likeliest, as scorers were told of them: another of two that
                are equally likely would be one that nobody scored.
    partial     of targets that lack tokens: one that is among the most likely and not shared is left out.
    """
    k = min(spec.k, logp_KV.shape[1])
    if spec.kind == "teacher_top_k":
        ids = None
    elif student_KS is not None and student_KS.shape[1] >= k:
        ids = student_KS[:, :k]
    else:
        ids = logp_KV.topk(k, dim=1, sorted=False).indices
    if partial is not None:
        return _shared(spec, ids, partial)
    theirs = logq_KV.topk(k, dim=1, sorted=False).indices if spec.kind != "student_top_k" else None
    if ids is None or theirs is None:
        ids = theirs if ids is None else ids
        assert ids is not None
        every = torch.ones_like(ids, dtype=torch.bool)
        return Entries(ids, every, every)
    marked_KV = torch.zeros_like(logp_KV, dtype=torch.bool)
    if spec.kind == "intersection":
        shared = marked_KV.scatter_(1, theirs, True).gather(1, ids)
        return Entries(ids, shared, shared)
    fresh = ~marked_KV.scatter_(1, ids, True).gather(1, theirs)
    every = torch.ones_like(ids, dtype=torch.bool)
    return Entries(torch.cat([ids, theirs], 1), torch.cat([every, every], 1), torch.cat([every, fresh], 1))


def _shared(spec: TopK, ours: Tensor | None, partial: Partial) -> Entries:
    theirs, V = partial.theirs_KS, partial.shared_KV.shape[1]
    marked = torch.zeros(len(partial.outside_K), V + 1, dtype=torch.bool, device=partial.shared_KV.device)
    if ours is None:
        assert theirs is not None
        return _filled(theirs, theirs >= 0, theirs >= 0)
    inside = partial.shared_KV.expand(len(ours), -1).gather(1, ours)
    if theirs is None:
        return Entries(ours, inside, inside)
    if spec.kind == "intersection":
        inside &= marked.scatter_(1, theirs.masked_fill(theirs < 0, V), True).gather(1, ours)
        return Entries(ours, inside, inside)
    fresh = ~marked.scatter_(1, ours, True).gather(1, theirs.clamp(min=0)) & (theirs >= 0)
    both = [(ours, theirs), (inside, theirs >= 0), (inside, fresh)]
    return _filled(*(torch.cat(pair, 1) for pair in both))


def _filled(ids: Tensor, inside: Tensor, counted: Tensor) -> Entries:
    """An id of -1 becomes a second mention of an entry of its row: nothing about an entry is then said in two ways."""
    first_K1 = (inside.long() * 2 + (ids >= 0)).argmax(1, keepdim=True)  # one that is inside, if there is any
    absent = ids < 0
    return Entries(
        torch.where(absent, ids.gather(1, first_K1).clamp(min=0), ids),
        torch.where(absent, inside.gather(1, first_K1), inside),
        counted & ~absent,
    )


def top_k_field(
    spec: TopK,
    shape: ShapeMaths,
    p_KV: Tensor,
    logp_KV: Tensor,
    q_KV: Tensor,
    logq_KV: Tensor,
    student_KS: Tensor | None = None,
    partial: Partial | None = None,
) -> TopKField:
    """The field of a term on `spec`'s entries; `student_KS` and `partial` as in `entries`."""
    chosen = entries(spec, logp_KV, logq_KV, student_KS, partial)
    logp, logq = logp_KV.gather(1, chosen.ids), logq_KV.gather(1, chosen.ids)
    on_p, on_q = (torch.where(chosen.counted, x.exp(), 0.0).sum(-1) for x in (logp, logq))
    resolved = torch.zeros_like(on_p, dtype=torch.bool)
    if spec.tail == "renormalise":
        logp, logq = (_scaled(x, chosen.counted) for x in (logp, logq))
        h_mass, mean_K, value_K = shape.field(Pair.of(logp, logq))
        centred = h_mass - logp.exp() * mean_K[:, None]
        return TopKField(chosen, centred, None, None, None, value_K, on_p, on_q, resolved)
    h_mass = shape.h_mass(logp, logq)
    f_mass = shape.f_mass(logp, logq)
    if spec.tail == "drop":
        f_mass = f_mass + shape.tilt * (logq.exp() - logp.exp())
        mean_K, value_K = (torch.where(chosen.counted, x, 0.0).sum(-1) for x in (h_mass, f_mass))
        return TopKField(chosen, h_mass, None, mean_K, None, value_K, on_p, on_q, resolved)
    tail_p_K, tail_q_K = _outside(p_KV, chosen), _outside(q_KV, chosen)
    tail = Tail(shape, tail_p_K, tail_q_K if partial is None else tail_q_K + partial.outside_K, spec.floor)
    h_mass = tail.beside(h_mass, logp.exp(), chosen.inside)
    mean_K, value_K = (torch.where(chosen.counted, x, 0.0).sum(-1) for x in (h_mass, f_mass))
    return TopKField(
        chosen, h_mass, tail.elsewhere_K, mean_K + tail.mean_K, tail.h_K, value_K + tail.f_mass_K, on_p, on_q,
        tail.unresolved_K,
    )  # fmt: skip


class Tail:
    """All that is not on the support, as one class; the constant c of `TopKField` is taken off here.

    c_K            the constant.
    h_K, f_mass_K  h of it, without c, and its part of the divergence; 0 where it is not resolved.
    elsewhere_K    h - c.
    mean_K         its part of E_p[h - c].
    """

    def __init__(self, shape: ShapeMaths, p_K: Tensor, q_K: Tensor, floor: float) -> None:
        self.unresolved_K = (p_K < floor) & (q_K < floor)
        log_masses = p_K.log()[:, None], q_K.clamp(min=floor).log()[:, None]
        h_mass_K, self.f_mass_K = (
            torch.where(self.unresolved_K, 0.0, x(*log_masses)[:, 0]) for x in (shape.h_mass, shape.f_mass)
        )
        self.h_K = h_mass_K / p_K.clamp(min=torch.finfo(p_K.dtype).tiny)
        in_tail_K = p_K > MOST
        self.c_K = torch.where(in_tail_K, self.h_K, 0.0)
        self.elsewhere_K = self.h_K - self.c_K
        self.mean_K = torch.where(in_tail_K, 0.0, h_mass_K)

    def beside(self, h_mass: Tensor, p: Tensor, inside: Tensor) -> Tensor:
        """p (h - c) at entries, some of which are inside the support."""
        return torch.where(inside, h_mass - p * self.c_K[:, None], p * self.elsewhere_K[:, None])


@dataclass(frozen=True)
class SharedField:
    """What a term on all shared tokens does: p (h - c) [K, V], its mean, and the facts of `TopKField`."""

    h_mass_KV: Tensor
    mean_K: Tensor
    value_K: Tensor
    student_mass_K: Tensor
    target_mass_K: Tensor
    unresolved_K: Tensor


def shared_field(shape: ShapeMaths, pair: Pair, partial: Partial) -> SharedField:
    """The field on every token that the target has, with all others of either side as one class."""
    hidden_KV, hidden_p_KV, tail = _shared_tail(shape, pair, partial)
    shared_p_KV = pair.p - hidden_p_KV
    h_mass_KV = shape.h_mass(pair.logp, pair.logq).masked_fill_(hidden_KV, 0.0)
    h_mass_KV.sub_(shared_p_KV * tail.c_K[:, None])
    mean_K = h_mass_KV.sum(-1) + tail.mean_K
    h_mass_KV.add_(hidden_p_KV.mul_(tail.elsewhere_K[:, None]))
    value_K = shape.f_mass(pair.logp, pair.logq).masked_fill_(hidden_KV, 0.0).sum(-1) + tail.f_mass_K
    on_p, on_q = shared_p_KV.sum(-1), pair.q.sum(-1)
    return SharedField(h_mass_KV, mean_K, value_K, on_p, on_q, tail.unresolved_K)


def shared_value(shape: ShapeMaths, pair: Pair, partial: Partial) -> Tensor:
    """[K]: the divergence alone."""
    hidden_KV, _, tail = _shared_tail(shape, pair, partial)
    return shape.f_mass(pair.logp, pair.logq).masked_fill_(hidden_KV, 0.0).sum(-1) + tail.f_mass_K


def _shared_tail(shape: ShapeMaths, pair: Pair, partial: Partial) -> tuple[Tensor, Tensor, Tail]:
    """Which tokens the target has not, the student's probabilities of these, and the class that they are."""
    hidden_KV = ~partial.shared_KV
    hidden_p_KV = pair.p * hidden_KV.to(pair.p.dtype)  # `where` takes ten times as long on a host
    return hidden_KV, hidden_p_KV, Tail(shape, hidden_p_KV.sum(-1), partial.outside_K, FLOOR)


def _scaled(log_KS: Tensor, counted_KS: Tensor) -> Tensor:
    """Log-probabilities scaled to sum to 1 over the counted entries; the others get no mass."""
    inside = log_KS.masked_fill(~counted_KS, -torch.inf)
    return (inside - inside.logsumexp(-1, keepdim=True)).masked_fill_(~counted_KS, -torch.inf)


def _outside(mass_KV: Tensor, chosen: Entries) -> Tensor:
    """[K]: the mass that is not on the support."""
    kept = mass_KV.gather(1, chosen.ids).masked_fill_(chosen.inside, 0.0)
    return mass_KV.scatter(1, chosen.ids, kept).sum(-1)
