"""What mean-difference steering says of itself."""

from __future__ import annotations

from typing import Any

from ...models.sites import by_layer, layer_index
from ...places import ROW_TOKENS
from ..method import Method
from ..shown import LayerCurve
from .config import MeanDifferenceConfig
from .layer import MeanDifferenceLayer
from .model import MeanDifferenceModel


def card_settings(config: MeanDifferenceConfig) -> list[str]:
    return ["site", "token_scope", "scale_to_rms", "strength"]


def card_layers(config: MeanDifferenceConfig) -> list[dict[str, Any]]:
    return [
        {"index": layer_index(site), "site": site, **statistics} for site, statistics in by_layer(config.fit_statistics)
    ]


METHOD = Method(
    short="mean-difference",
    config=MeanDifferenceConfig,
    model=MeanDifferenceModel,
    layer=MeanDifferenceLayer,
    tokens=(*ROW_TOKENS, "answer"),
    learnt_by="fit-mean-difference",
    settings="peft_edit.tuners.mean_difference.settings",
    card_settings=card_settings,
    card_layers=card_layers,
    no_lora="it adds a vector, which is a bias and no low-rank update of a weight; merge it where it merges",
    curves=(LayerCurve("norm", "Length of the difference of the means", "as activations are"),),
)
