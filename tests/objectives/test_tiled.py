"""The tiled pass against naive autograd in float64: gradients of every shape, support, tail and weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm
from opd.config.shapes import (
    ClippedKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.config.slots import TIS, Credit, EntropyGate, Full, IcePop, PPOClip, Ratio, Sampled, Tokens, TopK
from opd.objectives.kernels import block
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_look, tiled_loss
from opd.types import Head, ScorerRows
from tests.objectives import naive

T, V, PADDED, DS = 11, 13, 16, 6
SHAPES = {
    "reverse": ReverseKL(),
    "forward": ForwardKL(),
    "jsd": JensenShannon(beta=0.3),
    "jsd_normalised": JensenShannon(beta=0.7, normalised=True),
    "skew_forward": SkewForwardKL(),
    "skew_reverse": SkewReverseKL(alpha=0.2),
    "tv": TotalVariation(),
    "clipped": ClippedKL(low=-1.0, high=1.0),
    "floored": ClippedKL(low=-0.5, high=None),
    "tanh": TanhKL(),
    "gated": VerifierGatedKL(),
}
KINDS = ("student_top_k", "teacher_top_k", "union", "intersection")
TAILS = ("bucket", "sampled_correction", "renormalise", "drop")
SUPPORTS = {"full": Full(), "sampled": Sampled()} | {
    f"{kind}-{tail}": TopK(kind=kind, k=4, tail=tail) for kind in KINDS for tail in TAILS
}
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"scale": 0.5, "softcap": 4.0},
    "order": {"order": torch.tensor([2, 0, 1, *range(3, V)])},  # a cycle: it is not its own inverse
}
MIXES = {
    "single": {"a": 1.0},
    "routed": {"a": "even", "b": "odd"},
    "product": {"a": 0.3, "b": 0.7},
    "extrapolated": {"a": 1.4, "b": -0.4},
    "veto": {"a": 1.0, "student": 0.4},
}


@dataclasses.dataclass
class Setting:
    """Random student and two scorers of other widths; the second one has rows for a part of the tokens."""

    hidden: Tensor
    head: Head
    rows: TokenRows
    scorers: list[ScorerRows]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight_VD, self.head.bias_V) if x is not None and x.requires_grad]

    def gradients(self, scalar: Tensor) -> list[Tensor]:
        for x in self.leaves:
            x.grad = None
        scalar.backward()
        return [x.grad.clone() for x in self.leaves]

    def run(self, *terms: TermRows, temperature: float = 1.0, chunk: int = 4, **options):
        options = {"student_temperature": temperature, "chunk_tokens": chunk} | options
        return tiled_loss(self.hidden, self.head, self.rows, terms, self.scorers, **options)

    def naive(self, *terms: TermRows, temperature: float = 1.0) -> Tensor:
        return naive.loss(self.hidden, self.head, self.rows, terms, self.scorers, temperature)


def setting(seed: int = 0, *, dtype=torch.float64, bias=False, scale=1.0, softcap=None, order=None, b_rows=None):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, weight = rand(T, DS).requires_grad_(), rand(PADDED, DS).requires_grad_()
    head = Head(weight, V, rand(PADDED).requires_grad_() if bias else None, scale, softcap, order)
    rows = TokenRows(
        torch.randint(0, V, (T,), generator=g),
        torch.log(torch.rand(T, generator=g) * 0.5 + 0.05).to(dtype),
        torch.log(torch.rand(T, generator=g) * 0.5 + 0.05).to(dtype),
    )
    index = torch.arange(T) if b_rows is None else b_rows
    every = lambda n: torch.ones(n, dtype=torch.bool)  # noqa: E731
    a = ScorerRows("a", every(T), 1.3, hidden_TD=rand(T, 5), head=Head(rand(PADDED, 5), V))
    b_head = Head(rand(V, 4), V, rand(V), 1.5, 9.0, torch.arange(V).flip(0))
    b = ScorerRows("b", every(len(index)), 0.9, hidden_TD=rand(len(index), 4), head=b_head, index_T=b_rows)
    return Setting(hidden, head, rows, [a, b])


def rows_of(term, *, mix="single", dtype=torch.float64, seed=3, **more) -> TermRows:
    """Weights are random, and 0 at every third token."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.rand(T, generator=g) + 0.1) * (torch.arange(T) % 3 != 0)
    odd = torch.arange(T) % 2 == 1
    table = {"even": (~odd).to(dtype), "odd": odd.to(dtype)}
    c = {name: table[x] if isinstance(x, str) else torch.full((T,), x, dtype=dtype) for name, x in MIXES[mix].items()}
    if not isinstance(term, DivergenceTerm):
        c = {}
    elif isinstance(term.shape, VerifierGatedKL):
        more.setdefault("right_T", torch.arange(T) % 4 < 2)
    return TermRows(term, weight.to(dtype), c, mix in ("single", "routed"), **more)


