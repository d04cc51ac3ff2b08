from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..arguments import Argument, ArgumentError, check_options
from ..files import give_usual_permissions
from ..json_files import mismatch
from ..models.sites import check_names
from ..places import LayerIndices, normalise_layers
from .registration import peft_type


class Retained(TypedDict, total=False):
    """The texts that an edit was told to leave alone."""

    data: str | None
    files: list[str] | None
    texts: int
    tokens: int
    weight: float


class Provenance(TypedDict, total=False):
    """What an adapter was fitted to or trained on, see `EditConfig`."""

    data: str | None
    subset: str | None
    split: str | None
    files: list[str] | None
    tokens: str
    neutral: str | None
    prompt_format: str
    questions: int
    demonstrations: int
    token_pairs: int
    retain: Retained


class Part(Provenance):
    """The same of one of several adapters that were joined, whose name `adapter` is."""

    adapter: str


class Calibrated(TypedDict, total=False):
    """At which value of a field an edit met a budget of divergence from the base model."""

    dial: str
    value: float
    kl_p95: float
    budget: float
    texts: str
    tokens: int


class FittedOn(Provenance, total=False):
    """The same, and of an edit that joins several adapters that of each."""

    combined: list[Part]


@dataclass
class EditConfig(PeftConfig):
    """
    What the configurations of every editing method share.

    Args:
        target_modules (`list[str] | str | None`):
            Names of the modules whose outputs are edited, matched as in every PEFT method. By default the modules of
            the site, found by the architecture of the model.
        exclude_modules (`list[str] | str | None`):
            Names of modules that are not edited, matched in the same way.
        layers_to_transform (`list[int] | int | None`):
            Indices of the decoder blocks to edit, 0 the first. An int, a list or a range. By default all.
        base_model_fingerprint (`str | None`):
            Written by the fit or the training: `fingerprint` of the model whose activations it learnt from.
        fitted_on (`dict[str, Any]`):
            Written by the fit or the training: the name of the data (`data`) where it is known, and the numbers of
            `questions` and of `demonstrations` or `token_pairs`; the same of the texts to `retain`. Of an edit that
            joins several (`combined`), a list of the same of each `adapter`.
        calibration (`dict[str, Any]`):
            Written by `calibrate`: the `dial` that it set, to which `value`, and the 95th percentile of the divergence
            from the base model there, in nats, with its `budget`, and a hash of the `texts` and their number of
            `tokens`. Another value of the dial empties it.
        init_weights (`bool`):
            Leave this `True`: the identity, until it is fitted or trained. `False` makes a random edit, for tests.
        modules_to_save (`list[str] | None`):
            List of modules apart from the method's layers to be set as trainable and saved in the final checkpoint.

    Attributes:
        method: name of the method, in upper case; each configuration class has one.
        site: "mlp", "block" or "attention": what is edited where there are no `target_modules`.
        fixed: names of the fields that the modules of an adapter follow from, so that they cannot change later.
        dials: names of the fields by which an edit is made stronger, the usual one first: 0 is the base model.
        sites_in_use: names of the modules that adapters with this very object edit.
    """

    method: ClassVar[str]
    site: ClassVar[str] = "block"
    # Fields that the modules of an adapter follow from.
    fixed: ClassVar[tuple[str, ...]] = (
        *("site", "target_modules", "exclude_modules", "layers_to_transform", "init_weights"),
    )
    dials: ClassVar[tuple[str, ...]] = ("strength",)
    # Writes the model card beside an adapter that is saved, see `registration.write_cards_with`.
    card_writer: ClassVar[Callable[[Path, EditConfig], object] | None] = None

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the edited modules. Default: by site and architecture."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave out."}
    )
    layers_to_transform: LayerIndices = field(
        default=None, metadata={"help": "Decoder blocks, such as 0-3,7. Default: all.", "option": "--layers"}
    )
    base_model_fingerprint: str | None = field(
        default=None, metadata={"help": "Model whose activations it learnt from. Written by the fit or the training."}
    )
    fitted_on: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Data and number of demonstrations. Written by the fit or the training."},
    )
    calibration: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Budget of damage that the strength meets. Written by calibrate."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Leave this True. False makes a random edit, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the method's layers to be trained and saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
            check_names(name, getattr(self, name))
        self.layers_to_transform = normalise_layers(self.layers_to_transform, "layers_to_transform")
        self.check_written("fitted_on", FittedOn)
        self.check_written("calibration", Calibrated)
        if not isinstance(self.base_model_name_or_path, (str, os.PathLike, type(None))):
            raise ArgumentError(
                Argument("base_model_name_or_path"), f" must be text, or None, got {self.base_model_name_or_path!r}"
            )
        names = self.modules_to_save
        if mismatch(list(names) if isinstance(names, (tuple, set)) else names, list[str] | None):
            raise ArgumentError(Argument("modules_to_save"), f" must be a list of names, or None, got {names!r}")
        check_options(self, tuple(field.name for field in fields(self) if field.name in self._own_fields()))
        self.check_fields()
        dial = self.calibration.get("dial")
        if dial is not None and getattr(self, dial, None) != self.calibration.get("value"):
            self.calibration = {}  # of another value
        # The modules that an adapter with this configuration edits, once it is in a model.
        self.sites_in_use: set[str] = set()

    def check_fields(self) -> None:
        """Check, and bring into their form, the fields that a method adds. Those that are a choice or a number are
        checked as they are declared by then."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Check values that are set later as those that are given, together with the others: gate and strength may be
        changed at run time."""
        if "sites_in_use" in self.__dict__ and name in self._own_fields():
            value = getattr(replace(self, **{name: value}), name)
            if value != getattr(self, name):
                self.check_change(name, value)
                if name == self.calibration.get("dial"):
                    self.calibration = {}
        super().__setattr__(name, value)

    @classmethod
    def _own_fields(cls) -> set[str]:
        return {field.name for field in fields(cls)} - {field.name for field in fields(PeftConfig)}

    def check_change(self, name: str, value: Any) -> None:
        """Raise ArgumentError where a field cannot become another value any more.

        Args:
            name: of the field.
            value: checked.
        """
        if name in self.fixed and self.sites_in_use:
            raise ArgumentError(
                *(Argument(name), f" is {getattr(self, name)!r} for the modules that the adapter has in a model: add "),
                *("another adapter with ", Argument(name, value)),
            )

    def check_written(self, name: str, declared: Any) -> None:
        """Raise ArgumentError unless a field that a fit or a training writes is of a type, see `mismatch`."""
        if problem := mismatch(getattr(self, name), declared, name):
            found = problem.removeprefix(name) if problem.startswith(name) else f" has {problem}"
            raise ArgumentError(*(Argument(name), f"{found}; it is written by the fit or the training: make it again"))

    def layers_with_modules(self) -> list[int] | None:
        """Indices of the decoder blocks that get modules of the adapter; None for all."""
        return self.layers_to_transform

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the configuration, and the adapter's model card beside it: everything that saves an adapter (PEFT,
        Transformers, a trainer) saves its configuration last, into its folder."""
        super().save_pretrained(save_directory, **kwargs)
        # safetensors 0.8 lets nobody else read what it writes: another user would be told that there is no adapter.
        if (weights := Path(save_directory) / SAFETENSORS_WEIGHTS_NAME).exists():
            give_usual_permissions(weights)
        if EditConfig.card_writer is not None:
            EditConfig.card_writer(Path(save_directory), self)
