"""Commands of HPR."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from ...cli import common
from ...cli import training as shared
from ...cli.options import Fields, Run
from . import HPRConfig
from .train import HPRTrainer, HPRTrainingArguments


ADAPTER_FIELDS = shared.adapter_fields(HPRConfig, "num_angle_layers", "angle_hidden_size")
TRAINING_FIELDS = shared.training_fields(HPRTrainingArguments, Literal["probe_accuracy", "loss"])
EDIT_FIELDS = Fields(
    *("gate", "alpha", "rotation", "token_scope"),
    of=HPRConfig,
    # By default what the adapter has.
    changes={name: {"default": None} for name in ("gate", "alpha", "rotation", "token_scope")},
)


def train_hpr(
    model: common.ModelOptions,
    training: shared.Training,
    adapter: Annotated[dict[str, Any], ADAPTER_FIELDS],
    options: Annotated[dict[str, Any], TRAINING_FIELDS],
    output: common.Output,
    run: Run,
) -> None:
    """Train the probes and angle networks of an HPR adapter on a store. The weights of the base model are not loaded.

    Example: peft-edit train-hpr meta-llama/Llama-2-7b-hf train-store hpr-all --eval-store eval-store
    """
    if shared.train_adapter(training, model, adapter, options, run, output, HPRTrainer, _shown):
        print("Every layer edits until you select some: peft-edit select")


def _shown(trainer: HPRTrainer, results: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """What to print of a training."""
    columns, lines = {}, []
    if "eval_angle_error" in results:
        names = [f"eval_probe_accuracy_layer_{index}" for index in trainer.layers]
        columns["probe accuracy"] = [f"{results[name]:.4f}" for name in names]
        lines.append(f"Angle error of negative tokens: {results['eval_angle_error']:.4f} radians")
    if touched := [entry["retain_touched"] for entry in results["history"] if "retain_touched" in entry]:
        lines.append(f"Share of the retained tokens that are rotated: {touched[-1]:.4f}")
    return columns, lines


def select(
    model: common.ModelOptions,
    adapter: Annotated[
        str, {"help": "Trained HPR adapter: local folder, or on the Hub user/name@revision.", "positional": True}
    ],
    store: shared.Store,
    out: common.Out,
    edit: Annotated[dict[str, Any], EDIT_FIELDS],
    output: common.Output,
    run: Run,
    top_k: Annotated[int | None, {"help": "Keep so many layers; the paper keeps 5."}] = None,
    threshold: Annotated[float | None, {"help": "Keep layers with at least this accuracy, in [0, 1]."}] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Keep the layers of an HPR adapter with the most accurate probes, and set how they edit.

    The store is of questions that the adapter was not trained on. The weights of the base model are not loaded.

    Example: peft-edit select meta-llama/Llama-2-7b-hf hpr-all eval-store hpr-truthful --top-k 5 --gate 0.1
    """
    from ...adapters.save import check_adapter_folder, save_adapter
    from . import select as selection
    from .config import HPRConfig

    changes = {name: value for name, value in edit.items() if value is not None}
    HPRConfig(**changes)  # checks them
    check_adapter_folder(out, "HPR")
    if Path(adapter).exists() and out.exists() and out.samefile(adapter):
        raise ValueError(f"{out} is the adapter to select from, and would lose its other layers: choose another folder")
    adapted = common.load_adapter(
        common.load_structure(model), adapter, allow_fingerprint_mismatch, edit_only="selected"
    )
    result = selection.select_layers(
        adapted,
        store,
        top_k=top_k,
        threshold=threshold,
        prune=True,
        allow_fingerprint_mismatch=allow_fingerprint_mismatch,
    )
    for name, value in changes.items():
        setattr(adapted.peft_config["default"], name, value)
    save_adapter(adapted, out)
    output.write(run.record(result.to_dict()))

    rows = [[str(i), f"{value:.4f}", "yes" if i in result.selected else ""] for i, value in result.accuracy.items()]
    print(common.table(["layer", "probe accuracy", "edits"], rows))
    print(f"Adapter of {len(result.selected)} layers, {common.size_of(out)}: {out}")


COMMANDS = [train_hpr, select]
