"""Traps of the field that the tiled pass must not fall into, by their ids."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.config.objective import DataTerm, DivergenceTerm
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL
from opd.config.slots import Sampled, TopK
from opd.objectives.kernels import block
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_look, tiled_loss
from opd.types import Head, ScorerRows
from tests.objectives.test_tiled import DS, SHAPES, SUPPORTS, T, V, rows_of, setting
from tests.objectives.test_tiled import small_blocks as small_blocks  # a fixture for every test here

ALL = [(shape, support) for shape in SHAPES for support in SUPPORTS]
SOME = [(shape, support) for shape in ("reverse", "forward", "jsd", "clipped") for support in SUPPORTS]


def term_of(shape: str, support: str, **more) -> TermRows:
    return rows_of(DivergenceTerm(name="x", shape=SHAPES[shape], support=SUPPORTS[support]), **more)


@pytest.mark.parametrize("shape, support", ALL)
def test_T_1_student_equals_teacher_gives_zero_at_any_shared_temperature(shape: str, support: str) -> None:
    s = setting(20)
    same = Head(s.head.weight_VD.detach(), V)
    s.scorers = [ScorerRows("a", torch.ones(T, dtype=torch.bool), 0.8, hidden_TD=s.hidden.detach(), head=same)]
    loss, values = s.run(term_of(shape, support), temperature=0.8)
    assert abs(loss.item()) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in s.gradients(loss))
    kept = ~values.terms["x"].value_T.isnan()
    assert values.terms["x"].h_T[kept].abs().max() < 1e-12 and values.terms["x"].f_T[kept].abs().max() < 1e-12


@pytest.mark.parametrize("shape, support", SOME)
def test_X_1_M_3_a_masked_token_may_hold_nan(shape: str, support: str) -> None:
    gradients = []
    for poison in (False, True):
        s, term = setting(21), term_of(shape, support)
        out = term.weight_T == 0
        if poison:
            s.scorers[0].hidden_TD[out] = math.nan
            s.rows.behaviour_T[out] = math.nan
        loss, values = s.run(term)
        gradients.append(s.gradients(loss))
        assert torch.isfinite(values.terms["x"].value_T[~out]).all()
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("support", SUPPORTS)
def test_A_1_padded_rows_of_the_vocabulary_get_no_gradient_and_change_nothing(support: str) -> None:
    results = []
    for garbage in (0.0, 1e4):
        s = setting(22)
        with torch.no_grad():
            s.head.weight_VD[V:] = garbage
            s.scorers[0].head.weight_VD[V:] = garbage
        gradients = s.gradients(s.run(term_of("jsd", support))[0])
        assert gradients[1][V:].abs().max() == 0
        results.append(gradients[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("shape, support", ALL)
def test_M_2_tokens_that_nobody_can_draw_leave_every_gradient_finite(shape: str, support: str) -> None:
    """A bias of minus infinity in both models is a smaller vocabulary."""
    banned, results = [3, 8], []
    kept = [v for v in range(V) if v not in banned]
    for small in (False, True):
        s = setting(23, bias=True)
        s.rows = TokenRows(torch.tensor(kept)[s.rows.token_T % len(kept)], s.rows.behaviour_T)
        bias = torch.zeros(V, dtype=torch.float64)
        bias[banned] = -math.inf
        weight, weight_a = s.head.weight_VD.detach()[:V], s.scorers[0].head.weight_VD[:V]
        if small:
            weight, weight_a, bias = weight[kept], weight_a[kept], bias[kept]
            s.rows = TokenRows(torch.searchsorted(torch.tensor(kept), s.rows.token_T), s.rows.behaviour_T)
        s.head = Head(weight.requires_grad_(), len(weight), bias)
        s.scorers = [dataclasses.replace(s.scorers[0], head=Head(weight_a, len(weight), bias))]
        loss, _ = s.run(term_of(shape, support), diagnostics=True)
        results.append((loss, s.gradients(loss)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.isfinite(results[0][1]).all()
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("who", ["student", "scorer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_M_2_a_token_that_one_side_all_but_rules_out(shape: str, who: str) -> None:
    """95 nats: the probability is a subnormal float32, and the ratio, or its inverse, does not fit one."""
    s = setting(36, dtype=torch.float32, bias=True)
    low = torch.zeros(V)
    low[4] = -95.0
    if who == "student":
        s.head = dataclasses.replace(s.head, weight_VD=s.head.weight_VD.detach().requires_grad_(), bias_V=low)
    else:
        s.scorers[0] = dataclasses.replace(
            s.scorers[0], temperature=1.0, head=Head(s.scorers[0].head.weight_VD, V, low)
        )
    term = term_of(shape, "full", dtype=torch.float32)
    expected = s.gradients(s.naive(term))
    loss, _ = s.run(term)
    assert loss.item() == pytest.approx(s.naive(term).item(), rel=1e-5)
    for x, y in zip(s.gradients(loss), expected, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


@pytest.mark.parametrize("mix", ["product", "extrapolated", "veto"])
def test_M_2_mixed_targets_with_tokens_that_nobody_can_draw(mix: str) -> None:
    """log 0 - log 0 of an extrapolated target is no mass, not NaN."""
    s = setting(24)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[4] = -math.inf
    s.rows = TokenRows(torch.where(s.rows.token_T == 4, 0, s.rows.token_T), s.rows.behaviour_T)
    s.head = dataclasses.replace(s.head, bias_V=bias)
    s.scorers = [
        dataclasses.replace(x, head=dataclasses.replace(x.head, bias_V=bias, order_V=None, softcap=None))
        for x in s.scorers
    ]
    for support in ("full", "sampled", "union-bucket"):
        loss, _ = s.run(term_of("reverse", support, mix=mix))
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in s.gradients(loss)[:2])


@pytest.mark.parametrize("shape, support", SOME)
def test_O_23_nothing_flows_into_scorers_or_advantages(shape: str, support: str) -> None:
    s = setting(25)
    frozen = [x for scorer in s.scorers for x in (scorer.hidden_TD, scorer.head.weight_VD)]
    for x in frozen:
        x.requires_grad_()
    extra = torch.ones(T, dtype=torch.float64, requires_grad=True)
    term = term_of(shape, support, mix="veto", extra_T=extra)
    loss, values = s.run(term, diagnostics=True)
    loss.backward()
    assert all(x.grad is None for x in frozen) and extra.grad is None
    facts = [x for v in (*values.terms.values(), *values.scorers.values()) for x in vars(v).values() if x is not None]
    assert facts and not any(x.requires_grad for x in facts)


def test_O_23_the_student_inside_a_target_is_held_fixed() -> None:
    """Veto's target moves with the student; were it differentiated, the gradient would be another one."""
    s = setting(26)
    term = term_of("reverse", "full", mix="veto")
    gradient = s.gradients(s.run(term)[0])[0]
    z = (s.hidden @ s.head.weight_VD[:V].T).log_softmax(-1)
    logits = s.scorers[0].hidden_TD @ s.scorers[0].head.weight_VD[:V].T / s.scorers[0].temperature
    moving = (logits.log_softmax(-1) + 0.4 * z).log_softmax(-1)
    (term.weight_T[:, None] * z.exp() * (z - moving)).sum().backward()
    assert (gradient - (s.hidden.grad - gradient)).abs().max() > 1e-3  # .grad holds both by now


