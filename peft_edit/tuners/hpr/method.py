"""What HPR says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..method import Method
from ..shown import LayerCurve
from .config import HPRConfig
from .convert import GUIDANCE_CONFIG, convert_hpr
from .layer import NO_MERGE, OWN_ANGLE, HPRLayer
from .model import HPRModel


def card_settings(config: HPRConfig) -> list[str]:
    names = ["rotation", "alpha", "gate", "token_scope", "num_angle_layers"]
    return names if config.angle_hidden_size is None else [*names, "angle_hidden_size"]


def card_layers(config: HPRConfig) -> list[dict[str, Any]]:
    accuracies = sorted((int(index), value) for index, value in config.probe_accuracy.items())
    return [{"index": i, "accuracy": value, "edits": config.edits(i)} for i, value in accuracies]


def holds_guidance(folder: Path) -> bool:
    return (folder / GUIDANCE_CONFIG).exists()


METHOD = Method(
    short="HPR",
    config=HPRConfig,
    model=HPRModel,
    layer=HPRLayer,
    tokens=("answer",),
    learnt_by="train-hpr",
    settings="peft_edit.tuners.hpr.settings",
    card_settings=card_settings,
    card_layers=card_layers,
    no_merge=NO_MERGE,
    no_lora=f"{OWN_ANGLE}, which no LoRA adapter can do",
    published=holds_guidance,
    convert=convert_hpr,
    published_files=GUIDANCE_CONFIG,
    evidence="peft_edit.tuners.hpr.evidence",
    curves=(LayerCurve("accuracy", "Accuracy of the probe on held-out answers", "% of tokens", 100, chance=50.0),),
)
