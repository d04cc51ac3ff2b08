from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

from . import common
from .options import Run


def export_lora(
    model: common.LoadedModelOptions,
    adapter: common.SEAAdapter,
    out: Annotated[Path, {"help": "Folder of the LoRA adapter.", "positional": True}],
    output: common.Output,
    run: Run,
    rank: Annotated[
        int | None,
        {"help": "Truncate to this rank. Default: exact.", "minimum": 1, "allowed": "of at least 1"},
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Write a SEA adapter as a LoRA adapter, for PEFT without this package and for servers that take LoRA.

    Example: peft-edit export-lora meta-llama/Llama-2-7b-hf sea-truthful lora-truthful --rank 64
    """
    from ..adapters.read import load_adapter_config
    from ..tuners.sea import export_lora as exporting

    exporting.check_folder(out)
    exporting.check_exportable(load_adapter_config(adapter))
    base, _ = common.load_model(model)
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        export = exporting.sea_to_lora(adapted, out, rank=rank)
    output.write(run.record(export.to_dict()))

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
        print(f"Note: {run.tell(note)}.")
    exact = "" if any(site.truncation_error or site.rescale_error for site in export.sites) else ", exact"
    print(f"LoRA adapter of rank {export.rank}{exact}, {common.size_of(out)}: {out}")
