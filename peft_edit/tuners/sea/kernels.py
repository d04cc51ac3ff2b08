"""SEA's edit of tokens on a GPU, see `maths.edit`, in two thin products and one kernel. It needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fusing import launch
from .maths import Rescale, rounding


@triton.jit
def _add(h, out, d, change, own, factor, least, KEEP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(h + start + columns, mask=inside, other=0).to(tl.float32)
    y = own * x + factor * tl.load(change + start + columns, mask=inside, other=0).to(tl.float32)
    if KEEP_NORM:
        norm = tl.sqrt(tl.sum(y * y, axis=0))
        x_norm = tl.sqrt(tl.sum(x * x, axis=0))
        y = y * tl.where(norm <= least * x_norm, 0.0, x_norm / norm)
    tl.store(out + start + columns, y.to(out.dtype.element_ty), mask=inside)


def edit(
    h: Tensor, a: Tensor, b: Tensor, exchanged: bool, rescale: Rescale, mean_rescale: float, strength: float
) -> Tensor:
    """The edit of `maths.edit` with both projections and no feature map.

    Args:
        h: (..., d).
        a, b: (k+ + k-, d) each, h's dtype, with (h A^T) B = U+ U+^T h - U- U-^T h.
        exchanged: whether U+ and U- are to be exchanged.
        rescale, mean_rescale, strength: as there.
    """
    flat = h.reshape(-1, h.shape[-1])
    constant = {"mean": mean_rescale, "average": 0.5}.get(rescale, 1.0)
    # h + strength (constant (h + change) - h)
    own, factor = 1 + strength * (constant - 1), strength * constant * (-1 if exchanged else 1)
    change = (flat @ a.T) @ b
    return launch(_add, flat, change, own, factor, rounding(h.dtype), KEEP_NORM=rescale == "token").reshape(h.shape)
