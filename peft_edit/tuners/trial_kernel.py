"""The smallest kernel, which tells whether Triton works on a machine. It needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .fusing import launch


@triton.jit
def _double(h, out, d, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    tl.store(out + columns, 2 * tl.load(h + columns, mask=inside), mask=inside)


def doubled(h: Tensor) -> Tensor:
    """2 h, (1, d)."""
    return launch(_double, h)
