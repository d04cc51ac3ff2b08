"""Commands of ITI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from ...cli import common
from ...cli.options import Fields, Run
from .config import ITIConfig
from .fit import ITIFitArguments


FIELDS = Fields(
    *("num_heads", "alpha", "target_modules", "layers_to_transform"),
    of=ITIConfig,
    changes={"target_modules": common.MODULES, "layers_to_transform": common.LAYERS},
)


def fit_iti(
    model: common.LoadedModelOptions,
    store: Annotated[Path, {"help": "Store that collect --site attention wrote.", "positional": True}],
    out: common.Out,
    options: Annotated[dict[str, Any], FIELDS],
    fitting: ITIFitArguments,
    output: common.Output,
    run: Run,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Fit an ITI adapter (Inference-Time Intervention) to a store of attention heads, and save it.

    Example: peft-edit fit-iti meta-llama/Llama-2-7b-hf store iti --num-heads 48 --alpha 15
    """
    from peft import TaskType, get_peft_model

    from ...activations.store import ActivationStore
    from ...adapters.save import check_adapter_folder, save_adapter
    from ...processes import processes
    from .fit import fit_iti

    check_adapter_folder(out, ITIConfig.method)
    opened = ActivationStore(store, ITIConfig.site)
    layers = options["layers_to_transform"]
    taken = {"layers_to_transform": opened.layers if layers is None else layers}
    config = ITIConfig(task_type=TaskType.CAUSAL_LM, **{**options, **taken})
    base, _ = common.load_model(model)
    adapted = get_peft_model(base, config)
    with common.told_warnings(run):
        fit = fit_iti(adapted, opened, allow_fingerprint_mismatch=allow_fingerprint_mismatch, **vars(fitting))
    if not processes().is_main:
        return
    results = run.record(fit.to_dict())
    save_adapter(adapted, out, {"iti_fit.json": json.dumps(results, indent=2) + "\n"})
    output.write(results)
    rows = [
        [str(f.layer), f"{max(f.accuracy):.4f}", ", ".join(map(str, f.heads)) or "-", f"{f.change:.3f}"]
        for f in fit.layers
    ]
    print(common.table(["layer", "best probe accuracy", "edited heads", "change"], rows))
    print("change: length of what is added, over that of the activations of all heads")
    print(f"Adapter, fitted to {fit.answers} answers, {common.size_of(out)}: {out}")


COMMANDS = [fit_iti]
