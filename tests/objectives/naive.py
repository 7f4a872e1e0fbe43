"""What every kind of term means, as slow differentiable code on whole logits, one token at a time, from definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd.config import shapes, slots
from opd.config.objective import DataTerm, OutcomeTerm
from opd.objectives.kernels.tiled import TermRows, TokenRows
from opd.types import Head, ScorerRows

LONG = torch.float64


def logits64(hidden: Tensor, head: Head) -> Tensor:
    z = hidden.to(LONG) @ head.weight_VD.to(LONG)[: head.vocab_size].T
    if head.bias_V is not None:
        z = z + head.bias_V.to(LONG)[: head.vocab_size]
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z if head.order_V is None else z[:, head.order_V]


def mass(spec, right: bool | None, p: Tensor, q: Tensor) -> Tensor:
    """p f(q / p) per class, by its definition; differentiable in p."""
    r = q / p
    match spec:
        case shapes.ReverseKL():
            return p * (p / q).log()
        case shapes.ForwardKL():
            return q * r.log()
        case shapes.JensenShannon(beta=b, normalised=n):
            m = b * q + (1 - b) * p
            return (b * q * (q / m).log() + (1 - b) * p * (p / m).log()) / (b * (1 - b) if n else 1)
        case shapes.SkewForwardKL(alpha=a):
            return q * (q / (a * q + (1 - a) * p)).log()
        case shapes.SkewReverseKL(alpha=a):
            return p * (p / ((1 - a) * q + a * p)).log()
        case shapes.TotalVariation(dead_zone=d):
            up, down = (math.exp(-d) * q - p).clamp(min=0), (p - math.exp(d) * q).clamp(min=0)
            return (up + down) / 2
        case shapes.ClippedKL(low=low, high=high):
            a, b = -math.inf if low is None else low, math.inf if high is None else high
            return p * held(r, a, b)
        case shapes.VerifierGatedKL():
            return p * (held(r, 0.0, math.inf) if right else held(r, -math.inf, 0.0))
        case shapes.TanhKL(scale=1.0):
            return p * (1 - r + 2 * r * (torch.atan(r) - math.pi / 4))
    raise AssertionError(spec)


def held(r: Tensor, a: float, b: float) -> Tensor:
    inside = r - 1 - r.log()
    if a > -math.inf:
        inside = torch.where(r.log() < a, r * (1 - math.exp(-a)) - a, inside)
    if b < math.inf:
        inside = torch.where(r.log() > b, r * (1 - math.exp(-b)) - b, inside)
    return inside


def h_of(spec, right: bool | None, logp: Tensor, logq: Tensor) -> Tensor:
    """h by the table, of detached numbers."""
    x = (logq - logp).detach()
    r = x.exp()
    match spec:
        case shapes.ReverseKL():
            return x
        case shapes.ForwardKL():
            return r - 1
        case shapes.JensenShannon(beta=b, normalised=n):
            return (1 - b) * (b * r + 1 - b).log() / (b * (1 - b) if n else 1)
        case shapes.SkewForwardKL(alpha=a):
            return (1 - a) * r / (a * r + 1 - a) - (1 - a)
        case shapes.SkewReverseKL(alpha=a):
            u = (1 - a) * r + a
            return u.log() + a / u - a
        case shapes.TotalVariation(dead_zone=d):
            return torch.where(x.abs() <= d, 0.0, x.sign() / 2)
        case shapes.ClippedKL(low=low, high=high):
            return x.clamp(low, high)
        case shapes.VerifierGatedKL():
            return x.clamp(min=0) if right else x.clamp(max=0)
        case shapes.TanhKL(scale=s):
            return s * torch.tanh(x / s)
    raise AssertionError(spec)


def target(term: TermRows, t: int, logm: Mapping[str, Tensor]) -> Tensor:
    """log q~ over the vocabulary at token t."""
    mixed = sum(float(c[t]) * logm[name][t] for name, c in term.mix.items() if c[t] != 0)
    assert isinstance(mixed, Tensor)
    return torch.log_softmax(mixed.detach(), -1)


def chosen(spec: slots.TopK, logp: Tensor, logq: Tensor) -> list[int]:
    ours = {int(v) for v in logp.detach().argsort(descending=True)[: spec.k]}
    theirs = {int(v) for v in logq.argsort(descending=True)[: spec.k]}
    by_kind = {"student_top_k": ours, "teacher_top_k": theirs, "union": ours | theirs, "intersection": ours & theirs}
    return sorted(by_kind[spec.kind])


def ratio(term, strength: float, logp: Tensor, mu: Tensor, proximal: Tensor | None) -> Tensor:
    rule = term.importance
    if isinstance(rule, slots.NoImportance):
        return torch.ones((), dtype=LONG)
    then = mu if rule.against == "sampler" else (logp if proximal is None else proximal)
    rho = (logp - then).exp().detach()
    match rule:
        case slots.TIS(cap=cap):
            return rho.clamp(max=cap)
        case slots.IcePop(low=low, high=high):
            return rho if low <= rho <= high else torch.zeros((), dtype=LONG)
        case slots.PPOClip(low=low, high=high):
            gone = (strength > 0 and rho > 1 + high) or (strength < 0 and rho < 1 - low)
            return torch.zeros((), dtype=LONG) if gone else rho
    return rho


def loss(
    hidden: Tensor,
    head: Head,
    rows: TokenRows,
    terms: Sequence[TermRows],
    scorers: Sequence[ScorerRows],
    temperature: float,
) -> Tensor:
    """A scalar whose gradient is the declared one. Its value is the terms' own for full, bucket, renormalise."""
    logp_all = torch.log_softmax(logits64(hidden, head) / temperature, -1)
    logm: dict[str, dict[int, Tensor]] = {"student": {t: logp_all[t].detach() for t in range(len(logp_all))}}
    drawn: dict[str, dict[int, Tensor]] = {}
    for s in scorers:
        index = range(len(s.valid_T)) if s.index_T is None else s.index_T.tolist()
        if s.hidden_TD is not None:
            logq = torch.log_softmax(logits64(s.hidden_TD, s.head) / s.temperature, -1)
            logm[s.name] = dict(zip(index, logq, strict=True))
        else:
            drawn[s.name] = dict(zip(index, s.logprobs_T.to(LONG), strict=True))
    total = torch.zeros((), dtype=LONG)
    for term in terms:
        for t in range(len(logp_all)):
            w = float(term.weight_T[t])
            if w == 0 or not _open(term.term.tokens.where, t, logm):
                continue
            total = total + w * _token(term, t, rows, logp_all[t], logm, drawn)
    return total