@pytest.mark.parametrize("shape", ["reverse", "forward", "jsd", "skew_forward", "skew_reverse", "tanh", "clipped"])
@pytest.mark.parametrize(
    "estimator", ["sampled", "teacher_top_k-sampled_correction", "student_top_k-sampled_correction"]
)
def test_O_1_O_2_estimators_on_drawn_tokens_average_to_the_full_gradient(shape: str, estimator: str) -> None:
    """E over y ~ p, enumerated. For the corrected tail too (TA-OPD)."""
    s = setting(27)
    ones = torch.ones(T, dtype=torch.float64)
    full = s.gradients(s.run(dataclasses.replace(term_of(shape, "full"), weight_T=ones))[0])[0]
    p_TV = torch.softmax(s.hidden.detach() @ s.head.weight_VD.detach()[:V].T, -1)
    mean = torch.zeros_like(full)
    for v in range(V):
        s.rows = TokenRows(torch.full((T,), v), torch.zeros(T))
        mean += s.gradients(s.run(dataclasses.replace(term_of(shape, estimator), weight_T=p_TV[:, v]))[0])[0]
    torch.testing.assert_close(mean, full, atol=1e-10, rtol=1e-9)


def test_an_exact_baseline_keeps_the_mean_and_lowers_the_spread() -> None:
    s = setting(28)
    p_TV = torch.softmax(s.hidden.detach() @ s.head.weight_VD.detach()[:V].T, -1)
    means, spreads = [], []
    for baseline in ("none", "exact"):
        term = DivergenceTerm(name="x", support=Sampled(), credit={"baseline": baseline})
        one = []
        for v in range(V):
            s.rows = TokenRows(torch.full((T,), v), torch.zeros(T))
            row = dataclasses.replace(rows_of(term), weight_T=torch.ones(T, dtype=torch.float64))
            one.append(s.gradients(s.run(row)[0])[0])
        gradient_VTD = torch.stack(one)
        mean_TD = (p_TV.T[:, :, None] * gradient_VTD).sum(0)
        means.append(mean_TD)
        spreads.append((p_TV.T[:, :, None] * (gradient_VTD - mean_TD).square()).sum())
    torch.testing.assert_close(means[0], means[1])
    assert spreads[1] < spreads[0]


