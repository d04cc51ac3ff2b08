"""What SEA says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...models.sites import by_layer, layer_index
from ...places import ROW_TOKENS
from ..method import Method
from ..shown import LayerCurve
from .config import FIT_SETTINGS, SEAConfig
from .convert import convert_sea
from .export_lora import RECORD, check_lora, sea_to_lora
from .layer import SEALayer
from .lora_record import LoRARecord, contradiction
from .model import SEAModel
from .shown import layer_spectra


SETTINGS = ("site", "feature_map", "feature_space", "input_scale", "rescale", "projections", "strength")


def card_settings(config: SEAConfig) -> list[str]:
    of_map = ("feature_map", "feature_space", "input_scale") if config.feature_map is None else ()
    return [
        name
        for name in (
            *SETTINGS,
            *(FIT_SETTINGS if "demonstrations" in config.fitted_on else ()),
            *(("retain_energy",) if "retain" in config.fitted_on else ()),
        )
        if name not in of_map
    ]


def card_layers(config: SEAConfig) -> list[dict[str, Any]]:
    return [
        {"index": layer_index(site), "site": site, "ranks": ranks, **config.fit_statistics.get(site, {})}
        for site, ranks in by_layer(config.rank_pattern)
    ]


def holds_projections(folder: Path) -> bool:
    return any(folder.glob("*uu_*.pt"))


METHOD = Method(
    short="SEA",
    config=SEAConfig,
    model=SEAModel,
    layer=SEALayer,
    tokens=ROW_TOKENS,
    learnt_by="fit-sea",
    settings="peft_edit.tuners.sea.settings",
    card_settings=card_settings,
    card_layers=card_layers,
    check_lora=check_lora,
    to_lora=sea_to_lora,
    lora_record=RECORD,
    lora_contents=LoRARecord,
    lora_contradiction=contradiction,
    published=holds_projections,
    convert=convert_sea,
    published_files="uu_positive.pt and uu_negative.pt",
    evidence="peft_edit.tuners.sea.evidence",
    curves=(LayerCurve("change", "Change of what is to be left alone", "% of the norm", 100),),
    spectra=layer_spectra,
)
