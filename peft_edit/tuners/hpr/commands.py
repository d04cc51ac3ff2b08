"""Commands of HPR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import TaskType

from ...arguments import Argument, ArgumentError
from ...cli import common
from ...cli.options import Fields, Run
from ...files import resolved
from . import HPRConfig
from .train import HPRTrainingArguments


# Settings and results of a training, beside its adapter.
RECORD = "train_hpr.json"
# Options that change nothing about what is trained, or not as long as the settings are the same.
NO_SETTINGS = ("out", "cpu", "resume", "allow_fingerprint_mismatch", "json")
# Of Transformers' optimizers and schedules those that need no other package and no further arguments.
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd"]
Scheduler = Literal[
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt")
]

AT_LEAST_0 = {"minimum": 0, "allowed": "of 0 or more and finite"}
AT_LEAST_1 = {"minimum": 1, "allowed": "of at least 1"}

Store = Annotated[Path, {"help": "Store that collect --site block --tokens answer wrote.", "positional": True}]
ADAPTER_FIELDS = Fields(
    *("layers_to_transform", "target_modules", "num_angle_layers", "angle_hidden_size"),
    of=HPRConfig,
    changes={
        "layers_to_transform": common.LAYERS,
        "target_modules": common.MODULES,
    },
)
TRAINING_FIELDS = Fields(
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "optim", "weight_decay", "max_grad_norm", "metric_for_best_model", "bf16", "use_cpu", "seed"),
    "retain_weight",
    of=HPRTrainingArguments,
    changes={
        "num_train_epochs": {"option": "--epochs", "above": 0, "allowed": "above 0 and finite"},
        "max_steps": {"default": None, "help": "So many steps instead of epochs.", **AT_LEAST_1},
        "per_device_train_batch_size": {"option": "--batch-size", **AT_LEAST_1},
        "learning_rate": AT_LEAST_0,
        "lr_scheduler_type": {"type": Scheduler, "option": "--scheduler"},
        "warmup_steps": {"option": "--warmup", **AT_LEAST_0},
        "optim": {"type": Optimizer, "default": "adamw_torch_fused", "option": "--optimizer", "help": "Optimizer."},
        "weight_decay": {"help": "Weight decay.", **AT_LEAST_0},
        "max_grad_norm": AT_LEAST_0,
        "metric_for_best_model": {
            "type": Literal["probe_accuracy", "loss"],
            "option": "--best-by",
            "help": "Which epoch is kept.",
        },
        "bf16": {"type": bool, "default": False, "help": "Mixed precision."},
        "use_cpu": {"option": "--cpu", "help": "Train on the CPU even where there is a GPU."},
        "seed": {"help": "Of the initial weights and the order of the pairs."},
    },
)
EDIT_FIELDS = Fields(
    *("gate", "alpha", "rotation", "token_scope"),
    of=HPRConfig,
    # By default what the adapter has.
    changes={name: {"default": None} for name in ("gate", "alpha", "rotation", "token_scope")},
)


def train_hpr(
    model: common.ModelOptions,
    store: Store,
    out: common.Out,
    adapter: Annotated[dict[str, Any], ADAPTER_FIELDS],
    training: Annotated[dict[str, Any], TRAINING_FIELDS],
    output: common.Output,
    run: Run,
    eval_store: Annotated[Path | None, {"help": "Store of held-out questions."}] = None,
    retain: common.Retain = None,
    patience: Annotated[int | None, {"help": "Stop after so many epochs that are no better.", **AT_LEAST_1}] = None,
    resume: Annotated[bool, {"help": "Go on with a training that was interrupted, or begin again."}] = True,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Train the probes and angle networks of an HPR adapter on a store. The weights of the base model are not loaded.

    Example: peft-edit train-hpr meta-llama/Llama-2-7b-hf train-store hpr-all --eval-store eval-store
    """
    from peft import get_peft_model
    from transformers import EarlyStoppingCallback, set_seed

    from ...activations.store import open_pairs
    from ...adapters.save import check_adapter_folder, save_adapter
    from . import resuming
    from .train import HPRTrainer

    check_adapter_folder(out, "HPR", resuming.UNFINISHED)
    resuming.check_checkpoints(out)
    if patience is not None and eval_store is None:
        needs = (Argument("patience"), " needs ", Argument("eval_store"))
        raise ArgumentError(*needs, ": without an evaluation nothing can get better")
    opened = open_pairs(store)
    opened_eval = None if eval_store is None else open_pairs(eval_store)
    arguments = _training_arguments(training, out, opened_eval is not None)
    set_seed(arguments.seed)
    adapted = get_peft_model(common.load_structure(model), _config(adapter, opened.layers))
    trainer = HPRTrainer(
        adapted,
        arguments,
        train_dataset=opened,
        eval_dataset=opened_eval,
        retain_dataset=retain,
        allow_fingerprint_mismatch=allow_fingerprint_mismatch,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )
    settings = _settings(run, trainer.train_dataset)
    with arguments.main_process_first():
        checkpoint = resuming.last_checkpoint(out, settings, resume)
        if arguments.should_save:
            resuming.begin(out, settings)
    _train(trainer, out, checkpoint)
    results = {**settings, "steps": trainer.state.global_step, "history": trainer.state.log_history}
    if opened_eval is not None:
        results |= trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    results = run.record(results)
    save_adapter(adapted, out, {RECORD: json.dumps(results, indent=2) + "\n"}, resuming.UNFINISHED)
    resuming.end(out)
    output.write(results)
    _print(trainer, results, len(opened), out)


