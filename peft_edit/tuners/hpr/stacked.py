"""The modules of an HPR adapter with the weights of all decoder blocks stacked, to be trained at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...training.stacked import StackedModules, StackedNetwork
from ..angle import angle_between
from .layer import HPRLayer


class StackedHPR(StackedModules):
    """Probes and angle networks of all blocks of an adapter, their weights stacked: what the Trainer trains.

    Args:
        layers: the adapter's layers, alike in shape.
        adapter_name: the adapter.
    """

    of_pairs = 3

    def __init__(self, layers: list[HPRLayer], adapter_name: str):
        super().__init__()
        self.probe = nn.Parameter(torch.stack([x.hpr_probe[adapter_name].weight.detach()[0].float() for x in layers]))
        self.angle = StackedNetwork(layer.hpr_angle[adapter_name] for layer in layers)

    def forward(self, activations: Tensor, retained: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        Args:
            activations: (B, blocks, 2, d), of positive and negative tokens.
            retained: (R, blocks, d), of tokens to leave alone; None for none.

        Returns:
            float32 or wider: logits of the probes, (B, blocks, 2); predicted angles in radians, (B, blocks, 2); the
            angle between the two activations of a pair, (B, blocks). With `retained` also their logits and predicted
            angles, (R, blocks) each.
        """
        pairs = activations.permute(1, 2, 0, 3)  # (blocks, 2, B, d)
        target = angle_between(pairs[:, 1], pairs[:, 0])  # (blocks, B)
        count = 2 * pairs.shape[2]
        x = pairs.to(self.probe.dtype).flatten(1, 2)  # (blocks, 2 B, d)
        if retained is not None:
            x = torch.cat((x, retained.transpose(0, 1).to(x.dtype)), dim=1)  # (blocks, 2 B + R, d)
        logits = torch.bmm(x, self.probe.unsqueeze(2)).squeeze(2)
        angles = math.pi * torch.sigmoid(self.angle(x).squeeze(2).float())
        of_pairs = (y[:, :count].float().unflatten(1, (2, -1)).permute(2, 0, 1) for y in (logits, angles))
        of_retained = () if retained is None else (y[:, count:].float().T for y in (logits, angles))
        return (*of_pairs, target.T, *of_retained)

    @torch.no_grad()
    def copy_to(self, layers: list[HPRLayer | None], adapter_name: str) -> None:
        """Copy the weights to the blocks' own modules; a block that is None is left out."""
        for i, layer in enumerate(layers):
            if layer is not None:
                layer.hpr_probe[adapter_name].weight.copy_(self.probe[i].unsqueeze(0))
                self.angle.copy_to(layer.hpr_angle[adapter_name], i)
