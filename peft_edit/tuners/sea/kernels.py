"""What follows the thin products of SEA's edit of tokens on a GPU, see `maths.edit_at_once`. It needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fusing import launch


@triton.jit
def _add(h, out, d, positive, negative, own, factor, least, KEEP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(h + start + columns, mask=inside, other=0).to(tl.float32)
    plus = tl.load(positive + start + columns, mask=inside, other=0).to(tl.float32)
    minus = tl.load(negative + start + columns, mask=inside, other=0).to(tl.float32)
    y = own * x + factor * (plus - minus)
    if KEEP_NORM:
        norm = tl.sqrt(tl.sum(y * y, axis=0))
        x_norm = tl.sqrt(tl.sum(x * x, axis=0))
        y = y * tl.where(norm <= least * x_norm, 0.0, x_norm / norm)
    tl.store(out + start + columns, y.to(out.dtype.element_ty), mask=inside)


def add(h: Tensor, positive: Tensor, negative: Tensor, own: float, factor: float, least: float | None) -> Tensor:
    """own h + factor (positive - negative), computed in float32.

    Args:
        h, positive, negative: (m, d) each, of one dtype.
        own, factor: of h, and of the difference.
        least: None, or the result has the norms of h, but for one of at most this share of h's, which becomes zero.

    Returns:
        (m, d), h's dtype.
    """
    pair = (positive.contiguous(), negative.contiguous())
    return launch(_add, h, *pair, own, factor, 0.0 if least is None else least, KEEP_NORM=least is not None)
