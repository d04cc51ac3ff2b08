"""The networks of a Diff adapter with the weights of all decoder blocks stacked, to be trained at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...training.stacked import StackedModules, StackedNetwork
from .layer import DiffLayer
from .maths import squared_errors


class StackedDiff(StackedModules):
    """Networks of all blocks of an adapter, their weights stacked: what the Trainer trains.

    Args:
        layers: the adapter's layers, alike in shape.
        adapter_name: the adapter.
    """

    of_pairs = 2

    def __init__(self, layers: list[DiffLayer], adapter_name: str):
        super().__init__()
        self.network = StackedNetwork(layer.diff_network[adapter_name] for layer in layers)

    def forward(self, activations: Tensor, retained: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        Args:
            activations: (B, blocks, 2, d), of positive and negative tokens.
            retained: (R, blocks, d), of tokens to leave alone; None for none.

        Returns:
            float32 or wider, means over d: squared errors at the two tokens of each pair, (B, blocks, 2), and the
            square of their difference, (B, blocks). With `retained` also the square of what is added to those tokens,
            (R, blocks).
        """
        wide = torch.promote_types(activations.dtype, torch.float32)
        pairs = activations.permute(1, 2, 0, 3).to(wide)  # (blocks, 2, B, d)
        shift = pairs[:, 0] - pairs[:, 1]
        count = 2 * pairs.shape[2]
        x = pairs.to(self.network[0].weight.dtype).flatten(1, 2)  # (blocks, 2 B, d)
        if retained is not None:
            x = torch.cat((x, retained.transpose(0, 1).to(x.dtype)), dim=1)  # (blocks, 2 B + R, d)
        predicted = self.network(x).to(wide)
        errors = squared_errors(predicted[:, :count].unflatten(1, (2, -1)), shift)  # (blocks, 2, B)
        size = shift.square().mean(dim=-1)  # (blocks, B)
        of_retained = () if retained is None else (predicted[:, count:].square().mean(dim=-1).T,)
        return (errors.permute(2, 0, 1), size.T, *of_retained)

    @torch.no_grad()
    def copy_to(self, layers: list[DiffLayer | None], adapter_name: str) -> None:
        """Copy the weights to the blocks' own modules; a block that is None is left out."""
        for i, layer in enumerate(layers):
            if layer is not None:
                self.network.copy_to(layer.diff_network[adapter_name], i)
