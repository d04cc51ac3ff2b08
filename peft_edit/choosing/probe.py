"""How well a linear probe tells positive from negative activations: by which layers are ranked before any edit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations.store import ActivationStore


# Ridge of the probe, as a share of the mean squared length of an activation.
RIDGE = 1e-2


def probe_accuracy(store: ActivationStore, layer: int) -> float:
    """Share in [0, 1] of activations that a linear probe, fitted to the other half of the questions, tells right.

    Args:
        store: with one row an answer.
        layer: index of the block.
    """
    fold = store.questions() % 2
    if len(fold.unique()) < 2:  # all are even, or odd: halves of the questions in their order
        fold = torch.unique(store.questions(), return_inverse=True)[1] % 2
    x = torch.cat((store.positive(layer), store.negative(layer))).double()
    y = torch.cat((torch.ones(len(fold)), -torch.ones(len(fold)))).double()
    fold = fold.repeat(2)
    right = [_right(x[fold != half], y[fold != half], x[fold == half], y[fold == half]) for half in (0, 1)]
    return float(torch.cat(right).double().mean())


def _right(x: Tensor, y: Tensor, x_other: Tensor, y_other: Tensor) -> Tensor:
    """Whether ridge regression on (x, y), rows (n, d), gives each of the others its sign."""
    mean = x.mean(dim=0)
    x, x_other = x - mean, x_other - mean
    ridge = RIDGE * x.square().sum() / len(x)
    if len(x) < x.shape[1]:
        gram = x @ x.T
        w = x.T @ torch.linalg.solve(gram + ridge * torch.eye(len(x), dtype=x.dtype), y)
    else:
        w = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return (x_other @ w > 0) == (y_other > 0)
