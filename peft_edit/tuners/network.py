"""The feed-forward networks that methods train."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def feed_forward(features: int, out: int, num_layers: int = 4, hidden_size: int | None = None) -> nn.Sequential:
    """Linear layers with GELU between, (..., d) -> (..., out).

    Args:
        features: d.
        out: width of the output.
        num_layers: number of linear layers.
        hidden_size: width of the hidden ones; None halves: d, d/2, d/4, ..., out.
    """
    hidden = [max(1, features >> i) if hidden_size is None else hidden_size for i in range(1, num_layers)]
    layers = []
    for wide, narrow in pairwise([features, *hidden, out]):
        layers += [nn.Linear(wide, narrow), nn.GELU()]
    return nn.Sequential(*layers[:-1])
