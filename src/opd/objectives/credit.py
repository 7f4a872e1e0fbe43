"""What a drawn token answers for beyond itself: the divergence that comes after it."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens summed by one small matrix product; the result does not depend on it


def future_credit(f_T: Tensor, trained_T: Tensor, lengths: list[int], *, discount: float, length_norm: bool) -> Tensor:
    """[T]: sum_{t' > t} discount^(t' - t) c_t' with c = -f(r) at trained tokens of the same answer and 0 elsewhere.

    f_T          float [T], f(r) of the drawn tokens: the divergence's own value, not h. Masked tokens may hold NaN.
    trained_T    bool [T]. The mask is applied to what goes in and to what comes out: a masked token neither gives nor
                 gets credit, whatever the discount; it does count as distance.
    lengths      tokens of each answer, in the order in which they are laid end to end.
    length_norm  divides by the number of trained tokens that follow (MiniLLM, arXiv 2306.08543).

    Sums are made in float64 and returned in the dtype of `f_T`.
    """
    credit_T = torch.where(trained_T, -f_T.double(), 0.0)
    future_T = torch.cat([_discounted(c, discount) for c in credit_T.split(lengths)]) if lengths else credit_T
    if length_norm:
        after = [_discounted(m.double(), 1.0) for m in trained_T.split(lengths)]
        future_T = future_T / torch.cat(after).clamp(min=1.0)
    return torch.where(trained_T, future_T, 0.0).to(f_T.dtype)


def _discounted(c_T: Tensor, discount: float) -> Tensor:
    """float64 [T]: sum_{t' > t} discount^(t' - t) c_t'; by blocks, as one sum over blocks carries the later ones."""
    T = len(c_T)
    if T == 0:
        return c_T
    blocks = -(-T // BLOCK)
    c_MB = torch.nn.functional.pad(c_T, (0, blocks * BLOCK - T)).view(blocks, BLOCK)
    place_B = torch.arange(BLOCK, device=c_T.device, dtype=torch.float64)
    apart_BB = place_B[None, :] - place_B[:, None]  # t' - t
    power_BB = torch.where(apart_BB > 0, torch.pow(discount, apart_BB.clamp(min=0.0)), 0.0)
    within_MB = c_MB @ power_BB.T
    start_M = c_MB @ torch.pow(discount, place_B)  # seen from a block's first token
    later, carried = c_T.new_zeros(()), []
    for start in reversed(start_M.unbind()):
        carried.append(later)
        later = start + discount**BLOCK * later
    to_next_B = torch.pow(discount, BLOCK - place_B)
    return (within_MB + torch.stack(carried[::-1])[:, None] * to_next_B).flatten()[:T]
