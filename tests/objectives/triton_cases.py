"""Tests of the Triton pass against the tiled one, for whatever runs the kernels: `test_triton.py` on the host by
Triton's interpreter, `tests/gpu/test_triton_compiled.py` on a CUDA device. Each has a fixture `device`.

Few tokens and a small vocabulary, since the interpreter is slow; blocks of eight entries, so that a row has several.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm
from opd.config.shapes import TanhKL, VerifierGatedKL
from opd.config.slots import TIS, Credit, EntropyGate, PPOClip, Sampled, Tokens, TopK
from opd.objectives.kernels import block
from opd.objectives.kernels.rows import TermRows, TokenRows, TokenValues
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.types import Head, ScorerRows
from tests.objectives.test_tiled import SHAPES

T, V, PADDED, D = 4, 13, 16, 6
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"scale": 0.5, "softcap": 4.0},
    "order": {"order": torch.tensor([2, 0, 1, *range(3, V)])},  # a cycle: it is not its own inverse
    "all": {"bias": True, "scale": 0.5, "softcap": 4.0, "order": torch.tensor([2, 0, 1, *range(3, V)])},
}
MIXES = {
    "routed": {"a": "even", "b": "odd"},
    "product": {"a": 0.3, "b": 0.7},
    "extrapolated": {"a": 1.4, "b": -0.4},
    "veto": {"a": 1.0, "student": 0.4},
}
WITH_TABLE = SHAPES | {"tanh_0.3": TanhKL(scale=0.3)}


@dataclass
class Problem:
    """A student with scorers of other widths, on a device, in float32."""

    hidden_TD: Tensor
    head: Head
    rows: TokenRows
    scorers: list[ScorerRows]

    def loss(self, run, terms: list[TermRows], temperature: float, diagnostics: bool):
        """Loss, gradients of everything that has one, facts."""
        leaves = [self.hidden_TD, self.head.weight_VD, self.head.bias_V]
        leaves = [leaf for leaf in leaves if leaf is not None]
        for leaf in leaves:
            leaf.grad = None
        loss, values = run(
            self.hidden_TD, self.head, self.rows, terms, self.scorers,
            student_temperature=temperature, chunk_tokens=3, diagnostics=diagnostics,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves], values


def problem(
    device: torch.device, seed: int = 0, *, vocab=V, second=False, bias=False, scale=1.0, softcap=None, order=None
) -> Problem:
    """second: a scorer b, which has rows for odd tokens alone."""
    padded = vocab + PADDED - V
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    order = None if order is None else order.to(device)
    hidden, weight = rand(T, D).requires_grad_(), rand(padded, D).requires_grad_()
    head = Head(weight, vocab, rand(padded).requires_grad_() if bias else None, scale, softcap, order)
    token = torch.randint(0, vocab, (T,), generator=g).to(device)
    rows = TokenRows(token, -0.5 - rand(T).abs(), -0.5 - rand(T).abs())
    every = torch.ones(T, dtype=torch.bool, device=device)
    scorers = [ScorerRows("a", every, 1.3, hidden_TD=rand(T, 5), head=Head(rand(padded, 5), vocab))]
    if second:
        odd = torch.arange(1, T, 2, device=device)
        b_head = Head(rand(V, 4), V, rand(V), 1.5, 9.0, torch.arange(V, device=device).flip(0))
        scorers.append(ScorerRows("b", every[odd], 0.9, hidden_TD=rand(len(odd), 4), head=b_head, index_T=odd))
    return Problem(hidden, head, rows, scorers)


def term_rows(p: Problem, term, mix: str | None = None, seed: int = 3, **more) -> TermRows:
    """Random weights, 0 at the first token; where a scorer has no rows, a mixture of two leaves the token out."""
    device = p.hidden_TD.device
    g = torch.Generator().manual_seed(seed)
    weight = (torch.rand(T, generator=g) + 0.1) * (torch.arange(T) != 0)
    odd = torch.arange(T) % 2 == 1
    if mix in ("product", "extrapolated"):
        weight = weight * odd
    table = {"even": (~odd).float(), "odd": odd.float()}
    wanted = {"a": 1.0} if mix is None else MIXES[mix]
    c = {name: table[x] if isinstance(x, str) else torch.full((T,), x) for name, x in wanted.items()}
    c = {name: values.to(device) for name, values in c.items()} if isinstance(term, DivergenceTerm) else {}
    if isinstance(term, DivergenceTerm) and isinstance(term.shape, VerifierGatedKL):
        more["right_T"] = torch.arange(T, device=device) < 2
    return TermRows(term, weight.to(device), c, mix in (None, "routed"), **more)


def compare(p: Problem, *terms: TermRows, temperature: float = 0.8, diagnostics: bool = False) -> list[Tensor]:
    """Both passes give the same; returns the gradients."""
    from opd.objectives.kernels.triton import triton_loss

    loss, gradients, values = p.loss(tiled_loss, list(terms), temperature, diagnostics)
    ours, our_gradients, our_values = p.loss(triton_loss, list(terms), temperature, diagnostics)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for our, gradient in zip(our_gradients, gradients, strict=True):
        assert torch.isfinite(gradient).all()
        assert (our - gradient).norm() <= 1e-5 * gradient.norm()
    same_facts(our_values, values)
    return our_gradients


def compare_looks(p: Problem, *terms: TermRows, diagnostics: bool) -> None:
    from opd.objectives.kernels.triton import triton_look

    look = {"student_temperature": 0.8, "chunk_tokens": 3, "diagnostics": diagnostics}
    arguments = (p.hidden_TD, p.head, p.rows, terms, p.scorers)
    same_facts(triton_look(*arguments, **look), tiled_look(*arguments, **look))


def same_facts(ours: TokenValues, expected: TokenValues) -> None:
    torch.testing.assert_close(ours.logprob_T, expected.logprob_T, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours.entropy_T, expected.entropy_T, rtol=1e-5, atol=1e-6, equal_nan=True)
    for kind in ("terms", "scorers"):
        for name, facts in getattr(expected, kind).items():
            for field in dataclasses.fields(facts):
                ours_T, facts_T = getattr(getattr(ours, kind)[name], field.name), getattr(facts, field.name)
                assert (ours_T is None) == (facts_T is None), (name, field.name)
                if facts_T is not None:
                    torch.testing.assert_close(ours_T, facts_T, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight entries in a step of a program, two tokens in a block of what is written down."""
    from opd.objectives.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "WIDEST", 8)
    monkeypatch.setattr(block, "PART_HOST", 2)
    monkeypatch.setattr(block, "NUMBERS_HOST", 2 * V)
    monkeypatch.setattr(block, "NUMBERS_DEVICE", 2 * V)


