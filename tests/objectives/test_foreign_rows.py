"""Strict terms on a scorer with another tokenizer: shared tokens are compared, all else is one class on either side."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.objectives.head import head_logits, top_tokens
from opd.objectives.kernels.rows import TermRows, TokenRows, TokenValues
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.types import Head, ScorerRows
from tests.objectives import naive

T, D, V, U, K = 9, 5, 23, 31, 10
SHAPES = [{"kind": "reverse_kl"}, {"kind": "forward_kl"}, {"kind": "jsd", "beta": 0.3}]
TAILS = ["bucket", "sampled_correction", "renormalise", "drop"]
KINDS = ["teacher_top_k", "student_top_k", "union", "intersection"]


class Parts:
    """A student of V tokens, a scorer of U, a part of which both have, and tokens at which both read the same."""

    def __init__(self, seed: int = 0, *, shared: int = 14, sharpness: float = 1.0) -> None:
        made = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, dtype=torch.float64)

        self.hidden_TD, self.weight_VD = numbers(T, D), sharpness * numbers(V, D)
        self.theirs_TD, self.their_weight_UD = numbers(T, D), sharpness * numbers(U, D)
        self.order_V = torch.full((V,), -1)
        ours = torch.randperm(V, generator=made)[:shared]
        self.order_V[ours] = torch.randperm(U, generator=made)[:shared]
        self.shared_V = self.order_V >= 0
        self.token_T = ours[torch.randint(shared, (T,), generator=made)] if shared else torch.zeros(T).long()
        self.index_R = torch.tensor([0, 1, 3, 4, 6, 8])
        self.weight_T = torch.zeros(T).double()
        self.weight_T[self.index_R] = torch.rand(len(self.index_R), generator=made).double()
        self.weight_T[4] = 0.0
        self.logm_TU = (self.theirs_TD @ self.their_weight_UD.T).log_softmax(-1)

    @property
    def head(self) -> Head:
        return Head(self.weight_VD, V)

    @property
    def top_TK(self) -> Tensor:
        return top_tokens(self.hidden_TD, self.head, K, chunk_tokens=3)

    def whole(self, name: str = "teacher") -> ScorerRows:
        return ScorerRows(
            name, torch.ones(len(self.index_R)).bool(), 1.0,
            hidden_TD=self.theirs_TD[self.index_R], head=Head(self.their_weight_UD, U, order_V=self.order_V),
            index_T=self.index_R, shared_V=self.shared_V, own_token_T=self.order_V[self.token_T[self.index_R]],
        )  # fmt: skip

    def few(self, kind: str, k: int = K, *, padding: float = math.nan, extra: bool = False) -> ScorerRows:
        """The scorer's k likeliest, the student's, or both; a token that is not shared has id -1."""
        logm_RU = self.logm_TU[self.index_R]
        student_of_U = torch.full((U + 1,), -1)
        student_of_U[self.order_V] = torch.where(self.shared_V, torch.arange(V), -1)
        student_of_U[-1] = -1
        best = logm_RU.topk(k)
        theirs = (student_of_U[best.indices], best.values)
        mine_RK = self.top_TK[self.index_R]
        mine_RK = mine_RK.masked_fill(~self.shared_V[mine_RK], -1)
        mine = (mine_RK, logm_RU.gather(1, self.order_V[mine_RK].clamp(min=0)).masked_fill(mine_RK < 0, padding))
        parts = {"student_top_k": [mine], "union": [theirs, mine]}.get(kind, [theirs, mine] if extra else [theirs])
        ids, logm = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
        again = torch.zeros_like(ids, dtype=torch.bool)
        for n in range(1, ids.shape[1]):
            again[:, n] = (ids[:, :n] == ids[:, n : n + 1]).any(1) & (ids[:, n] >= 0)
        return ScorerRows(
            "teacher", torch.ones(len(ids)).bool(), 1.0,
            logprobs_T=logm_RU.gather(1, self.order_V[self.token_T[self.index_R]][:, None])[:, 0],
            entry_ids_TK=torch.nn.functional.pad(ids.masked_fill(again, -1), (0, 2), value=-1),
            entries_TK=torch.nn.functional.pad(logm.masked_fill(again, padding), (0, 2), value=padding),
            index_T=self.index_R, shared_V=self.shared_V,
        )  # fmt: skip

    def behaviour(self) -> Tensor:
        logp_TV = head_logits(self.hidden_TD, self.head).log_softmax(-1)
        return logp_TV.gather(1, self.token_T[:, None])[:, 0]

    def run(self, term: dict[str, Any], *scorers: ScorerRows, told: bool = True, **rows: Any) -> tuple[Tensor, ...]:
        """Loss, gradients of states and head, and the term's values at the tokens that it trains."""
        hidden_TD, weight_VD = self.hidden_TD.clone().requires_grad_(), self.weight_VD.clone().requires_grad_()
        one_T = torch.ones(T).double()
        made = TermRows(
            DivergenceTerm(name="term", **term), self.weight_T, rows.pop("mix", {"teacher": one_T}), unit=True
        )
        tokens = TokenRows(self.token_T, self.behaviour(), None, self.top_TK if told else None)
        loss, values = tiled_loss(
            hidden_TD, Head(weight_VD, V), tokens, [made], scorers, student_temperature=1.0, chunk_tokens=3
        )
        loss.backward()
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        return loss.detach(), hidden_TD.grad, weight_VD.grad, values.terms["term"].value_T[self.weight_T != 0]

    def look(self, scorer: ScorerRows, **fields: Any) -> TokenValues:
        one_T = torch.ones(T).double()
        term = TermRows(DivergenceTerm(name="term", **fields), self.weight_T, {"teacher": one_T}, unit=True)
        return tiled_look(
            self.hidden_TD, self.head, TokenRows(self.token_T, self.behaviour()), [term], [scorer],
            student_temperature=1.0, chunk_tokens=3, diagnostics=True,
        )  # fmt: skip

    def defined(self, term: DivergenceTerm) -> tuple[Tensor, Tensor, Tensor]:
        """By its definition: a scalar whose gradient is the declared one, and the gradients of states and head."""
        hidden_TD, weight_VD = self.hidden_TD.clone().requires_grad_(), self.weight_VD.clone().requires_grad_()
        logp_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
        total = torch.zeros(()).double()
        for t in torch.nonzero(self.weight_T)[:, 0].tolist():
            total = total + self.weight_T[t] * self._token(term, logp_TV[t], self.logm_TU[t], int(self.token_T[t]))
        total.backward()
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        return total.detach(), hidden_TD.grad, weight_VD.grad

    def _token(self, term: DivergenceTerm, logp: Tensor, logm: Tensor, drawn: int) -> Tensor:
        support = term.support
        every = {v for v in range(V) if self.shared_V[v]}
        if support.kind == "full":
            S, tail, floor = every, "bucket", 1e-6
        else:
            assert support.kind != "sampled"
            student_of = {int(u): v for v, u in enumerate(self.order_V) if u >= 0}
            ours = set(logp.topk(support.k).indices.tolist()) & every
            theirs = {student_of[u] for u in logm.topk(support.k).indices.tolist() if u in student_of}
            S = {"student_top_k": ours, "teacher_top_k": theirs, "union": ours | theirs}.get(
                support.kind, ours & theirs
            )
            tail, floor = support.tail, support.floor
        inside = sorted(S)
        p, q = logp.exp(), logm.exp()
        at_p, at_q = p[inside], q[self.order_V[inside]]
        h = naive.h_of(term.shape, None, logp[inside], logm[self.order_V[inside]])
        if tail == "drop":
            return -(h * at_p).sum()
        if tail == "renormalise":
            return naive.mass(term.shape, None, at_p / at_p.sum(), at_q / at_q.sum()).sum() if S else 0.0 * p.sum()
        rest_p = p[[v for v in range(V) if v not in S]].sum()
        rest_q = q[[u for u in range(U) if u not in set(self.order_V[inside].tolist())]].sum()
        if max(float(rest_p.detach()), float(rest_q)) < floor:
            return -(h * at_p).sum()
        rest_q = rest_q.clamp(min=floor)
        value = naive.mass(term.shape, None, torch.cat([at_p, rest_p[None]]), torch.cat([at_q, rest_q[None]])).sum()
        if tail == "sampled_correction" and drawn not in S:
            of_tail = naive.h_of(term.shape, None, rest_p.log(), rest_q.log())
            strength = naive.h_of(term.shape, None, logp[drawn], logm[self.order_V[drawn]]) - of_tail
            value = value - strength.detach() * logp[drawn]
        return value


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["kind"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_supports_of_shared_tokens_are_what_they_are_defined_to_be(kind: str, tail: str, shape: dict) -> None:
    for seed in range(2):
        parts = Parts(seed, sharpness=0.7)
        term = {"support": {"kind": kind, "k": K, "tail": tail}, "shape": shape}
        loss, dhidden, dweight, _ = parts.run(term, parts.whole(), told=False)
        value, hidden, weight = parts.defined(DivergenceTerm(name="term", **term))
        close(dhidden, hidden)
        close(dweight, weight)
        assert hidden.abs().sum() > 0.001
        if tail in ("bucket", "renormalise"):
            close(loss, value)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["kind"])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_A_3_the_whole_vocabulary_is_what_both_have_and_one_class_for_all_else(sharpness: float, shape: dict) -> None:
    parts = Parts(3, sharpness=sharpness)
    loss, dhidden, dweight, _ = parts.run({"shape": shape}, parts.whole())
    value, hidden, weight = parts.defined(DivergenceTerm(name="term", shape=shape))  # pyright: ignore
    for got, wanted in ((loss, value), (dhidden, hidden), (dweight, weight)):
        close(got, wanted)
    assert hidden.abs().sum() > 0.01


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), shared=st.integers(1, V), k=st.integers(1, K), shape=st.sampled_from(SHAPES))
def test_a_few_entries_train_as_states_do(kind: str, tail: str, seed: int, shared: int, k: int, shape: dict) -> None:
    parts = Parts(seed, shared=shared)
    term = {"support": {"kind": kind, "k": k, "tail": tail}, "shape": shape}
    expected = parts.run(term, parts.whole())
    for rows in (parts.few(kind), parts.few(kind, extra=True), parts.few(kind, padding=1e30)):
        for got, wanted in zip(parts.run(term, rows), expected, strict=True):
            close(got, wanted)


