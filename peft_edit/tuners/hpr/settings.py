"""The axes of HPR: an adapter is trained once for each way to train it, and serves all gates, angles and blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel, TaskType
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...activations.store import open_pairs
from ...adapters.match import check_store, find_adapter
from ...adapters.read import load_adapter
from ...adapters.save import save_adapter
from ...arguments import Argument, ArgumentError
from ...choosing.axes import Setting, Settings, Sources, declared, with_adapter, without_adapter
from ...json_files import digest_of
from ...training.progress import Progress
from .arguments import HPRTrainingArguments
from .config import HPRConfig
from .layer import HPRLayer
from .select import probe_accuracy
from .train import HPRTrainer


OF_CONFIG, OF_TRAINING = declared(HPRConfig), declared(HPRTrainingArguments)


@dataclass(frozen=True, kw_only=True)
class HPRSetting(Setting):
    """The fields of `HPRConfig` that a sweep can vary, and of `HPRTrainingArguments`, for each of whose values an
    adapter is trained.

    Attributes:
        top_k: of the layers, those with the most accurate probes; None for all.
        retain_weight: 0 for the loss of the paper.
    """

    top_k: int | None = field(
        default=None, metadata={"help": "So many layers with the best probes.", "minimum": 1, "allowed": "of 1 or more"}
    )
    gate: float = field(**OF_CONFIG["gate"])
    alpha: float = field(**OF_CONFIG["alpha"])
    rotation: Literal["angle", "reflection"] = field(**OF_CONFIG["rotation"])
    num_angle_layers: int = field(**OF_CONFIG["num_angle_layers"])
    angle_hidden_size: int | None = field(**OF_CONFIG["angle_hidden_size"])
    retain_weight: float = field(default=0.0, metadata=OF_TRAINING["retain_weight"]["metadata"])
    learning_rate: float = field(**OF_TRAINING["learning_rate"])
    num_train_epochs: float = field(**OF_TRAINING["num_train_epochs"])
    per_device_train_batch_size: int = field(**OF_TRAINING["per_device_train_batch_size"])
    seed: int = field(default=0, metadata={"help": "Of the initial weights and the order of the pairs."})


@dataclass(frozen=True)
class Training:
    """What an adapter is trained by: the fields of `HPRSetting` of these names."""

    num_angle_layers: int
    angle_hidden_size: int | None
    retain_weight: float
    learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    seed: int


MODULE_FIELDS = ("num_angle_layers", "angle_hidden_size")
Weights = dict[int, dict[str, dict[str, Tensor]]]  # block to the state of its probe and of its angle network


class HPRSettings(Settings):
    """Settings of HPR, of adapters that are trained here or of one that was trained before."""

    kind = HPRSetting
    rankings = ("probe",)
    site = "block"

    def __init__(self, model, sources: Sources):
        super().__init__(model, sources)
        self.eval_store = None if sources.eval_store is None else open_pairs(sources.eval_store)
        self.adapter = None if sources.adapter is None else str(sources.adapter)
        self.store = None if self.adapter else open_pairs(sources.store).at("block")
        self._given = self._read(self.adapter) if self.adapter else None
        self._temporary = None if sources.work else tempfile.TemporaryDirectory()
        self._work = Path(sources.work or self._temporary.name)
        self._configs: dict[Training | None, HPRConfig] = {}
        # Those of the training whose settings are being tried.
        self._held: tuple[Training | None, Weights] | None = None

    @property
    def layers(self) -> list[int]:
        return self.store.layers if self._given is None else sorted(self._given[1])

    @property
    def defaults(self) -> dict[str, Any]:
        return (
            {}
            if self.sources.retain is None or self.adapter
            else {"retain_weight": OF_TRAINING["retain_weight"]["default"]}
        )

    def check(self, setting: HPRSetting) -> None:
        training = asdict(self._training(setting))
        of_default = asdict(self._training(HPRSetting()))
        if self.adapter is not None and training != of_default:
            name = next(name for name, value in training.items() if value != of_default[name])
            raise ArgumentError(
                Argument(name), " is of a training, and ", Argument("adapter"), " was trained: leave one of them out"
            )
        if setting.retain_weight > 0 and self.sources.retain is None:
            raise ArgumentError(Argument("retain_weight"), " needs ", Argument("retain"), ": pass a store of texts too")
        if (
            setting.top_k is not None
            and self.eval_store is None
            and not (self._given and self._given[0].probe_accuracy)
        ):
            raise ArgumentError(Argument("top_k"), " needs ", Argument("eval_store"), ": pass held-out activations")
        if setting.top_k is not None and setting.top_k > len(setting.layers):
            raise ArgumentError(Argument("top_k"), f" must be at most {len(setting.layers)}, got {setting.top_k}")

    def group(self, setting: HPRSetting) -> Training | None:
        return None if self.adapter else self._training(setting)

    @staticmethod
    def _training(setting: HPRSetting) -> Training:
        return Training(**{f.name: getattr(setting, f.name) for f in fields(Training)})

    def ranking(self, name: str) -> dict[int, float]:
        """Of an adapter that was trained before. Those that are trained here have a ranking each: `top_k`."""
        accuracy = {int(index): value for index, value in self._given[0].probe_accuracy.items()} if self._given else {}
        if not accuracy and self._given and self.eval_store is not None:
            accuracy = self._accuracy(self.adapter)
        if not accuracy:
            raise ArgumentError(
                Argument("layers"), " cannot be ranked before the probes are trained: use the axis ", Argument("top_k")
            )
        return accuracy

    def edited(self, setting: HPRSetting) -> tuple[int, ...]:
        if setting.top_k is None:
            return setting.layers
        accuracy = self._configs[self.group(setting)].probe_accuracy
        best = sorted(setting.layers, key=lambda index: -accuracy[str(index)])[: setting.top_k]
        return tuple(sorted(best))

    def prepare(self, settings: Sequence[HPRSetting]) -> None:
        for training in dict.fromkeys(map(self.group, settings)):
            folder = self.adapter or str(self._trained(training))
            config, _ = self._read(folder)
            accuracy = config.probe_accuracy
            if self.eval_store is not None:
                accuracy = {str(index): value for index, value in self._accuracy(folder).items()}
            self._configs[training] = replace(config, probe_accuracy=accuracy)

    def _trained(self, training: Training) -> Path:
        """Folder of the adapter of a training, which is trained where it is not there."""
        stores = [self.store, self.eval_store, self.sources.retain if training.retain_weight else None]
        told = [None if store is None else [store.site, store.metadata] for store in stores]
        folder = self._work / f"trained-{digest_of([asdict(training), told, self.layers])}"
        if not (folder / CONFIG_NAME).exists():
            with self._train(training) as adapted:
                save_adapter(adapted, folder)
        return folder

    @contextmanager
    def _train(self, training: Training) -> Iterator[PeftModel]:
        arguments = self._arguments(training)
        modules = {name: getattr(training, name) for name in MODULE_FIELDS}
        set_seed(training.seed)
        config = HPRConfig(task_type=TaskType.CAUSAL_LM, layers_to_transform=self.layers, **modules)
        with with_adapter(self.model, config) as adapted:
            trainer = HPRTrainer(
                adapted,
                arguments,
                train_dataset=self.store,
                eval_dataset=self.eval_store,
                retain_dataset=self.sources.retain if training.retain_weight else None,
                allow_fingerprint_mismatch=self.sources.allow_fingerprint_mismatch,
            )
            # Logs would go to standard output, among the results.
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            progress = Progress(trainer.score)
            trainer.add_callback(progress)
            try:
                trainer.train()
            finally:
                progress.close()
            yield adapted

    def _arguments(self, training: Training) -> HPRTrainingArguments:
        of_trainer = {f.name: getattr(training, f.name) for f in fields(Training) if f.name not in MODULE_FIELDS}
        when = "epoch" if self.eval_store is not None else "no"
        return HPRTrainingArguments(
            output_dir=str((self._work / "training").resolve()),
            eval_strategy=when,
            save_strategy=when,
            report_to="none",
            use_cpu=next(self.model.parameters()).device.type == "cpu",
            **of_trainer,
        )

    def _read(self, folder: str) -> tuple[HPRConfig, Weights]:
        """Configuration and weights of an adapter in a folder."""
        adapted = load_adapter(self.model, folder, self.sources.allow_fingerprint_mismatch)
        try:
            _, config, layers = find_adapter(adapted, None, HPRConfig, HPRLayer)
            weights = {
                index: {part: getattr(layer, part)["default"].state_dict() for part in layer.adapter_layer_names}
                for index, layer in layers.items()
            }
            return replace(config), weights
        finally:
            without_adapter(adapted)

    def _accuracy(self, folder: str) -> dict[int, float]:
        adapted = load_adapter(self.model, folder, self.sources.allow_fingerprint_mismatch)
        try:
            name, _, layers = find_adapter(adapted, None, HPRConfig, HPRLayer)
            store = check_store(adapted, self.eval_store, "block", layers, self.sources.allow_fingerprint_mismatch)
            return {index: probe_accuracy(store, index, layer, name) for index, layer in layers.items()}
        finally:
            without_adapter(adapted)

    @contextmanager
    def applied(self, setting: HPRSetting) -> Iterator[PeftModel]:
        training = self.group(setting)
        if self._held is None or self._held[0] != training:
            self._held = training, self._read(self.adapter or str(self._trained(training)))[1]
        edited = self.edited(setting)
        trained = self._configs[training]
        config = replace(
            trained,
            selected_layers=None if trained.selected_layers is None and list(edited) == self.layers else list(edited),
            **{name: getattr(setting, name) for name in ("gate", "alpha", "rotation")},
        )
        with with_adapter(self.model, config) as adapted:
            name, _, layers = find_adapter(adapted, None, HPRConfig, HPRLayer)
            for index, layer in layers.items():
                for part, state in self._held[1][index].items():
                    getattr(layer, part)[name].load_state_dict(state)
            yield adapted

    learnt = applied


SETTINGS = HPRSettings
