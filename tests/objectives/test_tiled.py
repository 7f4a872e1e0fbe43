"""The tiled pass against plain autograd in float64: values and gradients, for every kind of term."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.config.objective import ForwardKL, JensenShannon, ReverseKL, Term
from opd.costs.memory import LOGITS_COPIES
from opd.objectives.kernels.tiled import TokenRows, tiled_loss
from opd.types import Head, ScorerRows

T, V, PADDED, DS, DT = 11, 13, 16, 6, 5
TERMS = {
    "reverse": Term(name="a", shape=ReverseKL()),
    "forward": Term(name="a", shape=ForwardKL(), coefficient=0.7),
    "jsd": Term(name="a", shape=JensenShannon(beta=0.3)),
    "sampled": Term(name="a", support="sampled"),
    "tml": Term(name="a", support="sampled", advantage_under="sampler", importance="ratio"),
    "sampled_forward": Term(name="a", support="sampled", shape=ForwardKL()),
    "data": Term(name="a", target="data", support="sampled", shape=ForwardKL()),
}


def setting(seed: int = 0, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, order=None):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden = rand(T, DS).requires_grad_()
    weight = rand(PADDED, DS).requires_grad_()
    b = rand(PADDED).requires_grad_() if bias else None
    head = Head(weight, V, b, scale, softcap)
    scorer = ScorerRows(
        "teacher",
        torch.ones(T, dtype=torch.bool),
        1.3,
        hidden_TD=rand(T, DT),
        head=Head(rand(PADDED, DT), V, order_V=order),
    )
    rows = TokenRows(
        torch.randint(0, V, (T,), generator=g),
        torch.log(torch.rand(T, generator=g) * 0.5 + 0.1),
        {"a": torch.rand(T, generator=g) * (torch.arange(T) % 3 != 0)},
    )
    return hidden, head, rows, scorer


def logits64(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    z = hidden.double() @ head.weight_VD.double()[:V].T
    if head.bias_V is not None:
        z = z + head.bias_V.double()[:V]
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z if head.order_V is None else z[:, head.order_V]


def reference(term: Term, hidden, head, rows: TokenRows, scorer: ScorerRows, temperature: float) -> torch.Tensor:
    """What each kind of term means, by autograd on full logits; tokens with weight 0 are left out first."""
    logp = torch.log_softmax(logits64(hidden, head) / temperature, -1)
    logq = torch.log_softmax(logits64(scorer.hidden_TD, scorer.head) / scorer.temperature, -1)
    y, w, logmu = rows.token_T[:, None], rows.weights["a"].double(), rows.behaviour_T.double()
    logp_y, logq_y = logp.gather(1, y)[:, 0], logq.gather(1, y)[:, 0]
    if term.target == "data":
        value = -logp_y
    elif term.support == "full":
        p, q = logp.exp(), logq.exp()
        if isinstance(term.shape, ReverseKL):
            value = (p * (logp - logq)).sum(-1)
        elif isinstance(term.shape, ForwardKL):
            value = (q * (logq - logp)).sum(-1)
        else:
            b = term.shape.beta
            m = b * q + (1 - b) * p
            value = (b * q * (logq - m.log()) + (1 - b) * p * (logp - m.log())).sum(-1)
    else:
        student = logmu if term.advantage_under == "sampler" else logp_y.detach()
        advantage = logq_y - student if isinstance(term.shape, ReverseKL) else torch.exp(logq_y - student) - 1
        if term.importance == "ratio":
            value = -torch.exp(logp_y - logmu) * advantage.detach()
        else:
            value = -logp_y * advantage.detach()
    kept = w != 0
    return (w[kept] * value[kept]).sum()


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "variant", [{}, {"bias": True}, {"scale": 0.5, "softcap": 4.0}, {"order": torch.arange(V).flip(0)}], ids=str
)
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())
def test_O_14_gradients_equal_autograd_on_full_logits(term: Term, variant, temperature: float, chunk: int) -> None:
    hidden, head, rows, scorer = setting(**variant)
    leaves = [x for x in (hidden, head.weight_VD, head.bias_V) if x is not None]
    reference(term, hidden, head, rows, scorer, temperature).backward()
    expected = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    loss, _ = tiled_loss(hidden, head, rows, [term], scorer=scorer, student_temperature=temperature, chunk_tokens=chunk)
    (2.0 * loss).backward()  # the backward pass must scale what the forward pass made
    for x, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, 2.0 * gradient.to(x.dtype), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "data"])
def test_value_equals_autograd_on_full_logits(name: str) -> None:
    hidden, head, rows, scorer = setting(1)
    term = TERMS[name]
    loss, _ = tiled_loss(hidden, head, rows, [term], scorer=scorer, student_temperature=1.0, chunk_tokens=4)
    assert loss.item() == pytest.approx(reference(term, hidden, head, rows, scorer, 1.0).item(), rel=1e-5)


def test_terms_add_up() -> None:
    """Two terms in one pass give the sum of their gradients."""
    hidden, head, rows, scorer = setting(2)
    one, two = TERMS["reverse"], TERMS["data"].model_copy(update={"name": "b"})
    both = TokenRows(rows.token_T, rows.behaviour_T, {"a": rows.weights["a"], "b": rows.weights["a"].flip(0)})
    gradients = []
    for terms in ([one], [two], [one, two]):
        hidden.grad = None
        tiled_loss(hidden, head, both, terms, scorer=scorer, student_temperature=1.0, chunk_tokens=4)[0].backward()
        gradients.append(hidden.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "sampled", "tml"])
def test_X_01_a_masked_token_may_hold_nan(name: str) -> None:
    """A token with weight 0 changes nothing, even when the teacher's state there is NaN (traps X-1, M-3)."""
    gradients = []
    for poison in (False, True):
        hidden, head, rows, scorer = setting(3)
        if poison:
            scorer.hidden_TD[rows.weights["a"] == 0] = float("nan")
            rows.behaviour_T[rows.weights["a"] == 0] = float("nan")
        loss, _ = tiled_loss(hidden, head, rows, [TERMS[name]], scorer=scorer, student_temperature=1.0, chunk_tokens=4)
        loss.backward()
        gradients.append((loss.item(), hidden.grad.clone(), head.weight_VD.grad.clone()))
    assert gradients[0][0] == gradients[1][0]
    assert torch.equal(gradients[0][1], gradients[1][1]) and torch.equal(gradients[0][2], gradients[1][2])


