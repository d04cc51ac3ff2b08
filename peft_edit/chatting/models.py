"""A base model and adapters on it, each with the settings of a conversation while it answers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.match import give_config, replace_config
from ..adapters.read import load_adapter
from ..answering.options import BASE, EDITED
from ..arguments import Argument, ArgumentError, nearest
from ..places import format_layers
from ..tuners.config import EditConfig
from ..tuners.layer import edit_layers
from ..tuners.method import method_of
from ..tuners.strength import check_strength, edit_strength, edited_blocks
from .settings import Settings


# Adapters that are kept, those that were used last. Others are read again when they are wanted.
KEPT = 8
NAME = "default"


@dataclass(frozen=True)
class Dial:
    """A field of an adapter's configuration that may be changed at run time, besides its strength.

    Attributes:
        name: of the field, "gate".
        help: what it does, in one line.
        own: its value in the adapter.
        minimum, maximum: that it may have; None where there is no bound.
    """

    name: str
    help: str
    own: float
    minimum: float | None
    maximum: float | None


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on the base model.

    Attributes:
        name: folder, or id on the Hub.
        method: short name of its method, "HPR"; of one of PEFT's own that of its type.
        model: the base model with it.
        layers: decoder blocks that it edits; none where it edits no activations.
        dials: what may be changed besides its strength.
    """

    name: str
    method: str
    model: PeftModel
    layers: tuple[int, ...]
    dials: tuple[Dial, ...]

    @property
    def edits(self) -> bool:
        """Whether it edits activations, and so has a strength."""
        return bool(edit_layers(self.model))

    @property
    def config(self) -> PeftConfig:
        return self.model.peft_config[NAME]


class ChatModels:
    """A base model with any number of adapters, of any methods, one of which edits at a time.

    Each adapter is on a copy of the base model that shares its weights, so that adapters know nothing of each other.
    One answer is made at a time.

    Args:
        base: the base model.
        tokenizer: of the base model.
        allow_fingerprint_mismatch: take adapters of a model with other weights.
    """

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allow_fingerprint_mismatch: bool = False
    ):
        self.base, self.tokenizer = base, tokenizer
        self._allow_mismatch = allow_fingerprint_mismatch
        self._adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()
        # Not of a thread: who iterates over an answer may change threads.
        self._answering, self._loading = Lock(), Lock()

    def adapter(self, name: str) -> LoadedAdapter:
        """An adapter, which is loaded if it is not.

        Args:
            name: folder, or id on the Hub, "user/name" or "user/name@revision".

        Raises:
            ValueError, OSError: it cannot be loaded, or is of another model.
        """
        with self._loading:
            if name not in self._adapters:
                self._adapters[name] = self._loaded(name)
            self._adapters.move_to_end(name)
            while len(self._adapters) > KEPT:
                self._adapters.popitem(last=False)
            return self._adapters[name]

    def forget(self, name: str) -> None:
        """Load an adapter anew when it is asked for next, as its files may have changed."""
        with self._loading:
            self._adapters.pop(name, None)

    def _loaded(self, name: str) -> LoadedAdapter:
        model = load_adapter(_sharing_weights(self.base), name, self._allow_mismatch, name=NAME).eval()
        config, method = model.peft_config[NAME], method_of(model.peft_config[NAME])
        layers = tuple(edited_blocks(edit_layers(model)))
        return LoadedAdapter(name, method.short if method else config.peft_type.value, model, layers, _dials(config))

    @contextmanager
    def answering(self, settings: Settings, side: str) -> Iterator[nn.Module]:
        """The model that answers, set as a conversation has it, inside the `with` block. Other conversations wait.

        Args:
            settings: of the conversation.
            side: `BASE` or `EDITED`.
        """
        adapter = None if side == BASE else self.adapter(settings.adapter)
        with self._answering:
            if adapter is None:
                yield self.base
                return
            with _changed(adapter.model, settings):
                yield adapter.model

    def with_adapter(self, settings: Settings, name: str | None) -> Settings:
        """The settings with another adapter as it was saved, None for the base model alone. Both answer then."""
        if name is not None:
            self.adapter(name)
        sides = (BASE,) if name is None else (BASE, EDITED)
        return replace(settings, adapter=name, strength=1.0, layers=None, dials={}, sides=sides)

    def with_strength(self, settings: Settings, strength: float) -> Settings:
        """The settings with a factor on the strength of the edit; raises ValueError for one that cannot be."""
        self._editing(settings)
        check_strength(strength)
        return replace(settings, strength=strength)

    def with_layers(self, settings: Settings, layers: Iterable[int] | None) -> Settings:
        """The settings with the decoder blocks that edit, None for all; raises ValueError where others are meant."""
        adapter = self._editing(settings)
        if layers is None:
            return replace(settings, layers=None)
        chosen = tuple(sorted(set(layers)))
        if outside := sorted(set(chosen) - set(adapter.layers)):
            raise ArgumentError(
                Argument("layers"),
                f" {format_layers(outside)} have no edit: {adapter.name} edits {told_layers(adapter)}",
            )
        return replace(settings, layers=None if chosen == adapter.layers else chosen)

    def with_dial(self, settings: Settings, name: str, value: float) -> Settings:
        """The settings with another value of a field of the adapter's configuration, one of its `dials`.

        Raises:
            ValueError: it has no such dial, or the dial no such value.
        """
        adapter = self._editing(settings)
        dials = {dial.name: dial for dial in adapter.dials}
        if name not in dials:
            what = nearest(name, dials) if dials else ": set its strength"
            if name == adapter.config.dials[0]:
                what = ": the strength multiplies it"
            raise ValueError(f"{adapter.name}, an adapter of {adapter.method}, has no {name} to set{what}")
        replace(adapter.config, **{name: value})  # which checks it
        others = {key: other for key, other in settings.dials.items() if key != name}
        return replace(settings, dials=others if value == dials[name].own else {**others, name: value})

    def _editing(self, settings: Settings) -> LoadedAdapter:
        """The adapter, where it edits activations, which alone have a strength and blocks that may be chosen."""
        if settings.adapter is None:
            raise ValueError("the base model alone has nothing to set: choose an adapter first")
        adapter = self.adapter(settings.adapter)
        if not adapter.edits:
            raise ValueError(f"{adapter.name} is an adapter of {adapter.method}, which has no edit that could be set")
        return adapter


def told_layers(adapter: LoadedAdapter) -> str:
    """The blocks that an adapter edits, as people write them."""
    return f"layers {format_layers(list(adapter.layers))}" if adapter.layers else "no layer"


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose tensors are those of the model."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _dials(config: PeftConfig) -> tuple[Dial, ...]:
    if not isinstance(config, EditConfig):
        return ()
    fields = type(config).__dataclass_fields__
    return tuple(
        Dial(
            name,
            fields[name].metadata["help"],
            getattr(config, name),
            fields[name].metadata.get("minimum"),
            fields[name].metadata.get("maximum"),
        )
        for name in config.dials[1:]  # the first is the strength
    )


@contextmanager
def _changed(model: PeftModel, settings: Settings) -> Iterator[None]:
    """Set an adapter as a conversation has it inside the `with` block."""
    own = model.peft_config[NAME]
    if settings.dials:
        replace_config(model, NAME, **settings.dials)
    try:
        if settings.strength == 1 and settings.layers is None:
            yield
            return
        with edit_strength(model, settings.strength, layers=settings.layers):
            yield
    finally:
        if settings.dials:
            give_config(model, NAME, own)