def _config(options: dict[str, Any], of_store: list[int]) -> HPRConfig:
    layers = options["layers_to_transform"]
    taken = {"layers_to_transform": of_store if layers is None else layers}
    return HPRConfig(task_type=TaskType.CAUSAL_LM, **{**options, **taken})


def _settings(run: Run, pairs) -> dict[str, Any]:
    """All that a training follows from."""
    settings = {name: value for name, value in run.options.items() if name not in NO_SETTINGS}
    # A store that was collected again in the same place has other data.
    data = {"data_fingerprint": pairs.store.metadata.get("data_fingerprint")}
    if pairs.retain is not None:
        data["retain_fingerprint"] = pairs.retain.metadata.get("data_fingerprint")
    return {**settings, **data}


def _training_arguments(options: dict[str, Any], out: Path, evaluated: bool) -> HPRTrainingArguments:
    steps = options.pop("max_steps")
    return HPRTrainingArguments(
        # Absolute, as it stands in the checkpoints: a training may go on from another working directory.
        output_dir=str(resolved(out)),
        max_steps=-1 if steps is None else steps,
        eval_strategy="epoch" if evaluated else "no",
        restore_callback_states_from_checkpoint=True,  # how long the patience has lasted
        **options,
    )


def _train(trainer, out: Path, checkpoint: str | None) -> None:
    """Train, from a checkpoint where there is one, with progress on standard error."""
    from transformers.trainer_callback import ProgressCallback

    from .progress import Progress

    trainer.remove_callback(ProgressCallback)
    progress = Progress()
    trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        progress.close()
        print("peft-edit: interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
        raise
    except RuntimeError as error:
        if "iostream" in str(error) or "PytorchStreamWriter" in str(error):  # what torch makes of a full disk
            raise ValueError(f"a checkpoint cannot be written to {out} ({error}): is the disk full?") from error
        raise
    finally:
        progress.close()


def _print(trainer, results: dict[str, Any], pairs: int, out: Path) -> None:
    """Print what a training came to."""
    if "eval_angle_error" in results:
        names = [f"eval_probe_accuracy_layer_{index}" for index in trainer.layers]
        rows = [[str(i), f"{results[name]:.4f}"] for i, name in zip(trainer.layers, names, strict=True)]
        print(common.table(["layer", "probe accuracy"], rows))
        print(f"Angle error of negative tokens: {results['eval_angle_error']:.4f} radians")
    if touched := [entry["retain_touched"] for entry in results["history"] if "retain_touched" in entry]:
        print(f"Share of the retained tokens that are rotated: {touched[-1]:.4f}")
    print(
        f"Adapter, {results['steps']} steps on {pairs} token pairs, {len(trainer.layers)} layers, "
        f"{common.size_of(out)}: {out}"
    )
    print("Every layer edits until you select some: peft-edit select")


def select(
    model: common.ModelOptions,
    adapter: Annotated[
        str, {"help": "Trained HPR adapter: local folder, or on the Hub user/name@revision.", "positional": True}
    ],
    store: Store,
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