def close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(ours, expected, strict=True):
        if x.dtype == torch.float64:
            torch.testing.assert_close(x, y.to(x.dtype), atol=1e-10, rtol=1e-9)
        else:
            torch.testing.assert_close(x.double(), y.double(), atol=1e-6, rtol=3e-6)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens in a block, so that tiles have several, and scorers read a tile in parts."""
    monkeypatch.setattr(block, "NUMBERS_HOST", 2 * V)
    monkeypatch.setattr(block, "PART_HOST", 3)


def widened(s: Setting) -> Setting:
    """The same numbers in float64."""

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    def wide_head(head: Head) -> Head:
        return dataclasses.replace(head, weight_VD=wide(head.weight_VD), bias_V=wide(head.bias_V))

    rows = TokenRows(s.rows.token_T, wide(s.rows.behaviour_T), wide(s.rows.proximal_T))
    scorers = [dataclasses.replace(x, hidden_TD=wide(x.hidden_TD), head=wide_head(x.head)) for x in s.scorers]
    return Setting(wide(s.hidden), wide_head(s.head), rows, scorers)


@pytest.mark.parametrize("temperature, softcap", [(0.8, 3.0), (1.0, None)], ids=["capped", "plain"])
@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_O_14_gradients_of_every_shape_on_every_support(shape, support, temperature: float, softcap) -> None:
    """With padding, a bias, and tiles that do not divide the tokens: 1e-6 of the norm in float32, 1e-10 in float64."""
    narrow = setting(1, dtype=torch.float32, scale=0.5, bias=True, softcap=softcap)
    s = widened(narrow)
    spec = DivergenceTerm(name="x", shape=shape, support=support, importance=Ratio())
    expected = s.gradients(s.naive(rows_of(spec), temperature=temperature))
    for ours, dtype, allowed in ((s, torch.float64, 1e-10), (narrow, torch.float32, 1e-6)):
        loss, _ = ours.run(rows_of(spec, dtype=dtype), temperature=temperature)
        found = ours.gradients(2.0 * loss)  # the backward pass scales what the forward pass made
        assert len(found) == len(expected) == 3
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == dtype and (x.double() / 2.0 - y).norm() <= allowed * y.norm()


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "support", ["full", "sampled", "student_top_k-bucket", "union-drop", "intersection-renormalise"]
)
def test_O_14_gradients_under_every_head(support: str, variant, temperature: float, chunk: int, dtype) -> None:
    s = setting(2, dtype=dtype, **variant)
    term = rows_of(DivergenceTerm(name="x", shape=JensenShannon(), support=SUPPORTS[support]), dtype=dtype)
    other = rows_of(DataTerm(name="y"), dtype=dtype, seed=4)
    expected = s.gradients(s.naive(term, other, temperature=temperature))
    loss, _ = s.run(term, other, temperature=temperature, chunk=chunk)
    close(s.gradients(loss), expected)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_O_14_gradients_in_16_bits_under_every_head(variant, temperature: float) -> None:
    """Against float64 of the same 16-bit numbers; a head's own rounding is all that may be seen."""
    narrow = setting(2, dtype=torch.bfloat16, **variant)
    s = widened(narrow)
    spec = DivergenceTerm(name="x", shape=JensenShannon(), importance=Ratio())
    expected = s.gradients(s.naive(rows_of(spec), temperature=temperature))
    found = narrow.gradients(narrow.run(rows_of(spec, dtype=torch.float32), temperature=temperature)[0])
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.bfloat16 and (x.double() - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("support", ["full", "sampled", "teacher_top_k-bucket", "union-sampled_correction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gradients_towards_log_linear_targets(mix: str, support: str, dtype) -> None:
    odd = torch.tensor([t for t in range(T) if t % 2 == 1])
    s = setting(3, dtype=dtype, b_rows=odd if mix == "routed" else None)
    terms = [
        rows_of(DivergenceTerm(name=name, shape=shape, support=SUPPORTS[support]), mix=mix, dtype=dtype, seed=seed)
        for name, shape, seed in (("x", ReverseKL(), 5), ("y", SkewReverseKL(), 6))
    ]
    terms[1] = dataclasses.replace(terms[1], weight_T=terms[1].weight_T.roll(1))  # other rows, the same target
    expected = s.gradients(s.naive(*terms))
    close(s.gradients(s.run(*terms)[0]), expected)


IMPORTANCE = [
    Ratio(),
    TIS(cap=1.5),
    IcePop(low=0.5, high=2.0),
    PPOClip(),
    PPOClip(against="proximal"),
    TIS(against="proximal"),
]


@pytest.mark.parametrize("importance", IMPORTANCE, ids=str)
@pytest.mark.parametrize("under", ["student", "sampler", "proximal"])
def test_gradients_of_weighted_drawn_tokens(importance, under: str) -> None:
    s = setting(4)
    extra = torch.linspace(-2, 2, T, dtype=torch.float64)
    terms = [
        rows_of(
            DivergenceTerm(name="x", support=Sampled(), advantage_under=under, importance=importance), extra_T=extra
        ),
        rows_of(OutcomeTerm(name="y", importance=importance), extra_T=-extra.flip(0), seed=7),
    ]
    expected = s.gradients(s.naive(*terms))
    _, values = s.run(*terms)
    assert (values.terms["x"].ratio_T[terms[0].weight_T != 0] != 1).any()
    close(s.gradients(s.run(*terms)[0]), expected)


@pytest.mark.parametrize(
    "credit", [Credit(baseline="exact"), Credit(now=False, discount=0.5), Credit(discount=0.9)], ids=str
)
@pytest.mark.parametrize("mix", ["single", "extrapolated"])
def test_gradients_of_credit(credit: Credit, mix: str) -> None:
    """With a discount a mixed target stays unnormalised; a baseline is E_p[h]."""
    s = setting(5)
    extra = torch.linspace(-1, 3, T, dtype=torch.float64)
    term = rows_of(DivergenceTerm(name="x", support=Sampled(), credit=credit), mix=mix, extra_T=extra)
    close(s.gradients(s.run(term)[0]), s.gradients(s.naive(term)))


def test_a_sequence_ratio_is_not_applied_again() -> None:
    s = setting(6)
    plain, sequence = (
        rows_of(DivergenceTerm(name="x", support=Sampled(), **more))
        for more in ({}, {"importance": Ratio(level="sequence")})
    )
    close(s.gradients(s.run(sequence)[0]), s.gradients(s.run(plain)[0]))


@pytest.mark.parametrize(
    "gate",
    [EntropyGate(of="a", above=2.0), EntropyGate(of="student", below=1.8), EntropyGate(of="b", above=1.0, below=2.2)],
    ids=str,
)
@pytest.mark.parametrize("support", ["full", "sampled", "teacher_top_k-bucket"])
def test_an_entropy_gate_leaves_tokens_out(gate: EntropyGate, support: str) -> None:
    s = setting(7)
    term = rows_of(DivergenceTerm(name="x", support=SUPPORTS[support], tokens=Tokens(where=gate)))
    expected = s.gradients(s.naive(term))
    loss, values = s.run(term)
    close(s.gradients(loss), expected)
    kept = ~values.terms["x"].value_T.isnan()
    assert 0 < kept.sum() < (term.weight_T != 0).sum()


def test_evidence_on_drawn_tokens_alone_needs_no_vocabulary() -> None:
    s = setting(8)
    full = list(s.scorers)
    y = s.rows.token_T[:, None]
    s.scorers = []
    for scorer in full:
        logq = torch.log_softmax(naive.logits64(scorer.hidden_TD, scorer.head) / scorer.temperature, -1)
        s.scorers.append(ScorerRows(scorer.name, scorer.valid_T, 1.0, logprobs_T=logq.gather(1, y)[:, 0]))
    for mix in ("single", "routed", "extrapolated", "veto"):
        term = rows_of(DivergenceTerm(name="x", support=Sampled()), mix=mix)
        close(s.gradients(s.run(term)[0]), s.gradients(s.naive(term)))
        assert s.run(term)[1].scorers["a"].reverse_kl_T is None


@pytest.mark.parametrize("support", ["full", "student_top_k-bucket", "union-renormalise"])
@pytest.mark.parametrize("shape", [x for x in SHAPES if x != "gated"])
def test_value_is_the_divergence(shape: str, support: str) -> None:
    s = setting(9)
    term = rows_of(DivergenceTerm(name="x", shape=SHAPES[shape], support=SUPPORTS[support]))
    loss, values = s.run(term)
    assert loss.item() == pytest.approx(s.naive(term).item(), rel=1e-10)
    value = values.terms["x"].value_T
    assert (value[term.weight_T == 0].isnan()).all()
    assert (term.weight_T * value).nansum().item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("shape", ["reverse", "forward", "jsd", "skew_forward", "skew_reverse", "clipped"])
def test_value_of_drop_has_its_gradient(shape: str) -> None:
    """Generalised KL and its kin: sum over S of p f(r) + tilt (q - p), differentiated with the support held fixed."""
    s = setting(10)
    term = rows_of(DivergenceTerm(name="x", shape=SHAPES[shape], support=TopK(kind="teacher_top_k", k=4, tail="drop")))
    gradient = s.gradients(s.run(term)[0])[0]
    step = torch.randn(T, DS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-6
    values = []
    for sign in (1, -1):
        moved = dataclasses.replace(s, hidden=(s.hidden.detach() + sign * step))
        values.append(moved.run(term)[0].item())
    assert (values[0] - values[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-6)


def test_terms_add_up() -> None:
    s = setting(11)
    terms = [
        rows_of(DivergenceTerm(name="x", shape=ForwardKL())),
        rows_of(DivergenceTerm(name="y", support=TopK(kind="union", k=3)), mix="product", seed=8),
        rows_of(DivergenceTerm(name="z", support=TopK(kind="student_top_k", k=3, tail="drop")), seed=9),
        rows_of(DataTerm(name="w"), seed=10),
    ]
    apart = [s.gradients(s.run(term)[0]) for term in terms]
    close(s.gradients(s.run(*terms)[0]), [sum(parts) for parts in zip(*apart, strict=True)])


def test_a_look_is_the_same_without_a_gradient() -> None:
    s = setting(12)
    terms = [rows_of(DivergenceTerm(name="x", support=x), mix="veto", seed=n) for n, x in enumerate(SUPPORTS.values())]
    terms = [dataclasses.replace(t, term=t.term.model_copy(update={"name": f"x{n}"})) for n, t in enumerate(terms)]
    options = {"student_temperature": 0.9, "chunk_tokens": 4, "diagnostics": True}
    look = tiled_look(s.hidden, s.head, s.rows, terms, s.scorers, **options)
    loss = tiled_loss(s.hidden, s.head, s.rows, terms, s.scorers, **options)[1]
    for kind in ("terms", "scorers"):
        for name, values in getattr(loss, kind).items():
            for field in dataclasses.fields(values):
                one, two = getattr(values, field.name), getattr(getattr(look, kind)[name], field.name)
                assert (one is None) == (two is None)
                if one is not None:
                    assert not two.requires_grad
                    torch.testing.assert_close(one, two, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("student, teacher", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("support", ["full", "union-bucket", "sampled"])
def test_student_and_scorer_may_have_different_dtypes(student, teacher, support: str) -> None:
    s = setting(13, dtype=student)
    s.scorers = setting(14, dtype=teacher, b_rows=torch.tensor([t for t in range(T) if t % 2])).scorers
    term = rows_of(DivergenceTerm(name="x", support=SUPPORTS[support]), mix="routed", dtype=student)
    for ours, expected in zip(s.gradients(s.run(term)[0]), s.gradients(s.naive(term)), strict=True):
        assert ours.dtype == student
        torch.testing.assert_close(ours.double(), expected.double(), atol=2e-6, rtol=1e-5)