def test_O_8_forward_kl_of_a_bucket_is_a_bound_and_keeps_its_gradient() -> None:
    """Truncated forward KL is negative where Q_S < P_S, and clamping it at 0 drops the gradient."""
    s = setting(29)
    ones = torch.ones(T, dtype=torch.float64)
    bucket = TopK(kind="teacher_top_k", k=4)
    value = {}
    for name, support in (("bucket", bucket), ("full", SUPPORTS["full"])):
        row = dataclasses.replace(rows_of(DivergenceTerm(name="x", shape=ForwardKL(), support=support)), weight_T=ones)
        loss, values = s.run(row)
        value[name] = values.terms["x"]
        assert (s.gradients(loss)[0].norm(dim=1) > 1e-3).all()
    assert (value["bucket"].student_mass_T > value["bucket"].target_mass_T).any()
    assert (value["bucket"].value_T >= 0).all() and (value["bucket"].value_T <= value["full"].value_T + 1e-12).all()


@pytest.mark.parametrize("shape", ["reverse", "forward", "jsd"])
def test_O_9_what_the_tail_looks_like_changes_nothing_but_its_mass_does(shape: str) -> None:
    """No constant stands for entries outside: exchanging two of them in the target leaves value and gradient."""
    s = setting(30, bias=True)
    logits = torch.log(torch.tensor([0.3, 0.25, 0.2, *[0.25 / (V - 3)] * (V - 3)], dtype=torch.float64))
    moved = logits.clone()
    moved[3], moved[4] = logits[3] + math.log(1.5), logits[4] + math.log(0.5)  # the same mass in all
    heavier = logits.clone()
    heavier[3:] += 0.3
    results = []
    for bias in (logits, moved, heavier):
        head = Head(torch.zeros(V, 5, dtype=torch.float64), V, bias)
        s.scorers = [dataclasses.replace(s.scorers[0], head=head, temperature=1.0)]
        term = DivergenceTerm(name="x", shape=SHAPES[shape], support=TopK(kind="teacher_top_k", k=3))
        loss, _ = s.run(rows_of(term))
        results.append((loss.item(), s.gradients(loss)[0]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-12, rtol=1e-10)
    assert abs(results[0][0] - results[2][0]) > 1e-3


@pytest.mark.parametrize("kind", ["student_top_k", "teacher_top_k", "union"])
@pytest.mark.parametrize("tail", ["bucket", "sampled_correction", "renormalise", "drop"])
def test_a_support_of_everything_is_the_full_vocabulary(kind: str, tail: str) -> None:
    s = setting(31)
    term = rows_of(DivergenceTerm(name="x", shape=JensenShannon(), support=TopK(kind=kind, k=99, tail=tail)))
    full = rows_of(DivergenceTerm(name="x", shape=JensenShannon()))
    for one, two in zip(s.gradients(s.run(term)[0]), s.gradients(s.run(full)[0]), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-9)


def test_an_unresolved_tail_has_no_field_and_is_counted() -> None:
    """Student and target agree but for rounding in a tail far below the floor; one of them above it is resolved."""
    s = setting(32)
    z = torch.tensor([3.0, 2.0, *[-16.0] * (V - 2)], dtype=torch.float64)
    student, same, other = z, z.clone(), z.clone()
    same[2:] += 3.0
    other[2:] += 12.0
    s.head = Head(torch.zeros(V, DS, dtype=torch.float64, requires_grad=True), V, student)
    term = rows_of(DivergenceTerm(name="x", support=TopK(kind="teacher_top_k", k=2)))
    found = {}
    for name, bias in (("same", same), ("other", other)):
        head = Head(torch.zeros(V, 5, dtype=torch.float64), V, bias)
        s.scorers = [dataclasses.replace(s.scorers[0], head=head, temperature=1.0)]
        found[name] = s.run(term)[1].terms["x"]
    kept = term.weight_T != 0
    assert found["same"].unresolved_T[kept].all() and not found["same"].unresolved_T[~kept].any()
    assert found["same"].value_T[kept].abs().max() < 1e-6
    assert not found["other"].unresolved_T.any() and (found["other"].value_T[kept] > 1e-9).all()


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products, times two."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_M_14_cost_is_that_of_the_tokens_that_are_there() -> None:
    """2 V (T (3 D_s + D_a) + R D_b): scorer b is only multiplied at the R tokens that it has rows for."""
    index = torch.tensor([1, 4, 5])
    s = setting(33, b_rows=index)
    with Products() as count:
        s.run(term_of("reverse", "full"), rows_of(DataTerm(name="y")))
    assert count.flops == 2 * V * (T * (3 * DS + 5) + len(index) * 4)
    options = {"student_temperature": 1.0, "chunk_tokens": 4}
    with Products() as count:
        tiled_look(s.hidden, s.head, s.rows, [term_of("reverse", "full")], s.scorers, **options)
    assert count.flops == 2 * V * (T * (DS + 5) + len(index) * 4)


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "tanh", "bucket", "sampled"])
def test_a_tile_of_each_model_and_a_few_blocks_are_alive_at_once(name: str, monkeypatch) -> None:
    """Counts storages: at a vocabulary of 151,936 a tile of 256 tokens has 156 MB, a block 4 MB."""
    T, V, C, B = 64, 5000, 32, 2
    monkeypatch.setattr(block, "NUMBERS_HOST", B * V)
    shape = SHAPES[name] if name in SHAPES else ReverseKL()
    support = {"bucket": TopK(kind="teacher_top_k", k=8), "sampled": Sampled()}.get(name, SUPPORTS["full"])
    hidden, weight = torch.randn(T, 2).requires_grad_(), torch.randn(V, 2).requires_grad_()
    ones, every = torch.ones(T), torch.ones(T, dtype=torch.bool)
    scorer = ScorerRows("a", every, 1.0, hidden_TD=torch.randn(T, 2), head=Head(torch.randn(V, 2), V))
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T))
    term = TermRows(DivergenceTerm(name="x", shape=shape, support=support), ones, {"a": ones}, True)
    alive: dict[int, int] = {}
    peak = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                storage = out.untyped_storage()
                if storage.nbytes() >= B * V * 4 and storage.data_ptr() not in alive:
                    alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
                peak = max(peak, sum(alive.values()))
            return out

    with Count():
        tiled_loss(hidden, Head(weight, V), rows, [term], [scorer], student_temperature=1.0, chunk_tokens=C)
    gradient = 4 * V * 2
    assert peak - gradient <= 4 * V * (2 * C + (16 if name == "tanh" else 12) * B)


