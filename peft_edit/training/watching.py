"""Losses that are looked at now and then: to look at each one, the program would wait for the device in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..tuners.layer import EditLayer


class WatchedLosses:
    """The last loss of each decoder block, or its first one that was not finite, on the device of the losses.

    Args:
        what: they are losses of, for messages.
    """

    def __init__(self, what: str):
        self.what = what
        self._values: Tensor | None = None
        self._steps: Tensor | None = None

    def add(self, losses: Tensor, step: int) -> None:
        """Take the losses of a step, (blocks,), without waiting for them."""
        losses = losses.detach()
        if self._values is None:
            self._values, self._steps = losses, torch.full_like(losses, step, dtype=torch.int64)
            return
        finite = torch.isfinite(self._values)
        self._values = torch.where(finite, losses, self._values)
        self._steps = torch.where(finite, step, self._steps)

    def check(self, layers: Mapping[int, EditLayer]) -> None:
        """Raise ValueError where a loss was not finite. It waits for the device, and begins anew.

        Args:
            layers: index of each block to its layer.
        """
        values, steps = self._values, self._steps
        self._values = self._steps = None
        if values is None or torch.isfinite(values).all():
            return
        found = zip(steps.tolist(), layers.items(), values.tolist(), torch.isfinite(values).tolist(), strict=True)
        step, index, layer, value = min((s, i, layer, value) for s, (i, layer), value, finite in found if not finite)
        raise ValueError(
            f"the {self.what} loss of layer {index} ({layer.site}) is {value} at step {step}: lower the learning rate, "
            "or check the activations of that layer"
        )
