"""What follows the thin products of SEA's edit of tokens on a GPU, see `maths.edit_at_once`. It needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fusing import launch


@triton.jit
def _add(h, out, d, change, own, factor, least, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(h + start + columns, mask=inside, other=0).to(tl.float32)
    y = own * x + factor * tl.load(change + start + columns, mask=inside, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(y * y, axis=0))
    x_norm = tl.sqrt(tl.sum(x * x, axis=0))
    y = y * tl.where(norm <= least * x_norm, 0.0, x_norm / norm)
    tl.store(out + start + columns, y.to(out.dtype.element_ty), mask=inside)


def add(h: Tensor, change: Tensor, own: float, factor: float, least: float) -> Tensor:
    """own h + factor change with the norms of h, computed in float32.

    Args:
        h, change: (m, d) each.
        own, factor: of each.
        least: share of the norm of h at or below which the sum has no direction and becomes zero.

    Returns:
        (m, d), h's dtype.
    """
    return launch(_add, h, change.contiguous(), own, factor, least)
