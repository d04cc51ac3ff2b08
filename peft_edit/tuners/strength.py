"""How strong edits are, at run time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..arguments import Argument, ArgumentError
from ..models.sites import layer_index
from ..places import LayerIndices, format_layers, normalise_layers
from .layer import EditLayer, StrengthScope, edit_layers


@contextmanager
def edit_strength(model: nn.Module, strength: float = 1.0, *, layers: LayerIndices = None) -> Iterator[None]:
    """Multiply the strength of every active edit of `model` inside the `with` block, also of adapters that are added,
    loaded or made active there.

    Args:
        model: a model with adapters of editing methods.
        strength: 0 is the base model, 1 the edit as configured, more is allowed.
        layers: indices of the decoder blocks that go on to edit; the others do not, inside the block. None for all,
            [] for none.

    Raises:
        ValueError: strength below 0, not finite, layers where the model has no edit, or a model without edits or with
            merged ones. Merging inside the block is refused.
    """
    check_strength(strength)
    edits = edit_layers(model)
    if not edits:
        raise ValueError(f"{type(model).__name__} has no edit whose strength could be set: load an adapter that edits")
    if any(layer.merged for layer in edits):
        raise ValueError("cannot change the strength of merged adapters: call unmerge_adapter first")
    scope = StrengthScope(strength, None if layers is None else _chosen(layers, edits))
    try:
        for layer in edits:
            layer.set_strength_scopes((*layer.strength_scopes, scope))
        yield
    finally:
        for layer in {*edits, *edit_layers(model)}:  # those of adapters that were added inside, too
            layer.set_strength_scopes(tuple(other for other in layer.strength_scopes if other is not scope))


def check_strength(strength: float) -> None:
    """Raise ValueError for what is no factor on a strength."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= sys.float_info.max:
        raise ArgumentError(Argument("strength"), f" must be a number of 0 or more and finite, got {strength!r}")


def edited_blocks(edits: Iterable[EditLayer]) -> list[int]:
    """Indices of the decoder blocks where an adapter edits, in their order."""
    indices = {layer_index(layer.site) for layer in edits if any(map(layer.is_fitted, layer.configs))}
    return sorted(indices - {None})


def _chosen(layers: LayerIndices, edits: Iterable[EditLayer]) -> frozenset[int]:
    given = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
    chosen = frozenset(normalise_layers(given) if given != [] else ())
    there = edited_blocks(edits)
    if missing := sorted(chosen - set(there)):
        raise ArgumentError(
            Argument("layers"), f" {format_layers(missing)} have no edit, the model has them in {format_layers(there)}"
        )
    return chosen


def continue_scopes(layers: Iterable[EditLayer]) -> None:
    """Let layers that are new in a model have the strength that its other layers have at this time."""
    layers = list(layers)
    scopes = max((layer.strength_scopes for layer in layers), key=len, default=())
    for layer in layers:
        if not layer.strength_scopes and scopes:
            layer.set_strength_scopes(scopes)
