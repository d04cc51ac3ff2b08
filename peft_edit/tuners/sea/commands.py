"""Commands of SEA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from ...arguments import Argument, ArgumentError
from ...cli import common
from ...cli.options import Fields, Run
from . import SEAConfig


FIELDS = Fields(
    *("site", "target_modules", "layers_to_transform", "positive_energy", "negative_energy", "centered"),
    *("feature_map", "feature_space", "input_scale", "rescale", "projections", "strength", "retain_energy"),
    of=SEAConfig,
    changes={
        "site": common.SITE,
        "target_modules": common.MODULES,
        "layers_to_transform": common.LAYERS,
        "centered": {"negatable": True},
    },
)


def fit_sea(
    model: common.LoadedModelOptions,
    store: Annotated[Path, {"help": "Store that collect wrote.", "positional": True}],
    out: common.Out,
    options: Annotated[dict[str, Any], FIELDS],
    output: common.Output,
    run: Run,
    retain: common.Retain = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
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

    check_adapter_folder(out, "SEA")
    if retain is None and options["retain_energy"] != SEAConfig.retain_energy:
        raise ArgumentError(Argument("retain_energy"), " needs ", Argument("retain"), ": pass a store of texts too")
    opened = ActivationStore(store, options["site"])
    layers = options["layers_to_transform"]
    taken = {"site": opened.site, "layers_to_transform": opened.layers if layers is None else layers}
    config = SEAConfig(task_type=TaskType.CAUSAL_LM, **{**options, **taken})
    base, _ = common.load_model(model)
    adapted = get_peft_model(base, config)
    with common.told_warnings(run):
        fit = fitting.fit_sea(adapted, opened, None, allow_fingerprint_mismatch, retain=retain)
    if not processes().is_main:
        return
    results = run.record(fit.to_dict())
    save_adapter(adapted, out, {"sea_fit.json": json.dumps(results, indent=2) + "\n"})
    output.write(results)
    _print(fit)
    print(f"Adapter, fitted to {fit.demonstrations} demonstrations, {common.size_of(out)}: {out}")


def _print(fit) -> None:
    """Print what the fit found in each layer."""
    header = ["layer", "rank +", "rank -", "energy +", "energy -", "signature", "rescale", "deviation", "change"]
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
            f"{f.change:.3f}",
        ]
        for f in fit.layers
    ]
    print(common.table(header, rows))
    print("signature: sum of the singular values of the two mean activations, which tells layers apart (SEA)")
    print("deviation: standard deviation of the rescale, the factor that gives an edited activation its norm back")
    print("change: relative change of the retain set's tokens, without one of the neutral demonstrations")


COMMANDS = [fit_sea]
