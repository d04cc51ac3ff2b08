"""What the layers of methods share whose modules are trained on stored activations."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..models.sites import layer_index
from .block import BlockEditLayer
from .config import EditConfig
from .frozen import no_weight


class TrainedLayer(nn.Module, BlockEditLayer):
    """Trained modules for each adapter, which edit the output of a decoder block."""

    # The method, for messages.
    method: ClassVar[str]

    def __init__(self, block: nn.Module, adapter_name: str, config: EditConfig, site: str, features: int) -> None:
        super().__init__()
        self.begin(adapter_name, site, features)
        self.index = layer_index(site)
        self.attach(block)
        self.update_layer(adapter_name, config)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        starts = tuple(f"{prefix}{part}." for part in self.adapter_layer_names)
        for name, tensor in state_dict.items():
            if name.startswith(starts) and not tensor.is_meta and (held := no_weight(tensor)):
                errors.append(
                    f"{name.removeprefix(prefix)} of the {self.method} adapter at {self.site} holds {held}: the "
                    "adapter file is damaged; load it again or train again"
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def check_loaded(self, linear: nn.Linear, adapter_name: str, h: Tensor) -> bool:
        """Raise ValueError where weights that are to edit h were not loaded.

        Args:
            linear: one of the adapter's layers.
            adapter_name: the adapter.
            h: on meta where the whole model is.

        Returns:
            Whether the weights are offloaded at this time.
        """
        offloaded = linear.weight.is_meta and hasattr(linear, "_hf_hook")  # as it is between two uses
        if linear.weight.is_meta and not offloaded and not h.is_meta:
            raise ValueError(
                f"{self.method} adapter {adapter_name!r} at {self.site} was not loaded: the adapter file lacks it, or "
                "load_adapter was given an offloaded model; load the complete adapter with PeftModel.from_pretrained "
                "or train again"
            )
        return offloaded
