"""What ITI says of itself."""

from __future__ import annotations

from typing import Any

from ...models.sites import by_layer, layer_index
from ...places import ROW_TOKENS
from ..method import Method
from ..shown import LayerCurve
from .config import ITIConfig
from .layer import ITILayer
from .model import ITIModel


def card_settings(config: ITIConfig) -> list[str]:
    return ["num_heads", "alpha"]


def card_layers(config: ITIConfig) -> list[dict[str, Any]]:
    return [
        {"index": layer_index(site), "best": max(statistics["accuracy"], default=0.0), **statistics}
        for site, statistics in by_layer(config.fit_statistics)
    ]


METHOD = Method(
    short="ITI",
    config=ITIConfig,
    model=ITIModel,
    layer=ITILayer,
    tokens=ROW_TOKENS,
    learnt_by="fit-iti",
    card_settings=card_settings,
    card_layers=card_layers,
    no_lora="it adds a vector, which is a bias and no low-rank update of a weight; merge it where it merges",
    curves=(LayerCurve("best", "Accuracy of the best head's probe on held-out answers", "%", 100, chance=50.0),),
)
