from __future__ import annotations

from ..vector import VectorLayer
from .config import ITIConfig


class ITILayer(VectorLayer):
    """ITI layer: a vector for each adapter, which is added to the outputs of a block's attention heads, the input of
    the attention's output projection. It is zero at the heads that are not edited."""

    adapter_layer_names: tuple[str, ...] = ("iti_vector",)
    method = "ITI"
    of_input = True

    def has_vector(self, config: ITIConfig) -> bool:
        return bool(config.fit_statistics.get(self.site, {}).get("heads"))

    def strength_of(self, config: ITIConfig) -> float:
        return config.alpha

    def __repr__(self) -> str:
        return "iti." + super().__repr__()
