"""Safetensors files as bytes: https://huggingface.co/docs/safetensors.

The library writes whole tensors only, and copies them first. The files of a store are written a part at a time, and
hold a checksum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models.dtypes import safetensors_name


# Stands for a file's checksum where that is not known yet: as long as one.
UNKNOWN_DIGEST = "0" * 64


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], digest: str = UNKNOWN_DIGEST) -> bytes:
    """First bytes of a file with tensors of these dtypes and shapes, one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"sha256": digest}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": safetensors_name(dtype), "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def memory(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
