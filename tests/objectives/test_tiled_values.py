"""Facts that come out of the pass besides the loss, against plain computations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm
from opd.config.shapes import ForwardKL, ReverseKL, VerifierGatedKL
from opd.config.slots import TIS, Credit, EntropyGate, PPOClip, Sampled, Tokens, TopK
from opd.objectives.kernels.diagnostics import TOP
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_loss
from opd.objectives.shapes import maths
from opd.types import Head, ScorerRows
from tests.objectives import naive
from tests.objectives.test_tiled import T, V, rows_of, setting
from tests.objectives.test_tiled import small_blocks as small_blocks  # a fixture for every test here


def distributions(s, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, and log m of both scorers, [T, V]."""
    logits = [(s.hidden.detach(), s.head, temperature), *((x.hidden_TD, x.head, x.temperature) for x in s.scorers)]
    return tuple(torch.log_softmax(naive.logits64(h, head).detach() / t, -1) for h, head, t in logits)


def drawn(s, log_TV: torch.Tensor) -> torch.Tensor:
    return log_TV.gather(1, s.rows.token_T[:, None])[:, 0]


def test_facts_about_student_and_scorers() -> None:
    s = setting(40, b_rows=torch.tensor([0, 2, 3, 7]))
    logp, loga, logb = distributions(s, 0.9)
    values = s.run(rows_of(DataTerm(name="x")), temperature=0.9, diagnostics=True)[1]
    torch.testing.assert_close(values.logprob_T, drawn(s, logp))
    torch.testing.assert_close(values.entropy_T, -(logp.exp() * logp).sum(-1))
    index = s.scorers[1].index_T
    elsewhere = torch.tensor([t for t in range(T) if t not in index.tolist()])
    for name, logm, at in (("a", loga, torch.arange(T)), ("b", logb, index)):
        found, mine = values.scorers[name], logp[at]
        torch.testing.assert_close(found.logprob_T[at], logm.gather(1, s.rows.token_T[at, None])[:, 0])
        torch.testing.assert_close(found.reverse_kl_T[at], (mine.exp() * (mine - logm)).sum(-1))
        torch.testing.assert_close(found.forward_kl_T[at], (logm.exp() * (logm - mine)).sum(-1))
        torch.testing.assert_close(found.entropy_T[at], -(logm.exp() * logm).sum(-1))
    assert values.scorers["b"].logprob_T[elsewhere].isnan().all()
    plain = s.run(rows_of(DataTerm(name="x")), temperature=0.9)[1].scorers["a"]
    assert plain.forward_kl_T is None and plain.entropy_T is None and plain.overlap_T is None
    torch.testing.assert_close(plain.reverse_kl_T, values.scorers["a"].reverse_kl_T)


def test_reverse_kl_of_a_term_and_of_the_log_are_one_number() -> None:
    s = setting(41)
    term = rows_of(DivergenceTerm(name="x"))
    whole = dataclasses.replace(term, weight_T=torch.ones(T, dtype=torch.float64))
    for rows in (term, whole):
        values = s.run(rows)[1]
        kept = rows.weight_T != 0
        torch.testing.assert_close(values.scorers["a"].reverse_kl_T[kept], values.terms["x"].value_T[kept])
        assert torch.isfinite(values.scorers["a"].reverse_kl_T).all()


