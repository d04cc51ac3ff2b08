"""The devices of a machine."""

from __future__ import annotations

import torch

from ..arguments import Argument, ArgumentError


def known_device(argument: str, name: str) -> torch.device:
    """The device of a name; raises ArgumentError for what is none, and for a GPU that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(Argument(argument), f" must be auto, cpu, cuda, cuda:1, ..., got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"{count or 'no'} CUDA device{'s' if count > 1 else ''}"
        raise ArgumentError(Argument(argument), f" is {name!r} and this machine has {have}: pass auto or cpu")
    return device