def test_a_bfloat16_pass_sums_loss_and_head_gradient_in_float32() -> None:
    """Many tiles: sums kept in bfloat16 would stop growing."""
    g = torch.Generator().manual_seed(0)
    T, D = 2000, 6
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g).requires_grad_()
    head = Head(torch.randn(V, 5, generator=g).bfloat16(), V)
    every = torch.ones(T, dtype=torch.bool)
    scorer = ScorerRows("a", every, 1.0, hidden_TD=torch.randn(T, 5, generator=g).bfloat16(), head=head)
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T))
    ones = torch.ones(T)
    term = TermRows(DivergenceTerm(name="x"), ones / T, {"a": ones}, True)
    losses, gradients = [], []
    for dtype in (torch.float64, torch.bfloat16):
        weight.grad = None
        states = hidden.to(dtype).requires_grad_()
        loss, _ = tiled_loss(states, Head(weight, V), rows, [term], [scorer], student_temperature=1.0, chunk_tokens=4)
        loss.backward()
        assert states.grad.dtype == dtype
        losses.append(loss)
        gradients.append(weight.grad.double())
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


def test_X_1_nan_at_a_trained_token_is_never_hidden() -> None:
    """Repairs of 0 * inf must not swallow a model that returns NaN: the step has to be seen as bad."""
    for shape, support in SOME:
        s = setting(34)
        s.scorers[0].hidden_TD[1] = math.nan
        loss, _ = s.run(term_of(shape, support))
        assert loss.isnan() and s.gradients(loss)[0][1].isnan().all(), (shape, support)


def test_M_2_a_token_that_only_the_scorer_against_it_rules_out_is_not_hidden() -> None:
    """q / m with m = 0 < q is infinite: the step has to be seen as bad, not trained on a target without the token."""
    s = setting(35)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[4] = -math.inf
    against = dataclasses.replace(s.scorers[1].head, bias_V=bias, order_V=None, softcap=None)
    s.scorers[1] = dataclasses.replace(s.scorers[1], head=against)
    assert s.run(term_of("reverse", "full", mix="product"))[0].isinf()
    assert s.run(term_of("reverse", "full", mix="extrapolated"))[0].isnan()