def test_overlap_counts_the_most_likely_tokens_of_both() -> None:
    g = torch.Generator().manual_seed(1)
    z, m = torch.randn(3, 60, generator=g), torch.randn(3, 60, generator=g)
    eye, every = torch.eye(60), torch.ones(3, dtype=torch.bool)
    scorer = ScorerRows("a", every, 1.0, hidden_TD=m, head=Head(eye, 60))
    rows = TokenRows(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    term = TermRows(DataTerm(name="x"), torch.ones(3), {}, True)
    options = {"student_temperature": 1.0, "chunk_tokens": 2, "diagnostics": True}
    found = tiled_loss(z, Head(eye, 60), rows, [term], [scorer], **options)[1].scorers["a"]
    for t in range(3):
        shared = set(z[t].argsort()[-TOP:].tolist()) & set(m[t].argsort()[-TOP:].tolist())
        assert found.overlap_T[t].item() == pytest.approx(len(shared) / TOP)
        assert found.overlap_mass_T[t].item() == pytest.approx(z[t].softmax(0)[sorted(shared)].sum().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [ReverseKL(), ForwardKL(), VerifierGatedKL()], ids=lambda x: x.kind)
@pytest.mark.parametrize("support", ["full", "sampled", TopK(kind="union", k=3)], ids=str)
def test_h_f_and_target_at_the_drawn_token(shape, support) -> None:
    s = setting(42)
    logp, loga, logb = distributions(s)
    credit = Credit(baseline="exact" if support == "sampled" else "none")
    term = rows_of(DivergenceTerm(name="x", shape=shape, support=support, credit=credit), mix="product")
    found = s.run(term)[1].terms["x"]
    kept = term.weight_T != 0
    expected = drawn(s, torch.log_softmax(0.3 * loga + 0.7 * logb, -1))
    functions = maths(shape, term.right_T)
    torch.testing.assert_close(found.target_T[kept], expected[kept])
    torch.testing.assert_close(found.h_T[kept], functions.h(drawn(s, logp), expected)[kept])
    torch.testing.assert_close(found.f_T[kept], functions.f(drawn(s, logp), expected)[kept])
    for column in (found.h_T, found.f_T, found.target_T, found.value_T, found.ratio_T):
        assert column[~kept].isnan().all()


@pytest.mark.parametrize("under", ["student", "sampler", "proximal"])
def test_the_log_ratio_is_taken_under_whom_the_term_says(under: str) -> None:
    s = setting(43)
    logp, loga, _ = distributions(s)
    term = rows_of(DivergenceTerm(name="x", support=Sampled(), advantage_under=under))
    base = {"student": drawn(s, logp), "sampler": s.rows.behaviour_T, "proximal": s.rows.proximal_T}[under]
    found = s.run(term)[1].terms["x"]
    kept = term.weight_T != 0
    torch.testing.assert_close(found.h_T[kept], (drawn(s, loga) - base)[kept])
    torch.testing.assert_close(found.f_T[kept], (base - drawn(s, loga))[kept])
    torch.testing.assert_close(found.value_T[kept], -found.h_T[kept])


def test_without_a_proximal_student_it_is_the_one_now() -> None:
    s = setting(44)
    s.rows = TokenRows(s.rows.token_T, s.rows.behaviour_T)
    term = rows_of(DivergenceTerm(name="x", support=Sampled(), importance=PPOClip(against="proximal")))
    kept = term.weight_T != 0
    assert (s.run(term)[1].terms["x"].ratio_T[kept] == 1).all()


def test_a_mixed_target_of_drawn_tokens_is_normalised_for_the_exact_baseline_alone() -> None:
    """Future credit needs log-linear rewards as they are: log Z of later states is part of them. Without a discount it
    would drop out of the mean, but whether it is known must not depend on what other terms ask of the scorers."""
    s = setting(45)
    _, loga, logb = distributions(s)
    plain = 1.4 * loga - 0.4 * logb
    normalised = torch.log_softmax(plain, -1)
    exact = Credit(baseline="exact")
    for credit, expected in ((Credit(), plain), (Credit(discount=0.5), plain), (exact, normalised)):
        term = rows_of(DivergenceTerm(name="x", support=Sampled(), credit=credit), mix="extrapolated")
        kept = term.weight_T != 0
        torch.testing.assert_close(s.run(term)[1].terms["x"].target_T[kept], drawn(s, expected)[kept])


def test_M_5_what_other_terms_ask_of_a_scorer_does_not_change_a_mixture_at_drawn_tokens() -> None:
    """Which answers share a micro-batch decides whether a scorer gives the whole vocabulary there or drawn tokens."""
    s = setting(48)
    term = rows_of(DivergenceTerm(name="x", support=Sampled(), importance=TIS(cap=1.1)), mix="extrapolated")
    loss, values = s.run(term)
    whole = s.gradients(loss)
    s.scorers = [as_drawn(scorer, log, s) for scorer, log in zip(s.scorers, distributions(s)[1:], strict=True)]
    loss, again = s.run(term)
    torch.testing.assert_close(again.terms["x"].target_T, values.terms["x"].target_T, equal_nan=True)
    for one, other in zip(whole, s.gradients(loss), strict=True):
        torch.testing.assert_close(one, other)


def as_drawn(scorer: ScorerRows, log_TV: torch.Tensor, s) -> ScorerRows:
    return ScorerRows(scorer.name, scorer.valid_T, scorer.temperature, logprobs_T=drawn(s, log_TV))


def test_masses_on_the_support() -> None:
    s = setting(46)
    logp, loga, _ = distributions(s)
    for kind in ("student_top_k", "teacher_top_k", "union", "intersection"):
        spec = TopK(kind=kind, k=5)
        term = rows_of(DivergenceTerm(name="x", support=spec))
        found = s.run(term)[1].terms["x"]
        for t in term.weight_T.nonzero()[:, 0].tolist():
            S = naive.chosen(spec, logp[t], loga[t])
            assert found.student_mass_T[t].item() == pytest.approx(logp[t][S].exp().sum().item(), rel=1e-9)
            assert found.target_mass_T[t].item() == pytest.approx(loga[t][S].exp().sum().item(), rel=1e-9)


def test_ppo_reports_the_clipped_surrogate() -> None:
    """min(rho A, clip(rho) A): its value goes on where its gradient has stopped."""
    s = setting(47)
    logp, _, _ = distributions(s)
    advantage = torch.linspace(-1, 1, T, dtype=torch.float64)
    term = rows_of(OutcomeTerm(name="x", importance=PPOClip(low=0.1, high=0.2)), extra_T=advantage)
    rho = (drawn(s, logp) - s.rows.behaviour_T).exp()
    expected = -torch.minimum(rho * advantage, rho.clamp(0.9, 1.2) * advantage)
    found, kept = s.run(term)[1].terms["x"], term.weight_T != 0
    torch.testing.assert_close(found.value_T[kept], expected[kept])
    assert found.h_T is None and (found.ratio_T[kept] == 0).any()


def test_facts_of_a_float32_pass_are_float32() -> None:
    s = setting(48, dtype=torch.float32)
    values = s.run(rows_of(DivergenceTerm(name="x"), dtype=torch.float32), diagnostics=True)[1]
    assert (
        values.logprob_T.dtype
        == values.terms["x"].value_T.dtype
        == values.scorers["a"].entropy_T.dtype
        == torch.float32
    )


def change(s, term, *, scorer=None, rows=None, **of_term):
    if scorer is not None:
        s.scorers[0] = dataclasses.replace(s.scorers[0], **scorer)
    if rows is not None:
        s.rows = dataclasses.replace(s.rows, **rows)
    return dataclasses.replace(term, **of_term)


ONES = torch.ones(T, dtype=torch.float64)
REFUSED = {
    "weights of another size": ({"weight_T": ONES[1:]}, "weight_T has 10 rows where 11"),
    "tokens of another size": ({"rows": {"behaviour_T": ONES[:4]}}, "behaviour_T has 4 rows"),
    "an unknown scorer": ({"mix": {"c": ONES}}, "reads the scorer c"),
    "no scorer at a token": ({"mix": {"a": ONES * (torch.arange(T) != 4)}}, "no scorer in its mix at 1 of 7"),
    "a scorer without rows there": (
        {"scorer": {"index_T": torch.arange(T - 1), "valid_T": ONES[1:] > 0, "hidden_TD": torch.zeros(T - 1, 5)}},
        "of which 1 have no row",
    ),
    "rows out of order": ({"scorer": {"index_T": torch.arange(T).flip(0)}}, "must ascend"),
    "drawn tokens where a distribution is needed": (
        {"scorer": {"hidden_TD": None, "head": None, "logprobs_T": -ONES}},
        "compares whole distributions",
    ),
    "no evidence": ({"scorer": {"hidden_TD": None, "head": None}}, "neither hidden states"),
    "another vocabulary": (
        {"scorer": {"head": Head(torch.zeros(V + 1, 5).double(), V + 1)}},
        "has 14 tokens and the student 13",
    ),
    "a reserved name": ({"scorer": {"name": "student"}}, "is the student itself"),
    "a name twice": ({"scorer": {"name": "b"}}, "names of their own"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_rows_that_do_not_fit_are_refused(changes, message: str) -> None:
    s = setting(49)
    weight = (torch.arange(T) % 3 != 0).double()
    term = dataclasses.replace(rows_of(DivergenceTerm(name="x")), weight_T=weight)
    with pytest.raises(ValueError, match=message):
        s.run(change(s, term, **changes))


def test_a_gate_or_an_outcome_without_its_evidence_is_refused() -> None:
    s = setting(50)
    s.scorers[0] = ScorerRows("a", ONES > 0, 1.0, logprobs_T=-ONES)
    gated = rows_of(DivergenceTerm(name="x", support=Sampled(), tokens=Tokens(where=EntropyGate(of="a", above=1))))
    with pytest.raises(ValueError, match="needs the entropy of a"):
        s.run(gated)
    with pytest.raises(ValueError, match="extra_T, its advantage"):
        s.run(rows_of(OutcomeTerm(name="x")))


def test_nothing_to_do_is_done() -> None:
    """No tokens, no terms, a term without a token, a scorer without a row."""
    s = setting(51, b_rows=torch.arange(0))
    term = dataclasses.replace(rows_of(DivergenceTerm(name="x")), weight_T=0 * ONES)
    loss, values = s.run(term)
    assert loss.item() == 0 and all(g.abs().max() == 0 for g in s.gradients(loss))
    assert values.terms["x"].value_T.isnan().all() and values.scorers["b"].logprob_T.isnan().all()
    assert s.run()[0].item() == 0
    empty = TokenRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss, values = tiled_loss(s.hidden[:0], s.head, empty, [], [], student_temperature=1.0, chunk_tokens=4)
    assert loss.item() == 0 and len(values.logprob_T) == 0
