"""What Diff says of itself."""

from __future__ import annotations

from typing import Any

from ..method import Method
from .config import DiffConfig
from .layer import NO_MERGE, OWN_VECTOR, DiffLayer
from .model import DiffModel


def card_settings(config: DiffConfig) -> list[str]:
    names = ["strength", "token_scope", "num_layers"]
    return names if config.hidden_size is None else [*names, "hidden_size"]


def card_layers(config: DiffConfig) -> list[dict[str, Any]]:
    return []


METHOD = Method(
    short="Diff",
    config=DiffConfig,
    model=DiffModel,
    layer=DiffLayer,
    tokens=("answer",),
    learnt_by="train-diff",
    card_settings=card_settings,
    card_layers=card_layers,
    no_merge=NO_MERGE,
    no_lora=f"{OWN_VECTOR}, which no LoRA adapter can do",
)
