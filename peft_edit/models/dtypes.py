"""Dtypes: their names, PyTorch's and those of safetensors, and computing in the one that is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


# Name in a safetensors file to dtype, of what weights and activations are. PyTorch counts float8 and float4 as floating
# point too: those hold the weights of quantised models, and it computes nothing in them.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in (FLOATING | _INTEGERS).items()}
_NOTHING_TO_DO = nullcontext()


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are no numbers to compute with: integers, and floats of 8 bits and less."""
    return dtype not in FLOATING.values()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values; of float8, too."""
    return bool((tensor.float() if is_quantised(tensor.dtype) else tensor).isfinite().all())


def as_written(tensor: Tensor) -> AbstractContextManager[None]:
    """Lets what is computed in the `with` block on the device of a tensor keep its dtype: autocast, which may be on
    around it, would round products to half precision.

    Edits rely on that: thresholds follow from the dtype, and inverses and differences amplify rounding.
    """
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return _NOTHING_TO_DO
    return torch.autocast(tensor.device.type, enabled=False)


def safetensors_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "F32"."""
    return _SAFETENSORS_NAMES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")
