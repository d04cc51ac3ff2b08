"""HPR's edit of tokens on a GPU, see `maths.edit`, in one kernel behind the angle network. It needs Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fusing import launch
from .maths import NO_DIRECTION, gate_logit


LIMITS = torch.finfo(torch.float32)


@triton.jit
def _dot(a, b):
    return tl.sum(a * b, axis=0)


@triton.jit
def _cosine(v, x, size):
    return tl.minimum(tl.maximum(_dot(v, x) / size, -1.0), 1.0)


@triton.jit
def _rotate(a, out, d, w, logits, alpha, threshold, smallest, largest, tiny, no_direction, pi, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(a + token * d + columns, mask=inside, other=0).to(tl.float32)
    n = tl.load(w + columns, mask=inside, other=0).to(tl.float32)
    negative = _dot(x, n) <= threshold
    n = n / tl.maximum(tl.sqrt(_dot(n, n)), tiny)
    norm = tl.sqrt(_dot(x, x))
    size = tl.minimum(tl.maximum(norm, smallest), largest)
    t = n - _cosine(n, x, size) / size * x
    sine = tl.sqrt(_dot(t, t))
    t = t - _cosine(t, x, size) / size * x
    length = tl.maximum(tl.sqrt(_dot(t, t)), no_direction / 2)
    angle = tl.minimum(alpha * (pi * tl.sigmoid(tl.load(logits + token).to(tl.float32))), pi)
    angle = tl.where((sine >= no_direction) & (size == norm), angle, 0.0)
    rotated = tl.cos(angle) * x + tl.sin(angle) * size / length * t
    tl.store(out + token * d + columns, tl.where(negative, rotated, x).to(out.dtype.element_ty), mask=inside)


def edit(a: Tensor, w: Tensor, logits: Tensor, gate: float, alpha: float) -> Tensor:
    """The edit of `maths.edit` by the angles pi sigmoid(f(a)).

    Args:
        a: (..., d).
        w: (d,).
        logits: f(a), (...).
        gate, alpha: as there, both above 0.
    """
    sizes = (math.sqrt(LIMITS.tiny), math.sqrt(LIMITS.max), LIMITS.tiny, NO_DIRECTION, math.pi)
    flat = a.reshape(-1, a.shape[-1])
    return launch(_rotate, flat, w.contiguous(), logits.contiguous(), alpha, gate_logit(gate), *sizes).reshape(a.shape)
