"""Activation stores -> trained adapter: a `transformers.Trainer` whose data are activations and whose model is the
adapter alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..activations.store import Store, open_pairs, open_store
from ..adapters.match import check_retain, check_store, describe_data, describe_retained, find_adapter, replace_config
from ..adapters.save import replaced_adapters
from ..arguments import Argument, ArgumentError
from ..models.sites import without_wrappers
from ..tuners.config import EditConfig
from ..tuners.layer import EditLayer
from .arguments import EditTrainingArguments
from .checkpoint import load_checkpoint
from .pairs import TokenPairs
from .stacked import StackedModules
from .watching import WatchedLosses


class EditTrainer(Trainer, ABC):
    """
    Trains the modules of an adapter on stored activations. It is a `transformers.Trainer`: callbacks, checkpoints,
    schedules, optimizers, mixed precision and several processes work as everywhere.

    The language model takes no part: it may be on the meta device, and only the adapter is moved to `args.device`. All
    decoder blocks train together in stacked weights, each by its own loss and with its gradient clipped by itself, so
    that a block's training does not depend on which others are trained (with optimizers that treat each weight by
    itself: AdamW, SGD, ...; Adafactor takes statistics of whole tensors). `train` ends with the weights in the adapter.

    A method's trainer says what it trains in class attributes, and has `losses` and `measures`.

    Args:
        model: a `PeftModel` with an adapter of the method, or a Transformers model after `add_adapter`.
        args: of the method's class.
        train_dataset: store of `collect_activations(..., site="block", tokens="answer")`, or its folder.
        eval_dataset: a store of other questions; also a dictionary of stores.
        retain_dataset: store of texts to leave alone, `collect_activations(..., site="block", tokens="all")`, or its
            folder.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: train although a store says that it was collected from another model.
        kwargs: further arguments of `transformers.Trainer`, such as `callbacks` and `optimizers`; not `data_collator`
            and `compute_metrics`, which are its own.

    Attributes:
        config_class, layer_class, arguments_class, stacked_class: of the method.
        trained: what is trained, in words.
        score: name of the measure that progress shows beside the loss.
        per_layer: names of those measures that are logged for each block too.

    Raises:
        TypeError: `args` are of another class.
        ValueError: a store does not fit the adapter (model, site, layers, hidden size, tokens), the evaluation data are
            missing, the adapter is of another method or has other modules to train, or an option has no meaning here,
            such as `gradient_checkpointing`, `label_smoothing_factor`, DeepSpeed and FSDP.
    """

    config_class: ClassVar[type[EditConfig]]
    layer_class: ClassVar[type[EditLayer]]
    arguments_class: ClassVar[type[EditTrainingArguments]]
    stacked_class: ClassVar[type[StackedModules]]
    trained: ClassVar[str]
    score: ClassVar[str]
    per_layer: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def losses(self, outputs: tuple[Tensor, ...], retain_weight: float = 1.0) -> Any:
        """The loss of what the stacked modules return: an object whose `total` is that of each block, (blocks,)."""

    @abstractmethod
    def measures(self, losses: Any, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What is logged besides the loss, by name, of each block, (blocks,)."""

    def trains(self, layer: int) -> bool:
        """Whether the block with this index is trained, of those that have modules of the adapter."""
        return True

    def __init__(
        self,
        model: nn.Module,
        args: EditTrainingArguments | None = None,
        *,
        train_dataset: Store | None = None,
        eval_dataset: Store | dict[str, Store] | None = None,
        retain_dataset: Store | None = None,
        adapter_name: str | None = None,
        allow_fingerprint_mismatch: bool = False,
        **kwargs: Any,
    ):
        kind = self.arguments_class
        args = kind(f"{self.config_class.method.lower()}_trainer") if args is None else args
        if not isinstance(args, kind):
            raise TypeError(f"args must be {kind.__name__}, got {type(args).__name__}: its defaults do not suit")
        if eval_dataset is None and args.eval_strategy != "no":
            raise ArgumentError(
                *(Argument("eval_strategy"), f" is {args.eval_strategy.value!r} and there is no "),
                *(Argument("eval_dataset"), f": pass a store of held-out questions, or {kind.__name__}("),
                *(Argument("eval_strategy", "no"), ")"),
            )
        if own := {"data_collator", "compute_metrics"} & set(kwargs):
            raise TypeError(f"{type(self).__name__} has a {min(own)} of its own: leave it out")
        args.check_suited()
        self.adapted_model = without_wrappers(model)
        self.adapter_name, _, layers = find_adapter(model, adapter_name, self.config_class, self.layer_class)
        self.layers = {index: layer for index, layer in layers.items() if self.trains(index)}
        self._check_adapter()
        self.allow_fingerprint_mismatch = allow_fingerprint_mismatch
        self._begin()
        train_pairs, eval_pairs = self._dataset(train_dataset), self._dataset(eval_dataset)
        if retain_dataset is not None:
            train_pairs = self._with_retain(train_pairs, retain_dataset, args.seed)
        if isinstance(eval_pairs, dict) and args.load_best_model_at_end:
            _check_best_metric(args.metric_for_best_model, list(eval_pairs), kind.metric_for_best_model)
        for layer in self.layers.values():
            # Checkpoints hold the adapter's own weights: rounded to half precision, they could not be resumed from.
            for module in self._modules_of(layer):
                module.float()
        super().__init__(
            model=self._stacked(),
            args=args,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            data_collator=_unchanged,
            compute_metrics=self._evaluation_metrics,
            **kwargs,
        )

    @property
    def adapter_config(self) -> EditConfig:
        """The adapter's configuration as it is now: a selection replaces it."""
        return self.adapted_model.peft_config[self.adapter_name]

    def _stacked(self) -> StackedModules:
        return self.stacked_class(list(self.layers.values()), self.adapter_name)

    def _modules_of(self, layer: EditLayer) -> list[nn.Module]:
        return [getattr(layer, part)[self.adapter_name] for part in layer.adapter_layer_names]

    def _check_adapter(self) -> None:
        if self.adapter_config.modules_to_save:
            raise ArgumentError(
                f"{type(self).__name__} trains {self.trained} alone, and the adapter has ",
                Argument("modules_to_save", self.adapter_config.modules_to_save),
                ": train those with a Trainer of the language model",
            )
        if pruned := [i for i, layer in self.layers.items() if not layer.has_adapter(self.adapter_name)]:
            raise ValueError(
                f"layers {pruned} were pruned since this trainer was made: make a new {type(self).__name__}"
            )
        modules = (module for layer in self.layers.values() for module in self._modules_of(layer))
        if any(weight.is_meta for module in modules for weight in module.parameters()):
            raise ValueError(
                "the weights of the adapter are on the meta device: add it outside torch.device('meta') and without "
                "low_cpu_mem_usage; the base model may stay there"
            )

    def _dataset(self, store):
        """Token pairs of a store or of each of a dictionary of them; the name of one of these is kept."""
        if isinstance(store, dict):
            return {name: self._dataset(value) for name, value in store.items()}
        several = getattr(self, "eval_dataset", None)
        if store is None or isinstance(store, TokenPairs) or (isinstance(several, dict) and store in several):
            return store
        store = open_pairs(store)
        store = check_store(self.adapted_model, store, "block", self.layers, self.allow_fingerprint_mismatch)
        return TokenPairs(store, self.layers)

    def _with_retain(self, pairs: TokenPairs | None, store: Store, seed: int) -> TokenPairs:
        if pairs is None:
            raise ArgumentError(Argument("retain_dataset"), " needs a ", Argument("train_dataset"))
        store = check_retain(
            self.adapted_model, open_store(store), "block", self.layers, self.allow_fingerprint_mismatch
        )
        return TokenPairs(pairs.store, self.layers, store, seed)

    def _begin(self) -> None:
        # Since the last log: sums of loss terms and scores over micro-batches, (terms, blocks), and their number.
        self._sums: Tensor | float = 0.0
        self._summed = 0
        # Whether of the training, to its losses.
        self._watched = {True: WatchedLosses("training"), False: WatchedLosses("evaluation")}

    def train(self, *args, **kwargs):
        self._check_adapter()
        self._begin()
        result = super().train(*args, **kwargs)
        self._copy_to_adapter()
        return result

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        return super().evaluate(self._dataset(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        return super().predict(self._dataset(test_dataset), *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        losses = self.losses(outputs, self.args.retain_weight)
        self._watched[model.training].add(losses.total, self.state.global_step)
        if model.training:
            measured = self.measures(losses, outputs)
            self._measured = list(measured)
            self._sums = self._sums + torch.stack(tuple(measured.values())).detach()
            self._summed += 1
        # The value is the mean over the blocks, the gradient that of the sum: each block's is that of its own loss.
        total = losses.total.sum()
        total = total - (total - losses.total.mean()).detach()
        return (total, outputs) if return_outputs else total

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            value, outputs = self.compute_loss(model, self._prepare_inputs(inputs), True)
        # No loss here: Trainer averages over batches, and several processes repeat samples to fill the last one.
        *predictions, target = outputs[: self.stacked_class.of_pairs]
        return (value, None, None) if prediction_loss_only else (None, tuple(predictions), target)

    def _check_losses(self) -> None:
        """Raise ValueError where a loss was not finite. What is logged, evaluated or saved has been looked at."""
        for losses in self._watched.values():
            losses.check(self.layers)

    def evaluation_loop(self, *args, **kwargs):
        self._check_losses()
        output = super().evaluation_loop(*args, **kwargs)
        self._check_losses()
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        self._check_losses()
        if "loss" in logs and self._summed:
            means = self.accelerator.reduce(self._sums / self._summed, reduction="mean")
            logs = {**logs, **self._named(dict(zip(self._measured, means.cpu(), strict=True)))}
            self._sums, self._summed = 0.0, 0
        super().log(logs, *args, **kwargs)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        outputs = tuple(torch.from_numpy(array) for array in (*prediction.predictions, prediction.label_ids))
        losses = self.losses(outputs)
        return {"loss": float(losses.total.mean()), **self._named(self.measures(losses, outputs))}

    def _named(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """Names for logging of values of each block, (blocks,)."""
        return {
            **{name: float(values.mean()) for name, values in measured.items()},
            **{
                f"{name}_layer_{index}": value
                for name in self.per_layer
                for index, value in zip(self.layers, measured[name].tolist(), strict=True)
            },
        }

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient of each block by itself; returns the norm of the largest, before."""
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # (blocks,)
        factor = (self.args.max_grad_norm / (norms + 1e-6)).clamp_max(1)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        return norms.max()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds the adapter as `save_pretrained` writes it, which PEFT loads."""
        if self.args.should_save:
            output_dir = self.args.output_dir if output_dir is None else output_dir
            self._copy_to_adapter()
            self._save_adapter(Path(output_dir))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _save_adapter(self, folder: Path) -> None:
        name = self.adapter_name
        if isinstance(self.adapted_model, PeftModel):
            self.adapted_model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
            return
        # A Transformers model saves its active adapter, and making this one active would unfreeze others.
        tensors = get_peft_model_state_dict(self.adapted_model, adapter_name=name, save_embedding_layers=False)
        tensors = {f"base_model.model.{key}": tensor.contiguous().cpu() for key, tensor in tensors.items()}
        with replaced_adapters(folder) as work:
            save_file(tensors, work / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            self.adapter_config.save_pretrained(work)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the adapter's README.md, which `save_pretrained` has written by then, is the card."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model_of_store = None
        if self.train_dataset is not None and not self.allow_fingerprint_mismatch:
            model_of_store = self.train_dataset.store.metadata["fingerprint"]
        path = Path(resume_from_checkpoint)
        load_checkpoint(type(self).__name__, path, self.adapter_name, self.adapter_config, self.layers, model_of_store)
        (self.model if model is None else model).load_state_dict(self._stacked().state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _copy_to_adapter(self) -> None:
        self._check_losses()
        kept = [layer if layer.has_adapter(self.adapter_name) else None for layer in self.layers.values()]
        self.accelerator.unwrap_model(self.model).copy_to(kept, self.adapter_name)
        if self.train_dataset is not None:
            store = self.train_dataset.store
            replace_config(
                self.adapted_model,
                self.adapter_name,
                base_model_fingerprint=store.metadata["fingerprint"],
                fitted_on={**describe_data(store), "token_pairs": len(store), **self._retained()},
            )

    def _retained(self) -> dict[str, Any]:
        retain = self.train_dataset.retain
        if retain is None:
            return {}
        return {"retain": {**describe_retained(retain), "weight": self.args.retain_weight}}


def _check_best_metric(metric: str, stores: list[str], usual: str) -> None:
    """Raise ValueError unless a metric is one of several evaluation stores. `usual` is that of a single one."""
    metric = metric.removeprefix("eval_")
    if not metric.startswith(tuple(f"{name}_" for name in stores)):
        decides = Argument("metric_for_best_model", f"{stores[0]}_{usual}")
        raise ArgumentError(
            *(Argument("eval_dataset"), f" has several stores ({', '.join(stores)}) and "),
            *(Argument("metric_for_best_model"), f" is {metric!r}: say which of them decides by ", decides),
        )


def _unchanged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
