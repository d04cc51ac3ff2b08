from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

from . import common
from .options import Run


def export_lora(
    model: common.LoadedModelOptions,
    adapter: common.PositionalAdapter,
    out: Annotated[Path, {"help": "Folder of the LoRA adapter.", "positional": True, "output": True}],
    output: common.Output,
    run: Run,
    rank: Annotated[
        int | None,
        {"help": "Truncate to this rank. Default: exact.", "minimum": 1, "allowed": "of at least 1"},
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Write an adapter as a LoRA adapter, for PEFT without this package and for servers that take LoRA.

    Example: peft-edit export-lora meta-llama/Llama-2-7b-hf sea-truthful lora-truthful --rank 64
    """
    from ..adapters.read import load_adapter_config
    from ..tuners.method import lora_method_of

    config = load_adapter_config(adapter)
    method = lora_method_of(config)
    method.check_lora(config, out)
    base, _ = common.load_model(model)
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch, edit_only="exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        export = method.to_lora(adapted, out, rank=rank)
    output.write(run.record(export.to_dict()))

    print(common.table(*export.table()))
    for note in export.notes:
        print(f"Note: {run.tell(note)}.")
    exact = ", exact" if export.exact else ""
    print(f"LoRA adapter of rank {export.rank}{exact}, {common.size_of(out)}: {out}")


COMMANDS = [export_lora]
