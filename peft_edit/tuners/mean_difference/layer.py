from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.outputs import OutputTensor, linear_outputs
from ...models.sites import is_linear
from ..block import BlockEditLayer, check_alone
from ..frozen import FrozenWeight
from .config import MeanDifferenceConfig


class MeanDifferenceVector(FrozenWeight):
    """Frozen vector v of h -> h + strength v. Its weight is (d,)."""

    def forward(self, h: Tensor, strength: float) -> Tensor:
        """Add to h, (..., d), in float32 or wider; the result has h's dtype."""
        self.check()
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.add(h.to(wide), self.weight.to(wide), alpha=strength).to(h.dtype)


class MeanDifferenceLayer(nn.Module, BlockEditLayer):
    """
    Mean-difference layer: a vector for each adapter, which is added to the output of a module.

    The vectors are frozen for ever: they come from a fit, not from training.
    """

    adapter_layer_names: tuple[str, ...] = ("mean_difference_vector",)

    def __init__(
        self, block: nn.Module, adapter_name: str, config: MeanDifferenceConfig, site: str, features: int
    ) -> None:
        super().__init__()
        self.begin(adapter_name, site, features)
        self.frozen_peft_weight_names = {}
        self.attach(block)
        self.update_layer(adapter_name, config)

    def make_modules(self, adapter_name: str, config: MeanDifferenceConfig) -> None:
        # NaN until loaded, so that a vector missing in the file cannot pass for an edit.
        vector = torch.full((self.features,), float("nan") if self.site in config.fit_statistics else 0.0)
        if not config.init_weights and self.site not in config.fit_statistics:
            vector = torch.randn(self.features)
        self.set_vector(adapter_name, vector)

    def set_vector(self, adapter_name: str, vector: Tensor, checked: bool = False) -> None:
        """Replace an adapter's vector, (d,)."""
        label = f"vector of mean-difference adapter {adapter_name!r} at {self.site}"
        self.mean_difference_vector[adapter_name] = MeanDifferenceVector(vector, label, checked)
        self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def is_fitted(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter and the fit made a vector for this site."""
        config = self.configs.get(adapter_name)
        return config is not None and (self.site in config.fit_statistics or not config.init_weights)

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        strength = self.configs[adapter_name].strength * self.strength_factor
        if strength == 0 or not self.is_fitted(adapter_name):
            return h
        return self.mean_difference_vector[adapter_name](h, strength)

    def output_tensors(self) -> dict[str, OutputTensor]:
        """The bias of the site's linear layer, where it has one."""
        base = self.get_base_layer()
        outputs = linear_outputs(base) if is_linear(base) else {}
        return {name: output for name, output in outputs.items() if name == "bias"}

    def check_mergeable(self, adapter_name: str) -> None:
        reason = None
        if self.configs[adapter_name].token_scope == "last":
            reason = "it edits the last token of a forward pass only, and a bias is added to all"
        elif not is_linear(self.get_base_layer()):
            reason = f"it adds a vector to the output of {self.site}, which is no linear layer with a bias"
        elif not self.output_tensors():
            reason = f"it adds a vector to the output of {self.site}, which has no bias to hold it"
        if reason:
            raise ValueError(f"adapter {adapter_name!r} cannot be merged: {reason}; keep it as an adapter")
        super().check_mergeable(adapter_name)
        check_alone(self, adapter_name)
        self.check_weights(adapter_name)
        self.mean_difference_vector[adapter_name].check()

    def merge_into(self, tensor: Tensor, axis: int, adapter_name: str, out: Tensor) -> None:
        # bias' = bias + strength v
        vector, strength = self.mean_difference_vector[adapter_name], self.configs[adapter_name].strength
        out.copy_(vector(tensor, strength))

    def __repr__(self) -> str:
        return "mean_difference." + super().__repr__()
