"""Commands of Diff."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ...cli import common
from ...cli import training as shared
from ...cli.options import Run
from .arguments import DiffTrainingArguments
from .config import DiffConfig
from .train import DiffTrainer


ADAPTER_FIELDS = shared.adapter_fields(DiffConfig, "num_layers", "hidden_size", "strength", "token_scope")
TRAINING_FIELDS = shared.training_fields(DiffTrainingArguments, Literal["loss", "relative_error"])


def train_diff(
    model: common.ModelOptions,
    training: shared.Training,
    adapter: Annotated[dict[str, Any], ADAPTER_FIELDS],
    options: Annotated[dict[str, Any], TRAINING_FIELDS],
    output: common.Output,
    run: Run,
) -> None:
    """Train the networks of a Diff adapter on a store. The weights of the base model are not loaded.

    Example: peft-edit train-diff meta-llama/Llama-2-7b-hf train-store diff --layers 12-16 --eval-store eval-store
    """
    shared.train_adapter(training, model, adapter, options, run, output, DiffTrainer, _shown)


def _shown(trainer: DiffTrainer, results: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """What to print of a training."""
    if "eval_relative_error" not in results:
        return {}, []
    names = [f"eval_relative_error_layer_{index}" for index in trainer.layers]
    return {"error, as a share of the difference": [f"{results[name]:.4f}" for name in names]}, []


COMMANDS = [train_diff]
