from __future__ import annotations

from ..vector import VectorLayer
from .config import MeanDifferenceConfig


class MeanDifferenceLayer(VectorLayer):
    """Mean-difference layer: a vector for each adapter, which is added to the output of a module."""

    adapter_layer_names: tuple[str, ...] = ("mean_difference_vector",)
    method = "mean-difference"

    def has_vector(self, config: MeanDifferenceConfig) -> bool:
        return self.site in config.fit_statistics

    def strength_of(self, config: MeanDifferenceConfig) -> float:
        return config.strength

    def __repr__(self) -> str:
        return "mean_difference." + super().__repr__()
