"""What a method offers to whoever looks for its best setting: the axes along which settings differ, and a way to make
the edits of many settings without learning each one anew."""

from __future__ import annotations

import dataclasses
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..activations.store import ActivationStore
from ..arguments import Argument, ArgumentError, check_value, hints_of, nearest
from ..models.sites import decoder_blocks
from ..places import format_layers, normalise_layers, parse_layers


# "each" and "windows of N" stand for several values.
LAYERS = {"help": "Blocks: all, last N, first N, each, windows of N, top N by RANKING, or such as 0-3,7."}


@dataclass(frozen=True)
class Sources:
    """What edits are learnt from.

    Attributes:
        store: activations of the demonstrations.
        retain: activations of texts to leave alone; None for none.
        eval_store: activations of held-out questions, by which layers are ranked; None for none.
        adapter: a folder with a learnt adapter, whose settings are looked for; None to learn.
        work: folder for what takes long to learn, where it is found again; None for one that is removed.
        allow_fingerprint_mismatch: also where a store says that it is of another model.
    """

    store: ActivationStore
    retain: ActivationStore | None = None
    eval_store: ActivationStore | None = None
    adapter: Path | None = None
    work: Path | None = None
    allow_fingerprint_mismatch: bool = False


def declared(kind: type) -> dict[str, dict[str, Any]]:
    """Name of each field of a dataclass to its default and metadata, as keywords of `dataclasses.field`: an axis that
    is a field of a configuration is declared there."""
    return {f.name: {"default": f.default, "metadata": f.metadata} for f in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value on each axis. Each field is an axis; a method adds its own, with their defaults, and with metadata as
    those of configurations.

    Attributes:
        layers: indices of the blocks that edit, in increasing order.
    """

    layers: tuple[int, ...] = field(default=(), metadata=LAYERS)

    def __post_init__(self):
        """Check the fields that a method adds."""
        hints = hints_of(type(self))
        for axis in fields(self):
            if axis.name != "layers":
                check_value(axis.name, getattr(self, axis.name), hints[axis.name], axis.metadata)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; layers as the command line writes them."""
        return {**dataclasses.asdict(self), "layers": format_layers(list(self.layers))}


class Settings(ABC):
    """Makes the edits of a method's settings.

    Args:
        model: the base model, without adapters. Between two edits it is as it was.
        sources: what they are learnt from.

    Attributes:
        kind: class of the method's settings.
        aliases: axis to the fields that a value of it sets, for axes that are no field.
        rankings: names of the rankings of layers, see `ranking`.
        site: "mlp" or "block".
    """

    kind: ClassVar[type[Setting]]
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    rankings: ClassVar[tuple[str, ...]] = ()
    site: str

    def __init__(self, model: nn.Module, sources: Sources):
        self.model, self.sources = model, sources

    @property
    def defaults(self) -> dict[str, Any]:
        """Values on axes that a grid does not name, where they follow from the sources."""
        return {}

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """The blocks that can edit, in increasing order."""

    @property
    def count(self) -> int:
        """Number of the model's blocks."""
        return len(decoder_blocks(self.model))

    def ranking(self, name: str) -> dict[int, float]:
        """A block's score, the greatest of the best, by one of `rankings`. Only those are asked for, so that a method
        without any need not have this."""
        raise NotImplementedError(f"{type(self).__name__} ranks no blocks by {name}")

    @abstractmethod
    def check(self, setting: Setting) -> None:
        """Raise ArgumentError where a setting cannot be tried."""

    def edited(self, setting: Setting) -> tuple[int, ...]:
        """The blocks that a setting edits."""
        return setting.layers

    def group(self, setting: Setting) -> Hashable:
        """Settings of one group follow from one fit or training; those of a group are tried one after the other."""
        return ()

    @abstractmethod
    def prepare(self, settings: Sequence[Setting]) -> None:
        """Learn what all settings share, before the first is tried."""

    @abstractmethod
    def applied(self, setting: Setting) -> AbstractContextManager[PeftModel]:
        """The model with the edit of a setting, its only adapter, which is gone after the `with` block."""

    @abstractmethod
    def learnt(self, setting: Setting) -> AbstractContextManager[PeftModel]:
        """The same, with the adapter as whoever learns it with this setting alone has it: to be saved."""


@contextmanager
def with_adapter(model: nn.Module, config: PeftConfig) -> Iterator[PeftModel]:
    """A base model with a new adapter, which is gone after the `with` block."""
    adapted = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        without_adapter(adapted)


def without_adapter(adapted: PeftModel) -> None:
    """Take the adapters off a base model, which can then be given others."""
    base = adapted.unload()
    if hasattr(base, "peft_config"):  # PEFT would warn of a second adapter
        del base.peft_config


def check_bare(model: nn.Module) -> None:
    """Raise ValueError for a model with adapters."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has adapters already: pass the base model, to which the edits are added in turn")


def settings_of(maker: Settings, grid: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The settings of a grid, each once, in its order.

    Args:
        maker: of the method.
        grid: axis to a value or a list of values, of which all combinations are meant; or a list of such grids.

    Raises:
        ValueError: an axis that the method does not have, or a value that it cannot have.
    """
    found: dict[Setting, None] = {}
    for part in grid if isinstance(grid, (list, tuple)) else [grid]:
        if not isinstance(part, Mapping):
            raise ArgumentError(Argument("grid"), f" must be a dict of axes, or a list of these, got {part!r}")
        axes = {name: _values(maker, name, values) for name, values in _checked(maker, part).items()}
        given = {name for axis in axes for name in maker.aliases.get(axis, (axis,))}
        axes |= {name: [value] for name, value in maker.defaults.items() if name not in given}
        axes.setdefault("layers", [tuple(maker.layers)])
        for values in itertools.product(*axes.values()):
            setting = maker.kind(**_fields(maker, dict(zip(axes, values, strict=True))))
            maker.check(setting)
            found.setdefault(setting)
    if not found:
        raise ArgumentError(Argument("grid"), " has no setting: give an axis some values")
    return list(found)


def _checked(maker: Settings, part: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [*(axis.name for axis in fields(maker.kind)), *maker.aliases]
    for name in part:
        if name not in names:
            raise ArgumentError(
                Argument("grid"), f" has an axis {name!r} that the method has not{nearest(str(name), names)}"
            )
    for name, targets in maker.aliases.items():
        if name in part and (twice := set(targets) & set(part)):
            raise ArgumentError(Argument("grid"), f" sets {min(twice)!r} also by {name!r}: leave one of them out")
    return part


def _fields(maker: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    return {target: value for name, value in values.items() for target in maker.aliases.get(name, (name,))}


def _values(maker: Settings, name: str, values: Any) -> list[Any]:
    listed = list(values) if isinstance(values, (list, tuple, range)) else [values]
    if not listed:
        raise ArgumentError(Argument("grid"), f" has no value on the axis {name!r}: give it one, or leave it out")
    if name == "layers":
        return [layers for value in listed for layers in layer_choices(maker, value)]
    kind = hints_of(maker.kind)[maker.aliases.get(name, (name,))[0]]
    # YAML and people write 1 for 1.0, and a record holds one of them.
    return [float(v) if kind in (float, float | None) and type(v) is int else v for v in listed]


def layer_choices(maker: Settings, value: Any) -> Iterator[tuple[int, ...]]:
    """The blocks that a value of the axis `layers` means, see `LAYERS`; several for "each" and "windows of N".

    Raises:
        ValueError: it means none, or blocks that cannot edit.
    """
    count, available = maker.count, maker.layers
    text = value.strip() if isinstance(value, str) else ""
    if text == "all" or value is None:
        chosen = [tuple(available)]
    elif text == "each":
        chosen = [(index,) for index in available]
    elif n := _number(r"windows of (\d+)", text, count):
        chosen = _windows(available, n)
    elif n := _number(r"last (\d+)", text, count):
        chosen = [tuple(range(count - n, count))]
    elif n := _number(r"first (\d+)", text, count):
        chosen = [tuple(range(n))]
    elif match := re.fullmatch(r"top (\d+) by (\w+)", text):
        chosen = [top(maker, int(match[1]), match[2])]
    else:
        chosen = [_listed(value)]
    for layers in chosen:
        if outside := sorted(set(layers) - set(range(count))):
            raise ArgumentError(Argument("layers"), f" {outside} are outside the model, which has 0 to {count - 1}")
        if missing := sorted(set(layers) - set(available)):
            raise ArgumentError(
                Argument("layers"), f" {missing} are not in the store or adapter, which has {format_layers(available)}"
            )
        yield layers


def _windows(available: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Runs of n neighbours side by side, from the first block on; the last one of a run of blocks ends with it."""
    chosen = []
    for _, run in groupby(enumerate(available), key=lambda pair: pair[1] - pair[0]):
        blocks = [index for _, index in run]
        starts = list(range(0, len(blocks) - n + 1, n))
        if starts and starts[-1] + n < len(blocks):
            starts.append(len(blocks) - n)
        chosen += [tuple(blocks[start : start + n]) for start in starts]
    if not chosen:
        raise ArgumentError(
            Argument("layers"), f": of {format_layers(available)} no {n} are neighbours: take smaller windows"
        )
    return chosen


def _number(pattern: str, text: str, count: int) -> int | None:
    match = re.fullmatch(pattern, text)
    if match and not 1 <= int(match[1]) <= count:
        raise ArgumentError(Argument("layers"), f" {text!r}: the model has {count} blocks")
    return int(match[1]) if match else None


def _listed(value: Any) -> tuple[int, ...]:
    try:
        return tuple(parse_layers(value) if isinstance(value, str) else normalise_layers(value))
    except ArgumentError:
        raise ArgumentError(
            Argument("layers"),
            " must be all, last N, first N, each, windows of N, top N by RANKING, or blocks such as 0-3,7, "
            f"got {value!r}",
        ) from None


def top(maker: Settings, k: int, ranking: str, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """The k best of some blocks by a ranking; of equal ones the lower."""
    if ranking not in maker.rankings:
        known = " or ".join(maker.rankings) or "none"
        raise ArgumentError(Argument("layers"), f" can be ranked by {known}, got {ranking!r}")
    among = maker.layers if among is None else among
    if not 1 <= k <= len(among):
        raise ArgumentError(Argument("layers"), f": top {k} of {len(among)} blocks: choose from 1 to {len(among)}")
    scores = maker.ranking(ranking)
    return tuple(sorted(sorted(among, key=lambda index: -scores[index])[:k]))
