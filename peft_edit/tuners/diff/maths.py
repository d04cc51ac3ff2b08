"""Diff: the loss of its networks.

Source: "Householder Pseudo-Rotation: A Novel Approach to Activation Editing in LLMs with Direction-Magnitude
Perspective" (HPR), EMNLP 2024, 2024.emnlp-main.761, section 4.1. d is the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def squared_errors(predicted: Tensor, shift: Tensor) -> Tensor:
    """Mean over d of the squared error of each prediction: a positive activation needs nothing, a negative one a+ - a-.

    Args:
        predicted: (..., 2, B, d), at the positive and at the negative activations of B pairs.
        shift: (..., B, d), a+ - a-.

    Returns:
        (..., 2, B).
    """
    return (predicted - torch.stack((torch.zeros_like(shift), shift), dim=-3)).square().mean(dim=-1)


@dataclass(frozen=True)
class Loss:
    """Loss of each block, (blocks,).

    Attributes:
        total: all of it.
        positive, negative: mean squared errors at positive and at negative activations.
        retained: mean square of what is added to tokens to leave alone; None where there are none.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    retained: Tensor | None


def loss(errors: Tensor, retained: Tensor | None = None, retain_weight: float = 1.0) -> Loss:
    """Mean squared error over the 2 B rows x = [a+; a-] of B pairs.

    Tokens r to leave alone (ours; the paper has none) count as positive ones: retain_weight |f(r)|^2 / d is added, of
    as many as there are pairs with the weight of a row x.

    Args:
        errors: (blocks, 2, B), see `squared_errors`.
        retained: (blocks, R), the mean square of what is added to a token to leave alone; None for none.
        retain_weight: their weight, 0 or more.
    """
    positive, negative = errors.mean(dim=-1).unbind(dim=-1)
    total = errors.mean(dim=(-2, -1))
    if retained is not None:
        retained = retained.mean(dim=-1)
        total = total + retain_weight / 2 * retained  # half: the mean above is over two rows for each pair
    return Loss(total, positive, negative, retained)