def test_a_support_larger_than_a_vocabulary_is_all_that_is_shared() -> None:
    parts = Parts(2)
    expected = parts.run({}, parts.whole())
    for kind in KINDS:
        got = parts.run({"support": {"kind": kind, "k": 100}}, parts.whole(), told=False)
        for x, y in zip(got, expected, strict=True):
            close(x, y)


def test_nothing_shared_trains_nothing() -> None:
    parts = Parts(2, shared=0)
    scorer = replace(parts.whole(), own_token_T=torch.zeros(len(parts.index_R)).long())
    for term in ({}, {"support": {"kind": "union", "k": 3}}):
        _, dhidden, dweight, _ = parts.run(term, scorer, told=False)
        assert dhidden.isfinite().all() and dhidden.abs().max() < 1e-12 and dweight.abs().max() < 1e-12


@pytest.mark.parametrize("support", [{"kind": "full"}, {"kind": "union", "k": K}, {"kind": "teacher_top_k", "k": K}])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["kind"])
def test_scorers_of_both_sorts_share_a_term(support: dict, shape: dict) -> None:
    """Routed: each token's gradient is that of its own scorer alone."""
    parts = Parts(5)
    own = ScorerRows(
        "own", torch.ones(T).bool(), 1.0, hidden_TD=parts.theirs_TD, head=Head(parts.their_weight_UD[:V], V)
    )
    theirs_T = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 1]).double()
    term = {"support": support, "shape": shape}
    alone = [
        parts.run(term, parts.whole(), told=False)[1],
        parts.run(term, own, mix={"own": torch.ones(T).double()}, told=False)[1],
    ]
    both = parts.run(term, parts.whole(), own, mix={"teacher": theirs_T, "own": 1 - theirs_T}, told=False)[1]
    close(both, torch.where(theirs_T[:, None] > 0, *alone))


