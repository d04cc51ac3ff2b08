from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from . import common


def export_lora(
    model: common.Model,
    adapter: Annotated[str, typer.Argument(help="SEA adapter: id on the Hub or local folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the LoRA adapter.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank. Default: exact.", min=1)] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    dtype: common.Dtype = "auto",
    device_map: common.DeviceMap = "auto",
    json_file: common.Json = None,
) -> None:
    """Write a SEA adapter as a LoRA adapter, for PEFT without this package and for servers that take LoRA.

    Example: peft-edit export-lora meta-llama/Llama-2-7b-hf sea-truthful lora-truthful --rank 64
    """
    from ..adapters.read import load_adapter_config
    from ..tuners.sea import export_lora as exporting

    common.check_json(json_file)
    exporting.check_folder(out)
    exporting.check_exportable(load_adapter_config(adapter))
    base, _ = common.load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        export = exporting.sea_to_lora(adapted, out, rank=rank)
    common.write_json(json_file, export.to_dict())

    header = ["module", "directions", "exact rank", "rank", "truncation error", "rescale error"]
    rows = [
        [
            site.site,
            str(site.factor_rank),
            str(site.exact_rank),
            str(site.rank),
            f"{site.truncation_error:.3g}",
            f"{site.rescale_error:.3g}",
        ]
        for site in export.sites
    ]
    print(common.table(header, rows))
    for note in export.notes:
        print(f"Note: {common.in_options(note)}.")
    size = (out / "adapter_model.safetensors").stat().st_size
    exact = "" if any(site.truncation_error or site.rescale_error for site in export.sites) else ", exact"
    print(f"LoRA adapter of rank {export.rank}{exact}, {size / 1e6:.2f} MB: {out}")