def test_A_01_padded_rows_of_the_vocabulary_get_no_gradient_and_change_nothing() -> None:
    hidden, head, rows, scorer = setting(4)
    results = []
    for garbage in (0.0, 1e4):
        with torch.no_grad():
            head.weight_VD[V:] = garbage
            scorer.head.weight_VD[V:] = garbage
        hidden.grad = head.weight_VD.grad = None
        loss, _ = tiled_loss(
            hidden, head, rows, [TERMS["reverse"]], scorer=scorer, student_temperature=1.0, chunk_tokens=4
        )
        loss.backward()
        assert head.weight_VD.grad[V:].abs().max() == 0
        results.append(hidden.grad.clone())
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "sampled", "sampled_forward"])
def test_T_01_student_equals_teacher_gives_zero_at_any_shared_temperature(name: str) -> None:
    hidden, head, rows, _ = setting(5)
    scorer = ScorerRows(
        "teacher",
        torch.ones(T, dtype=torch.bool),
        0.8,
        hidden_TD=hidden.detach(),
        head=Head(head.weight_VD.detach(), V),
    )
    loss, _ = tiled_loss(hidden, head, rows, [TERMS[name]], scorer=scorer, student_temperature=0.8, chunk_tokens=4)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["reverse", "forward", "jsd"])
def test_sampled_estimator_averages_to_the_full_gradient(name: str) -> None:
    """E over y ~ p of the sampled gradient, enumerated, is the gradient of the full divergence (O-1, O-2, O-3)."""
    term = TERMS[name].model_copy(update={"coefficient": 1.0})
    hidden, head, _, scorer = setting(6)
    ones = {"a": torch.ones(T)}
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T), ones)
    loss, _ = tiled_loss(hidden, head, rows, [term], scorer=scorer, student_temperature=1.0, chunk_tokens=64)
    loss.backward()
    full = hidden.grad.clone()
    mean = torch.zeros_like(full)
    p_TV = torch.softmax(logits64(hidden.detach(), head).detach(), -1)
    sampled = term.model_copy(update={"support": "sampled"})
    for v in range(V):
        hidden.grad = None
        rows = TokenRows(torch.full((T,), v), torch.zeros(T), {"a": p_TV[:, v].float()})
        tiled_loss(hidden, head, rows, [sampled], scorer=scorer, student_temperature=1.0, chunk_tokens=64)[0].backward()
        mean += hidden.grad
    torch.testing.assert_close(mean, full, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "most"), [("reverse", LOGITS_COPIES), ("forward", LOGITS_COPIES), ("jsd", 10)])
def test_no_more_tiles_are_alive_at_once_than_the_memory_estimate_says(name: str, most: int) -> None:
    """Counts storages of a tile's size: at a vocabulary of 151,936 each of them is 0.3 GB."""
    T, V, C = 64, 5000, 32
    hidden, weight = torch.randn(T, 2).requires_grad_(), torch.randn(V, 2).requires_grad_()
    ones_T = torch.ones(T, dtype=torch.bool)
    scorer = ScorerRows("teacher", ones_T, 1.0, hidden_TD=torch.randn(T, 2), head=Head(torch.randn(V, 2), V))
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T), {"a": torch.ones(T)})
    alive: dict[int, int] = {}
    peak = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= C * V:
                storage = out.untyped_storage()
                if storage.data_ptr() not in alive:
                    alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
                peak = max(peak, sum(alive.values()))
            return out

    with Count():
        tiled_loss(hidden, Head(weight, V), rows, [TERMS[name]], scorer=scorer, student_temperature=1.0, chunk_tokens=C)
    assert peak / (4 * C * V) < most + 0.5


def test_a_bfloat16_pass_sums_loss_and_head_gradient_in_float32() -> None:
    """Many tiles: sums kept in bfloat16 would stop growing."""
    g = torch.Generator().manual_seed(0)
    T, D = 2000, 6
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g).requires_grad_()
    scorer = ScorerRows(
        "teacher",
        torch.ones(T, dtype=torch.bool),
        1.0,
        hidden_TD=torch.randn(T, DT, generator=g).bfloat16(),
        head=Head(torch.randn(V, DT, generator=g).bfloat16(), V),
    )
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T), {"a": torch.full((T,), 1 / T)})
    losses, gradients = [], []
    for dtype in (torch.float64, torch.bfloat16):
        weight.grad = None
        states = hidden.to(dtype).requires_grad_()
        loss, _ = tiled_loss(
            states, Head(weight, V), rows, [TERMS["reverse"]], scorer=scorer, student_temperature=1.0, chunk_tokens=4
        )
        loss.backward()
        assert states.grad.dtype == dtype
        losses.append(loss)
        gradients.append(weight.grad.double())
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()