def _open(gate: slots.EntropyGate | None, t: int, logm) -> bool:
    if gate is None:
        return True
    logq = logm[gate.of][t]
    entropy = float(-(logq.exp() * logq).sum())
    return (gate.above is None or entropy > gate.above) and (gate.below is None or entropy < gate.below)


def _token(rows_of: TermRows, t: int, rows: TokenRows, logp: Tensor, logm, drawn) -> Tensor:
    term, y = rows_of.term, int(rows.token_T[t])
    mu = rows.behaviour_T[t].to(LONG)
    proximal = None if rows.proximal_T is None else rows.proximal_T[t].to(LONG)
    extra = 0.0 if rows_of.extra_T is None else float(rows_of.extra_T[t])
    if isinstance(term, DataTerm):
        return -logp[y]
    if isinstance(term, OutcomeTerm):
        return -extra * ratio(term, extra, logp[y], mu, proximal) * logp[y]
    right = None if rows_of.right_T is None else bool(rows_of.right_T[t])
    if isinstance(term.support, slots.Sampled):
        used = [name for name, c in rows_of.mix.items() if c[t] != 0]
        if term.credit.baseline != "exact" or term.credit.discount > 0:  # log-linear rewards stay as they are
            at = {name: drawn[name][t] if name in drawn else logm[name][t][y] for name in used}
            logq_y = sum(float(rows_of.mix[name][t]) * value for name, value in at.items())
        else:
            logq_y = target(rows_of, t, logm)[y]
        base = {"student": logp[y], "sampler": mu, "proximal": logp[y] if proximal is None else proximal}
        s = h_of(term.shape, right, base[term.advantage_under], logq_y)
        if term.credit.baseline == "exact":
            s = s - (logp.exp() * h_of(term.shape, right, logp, target(rows_of, t, logm))).sum().detach()
        s = (s if term.credit.now else 0.0) + extra
        return -(s * ratio(term, float(s), logp[y], mu, proximal)).detach() * logp[y]
    logq = target(rows_of, t, logm)
    p, q = logp.exp(), logq.exp()
    if isinstance(term.support, slots.Full):
        return mass(term.shape, right, p, q).sum()
    S = chosen(term.support, logp, logq)
    rest = [v for v in range(len(p)) if v not in S]
    tail = term.support.tail
    if tail == "renormalise":
        return mass(term.shape, right, p[S] / p[S].sum(), q[S] / q[S].sum()).sum() if S else 0.0 * p.sum()
    if tail == "drop":
        return -(h_of(term.shape, right, logp, logq)[S] * p[S]).sum()
    floor = term.support.floor
    resolved = max(float(p[rest].detach().sum()), float(q[rest].sum())) >= floor
    classes_p, classes_q = p[S], q[S]
    if resolved and rest:
        classes_p = torch.cat([p[S], p[rest].sum()[None]])
        classes_q = torch.cat([q[S], q[rest].sum()[None].clamp(min=floor)])
        value = mass(term.shape, right, classes_p, classes_q).sum()
    else:  # the tail has no field: h is 0 there
        value = -(h_of(term.shape, right, logp, logq)[S] * p[S]).sum()
    if tail == "sampled_correction" and y not in S:
        h_tail = torch.zeros((), dtype=LONG)
        if resolved:
            h_tail = h_of(term.shape, right, classes_p[-1].log(), classes_q[-1].log())
        s = h_of(term.shape, right, logp[y], logq[y]) - h_tail
        value = value - (s * ratio(term, float(s), logp[y], mu, proximal)).detach() * logp[y]
    return value
