from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

from ..arguments import Argument, ArgumentError
from ..tuners.sea import SEAConfig
from . import common
from .options import Fields, Run


SEA_FIELDS = Fields(
    "layers_to_transform",
    "rescale",
    of=SEAConfig,
    changes={
        "layers_to_transform": common.LAYERS,
        "rescale": {"type": Literal["token", "none", "average"], "help": "How SEA scales the edited activation."},
    },
)


def convert(
    model: Annotated[common.ModelOptions, Fields("model", changes={"model": {"arguments": ("base_model",)}})],
    source: Annotated[Path, {"help": "Folder that the published code wrote.", "positional": True}],
    out: common.Out,
    options: Annotated[dict, SEA_FIELDS],
    output: common.Output,
    run: Run,
) -> None:
    """Turn what the published code of SEA or HPR writes into an adapter. The base model's weights are not loaded.

    SEA: (no_mean_sub_)uu_positive.pt and (no_mean_sub_)uu_negative.pt; nothing in them is executed. HPR:
    guidance_config.json and guidance.safetensors.

    Example: peft-edit convert meta-llama/Llama-2-7b-hf projections/truthful sea-truthful --layers 11-31
    """
    from ..adapters import conversion
    from ..adapters.read import check_local
    from ..tuners.hpr.convert import GUIDANCE_CONFIG, convert_hpr
    from ..tuners.sea.convert import convert_sea

    layers, rescale = options["layers_to_transform"], options["rescale"]
    check_local(model.model, "config.json")
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    logging.getLogger(conversion.__name__).setLevel(logging.ERROR)  # the notes are printed below
    if (source / GUIDANCE_CONFIG).exists():
        if layers is not None or rescale != "token":
            raise ArgumentError(
                *(Argument("layers"), " and ", Argument("rescale")),
                " are for SEA; HPR's layers stand in its file: leave them out",
            )
        converted = convert_hpr(source, out, base_model=model.model)
        print(f"Layers: {', '.join(map(str, converted.layers))}")
    elif not any(source.glob("*uu_*.pt")):
        raise ValueError(
            f"{source} holds neither uu_positive.pt and uu_negative.pt (SEA) nor {GUIDANCE_CONFIG} (HPR): "
            "pass the folder that the published code wrote"
        )
    else:
        converted = convert_sea(source, out, base_model=model.model, layers=layers, rescale=rescale)
        rows = [[str(layer), *map(str, ranks)] for layer, ranks in zip(converted.layers, converted.ranks, strict=True)]
        print(common.table(["layer", "rank +", "rank -"], rows))
        print(f"The projections are those of their factors to {converted.deviation:.1g}.")
    output.write(run.record(converted.to_dict()))
    for note in converted.notes:
        print(f"Note: {run.tell(note)}.")
    print(f"{converted.method} adapter, {common.size_of(out)}: {out}")
