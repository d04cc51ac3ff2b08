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


def combine_sea(
    model: common.LoadedModelOptions,
    out: common.Out,
    output: common.Output,
    run: Run,
    adapter: Annotated[
        list[str] | None,
        {
            "help": "SEA adapter: local folder, or id on the Hub. Give it twice or more.",
            "repeated": True,
            "arguments": ("adapters",),
        },
    ] = None,
    store: Annotated[
        Path | None, {"help": "Store of neutral activations, which rescale mean, merging and export need."}
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Make one SEA adapter of several that does what each does: a joint edit, of truthfulness and fairness.

    Example: peft-edit combine-sea meta-llama/Llama-2-7b-hf sea-joint --adapter sea-truthful --adapter sea-fair
    """
    from ...adapters.read import local_adapter
    from ...adapters.save import check_adapter_folder, save_adapter
    from .combine import combine_sea

    check_adapter_folder(out, "SEA")
    first, *others = adapter or [""]
    if not others:
        raise ArgumentError(Argument("adapter"), f" must be given twice or more, got {len(adapter or ())}")
    # What the joint edit records them as; names of adapters have no dots.
    edits = [f"{number}_{Path(name).name.replace('.', '_')}" for number, name in enumerate(adapter, 1)]
    base, _ = common.load_model(model)
    adapted = common.load_adapter(base, first, allow_fingerprint_mismatch, edit_only="combined", name=edits[0])
    for edit, name in zip(edits[1:], others, strict=True):
        # Checked by itself: PEFT adds an adapter to others with less care.
        structure = common.load_structure(model)
        common.load_adapter(structure, name, allow_fingerprint_mismatch, edit_only="combined")
        adapted.load_adapter(local_adapter(name), adapter_name=edit)
    joint = combine_sea(adapted, edits, "default", store)
    adapted.set_adapter(joint)
    for edit in edits:
        adapted.delete_adapter(edit)
    ranks = adapted.peft_config[joint].rank_pattern
    save_adapter(adapted, out)
    output.write(run.record({"adapters": adapter, "ranks": ranks}))
    print(common.table(["site", "rank +", "rank -"], [[site, *map(str, pair)] for site, pair in ranks.items()]))
    print(f"Adapter of {len(edits)} edits, {common.size_of(out)}: {out}")


COMMANDS = [fit_sea, combine_sea]
