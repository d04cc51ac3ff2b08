"""When edits may take a shorter way because nothing but values is asked for, and when that is a fused Triton kernel: of
a few tokens, launching many small kernels takes longer than they do. The kernels stand in the folders of the methods,
their references in `maths`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


# Features that one program keeps in its registers.
MAX_FEATURES = 2**14
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Triton's least compute capability.
CAPABILITY = (8, 0)


def values_alone(h: Tensor) -> bool:
    """Whether nothing but the values of an edit of h is asked for: no gradient, graph or transformation."""
    return (
        not torch.is_grad_enabled()
        and type(h) is Tensor
        and not h.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def kernels_apply(h: Tensor) -> bool:
    """Whether activations, (..., d), of which `values_alone` are asked for can be edited by a kernel."""
    return h.is_cuda and h.dtype in DTYPES and h.numel() > 0 and h.shape[-1] <= MAX_FEATURES and has_triton(h.device)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for a GPU."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= CAPABILITY


def launch(kernel: Any, h: Tensor, *arguments: Any, **constants: Any) -> Tensor:
    """Run a kernel with one program for each token.

    Args:
        kernel: a `triton.jit` function of h, the result, d, the arguments, the constants and BLOCK, at least d.
        h: (m, d).

    Returns:
        What it writes, (m, d), h's dtype.
    """
    h = h.contiguous()
    out = torch.empty_like(h)
    count, d = h.shape
    block = 1 << (d - 1).bit_length()
    warps = max(1, min(16, block // 512))
    # Triton launches on the current device, which need not be that of the layer.
    with torch.cuda.device_of(h):
        kernel[(count,)](h, out, d, *arguments, BLOCK=block, num_warps=warps, **constants)
    return out