def test_facts_are_about_shared_tokens_and_one_class_and_have_no_nan_at_rows() -> None:
    parts = Parts(6)
    values = parts.look(parts.whole())
    said, rows = values.scorers["teacher"], parts.index_R
    logp_TV = (parts.hidden_TD @ parts.weight_VD.T).log_softmax(-1)
    value = torch.stack(
        [parts._token(DivergenceTerm(name="t"), logp_TV[t], parts.logm_TU[t], 0) for t in rows.tolist()]
    )
    assert said.reverse_kl_T is not None and said.forward_kl_T is not None and said.overlap_T is not None
    assert said.entropy_T is not None
    close(said.reverse_kl_T[rows], value)
    close(said.logprob_T[rows], parts.logm_TU[rows, parts.order_V[parts.token_T[rows]]])
    logm = parts.logm_TU[rows]
    close(said.entropy_T[rows], -(logm.exp() * logm).sum(-1))
    assert said.forward_kl_T[rows].isfinite().all() and (said.overlap_T[rows] < 1).all()
    mass_T = values.terms["term"].student_mass_T
    assert mass_T is not None
    close(mass_T[parts.weight_T != 0], logp_TV.exp()[:, parts.shared_V].sum(-1)[parts.weight_T != 0])
    few = parts.look(parts.few("teacher_top_k"), support={"kind": "teacher_top_k", "k": K}).scorers["teacher"]
    assert few.reverse_kl_T is None and few.entropy_T is None


