"""When edits may take a shorter way because nothing but values is asked for: of a few tokens, launching many small
operators takes longer than they do. On a GPU a fused Triton kernel takes their place, which stands in the folder of the
method, its reference in `maths`; on a CPU numbers of Python do."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


# Features that one program keeps in its registers.
MAX_FEATURES = 2**14
# Tokens whose own numbers, such as norms, a CPU computes faster in Python than by an operator for each step.
FEW_TOKENS = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def values_alone(h: Tensor) -> bool:
    """Whether nothing but the values of an edit of h is asked for: no gradient, compiled graph or transformation."""
    return (
        not torch.is_grad_enabled()
        and type(h) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def is_at_hand(module: nn.Module) -> bool:
    """Whether a module's weights are plain tensors that can be used without calling it: nothing offloads, gathers or
    shards them, and it has no hooks of its own."""
    # A module looks long for an attribute that it lacks.
    listening = "_hf_hook" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks
    return not listening and all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values())


def numbers_are_faster(h: Tensor) -> bool:
    """Whether activations, (..., d), of which `values_alone` are asked for are so few, and on a CPU, that what is one
    number for each token is better computed in Python."""
    return not _followed() and h.is_cpu and 0 < h.numel() <= FEW_TOKENS * h.shape[-1]


def _followed() -> bool:
    """Whether somebody records operators, or takes derivatives forwards."""
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0


def kernels_apply(h: Tensor) -> bool:
    """Whether activations, (..., d), of which `values_alone` are asked for can be edited by a kernel."""
    return (
        h.is_cuda
        and h.dtype in DTYPES
        and h.numel() > 0
        and h.shape[-1] <= MAX_FEATURES
        and not _followed()
        and has_triton(h.device)
    )


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for a GPU, which one small kernel tries."""
    if find_spec("triton") is None:
        return False
    try:
        from .trial_kernel import doubled

        return float(doubled(torch.ones(1, 1, device=device))) == 2
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton is installed and compiles nothing for {device} ({type(error).__name__}: {what}): edits run as "
            "several kernels, a little slower; it needs a C compiler and a GPU that it knows",
            stacklevel=2,
        )
        return False


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
