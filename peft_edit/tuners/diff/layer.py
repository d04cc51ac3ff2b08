from __future__ import annotations

import torch
from torch import Tensor

from ...models.dtypes import as_written
from ..network import feed_forward
from ..trained import TrainedLayer
from .config import DiffConfig


# Why an adapter is no linear update.
OWN_VECTOR = "it adds a vector of its own to each token"
NO_MERGE = f"{OWN_VECTOR}, which no weight of the model can do"


class DiffLayer(TrainedLayer):
    """
    Diff layer: a network for each adapter, which edits the output of a decoder block: a -> a + strength f(a).

    The network predicts what would have to be added to make the activation positive, nothing where it is.
    """

    adapter_layer_names: tuple[str, ...] = ("diff_network",)
    method = "Diff"

    def make_modules(self, adapter_name: str, config: DiffConfig) -> None:
        network = feed_forward(self.features, self.features, config.num_layers, config.hidden_size)
        with torch.no_grad():
            for parameter in network[-1].parameters():
                parameter.zero_() if config.init_weights else parameter.normal_()
        self.diff_network[adapter_name] = network

    def difference(self, a: Tensor, adapter_name: str) -> Tensor:
        """f(a) of activations (..., d), in the dtype of the network."""
        network = self.diff_network[adapter_name]
        with as_written(a):
            return network(a.to(network[0].weight.dtype))

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        strength = self.configs[adapter_name].strength * self.strength_factor
        if strength == 0:
            return h
        self.check_loaded(self.diff_network[adapter_name][0], adapter_name, h)
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.add(h.to(wide), self.difference(h, adapter_name).to(wide), alpha=strength).to(h.dtype)

    def check_mergeable(self, adapter_name: str) -> None:
        raise ValueError(f"adapter {adapter_name!r} cannot be merged: {NO_MERGE}; keep it as an adapter")

    def __repr__(self) -> str:
        return "diff." + super().__repr__()