@pytest.mark.parametrize(
    ("change", "term", "said"),
    [
        ({"own_token_T": None}, {}, "needs own_token_T"),
        ({"head": "plain"}, {}, "head.order_V"),
        ({"shared_V": torch.ones(V + 1).bool()}, {}, "shared_V has 24 rows where 23"),
        ({"own_token_T": torch.zeros(3).long()}, {}, "own_token_T has 3 rows"),
        ({"shared_V": None}, {}, "31 tokens and the student 23"),
        ({}, {"support": "sampled", "credit": {"baseline": "exact"}}, "free of bias"),
        ({}, {"tokens": {"where": {"of": "teacher", "above": 0.1}}}, "Gate by the student's"),
        ({}, {"alignment": "gold"}, "its rows have none"),
    ],
)
def test_A_2_A_3_rows_that_do_not_fit_are_refused(change: dict, term: dict, said: str) -> None:
    parts = Parts()
    if change.get("head") == "plain":
        change = {"head": Head(parts.their_weight_UD, U)}
    with pytest.raises(ValueError, match=said):
        parts.run(term, replace(parts.whole(), **change))


def test_a_mixture_of_vocabularies_is_refused() -> None:
    parts = Parts()
    half_T = torch.full((T,), 0.5).double()
    term = DivergenceTerm(name="term", target={"kind": "product", "weights": {"a": 0.5, "b": 0.5}})  # pyright: ignore
    rows = TermRows(term, parts.weight_T, {"a": half_T, "b": half_T}, unit=False)
    with pytest.raises(ValueError, match="mixture is known on shared tokens alone"):
        tiled_look(
            parts.hidden_TD, parts.head, TokenRows(parts.token_T, parts.behaviour()), [rows],
            [parts.whole("a"), parts.whole("b")], student_temperature=1.0, chunk_tokens=3,
        )  # fmt: skip
