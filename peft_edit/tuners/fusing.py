"""When and how the edits of a few tokens run as fused Triton kernels: launching many small ones takes longer than they
do. The kernels stand in the folders of the methods, their references in `maths`."""

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


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for a GPU."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= CAPABILITY


def applies(h: Tensor) -> bool:
    """Whether activations, (..., d), can be edited by a kernel: they are on a GPU, and nothing but their values is
    asked for, no gradient, graph or transformation."""
    return (
        h.is_cuda
        and type(h) is Tensor
        and h.dtype in DTYPES
        and 0 < h.shape[-1] <= MAX_FEATURES
        and h.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and has_triton(h.device)
    )


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
