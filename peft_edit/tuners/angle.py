"""The angle between activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angle between vectors along the last dimension, in [0, pi]; 0 where one of them is zero.

    By Kahan's formula 2 atan2(|a^ - b^|, |a^ + b^|), which is accurate at 0 and at pi, where the arc cosine is not.

    Args:
        a, b: (..., d), any floating dtype.

    Returns:
        (...), float32 or wider.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (functional.normalize(x.to(wide), dim=-1, eps=torch.finfo(wide).tiny) for x in (a, b))
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return torch.where(a.any(dim=-1) & b.any(dim=-1), angle, 0)
