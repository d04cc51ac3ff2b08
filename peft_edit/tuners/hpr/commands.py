from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any
from zipfile import is_zipfile

import typer
from safetensors import SafetensorError, safe_open

from ...cli import common


# Settings and results of a training, beside its adapter; and settings of one that is not finished.
RECORD, UNFINISHED = "train_hpr.json", "train_hpr.unfinished.json"
# Those of Transformers that need no other package and no further arguments.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd")
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
# Settings that are recorded and are no options.
NO_OPTIONS = ("model", "store", "data_fingerprint")
BEST_BY = ("probe_accuracy", "loss")
Store = Annotated[
    Path, typer.Argument(help="Store that collect --site block --tokens answer wrote.", show_default=False)
]
Out = Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)]


def train_hpr(
    model: common.Model,
    store: Store,
    out: Out,
    eval_store: Annotated[Path | None, typer.Option(help="Store of held-out questions.")] = None,
    layers: common.Layers = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated names of other modules, as given to collect.")
    ] = None,
    num_angle_layers: Annotated[int, typer.Option(help="Linear layers in an angle network.")] = 4,
    angle_hidden_size: Annotated[int | None, typer.Option(help="Width of its hidden layers. Default: halved.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the token pairs.")] = 5.0,
    max_steps: Annotated[int | None, typer.Option(help="So many steps instead of epochs.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Token pairs in a batch, on each device.", min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.", min=0)] = 5e-4,
    scheduler: Annotated[
        str, typer.Option(help="cosine, linear, constant, ... as Transformers names them.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Steps of warm-up; below 1 a share of all steps.", min=0)] = 0.05,
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")] = "adamw_torch_fused",
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", min=0)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Bound for the norm of each block's gradient.", min=0)] = 1.0,
    best_by: Annotated[str, typer.Option(help=f"Which epoch is kept: {', '.join(BEST_BY)}.")] = "probe_accuracy",
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs that are no better.", min=1)] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")] = False,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the pairs.")] = 42,
    resume: Annotated[bool, typer.Option(help="Go on with a training that was interrupted, or begin again.")] = True,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    json_file: common.Json = None,
) -> None:
    """Train the probes and angle networks of an HPR adapter on a store. The weights of the base model are not loaded.

    Example: peft-edit train-hpr meta-llama/Llama-2-7b-hf train-store hpr-all --eval-store eval-store
    """
    from peft import TaskType, get_peft_model
    from transformers import EarlyStoppingCallback, set_seed
    from transformers.trainer_callback import ProgressCallback

    from ...activations.store import open_pairs
    from ...adapters.save import check_adapter_folder, save_adapter
    from ...arguments import check_choice
    from .config import HPRConfig
    from .train import HPRTrainer, HPRTrainingArguments

    settings: dict[str, Any] = {
        **{"model": model, "revision": revision, "store": str(store), "eval_store": eval_store and str(eval_store)},
        **{"layers": layers, "target_modules": target_modules, "num_angle_layers": num_angle_layers},
        **{"angle_hidden_size": angle_hidden_size, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size},
        **{"learning_rate": learning_rate, "scheduler": scheduler, "warmup": warmup, "optimizer": optimizer},
        **{"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "patience": patience, "bf16": bf16},
        **{"seed": seed, "best_by": best_by},
    }
    common.check_json(json_file)
    check_adapter_folder(out, "HPR", UNFINISHED)
    if _checkpoints(out) and not (out / UNFINISHED).exists():
        raise ValueError(f"{out} has checkpoints that train-hpr did not write: choose another folder")
    check_choice("--scheduler", scheduler, SCHEDULERS)
    check_choice("--optimizer", optimizer, OPTIMIZERS)
    check_choice("--best-by", best_by, BEST_BY)
    if not 0 < epochs < float("inf"):
        raise ValueError(f"--epochs must be above 0 and finite, got {epochs}")
    if patience is not None and eval_store is None:
        raise ValueError("--patience needs --eval-store: without an evaluation nothing can get better")
    opened = open_pairs(store)
    opened_eval = None if eval_store is None else open_pairs(eval_store)
    # A store that was collected again in the same place has other data.
    settings["data_fingerprint"] = opened.metadata.get("data_fingerprint")
    config = HPRConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=None if target_modules is None else target_modules.split(","),
        layers_to_transform=opened.layers if layers is None else common.parse_layers(layers),
        num_angle_layers=num_angle_layers,
        angle_hidden_size=angle_hidden_size,
    )
    arguments = HPRTrainingArguments(
        # Absolute, as it stands in the checkpoints: a training may go on from another working directory.
        output_dir=str(out.resolve()),
        num_train_epochs=epochs,
        max_steps=-1 if max_steps is None else max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        optim=optimizer,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        use_cpu=cpu,
        seed=seed,
        eval_strategy="no" if opened_eval is None else "epoch",
        metric_for_best_model=best_by,
        restore_callback_states_from_checkpoint=True,  # how long the patience has lasted
    )
    set_seed(seed)
    adapted = get_peft_model(common.load_structure(model, revision), config)
    trainer = HPRTrainer(
        adapted,
        arguments,
        train_dataset=opened,
        eval_dataset=opened_eval,
        allow_fingerprint_mismatch=allow_fingerprint_mismatch,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )
    with arguments.main_process_first():
        checkpoint = _interrupted_training(out, settings, resume)
        if arguments.should_save:
            common.write_json(out / UNFINISHED, settings)
    trainer.remove_callback(ProgressCallback)
    progress = _progress_callback()
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
    results = {**settings, "steps": trainer.state.global_step, "history": trainer.state.log_history}
    if opened_eval is not None:
        results |= trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    save_adapter(adapted, out, {RECORD: json.dumps(results, indent=2) + "\n"}, UNFINISHED)
    for folder in _checkpoints(out):
        shutil.rmtree(folder)
    (out / UNFINISHED).unlink()  # last: it says whose the checkpoints are
    common.write_json(json_file, results)

    if opened_eval is not None:
        names = [f"eval_probe_accuracy_layer_{index}" for index in trainer.layers]
        rows = [[str(i), f"{results[name]:.4f}"] for i, name in zip(trainer.layers, names, strict=True)]
        print(common.table(["layer", "probe accuracy"], rows))
        print(f"Angle error of negative tokens: {results['eval_angle_error']:.4f} radians")
    size = (out / "adapter_model.safetensors").stat().st_size
    print(
        f"Adapter, {results['steps']} steps on {len(opened)} token pairs, {len(trainer.layers)} layers, "
        f"{size / 1e6:.2f} MB: {out}"
    )
    print("Every layer edits until you select some: peft-edit select")


