"""Names of dtypes: PyTorch's, and those of safetensors."""

from __future__ import annotations

import torch


# Name in a safetensors file to dtype, of what weights and activations are.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in (FLOATING | _INTEGERS).items()}


def safetensors_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "F32"."""
    return _SAFETENSORS_NAMES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")
