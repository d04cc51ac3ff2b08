"""Activation stores -> trained HPR adapter: a `transformers.Trainer` whose data are activations and whose model is the
adapter alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ...activations.store import ActivationStore, Store, open_pairs, open_store
from ...adapters.match import check_retain, check_store, describe_data, describe_retained, find_adapter, replace_config
from ...adapters.save import replaced_adapters
from ...arguments import Argument, ArgumentError
from ...models.sites import without_wrappers
from .arguments import HPRTrainingArguments
from .checkpoint import load_checkpoint
from .config import HPRConfig
from .layer import HPRLayer
from .maths import Loss, loss
from .stacked import StackedHPR


class TokenPairs(Dataset):
    """The token pairs of a store, whole batches at a time: slices of memory-mapped tensors.

    Args:
        store: with `tokens="answer"`.
        layers: indices of the decoder blocks to read.
        retain: with `tokens="all"`: texts to leave alone, of which a batch has as many tokens as pairs; None for none.
        seed: of their choice.
    """

    def __init__(
        self, store: ActivationStore, layers: Iterable[int], retain: ActivationStore | None = None, seed: int = 0
    ):
        self.store, self.layers = store, list(layers)
        self.pairs = store.pairs()
        self.retain, self.seed = retain, seed
        self.retained_rows = None if retain is None else retain.text_tokens()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Batch of B pairs: "activations", (B, layers, 2, d), the positive one of each pair first; "retained", (B,
        layers, d), where there are texts to leave alone."""
        pairs = self.pairs[torch.as_tensor(indices)]  # (B, 2): negative, positive
        activations = self.store.gather(pairs.flip(1).T.flatten(), self.layers)  # (layers, 2 B, d)
        batch = {"activations": activations.unflatten(1, (2, len(pairs))).permute(2, 0, 1, 3)}
        if self.retain is not None:
            rows = self._drawn(indices)
            batch["retained"] = self.retain.gather(rows, self.layers).transpose(0, 1)
        return batch

    def _drawn(self, indices: list[int]) -> Tensor:
        """Rows to leave alone, drawn by which pairs are beside them: the same after a resumption, and in every worker,
        and others in every epoch."""
        digest = hashlib.blake2b(f"{self.seed} {list(map(int, indices))}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return self.retained_rows[torch.randint(len(self.retained_rows), (len(indices),), generator=generator)]


class HPRTrainer(Trainer):
    """
    Trains the probes and angle networks of an HPR adapter on stored activations. It is a `transformers.Trainer`:
    callbacks, checkpoints, schedules, optimizers, mixed precision and several processes work as everywhere.

    The language model takes no part: it may be on the meta device, and only the adapter is moved to `args.device`. All
    decoder blocks train together in stacked weights, each by its own loss and with its gradient clipped by itself, so
    that a block's training does not depend on which others are trained (with optimizers that treat each weight by
    itself: AdamW, SGD, ...; Adafactor takes statistics of whole tensors). `train` ends with the weights in the adapter.

    Logged besides the loss (HPR, equations 8 to 10), which is the mean over the blocks: `probe_loss`, `angle_loss`,
    `angle_error` (mean |predicted - true| angle of negative tokens, radians) and `probe_accuracy`, the share in [0, 1]
    of right decisions over both tokens of all pairs, on average and for each block. With a retain set also
    `retain_touched`, the share of its tokens in the batches that the probe would have rotated.

    Args:
        model: a `PeftModel` with an HPR adapter, or a Transformers model after `add_adapter`.
        args: [`HPRTrainingArguments`].
        train_dataset: store of `collect_activations(..., site="block", tokens="answer")`, or its folder.
        eval_dataset: a store of other questions; also a dictionary of stores.
        retain_dataset: store of texts to leave alone, `collect_activations(..., site="block", tokens="all")`, or its
            folder (ours; the paper has none). The probe learns that their tokens are positive.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: train although a store says that it was collected from another model.
        kwargs: further arguments of `transformers.Trainer`, such as `callbacks` and `optimizers`; not `data_collator`
            and `compute_metrics`, which are its own.

    Raises:
        TypeError: `args` are no `HPRTrainingArguments`.
        ValueError: a store does not fit the adapter (model, site, layers, hidden size, tokens), the evaluation data are
            missing, the adapter is none of HPR or has other modules to train, or an option has no meaning here, such as
            `gradient_checkpointing`, `label_smoothing_factor`, DeepSpeed and FSDP.
    """

    def __init__(
        self,
        model: nn.Module,
        args: HPRTrainingArguments | None = None,
        *,
        train_dataset: Store | None = None,
        eval_dataset: Store | dict[str, Store] | None = None,
        retain_dataset: Store | None = None,
        adapter_name: str | None = None,
        allow_fingerprint_mismatch: bool = False,
        **kwargs: Any,
    ):
        args = HPRTrainingArguments("hpr_trainer") if args is None else args
        if not isinstance(args, HPRTrainingArguments):
            raise TypeError(f"args must be HPRTrainingArguments, got {type(args).__name__}: its defaults do not suit")
        if eval_dataset is None and args.eval_strategy != "no":
            raise ArgumentError(
                *(Argument("eval_strategy"), f" is {args.eval_strategy.value!r} and there is no "),
                *(Argument("eval_dataset"), ": pass a store of held-out questions, or HPRTrainingArguments("),
                *(Argument("eval_strategy", "no"), ")"),
            )
        if own := {"data_collator", "compute_metrics"} & set(kwargs):
            raise TypeError(f"HPRTrainer has a {min(own)} of its own: leave it out")
        args.check_suited()
        self.adapted_model = without_wrappers(model)
        self.adapter_name, _, layers = find_adapter(model, adapter_name, HPRConfig, HPRLayer)
        self.layers = {index: layer for index, layer in layers.items() if self.adapter_config.edits(index)}
        self._check_adapter()
        self.allow_fingerprint_mismatch = allow_fingerprint_mismatch
        # Since the last log: sums of loss terms and scores over micro-batches, (terms, blocks), and their number.
        self._sums: Tensor | float = 0.0
        self._summed = 0
        train_pairs, eval_pairs = self._dataset(train_dataset), self._dataset(eval_dataset)
        if retain_dataset is not None:
            train_pairs = self._with_retain(train_pairs, retain_dataset, args.seed)
        if isinstance(eval_pairs, dict) and args.load_best_model_at_end:
            _check_best_metric(args.metric_for_best_model, list(eval_pairs))
        for layer in self.layers.values():
            # Checkpoints hold the adapter's own weights: rounded to half precision, they could not be resumed from.
            layer.hpr_probe[self.adapter_name].float()
            layer.hpr_angle[self.adapter_name].float()
        super().__init__(
            model=StackedHPR(list(self.layers.values()), self.adapter_name),
            args=args,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            data_collator=_unchanged,
            compute_metrics=self._evaluation_metrics,
            **kwargs,
        )

    @property
    def adapter_config(self) -> HPRConfig:
        """The adapter's configuration as it is now: a selection replaces it."""
        return self.adapted_model.peft_config[self.adapter_name]

    def _check_adapter(self) -> None:
        if not self.layers:
            raise ArgumentError(
                f"adapter {self.adapter_name!r} edits no layer (",
                Argument("selected_layers", []),
                "): nothing to train",
            )
        if self.adapter_config.modules_to_save:
            raise ArgumentError(
                "HPRTrainer trains probes and angle networks alone, and the adapter has ",
                Argument("modules_to_save", self.adapter_config.modules_to_save),
                ": train those with a Trainer of the language model",
            )
        if pruned := [i for i, layer in self.layers.items() if not layer.has_adapter(self.adapter_name)]:
            raise ValueError(f"layers {pruned} were pruned since this trainer was made: make a new HPRTrainer")
        probes = (layer.hpr_probe[self.adapter_name].weight for layer in self.layers.values())
        if any(weight.is_meta for weight in probes):
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

    def train(self, *args, **kwargs):
        self._check_adapter()
        self._sums, self._summed = 0.0, 0
        result = super().train(*args, **kwargs)
        self._copy_to_adapter()
        return result

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        return super().evaluate(self._dataset(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        return super().predict(self._dataset(test_dataset), *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        losses = _losses(*outputs, weight=self.args.retain_weight)
        finite = torch.isfinite(losses.total)
        if not finite.all():
            bad = list(self.layers)[int((~finite).nonzero()[0])]
            what, value = "training" if model.training else "evaluation", losses.total[~finite][0].item()
            raise ValueError(
                f"the {what} loss of layer {bad} ({self.layers[bad].site}) is {value} at step "
                f"{self.state.global_step}: lower the learning rate, or check the activations of that layer"
            )
        if model.training:
            terms = (losses.probe, losses.angle, *_scores(*outputs[:3]), *_touched(*outputs[3:]))
            self._sums = self._sums + torch.stack(terms).detach()
            self._summed += 1
        # The value is the mean over the blocks, the gradient that of the sum: each block's is that of its own loss.
        total = losses.total.sum()
        total = total - (total - losses.total.mean()).detach()
        return (total, outputs) if return_outputs else total

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            value, (logits, angles, target, *_) = self.compute_loss(model, self._prepare_inputs(inputs), True)
        # No loss here: Trainer averages over batches, and several processes repeat samples to fill the last one.
        return (value, None, None) if prediction_loss_only else (None, (logits, angles), target)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._summed:
            means = self.accelerator.reduce(self._sums / self._summed, reduction="mean")
            logs = {**logs, **self._named(*means.cpu())}
            self._sums, self._summed = 0.0, 0
        super().log(logs, *args, **kwargs)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, angles = (torch.from_numpy(array) for array in prediction.predictions)
        outputs = (logits, angles, torch.from_numpy(prediction.label_ids))
        losses = _losses(*outputs)
        return {
            "loss": float(losses.total.mean()),
            **self._named(losses.probe, losses.angle, *_scores(*outputs)),
        }

    def _named(
        self, probe: Tensor, angle: Tensor, accuracy: Tensor, error: Tensor, touched: Tensor | None = None
    ) -> dict[str, float]:
        """Names for logging of values of each block, (blocks,)."""
        means = {"probe_loss": probe, "angle_loss": angle, "probe_accuracy": accuracy, "angle_error": error}
        means |= {} if touched is None else {"retain_touched": touched}
        of_layers = zip(self.layers, accuracy.tolist(), strict=True)
        return {
            **{name: float(values.mean()) for name, values in means.items()},
            **{f"probe_accuracy_layer_{index}": value for index, value in of_layers},
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
        load_checkpoint(path, self.adapter_name, self.adapter_config, self.layers, model_of_store)
        stacked = StackedHPR(list(self.layers.values()), self.adapter_name)
        (self.model if model is None else model).load_state_dict(stacked.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _copy_to_adapter(self) -> None:
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


def _check_best_metric(metric: str, stores: list[str]) -> None:
    """Raise ValueError unless a metric is one of several evaluation stores."""
    metric = metric.removeprefix("eval_")
    if not metric.startswith(tuple(f"{name}_" for name in stores)):
        decides = Argument("metric_for_best_model", f"{stores[0]}_probe_accuracy")
        raise ArgumentError(
            *(Argument("eval_dataset"), f" has several stores ({', '.join(stores)}) and "),
            *(Argument("metric_for_best_model"), f" is {metric!r}: say which of them decides by ", decides),
        )


def _losses(logits: Tensor, angles: Tensor, target: Tensor, *retained: Tensor, weight: float = 1.0) -> Loss:
    """Loss terms of each block, (blocks,), of what `StackedHPR` returns."""
    logits_of_retained, angles_of_retained = (x.T for x in retained) if retained else (None, None)
    return loss(
        logits.permute(1, 2, 0),
        angles.permute(1, 2, 0),
        target.T,
        retained_logits=logits_of_retained,
        retained_angles_rad=angles_of_retained,
        retain_weight=weight,
    )


def _scores(logits: Tensor, angles: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probe accuracy and mean absolute error of the negative tokens' angles, (blocks,) each."""
    right = torch.stack((logits[..., 0] > 0, logits[..., 1] <= 0))
    return right.float().mean(dim=(0, 1)), (angles[..., 1] - target).abs().mean(dim=0)


def _touched(logits: Tensor | None = None, angles: Tensor | None = None) -> tuple[Tensor, ...]:
    """Share of the tokens to leave alone that the paper's gate would let rotate, (blocks,), where there are any."""
    return () if logits is None else ((logits <= 0).float().mean(dim=0),)


def _unchanged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