def select(
    model: common.Model,
    adapter: Annotated[
        str,
        typer.Argument(help="Trained HPR adapter: local folder, or on the Hub user/name@revision.", show_default=False),
    ],
    store: Store,
    out: Out,
    top_k: Annotated[int | None, typer.Option(help="Keep so many layers; the paper keeps 5.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep layers with at least this accuracy, in [0, 1].")] = None,
    gate: Annotated[float | None, typer.Option(help="Rotate where the probability is at most this, in [0, 1].")] = None,
    alpha: Annotated[float | None, typer.Option(help="Factor on the angle.")] = None,
    rotation: Annotated[str | None, typer.Option(help="angle or reflection.")] = None,
    token_scope: Annotated[str | None, typer.Option(help="all or last token of a forward pass.")] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
    revision: common.Revision = None,
    json_file: common.Json = None,
) -> None:
    """Keep the layers of an HPR adapter with the most accurate probes, and set how they edit.

    The store is of questions that the adapter was not trained on. The weights of the base model are not loaded.

    Example: peft-edit select meta-llama/Llama-2-7b-hf hpr-all eval-store hpr-truthful --top-k 5 --gate 0.1
    """
    from ...adapters.save import check_adapter_folder, save_adapter
    from . import select as selection
    from .config import HPRConfig

    given = {"gate": gate, "alpha": alpha, "rotation": rotation, "token_scope": token_scope}
    changes = {name: value for name, value in given.items() if value is not None}
    HPRConfig(**changes)  # checks them
    common.check_json(json_file)
    check_adapter_folder(out, "HPR")
    if Path(adapter).exists() and out.exists() and out.samefile(adapter):
        raise ValueError(f"{out} is the adapter to select from, and would lose its other layers: choose another folder")
    adapted = common.load_adapter(common.load_structure(model, revision), adapter, allow_fingerprint_mismatch)
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
    common.write_json(json_file, result.to_dict())

    rows = [[str(i), f"{value:.4f}", "yes" if i in result.selected else ""] for i, value in result.accuracy.items()]
    print(common.table(["layer", "probe accuracy", "edits"], rows))
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"Adapter of {len(result.selected)} layers, {size / 1e6:.2f} MB: {out}")


def _checkpoints(out: Path) -> list[Path]:
    """Checkpoints of an unfinished training, the last one last."""
    folders = (folder for folder in out.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit())
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def _is_complete(checkpoint: Path) -> bool:
    """Whether a training can go on from it exactly: a run may have been killed while it was written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # What torch writes is a ZIP archive, whose directory stands at its end.
    written = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return isinstance(state, dict) and "global_step" in state and len(written) > 2 and all(map(is_zipfile, written))


def _interrupted_training(out: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """The checkpoint to go on from, or None. Without `resume` all checkpoints are deleted."""
    complete = [folder for folder in _checkpoints(out) if _is_complete(folder)]
    if not resume or not complete:
        for folder in _checkpoints(out):
            shutil.rmtree(folder)
        return None
    try:
        before = dict(json.loads((out / UNFINISHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{out} has checkpoints and no readable {UNFINISHED} ({error}): pass resume=False to begin again"
        ) from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        options = {name: f"--{name.replace('_', '-')}" for name in changed if name not in NO_OPTIONS}
        what = "; ".join(
            f"{options.get(name, name)} is {before.get(name)!r} there, {settings[name]!r} here" for name in changed[:3]
        )
        raise ValueError(
            f"{out} holds a training that was interrupted, with other arguments ({what}): choose another folder, or "
            "pass resume=False to begin again"
        )
    return str(complete[-1])


def _progress_callback():
    """Transformers' progress bars, which show the loss and the accuracy instead of printing every log to standard
    output, where the results go."""
    from transformers.trainer_callback import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            shown = {name: logs[name] for name in ("loss", "probe_accuracy") if name in logs}
            if state.is_world_process_zero and self.training_bar is not None and shown:
                self.training_bar.set_postfix(shown)

        def close(self) -> None:
            """Close the bars that an error has left open, so that its message gets a line of its own."""
            for bar in (self.prediction_bar, self.training_bar):
                if bar is not None:
                    bar.close()

    return Progress()
