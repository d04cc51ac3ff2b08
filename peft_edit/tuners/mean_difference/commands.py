"""Commands of mean-difference steering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from ...cli import common
from ...cli.options import Fields, Run
from .config import MeanDifferenceConfig


FIELDS = Fields(
    *("site", "target_modules", "layers_to_transform", "token_scope", "scale_to_rms", "strength"),
    of=MeanDifferenceConfig,
    changes={
        "site": common.SITE,
        "target_modules": common.MODULES,
        "layers_to_transform": common.LAYERS,
    },
)


def fit_mean_difference(
    model: common.LoadedModelOptions,
    store: Annotated[Path, {"help": "Store that collect wrote.", "positional": True}],
    out: common.Out,
    options: Annotated[dict[str, Any], FIELDS],
    output: common.Output,
    run: Run,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Fit a mean-difference adapter (CAA, DiffMean) to a store, and save it.

    Example: peft-edit fit-mean-difference meta-llama/Llama-2-7b-hf store steering --layers 13 --strength 2
    """
    from peft import TaskType, get_peft_model

    from ...activations.store import ActivationStore
    from ...adapters.save import check_adapter_folder, save_adapter
    from ...processes import processes
    from .fit import fit_mean_difference

    check_adapter_folder(out, MeanDifferenceConfig.method)
    opened = ActivationStore(store, options["site"])
    layers = options["layers_to_transform"]
    taken = {"site": opened.site, "layers_to_transform": opened.layers if layers is None else layers}
    config = MeanDifferenceConfig(task_type=TaskType.CAUSAL_LM, **{**options, **taken})
    base, _ = common.load_model(model)
    adapted = get_peft_model(base, config)
    with common.told_warnings(run):
        fit = fit_mean_difference(adapted, opened, allow_fingerprint_mismatch=allow_fingerprint_mismatch)
    if not processes().is_main:
        return
    results = run.record(fit.to_dict())
    save_adapter(adapted, out, {"mean_difference_fit.json": json.dumps(results, indent=2) + "\n"})
    output.write(results)
    rows = [[str(f.layer), f"{f.norm:.3g}", f"{f.rms:.3g}", f"{f.change:.3f}"] for f in fit.layers]
    print(common.table(["layer", "norm of the difference", "RMS of activations", "change"], rows))
    print("change: length of what is added, over that of activations (root mean square)")
    counted = opened.counted
    print(f"Adapter, fitted to {fit.demonstrations} {counted}, {common.size_of(out)}: {out}")


COMMANDS = [fit_mean_difference]
