"""How strong edits are, at run time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..arguments import Argument, ArgumentError
from .layer import edit_layers


@contextmanager
def edit_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the strength of every active edit of `model` inside the `with` block.

    Args:
        model: a model with adapters of editing methods.
        strength: 0 is the base model, 1 the edit as configured, more is allowed.

    Raises:
        ValueError: strength below 0, not finite, or a model without edits or with merged ones. Merging inside the
            block is refused.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= sys.float_info.max:
        raise ArgumentError(Argument("strength"), f" must be a number of 0 or more and finite, got {strength!r}")
    layers = edit_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no edit whose strength could be set: load an adapter that edits")
    if any(layer.merged for layer in layers):
        raise ValueError("cannot change the strength of merged adapters: call unmerge_adapter first")
    before = [(layer.strength_factor, layer.in_edit_strength) for layer in layers]
    try:
        for layer in layers:
            layer.strength_factor, layer.in_edit_strength = layer.strength_factor * strength, True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.strength_factor, layer.in_edit_strength = state
