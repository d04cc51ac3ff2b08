"""What a method says of itself, and all methods: the rest of the package asks here and names none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftConfig

from ..arguments import choices_of, hints_of
from . import METHODS
from .config import EditConfig
from .layer import EditLayer
from .model import EditModel
from .shown import LayerCurve, LayerSpectra


@dataclass(frozen=True)
class Method:
    """An editing method. Everything of it is in one folder, that of its configuration.

    Its folder also has `commands.py`, see `peft_edit.cli`.

    Attributes:
        short: its short name in a sentence, "SEA".
        config: class of its configurations, which know its short name, the fields and their defaults.
        model: its tuner.
        layer: class of its layers.
        tokens: what of a store it learns from, values of `ActivationStore.tokens`, the usual one first.
        learnt_by: the command that makes an adapter of it, "fit-sea", for messages.
        card_settings: configuration to the names of the fields that its model card shows.
        card_layers: configuration to what the card's template `card.md` in the method's folder shows of each layer.
        no_merge: why it never merges into weights, None where it can: "it rotates each token by ...".
        no_lora: why it cannot become a LoRA adapter, None where `to_lora` can make one.
        check_lora: (configuration, out_dir) raises ValueError, with the reason, where that cannot be.
        lora_record: name of the file, JSON, that `to_lora` writes beside the LoRA adapter: its "source" is the edit's
            configuration; the rest is for the template of the card, `lora.md` in the method's folder.
        lora_contents: `TypedDict` of that file.
        lora_contradiction: (its contents, the LoRA adapter's configuration) to what cannot be there, or None.
        to_lora: (model, out_dir, rank=) writes the active adapter as a LoRA adapter; the result has `rank`, `exact`,
            `notes`, `table()` and `to_dict()`.
        published: whether a folder holds what the method's published code writes.
        convert: (source_dir, out_dir, base_model=, ...) makes an adapter of such a folder; the result has `notes`,
            `table()`, `remarks()` and `to_dict()`.
        published_files: names of those files, for messages.
        settings: module whose `SETTINGS` makes the edits of a sweep, see `peft_edit.choosing.axes`.
        evidence: module whose `show(scene)` is the method's part of the demonstration.
        curves: numbers of each layer in what `card_layers` gives that pictures show.
        spectra: (configuration, block index to layer, store, retain store or None) yields the `LayerSpectra` of each
            layer in turn; None where the method decomposes nothing.
    """

    short: str
    config: type[EditConfig]
    model: type[EditModel]
    layer: type[EditLayer]
    tokens: tuple[str, ...]
    learnt_by: str
    card_settings: Callable[[Any], list[str]]
    card_layers: Callable[[Any], list[dict[str, Any]]]
    no_merge: str | None = None
    no_lora: str | None = None
    check_lora: Callable[[Any, Path], None] | None = None
    to_lora: Callable[..., Any] | None = None
    lora_record: str | None = None
    lora_contents: Any = None
    lora_contradiction: Callable[[Mapping[str, Any], PeftConfig], str | None] | None = None
    published: Callable[[Path], bool] | None = None
    convert: Callable[..., Any] | None = None
    published_files: str = ""
    settings: str | None = None
    evidence: str | None = None
    curves: tuple[LayerCurve, ...] = ()
    spectra: Callable[..., Iterator[LayerSpectra]] | None = None

    @property
    def name(self) -> str:
        """Its name in upper case, that of the `PeftType`."""
        return self.config.method

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that it learns from and edits, values of `ActivationStore.site`."""
        return choices_of(hints_of(self.config).get("site")) or (self.config.site,)

    @property
    def folder(self) -> Path:
        return Path(inspect.getfile(self.config)).parent


@cache
def methods() -> Mapping[str, Method]:
    """All methods by their names, in the order in which they are shown."""
    found = (import_module(f"{__package__}.{name}.method").METHOD for name in METHODS)
    return MappingProxyType({method.name: method for method in found})


def method_of(config: PeftConfig) -> Method | None:
    """The method of an adapter; None for one of PEFT's own."""
    return methods().get(config.peft_type)


def lora_method_of(config: PeftConfig) -> Method:
    """The method of an adapter that can become a LoRA adapter; raises ValueError, with the reason, for others."""
    method = method_of(config)
    if method is None or method.to_lora is None:
        reason = f": {method.no_lora}" if method else ""
        raise ValueError(
            f"only {names(lambda method: method.to_lora)} adapters can be exported as LoRA, got one of "
            f"{method.short if method else config.peft_type.value}{reason}"
        )
    return method


def names(having: Callable[[Method], object] = lambda method: True) -> str:
    """Short names of all methods, or of those that have something, for messages: "SEA or HPR"."""
    found = [method.short for method in methods().values() if having(method)]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
