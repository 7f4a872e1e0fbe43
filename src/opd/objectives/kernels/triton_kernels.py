"""Triton kernels over rows of the vocabulary: one program per row, which walks over its entries block by block.

Rows are logits as the matrix product left them. `entry` makes log-probabilities of them on the fly, with bias, scale,
softcap, order and temperature, so that no finished logits are ever written. Offsets are int64: rows x vocabulary
passes 2^31. Every load and store is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opd.objectives.kernels.triton_shapes import masses, tanh


@triton.jit
def entry(
    raw_ptr, row, stride, v, inside, bias_ptr, order_ptr, scale, softcap, temperature,
    BIAS: tl.constexpr, ORDER: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(logits divided by the temperature, places in the row, bend of the softcap) of the tokens v."""
    column = v
    if ORDER:
        column = tl.load(order_ptr + v, mask=inside, other=0)
    z = tl.load(raw_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z = z * scale
    bend = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        bounded = tanh(z / softcap)
        bend = 1.0 - bounded * bounded
        z = bounded * softcap
    return tl.where(inside, z / temperature, float("-inf")), column, bend


@triton.jit
def summary_kernel(
    raw_ptr, stride, bias_ptr, order_ptr, scale, softcap, temperature, token_ptr, logsumexp_ptr, drawn_ptr,
    entropy_ptr, V, BIAS: tl.constexpr, ORDER: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row, in one pass: logsumexp, log-probability of a token, entropy.

    Every lane keeps its own maximum; sums are moved to the new one when it grows. `spread` is sum e (z - maximum).
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    drawn = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z, _, _ = entry(
            raw_ptr, row, stride, v, v < V, bias_ptr, order_ptr, scale, softcap, temperature, BIAS, ORDER, SOFTCAP
        )
        drawn = tl.where(v == token, z, drawn)
        grown = tl.where(z > top, z, top)
        anchor = tl.where(grown == float("-inf"), 0.0, grown)
        kept = tl.exp(top - anchor)
        e = tl.exp(z - anchor)
        spread = kept * (spread + tl.where(total == 0.0, 0.0, total * (top - anchor)))
        spread += tl.where(e == 0.0, 0.0, e * (z - anchor))
        total = total * kept + e
        top = grown
    highest = tl.max(top, axis=0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    kept = tl.exp(top - anchor)
    spread = kept * (spread + tl.where(total == 0.0, 0.0, total * (top - anchor)))
    sum_e = tl.sum(total * kept, axis=0)
    logsumexp = anchor + tl.log(sum_e)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(drawn_ptr + row, tl.sum(drawn, axis=0) - logsumexp)
    tl.store(entropy_ptr + row, tl.log(sum_e) - tl.sum(spread, axis=0) / sum_e)


@triton.jit
def logprobs_kernel(
    raw_ptr, stride, bias_ptr, order_ptr, scale, softcap, temperature, logsumexp_ptr, into_ptr, V,
    BIAS: tl.constexpr, ORDER: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the log-probabilities of every row down, in the order of tokens."""
    row = tl.program_id(0).to(tl.int64)
    logsumexp = tl.load(logsumexp_ptr + row)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        z, _, _ = entry(
            raw_ptr, row, stride, v, inside, bias_ptr, order_ptr, scale, softcap, temperature, BIAS, ORDER, SOFTCAP
        )
        tl.store(into_ptr + row * V + v, z - logsumexp, mask=inside)


@triton.jit
def mix_kernel(
    raw_ptr, stride, bias_ptr, order_ptr, scale, softcap, temperature, logsumexp_ptr, from_ptr, to_ptr, share_ptr,
    into_ptr, V, BIAS: tl.constexpr, ORDER: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds c log m to rows of a log-linear target. Where a scorer says no mass, the target has none for good."""
    k = tl.program_id(0).to(tl.int64)
    row, to, share = tl.load(from_ptr + k), tl.load(to_ptr + k), tl.load(share_ptr + k)
    logsumexp = tl.load(logsumexp_ptr + row)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        z, _, _ = entry(
            raw_ptr, row, stride, v, inside, bias_ptr, order_ptr, scale, softcap, temperature, BIAS, ORDER, SOFTCAP
        )
        before = tl.load(into_ptr + to * V + v, mask=inside, other=0.0)
        part = share * (z - logsumexp)
        none = (before == float("-inf")) | (part == float("-inf"))
        tl.store(into_ptr + to * V + v, tl.where(none, float("-inf"), before + part), mask=inside)


@triton.jit
def compare_kernel(
    p_raw_ptr, p_stride, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature, p_logsumexp_ptr,
    q_raw_ptr, q_stride, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature, q_logsumexp_ptr,
    p_row_ptr, q_row_ptr, low_ptr, high_ptr, a, b, c, table_ptr, entries, step, mean_ptr, value_ptr, V,
    P_BIAS: tl.constexpr, P_ORDER: tl.constexpr, P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr, Q_ORDER: tl.constexpr, Q_SOFTCAP: tl.constexpr,
    SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per pair of rows: E_p[h], and the divergence E_p[f]."""
    k = tl.program_id(0).to(tl.int64)
    p_row, q_row = tl.load(p_row_ptr + k), tl.load(q_row_ptr + k)
    p_logsumexp, q_logsumexp = tl.load(p_logsumexp_ptr + p_row), tl.load(q_logsumexp_ptr + q_row)
    low, high = tl.load(low_ptr + k), tl.load(high_ptr + k)
    mean = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        p_z, _, _ = entry(
            p_raw_ptr, p_row, p_stride, v, inside, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature,
            P_BIAS, P_ORDER, P_SOFTCAP,
        )  # fmt: skip
        q_z, _, _ = entry(
            q_raw_ptr, q_row, q_stride, v, inside, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature,
            Q_BIAS, Q_ORDER, Q_SOFTCAP,
        )  # fmt: skip
        h_mass, f_mass = masses(
            p_z - p_logsumexp, q_z - q_logsumexp, inside, low, high, a, b, c, table_ptr, entries, step, SHAPE, True
        )
        mean += tl.where(inside, h_mass, 0.0)
        value += tl.where(inside, f_mass, 0.0)
    tl.store(mean_ptr + k, tl.sum(mean, axis=0))
    tl.store(value_ptr + k, tl.sum(value, axis=0))


@triton.jit
def field_kernel(
    p_raw_ptr, p_stride, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature, p_logsumexp_ptr,
    q_raw_ptr, q_stride, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature, q_logsumexp_ptr,
    p_row_ptr, q_row_ptr, low_ptr, high_ptr, weight_ptr, a, b, c, into_ptr, V,
    P_BIAS: tl.constexpr, P_ORDER: tl.constexpr, P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr, Q_ORDER: tl.constexpr, Q_SOFTCAP: tl.constexpr,
    SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds -w p h(r) to rows of the gradient with respect to the student's scaled logits."""
    k = tl.program_id(0).to(tl.int64)
    p_row, q_row = tl.load(p_row_ptr + k), tl.load(q_row_ptr + k)
    p_logsumexp, q_logsumexp = tl.load(p_logsumexp_ptr + p_row), tl.load(q_logsumexp_ptr + q_row)
    low, high, weight = tl.load(low_ptr + k), tl.load(high_ptr + k), tl.load(weight_ptr + k)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        p_z, _, _ = entry(
            p_raw_ptr, p_row, p_stride, v, inside, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature,
            P_BIAS, P_ORDER, P_SOFTCAP,
        )  # fmt: skip
        q_z, _, _ = entry(
            q_raw_ptr, q_row, q_stride, v, inside, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature,
            Q_BIAS, Q_ORDER, Q_SOFTCAP,
        )  # fmt: skip
        h_mass, _ = masses(
            p_z - p_logsumexp, q_z - q_logsumexp, inside, low, high, a, b, c, into_ptr, 1, 1.0, SHAPE, False
        )
        place = into_ptr + p_row * V + v
        tl.store(place, tl.load(place, mask=inside, other=0.0) - weight * h_mass, mask=inside)


@triton.jit
def finish_kernel(
    p_raw_ptr, p_stride, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature, p_logsumexp_ptr,
    q_raw_ptr, q_stride, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature, q_logsumexp_ptr,
    q_row_ptr, low_ptr, high_ptr, weight_ptr, a, b, c, along_ptr, drawn_ptr, token_ptr, other_ptr, V,
    P_BIAS: tl.constexpr, P_ORDER: tl.constexpr, P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr, Q_ORDER: tl.constexpr, Q_SOFTCAP: tl.constexpr,
    SHAPE: tl.constexpr, FIELD: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient with respect to the product of states and head over that product, for every row:

        g_v = other_v - w p_v h(r_v) + along p_v - drawn 1[v = y]

    and through temperature, softcap and scale. A weight of 0 leaves the target unread: NaN there is nothing.
    An order exchanges rows of the head; an entry is written where it was read, by the program that read it.
    """
    row = tl.program_id(0).to(tl.int64)
    p_logsumexp = tl.load(p_logsumexp_ptr + row)
    along, drawn, token = tl.load(along_ptr + row), tl.load(drawn_ptr + row), tl.load(token_ptr + row)
    if FIELD:
        q_row = tl.load(q_row_ptr + row)
        q_logsumexp = tl.load(q_logsumexp_ptr + q_row)
        low, high, weight = tl.load(low_ptr + row), tl.load(high_ptr + row), tl.load(weight_ptr + row)
        read_V = tl.where(weight != 0.0, V, 0)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        p_z, column, bend = entry(
            p_raw_ptr, row, p_stride, v, inside, p_bias_ptr, p_order_ptr, p_scale, p_softcap, p_temperature,
            P_BIAS, P_ORDER, P_SOFTCAP,
        )  # fmt: skip
        logp = p_z - p_logsumexp
        gradient = along * tl.exp(logp) - tl.where(v == token, drawn, 0.0)
        if OTHER:
            gradient += tl.load(other_ptr + row * V + v, mask=inside, other=0.0)
        if FIELD:
            read = v < read_V
            q_z, _, _ = entry(
                q_raw_ptr, q_row, q_stride, v, read, q_bias_ptr, q_order_ptr, q_scale, q_softcap, q_temperature,
                Q_BIAS, Q_ORDER, Q_SOFTCAP,
            )  # fmt: skip
            h_mass, _ = masses(logp, q_z - q_logsumexp, read, low, high, a, b, c, other_ptr, 1, 1.0, SHAPE, False)
            gradient -= tl.where(read, weight * h_mass, 0.0)
        gradient *= bend * (p_scale / p_temperature)
        tl.store(p_raw_ptr + row * p_stride + column, gradient, mask=inside)
