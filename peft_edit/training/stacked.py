"""Modules with the weights of all decoder blocks stacked, to be trained at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tuners.layer import EditLayer


class StackedModules(nn.Module, ABC):
    """The modules of an adapter of all blocks, their weights stacked: what an `EditTrainer` trains. Each parameter has
    the blocks along its first axis. It is made of the adapter's layers, alike in shape, and the adapter's name.

    Attributes:
        of_pairs: how many tensors `forward` returns of pairs. The last of them are what is to be predicted.
    """

    of_pairs: ClassVar[int]

    @abstractmethod
    def forward(self, activations: Tensor, retained: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        Args:
            activations: (B, blocks, 2, d), of positive and negative tokens.
            retained: (R, blocks, d), of tokens to leave alone; None for none.

        Returns:
            What the trainer's `losses` take, of pairs and then of tokens to leave alone.
        """

    @abstractmethod
    def copy_to(self, layers: list[EditLayer | None], adapter_name: str) -> None:
        """Copy the weights to the blocks' own modules; a block that is None is left out."""


class StackedLinear(nn.Module):
    """A linear layer for each block, applied at once: (blocks, n, in) -> (blocks, n, out)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().float() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().float() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class StackedNetwork(nn.ModuleList):
    """A network of `feed_forward` for each block, applied at once: (blocks, n, in) -> (blocks, n, out)."""

    def __init__(self, networks: Iterable[nn.Sequential]):
        layers = zip(*networks, strict=True)
        super().__init__(StackedLinear(m) for m in layers if isinstance(m[0], nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(self):
            x = linear(functional.gelu(x) if i else x)
        return x

    @torch.no_grad()
    def copy_to(self, network: nn.Sequential, block: int) -> None:
        """Copy the weights of a block, by its place, to its own network."""
        linear = [m for m in network if isinstance(m, nn.Linear)]
        for stacked, module in zip(self, linear, strict=True):
            module.weight.copy_(stacked.weight[block])
            module.bias.copy_(stacked.bias[block])