@pytest.mark.parametrize("shape", WITH_TABLE.values(), ids=WITH_TABLE.keys())
def test_triton_gives_every_shape_on_the_whole_vocabulary(shape, device) -> None:
    p = problem(device, 1, bias=True, scale=0.5, softcap=4.0)
    compare(p, term_rows(p, DivergenceTerm(name="x", shape=shape)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_triton_gives_every_shape_on_drawn_tokens_with_an_exact_baseline(shape, device) -> None:
    p = problem(device, 2, scale=0.5)
    term = DivergenceTerm(
        name="x", shape=shape, support=Sampled(), credit=Credit(baseline="exact"), importance=PPOClip()
    )
    compare(p, term_rows(p, term), temperature=1.0)


@pytest.mark.parametrize("head", HEADS)
def test_triton_reads_every_head(head: str, device) -> None:
    p = problem(device, 3, **HEADS[head])
    p.scorers[0].hidden_TD[0] = torch.nan  # a weight of 0 leaves the token out, whatever is there
    terms = [
        term_rows(p, DivergenceTerm(name="x", shape=SHAPES["jsd"])),
        term_rows(p, DivergenceTerm(name="y", support=Sampled(), importance=TIS(cap=1.5)), seed=4),
        term_rows(p, DataTerm(name="z"), seed=5),
    ]
    compare(p, *terms)


@pytest.mark.parametrize("mix", MIXES)
def test_triton_gives_log_linear_targets_and_sums_of_terms(mix: str, device) -> None:
    p = problem(device, 4, second=True)
    p.scorers[0].hidden_TD[0] = torch.nan
    extra = torch.linspace(-1, 2, T, device=device)
    gate = Tokens(where=EntropyGate(of="student", below=2.0))
    compare(
        p,
        term_rows(p, DivergenceTerm(name="x", shape=SHAPES["skew_reverse"]), mix),
        term_rows(p, DivergenceTerm(name="y", tokens=gate), mix, seed=4),
        term_rows(p, DivergenceTerm(name="z", support=Sampled()), mix, seed=5, extra_T=extra),
        term_rows(p, OutcomeTerm(name="w"), seed=6, extra_T=extra),
    )


def test_triton_beside_terms_on_a_few_entries_and_diagnostics(device) -> None:
    p = problem(device, 5, second=True, bias=True)
    terms = [
        term_rows(p, DivergenceTerm(name="x", shape=SHAPES["forward"]), "product"),
        term_rows(p, DivergenceTerm(name="y", support=TopK(kind="union", k=3)), "product", seed=4),
        term_rows(p, DivergenceTerm(name="z", support=TopK(kind="student_top_k", k=3, tail="drop")), seed=5),
    ]
    compare(p, *terms, diagnostics=True)
    compare_looks(p, *terms, diagnostics=True)
    compare_looks(p, *terms[:1], diagnostics=False)


@pytest.mark.parametrize("shape", ["forward", "jsd", "skew_forward", "skew_reverse", "tv", "clipped", "tanh"])
def test_O_14_triton_where_student_or_target_has_no_mass(shape: str, device) -> None:
    """Entry 0 has mass on neither side, entry 1 none in the student, entry 2 none in the target."""
    p = problem(device, 6, bias=True)
    a = p.scorers[0]
    bias = torch.zeros(PADDED, device=device)
    bias[[0, 2]] = -torch.inf
    p.scorers[0] = dataclasses.replace(a, head=dataclasses.replace(a.head, bias_V=bias))
    with torch.no_grad():
        p.head.bias_V[[0, 1]] = -torch.inf
    p.rows.token_T[:] = 5
    compare(p, term_rows(p, DivergenceTerm(name="x", shape=SHAPES[shape])))


def test_triton_gives_no_mass_where_a_scorer_of_the_mixture_gives_none(device) -> None:
    """Entry 2 has no mass under either scorer; the one against it does not bring it back."""
    p = problem(device, 8, second=True)
    bias = torch.zeros(PADDED, device=device)
    bias[2] = -torch.inf
    p.scorers = [
        dataclasses.replace(s, head=Head(s.head.weight_VD, V, bias[: len(s.head.weight_VD)])) for s in p.scorers
    ]
    p.rows.token_T[:] = 5
    compare(p, term_rows(p, DivergenceTerm(name="x", shape=SHAPES["jsd"]), "extrapolated"))


def test_triton_gives_nothing_at_the_target(device) -> None:
    """h(1) = 0: where student and scorer are the same numbers, the gradient is exactly 0 for every shape."""
    from opd.objectives.kernels.triton import triton_loss

    p = problem(device, 7)
    head = dataclasses.replace(p.head, weight_VD=p.head.weight_VD.detach())
    p.scorers = [dataclasses.replace(p.scorers[0], hidden_TD=p.hidden_TD.detach(), head=head, temperature=0.8)]
    for shape in SHAPES.values():
        loss, gradients, _ = p.loss(triton_loss, [term_rows(p, DivergenceTerm(name="x", shape=shape))], 0.8, False)
        assert abs(loss) < 1e-6
        assert all((gradient == 0).all() for gradient in gradients)
