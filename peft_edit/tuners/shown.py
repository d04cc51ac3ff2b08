"""What a method shows of the layers that it edits, for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCurve:
    """A number that a method's configuration has of each layer.

    Attributes:
        key: of the number in what `Method.card_layers` gives; layers without it are left out.
        title: what it is, in words.
        unit: with the name of the axis, "%".
        factor: from the number to that unit.
        chance: what it would be of a layer that tells nothing, in the unit; None where there is no such value.
    """

    key: str
    title: str
    unit: str
    factor: float = 1.0
    chance: float | None = None


@dataclass(frozen=True)
class LayerSpectra:
    """How activations of a layer covary.

    Attributes:
        layer: index of the decoder block.
        singular_values: name of each direction to its singular values, in decreasing order, the largest above 0.
        ranks: of the same, how many of them the adapter uses.
        signature: how well the layer tells positive from negative, a sum of singular values.
    """

    layer: int
    singular_values: Mapping[str, Sequence[float]]
    ranks: Mapping[str, int]
    signature: float
