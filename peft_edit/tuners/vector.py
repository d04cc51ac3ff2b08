"""What the layers of methods share that add one vector to the activations of a module."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models.outputs import OutputTensor, linear_outputs
from ..models.parts import is_linear
from .block import BlockEditLayer, check_alone
from .config import EditConfig
from .frozen import FrozenWeight


class FrozenVector(FrozenWeight):
    """Frozen vector v of h -> h + strength v. Its weight is (d,)."""

    def forward(self, h: Tensor, strength: float) -> Tensor:
        """Add to h, (..., d), in float32 or wider; the result has h's dtype."""
        self.check()
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.add(h.to(wide), self.weight.to(wide), alpha=strength).to(h.dtype)


class VectorLayer(nn.Module, BlockEditLayer):
    """
    A vector for each adapter, which is added to the output of a module, or to its input.

    The vectors are frozen for ever: they come from a fit, not from training. A subclass names the one `ModuleDict` that
    holds them in `adapter_layer_names`.
    """

    # The method, for messages: "mean-difference".
    method: ClassVar[str]

    def __init__(self, block: nn.Module, adapter_name: str, config: EditConfig, site: str, features: int) -> None:
        super().__init__()
        self.begin(adapter_name, site, features)
        self.frozen_peft_weight_names = {}
        self.attach(block)
        self.update_layer(adapter_name, config)

    @abstractmethod
    def has_vector(self, config: EditConfig) -> bool:
        """Whether the fit that made an adapter made a vector for this site."""

    @abstractmethod
    def strength_of(self, config: EditConfig) -> float:
        """Factor on the vector of an adapter, as its configuration says."""

    def vector(self, adapter_name: str) -> FrozenVector:
        """That of an adapter."""
        return getattr(self, self.adapter_layer_names[0])[adapter_name]

    def make_modules(self, adapter_name: str, config: EditConfig) -> None:
        # NaN until loaded, so that a vector missing in the file cannot pass for an edit.
        vector = torch.full((self.features,), float("nan") if self.has_vector(config) else 0.0)
        if not config.init_weights and not self.has_vector(config):
            vector = torch.randn(self.features)
        self.set_vector(adapter_name, vector)

    def set_vector(self, adapter_name: str, vector: Tensor, checked: bool = False) -> None:
        """Replace an adapter's vector, (d,)."""
        label = f"vector of {self.method} adapter {adapter_name!r} at {self.site}"
        getattr(self, self.adapter_layer_names[0])[adapter_name] = FrozenVector(vector, label, checked)
        self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names

    def is_fitted(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter and the fit made a vector for this site."""
        config = self.configs.get(adapter_name)
        return config is not None and (self.has_vector(config) or not config.init_weights)

    def edit(self, h: Tensor, adapter_name: str) -> Tensor:
        strength = self.strength_of(self.configs[adapter_name]) * self.strength_factor
        if strength == 0 or not self.is_fitted(adapter_name):
            return h
        return self.vector(adapter_name)(h, strength)

    def output_tensors(self) -> dict[str, OutputTensor]:
        """The bias of the site's linear layer, where it has one."""
        base = self.get_base_layer()
        outputs = linear_outputs(base) if is_linear(base) else {}
        return {name: output for name, output in outputs.items() if name == "bias"}

    @property
    def merge_reads(self) -> tuple[str, ...]:
        return ("weight",) if self.of_input else ()

    def check_mergeable(self, adapter_name: str) -> None:
        reason, what = None, f"it adds a vector to the {'input' if self.of_input else 'output'} of {self.site}"
        if self.depends_on_padding(adapter_name):
            reason = "it edits the last token of a forward pass only, and a bias is added to all"
        elif not is_linear(self.get_base_layer()):
            reason = f"{what}, which is no linear layer with a bias"
        elif not self.output_tensors():
            reason = f"{what}, which has no bias to hold it"
        if reason:
            raise ValueError(f"adapter {adapter_name!r} cannot be merged: {reason}; keep it as an adapter")
        super().check_mergeable(adapter_name)
        check_alone(self, adapter_name)
        self.check_weights(adapter_name)
        self.vector(adapter_name).check()

    def merge_into(self, tensor: Tensor, axis: int, adapter_name: str, out: Tensor, **beside: Tensor) -> None:
        # bias' = bias + strength v; of an input bias' = bias + strength W v
        vector, strength = self.vector(adapter_name), self.strength_of(self.configs[adapter_name])
        if not self.of_input:
            out.copy_(vector(tensor, strength))
            return
        weight = beside["weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        features_last = linear_outputs(self.get_base_layer())["weight"].axis == 1  # (in, out)
        weight = (weight.T if features_last else weight).to(wide)
        out.copy_(torch.add(tensor.to(wide), weight @ vector.weight.to(wide), alpha=strength))
