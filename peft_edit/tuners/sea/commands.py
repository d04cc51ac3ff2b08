from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...cli import common


def fit_sea(
    model: common.Model,
    store: Annotated[Path, typer.Argument(help="Store that collect wrote.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    site: Annotated[str | None, typer.Option(help="Of a store with several: mlp or block. Default: mlp.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names of other modules, as given to collect.")
    ] = None,
    layers: common.Layers = None,
    positive_energy: Annotated[float, typer.Option(help="Energy of the positive directions, in (0, 1].")] = 0.998,
    negative_energy: Annotated[float, typer.Option(help="Energy of the negative directions, in (0, 1].")] = 0.998,
    centered: Annotated[bool, typer.Option(help="Centre the demonstrations first.")] = False,
    feature_map: Annotated[str | None, typer.Option(help="tanh, squared_exponential or elu.")] = None,
    feature_space: Annotated[str, typer.Option(help="activation or feature.")] = "activation",
    input_scale: Annotated[float | None, typer.Option(help="Divide by this times the RMS before the map.")] = None,
    rescale: Annotated[str, typer.Option(help="token, none, mean or average.")] = "token",
    projections: Annotated[str, typer.Option(help="both, positive, negative or exchanged.")] = "both",
    strength: Annotated[float, typer.Option(help="0 is the base model, 1 the edit.")] = 1.0,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    dtype: common.Dtype = "auto",
    device_map: common.DeviceMap = "auto",
    json_file: common.Json = None,
) -> None:
    """Fit a SEA adapter to a store, in closed form, and save it.

    Example: peft-edit fit-sea meta-llama/Llama-2-7b-hf store sea-truthful --layers 11-31 --rescale none
    """
    from peft import TaskType, get_peft_model

    from ...activations.store import ActivationStore
    from ...adapters.save import check_adapter_folder, save_adapter
    from ...processes import processes
    from . import fit as fitting
    from .config import SEAConfig

    common.check_json(json_file)
    check_adapter_folder(out, "SEA")
    opened = ActivationStore(store, site)
    config = SEAConfig(
        task_type=TaskType.CAUSAL_LM,
        site=opened.site,
        target_modules=None if target_modules is None else target_modules.split(","),
        layers_to_transform=opened.layers if layers is None else common.parse_layers(layers),
        positive_energy=positive_energy,
        negative_energy=negative_energy,
        centered=centered,
        feature_map=feature_map,
        feature_space=feature_space,
        input_scale=input_scale,
        rescale=rescale,
        projections=projections,
        strength=strength,
    )
    base, _ = common.load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    adapted = get_peft_model(base, config)
    fit = fitting.fit_sea(adapted, opened, allow_fingerprint_mismatch=allow_fingerprint_mismatch)
    if not processes().is_main:
        return
    results = fit.to_dict()
    save_adapter(adapted, out, {"sea_fit.json": json.dumps(results, indent=2) + "\n"})
    common.write_json(json_file, results)

    header = ["layer", "rank +", "rank -", "energy +", "energy -", "signature", "rescale", "deviation"]
    rows = [
        [
            str(f.layer),
            str(f.positive_rank),
            str(f.negative_rank),
            f"{f.positive_energy:.5f}",
            f"{f.negative_energy:.5f}",
            f"{f.signature:.3g}",
            f"{f.mean_rescale:.3f}",
            f"{f.mean_rescale_deviation:.3f}",
        ]
        for f in fit.layers
    ]
    print(common.table(header, rows))
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"Adapter, fitted to {fit.demonstrations} demonstrations, {size / 1e6:.2f} MB: {out}")
