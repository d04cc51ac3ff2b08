from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from . import common


def convert(
    model: common.Model,
    source: Annotated[Path, typer.Argument(help="Folder that the published code wrote.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    layers: common.Layers = None,
    rescale: Annotated[str, typer.Option(help="SEA: token, none or average.")] = "token",
    json_file: common.Json = None,
) -> None:
    """Turn what the published code of SEA or HPR writes into an adapter. The base model's weights are not loaded.

    SEA: (no_mean_sub_)uu_positive.pt and (no_mean_sub_)uu_negative.pt; nothing in them is executed. HPR:
    guidance_config.json and guidance.safetensors.

    Example: peft-edit convert meta-llama/Llama-2-7b-hf projections/truthful sea-truthful --layers 11-31
    """
    from ..adapters import conversion
    from ..tuners.hpr.convert import GUIDANCE_CONFIG, convert_hpr
    from ..tuners.sea.convert import convert_sea

    common.check_json(json_file)
    common.check_local(model, "config.json")
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    logging.getLogger(conversion.__name__).setLevel(logging.ERROR)  # the notes are printed below
    if (source / GUIDANCE_CONFIG).exists():
        if layers is not None or rescale != "token":
            raise ValueError("--layers and --rescale are for SEA; HPR's layers stand in its file: leave them out")
        converted = convert_hpr(source, out, base_model=model)
        print(f"Layers: {', '.join(map(str, converted.layers))}")
    elif not any(source.glob("*uu_*.pt")):
        raise ValueError(
            f"{source} holds neither uu_positive.pt and uu_negative.pt (SEA) nor {GUIDANCE_CONFIG} (HPR): "
            "pass the folder that the published code wrote"
        )
    else:
        converted = convert_sea(source, out, base_model=model, layers=common.parse_layers(layers), rescale=rescale)
        rows = [[str(layer), *map(str, ranks)] for layer, ranks in zip(converted.layers, converted.ranks, strict=True)]
        print(common.table(["layer", "rank +", "rank -"], rows))
        print(f"The projections are those of their factors to {converted.deviation:.1g}.")
    common.write_json(json_file, converted.to_dict())
    for note in converted.notes:
        print(f"Note: {common.in_options(note)}.")
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"{converted.method} adapter, {size / 1e6:.2f} MB: {out}")
