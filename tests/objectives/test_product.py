"""Products by the other library: the same numbers in every layout and size, and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opd.objectives import product as products
from opd.objectives.kernels.head_gradient import HeadGradient
from opd.objectives.kernels.scratch import Scratch
from opd.objectives.product import FasterLinear, faster, linear, product, product_into

SINGLE = 2e-6  # of the norm, against float64
LARGE = [(257, 192, 301), (96, 4096, 64), (40, 333, 1000)]  # M, K, N: above SMALL

pytestmark = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has one library for float32 only")


def _far(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("M", "K", "N"), LARGE)
@pytest.mark.parametrize("left", ["rows", "columns", "strided"])
@pytest.mark.parametrize("right", ["rows", "columns", "strided"])
def test_every_layout_gives_the_product(M: int, K: int, N: int, left: str, right: str) -> None:
    def made(rows: int, layout: str) -> torch.Tensor:
        if layout == "columns":
            return torch.randn(K, rows).T
        return torch.randn(rows, 2 * K)[:, ::2] if layout == "strided" else torch.randn(rows, K)

    torch.manual_seed(0)
    a_MK, b_NK = made(M, left), made(N, right)
    assert faster(a_MK, b_NK)
    exact = a_MK.double() @ b_NK.double().T
    assert _far(product(a_MK, b_NK), exact) < SINGLE
    assert _far(product_into(a_MK, b_NK, torch.full((M, N), torch.nan)), exact) < SINGLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_of_columns_cover_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 4 * 50 * 7)  # seven columns at a time, the last block shorter
    torch.manual_seed(0)
    a_MK, b_NK = torch.randn(50, 900, dtype=dtype), torch.randn(101, 900, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    made = product_into(a_MK, b_NK, torch.full((50, 101), torch.nan, dtype=wide))
    assert made.dtype == wide and torch.allclose(made, (a_MK @ b_NK.T).to(wide), rtol=1e-5, atol=1e-4)


def test_long_sums_are_taken_in_parts() -> None:
    """The sum of 4,096 terms that are added one after the other is twice as far off."""
    torch.manual_seed(0)
    a_MK, b_NK = torch.randn(96, 4096), torch.randn(200, 4096)
    exact = a_MK.double() @ b_NK.double().T
    made = product_into(a_MK, b_NK, torch.empty(96, 200))
    assert _far(made, exact) < 0.6 * _far(product(a_MK, b_NK), exact)


def test_small_and_other_products_are_torchs_own() -> None:
    a_MK, b_NK = torch.randn(4, 8), torch.randn(5, 8)
    assert not faster(a_MK, b_NK) and torch.equal(product(a_MK, b_NK), a_MK @ b_NK.T)
    a_MK, b_NK = torch.randn(257, 192).bfloat16(), torch.randn(301, 192).bfloat16()
    assert not faster(a_MK, b_NK) and torch.equal(product(a_MK, b_NK), a_MK @ b_NK.T)


@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
def test_a_linear_layer_and_its_gradients(frozen: str) -> None:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(3, 100, 192), "weight": torch.randn(301, 192), "bias": torch.randn(301)}
    out = torch.randn(3, 100, 301)
    ours = {name: t.clone().requires_grad_(name != frozen) for name, t in tensors.items()}
    exact = {name: t.double().requires_grad_(name != frozen) for name, t in tensors.items()}
    linear(*ours.values()).backward(out)
    F.linear(*exact.values()).backward(out.double())
    for name, tensor in exact.items():
        mine = ours[name].grad
        assert (mine is None) == (tensor.grad is None) == (name == frozen)
        if mine is not None and tensor.grad is not None:
            assert _far(mine, tensor.grad) < SINGLE, name


def test_layers_of_any_module_take_the_faster_way() -> None:
    layer, x = torch.nn.Linear(192, 301), torch.randn(100, 192)
    with FasterLinear():
        assert "_Linear" in type(layer(x).grad_fn.next_functions[0][0]).__name__  # pyright: ignore
    with FasterLinear(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_heads_gradient_is_summed_over_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 4 * 64 * 100)
    torch.manual_seed(0)
    T, V, D, padding = 128, 700, 96, 3
    states, weight = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    dlogits = torch.randn(T, V, dtype=torch.promote_types(dtype, torch.float32))
    sums = HeadGradient(states, torch.Size((V + padding, D)), dlogits.dtype, hidden=True, weight=True)
    for tile in (slice(0, 64), slice(64, T)):
        sums.add(tile, dlogits[tile], weight)
    assert sums.hidden_TD is not None and sums.weight_VD is not None
    bound = 1e-2 if dtype == torch.bfloat16 else SINGLE
    assert _far(sums.hidden_TD, dlogits.double() @ weight.double()) < bound
    assert _far(sums.weight_VD[:V], dlogits.double().T @ states.double()) < bound
    assert not sums.weight_VD[V:].any()


def test_scratch_is_used_again_and_grows() -> None:
    scratch = Scratch()
    cpu = torch.device("cpu")
    first = scratch.take("a", 4, 8, torch.float32, cpu)
    assert scratch.take("a", 2, 8, torch.float32, cpu).data_ptr() == first.data_ptr()
    assert scratch.take("b", 2, 8, torch.float32, cpu).data_ptr() != first.data_ptr()
    assert scratch.take("a", 8, 8, torch.float32, cpu).shape == (8, 8)
    assert scratch.take("a", 2, 8, torch.float64, cpu).dtype == torch.float64
