"""What the commands share that train an adapter on a store of token pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..arguments import Argument, ArgumentError
from ..files import resolved
from . import common
from .options import Fields, Run


if TYPE_CHECKING:
    from ..training.arguments import EditTrainingArguments
    from ..training.trainer import EditTrainer
    from ..tuners.config import EditConfig

# Options that change nothing about what is trained, or not as long as the settings are the same.
NO_SETTINGS = ("out", "cpu", "resume", "allow_fingerprint_mismatch", "json")
# Of Transformers' optimizers and schedules those that need no other package and no further arguments.
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd"]
Scheduler = Literal[
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt")
]

AT_LEAST_0 = {"minimum": 0, "allowed": "of 0 or more and finite"}
AT_LEAST_1 = {"minimum": 1, "allowed": "of at least 1"}

STORE = {"help": "Store that collect --site block --tokens answer wrote.", "positional": True}
Store = Annotated[Path, STORE]


def adapter_fields(config: type[EditConfig], *names: str) -> Fields:
    """Options of an adapter that is trained: where it edits, and further fields of its configuration."""
    return Fields(
        *("layers_to_transform", "target_modules", *names),
        of=config,
        changes={"layers_to_transform": common.LAYERS, "target_modules": common.MODULES},
    )


def training_fields(arguments: type[EditTrainingArguments], best_by: Any) -> Fields:
    """Options of a training.

    Args:
        arguments: of the method.
        best_by: `Literal` of the metrics by which the best epoch may be chosen.
    """
    return Fields(
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type"),
        *("warmup_steps", "optim", "weight_decay", "max_grad_norm", "metric_for_best_model", "bf16", "use_cpu", "seed"),
        "retain_weight",
        of=arguments,
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
            "metric_for_best_model": {"type": best_by, "option": "--best-by", "help": "Which epoch is kept."},
            "bf16": {"type": bool, "default": False, "help": "Mixed precision."},
            "use_cpu": {"option": "--cpu", "help": "Train on the CPU even where there is a GPU."},
            "seed": {"help": "Of the initial weights and the order of the pairs."},
        },
    )


@dataclass(kw_only=True)
class Training:
    """What every training takes and makes."""

    store: Path = field(metadata=STORE)
    out: Path = field(metadata=common.OUT)
    eval_store: Path | None = field(default=None, metadata={"help": "Store of held-out questions."})
    retain: Path | None = field(default=None, metadata=common.RETAIN)
    patience: int | None = field(
        default=None, metadata={"help": "Stop after so many epochs that are no better.", **AT_LEAST_1}
    )
    resume: bool = field(default=True, metadata={"help": "Go on with a training that was interrupted, or begin again."})
    allow_fingerprint_mismatch: bool = field(default=False, metadata=common.MISMATCH)


def train_adapter(
    training: Training,
    model: common.ModelOptions,
    adapter: dict[str, Any],
    options: dict[str, Any],
    run: Run,
    output: common.Output,
    trainer_class: type[EditTrainer],
    shown: Callable[[EditTrainer, dict[str, Any]], tuple[dict[str, list[str]], list[str]]],
) -> bool:
    """Train an adapter, save it with a record of the training beside it, and print what it came to.

    Args:
        training: what it takes and makes.
        model: the base model.
        adapter: fields of the adapter's configuration.
        options: of the training.
        run: the command.
        output: where results go.
        trainer_class: of the method.
        shown: what to print of the trainer and the results: columns of a table of the layers, by their titles, and
            lines below it.

    Returns:
        Whether this is the process that printed it.
    """
    from peft import TaskType, get_peft_model
    from transformers import EarlyStoppingCallback, set_seed

    from ..activations.store import open_pairs
    from ..adapters.changes import warn_of_change
    from ..adapters.save import check_adapter_folder, save_adapter
    from ..training.changes import changes_of
    from ..training.resuming import Interrupted

    out, config_class, interrupted = training.out, trainer_class.config_class, Interrupted(training.out, run.command)
    check_adapter_folder(out, config_class.method, interrupted.name)
    interrupted.check_checkpoints()
    if training.patience is not None and training.eval_store is None:
        needs = (Argument("patience"), " needs ", Argument("eval_store"))
        raise ArgumentError(*needs, ": without an evaluation nothing can get better")
    if training.retain is None and options["retain_weight"] != trainer_class.arguments_class.retain_weight:
        raise ArgumentError(Argument("retain_weight"), " needs ", Argument("retain"), ": pass a store of texts too")
    opened = open_pairs(training.store)
    opened_eval = None if training.eval_store is None else open_pairs(training.eval_store)
    arguments = _arguments(trainer_class.arguments_class, options, out, opened_eval is not None)
    set_seed(arguments.seed)
    layers = adapter["layers_to_transform"]
    taken = {"layers_to_transform": opened.layers if layers is None else layers}
    config = config_class(task_type=TaskType.CAUSAL_LM, **{**adapter, **taken})
    adapted = get_peft_model(common.load_structure(model), config)
    trainer = trainer_class(
        adapted,
        arguments,
        train_dataset=opened,
        eval_dataset=opened_eval,
        retain_dataset=training.retain,
        allow_fingerprint_mismatch=training.allow_fingerprint_mismatch,
        callbacks=None if training.patience is None else [EarlyStoppingCallback(training.patience)],
    )
    settings = _settings(run, trainer.train_dataset)
    with arguments.main_process_first():
        checkpoint = interrupted.last_checkpoint(settings, training.resume)
        if arguments.should_save:
            interrupted.begin(settings)
    _train(trainer, out, checkpoint)
    results = {**settings, "steps": trainer.state.global_step, "history": trainer.state.log_history}
    if opened_eval is not None:
        results |= trainer.evaluate()
    if not trainer.is_world_process_zero():
        return False
    changes, rows = changes_of(trainer)
    results |= {"change": {str(layer): change for layer, change in changes.items()}, "change_of": rows}
    results = run.record(results)
    record = f"{run.command.replace('-', '_')}.json"
    save_adapter(adapted, out, {record: json.dumps(results, indent=2) + "\n"}, interrupted.name)
    interrupted.end()
    output.write(results)
    columns, lines = shown(trainer, results)
    columns = {"layer": list(map(str, changes)), **columns, "change": [f"{change:.3f}" for change in changes.values()]}
    print(common.table(list(columns), list(map(list, zip(*columns.values(), strict=True)))))
    print("\n".join([f"change: relative change of {rows}", *lines]))
    with common.told_warnings(run):
        warn_of_change(changes, rows)
    print(
        f"Adapter, {results['steps']} steps on {len(opened)} token pairs, {len(trainer.layers)} layers, "
        f"{common.size_of(out)}: {out}"
    )
    return True


def _settings(run: Run, pairs) -> dict[str, Any]:
    """All that a training follows from."""
    settings = {name: value for name, value in run.options.items() if name not in NO_SETTINGS}
    # A store that was collected again in the same place has other data.
    data = {"data_fingerprint": pairs.store.metadata.get("data_fingerprint")}
    if pairs.retain is not None:
        data["retain_fingerprint"] = pairs.retain.metadata.get("data_fingerprint")
    return {**settings, **data}


def _arguments(
    kind: type[EditTrainingArguments], options: dict[str, Any], out: Path, evaluated: bool
) -> EditTrainingArguments:
    steps = options.pop("max_steps")
    return kind(
        # Absolute, as it stands in the checkpoints: a training may go on from another working directory.
        output_dir=str(resolved(out)),
        max_steps=-1 if steps is None else steps,
        eval_strategy="epoch" if evaluated else "no",
        restore_callback_states_from_checkpoint=True,  # how long the patience has lasted
        **options,
    )


def _train(trainer: EditTrainer, out: Path, checkpoint: str | None) -> None:
    """Train, from a checkpoint where there is one, with progress on standard error."""
    from transformers.trainer_callback import ProgressCallback

    from ..training.progress import Progress

    trainer.remove_callback(ProgressCallback)
    progress = Progress(trainer.score)
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
