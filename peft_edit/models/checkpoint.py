"""Safetensors checkpoints as they lie on disk: which file holds the bytes of which parameter of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..json_files import inside, read_json


# What to do about a checkpoint whose files disagree or are damaged.
AGAIN = "download or save the checkpoint again"
WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"


class BaseConfig(TypedDict, total=False):
    """What of config.json is read here, besides what Transformers makes of it."""

    transformers_weights: str | None


class WeightIndex(TypedDict):
    """An index file: key of each tensor to its file, and what is never used, without which Transformers loads none."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Bytes `start` to `end` of a file of the checkpoint. `dtype` is the name that safetensors has for it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint that a parameter is loaded from, through Transformers' operations. `part` numbers the
    different tensors that they put together."""

    key: str
    operations: tuple[ConversionOps, ...] = ()
    part: int = 0

    @property
    def stacks(self) -> bool:
        """Whether several such tensors become one parameter."""
        return any(isinstance(operation, MergeModulelist) for operation in self.operations)


class Checkpoint:
    """The files of a checkpoint in a folder. Reads headers only.

    Attributes:
        path: the folder.
        index: name of the index file; None for one file without an index.
        files: names of the files with tensors, in order.
        tensors: key of each tensor to its place.

    Raises:
        ValueError: no safetensors checkpoint, a file of it is missing or damaged, or index and files disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        found = find_weights(lambda name: path / name if (path / name).exists() else None)
        if found is None:
            pickled = ", its weights are pickled" if any(path.glob("*.bin")) else ""
            raise ValueError(
                f"{path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}{pickled}: pass a safetensors "
                "checkpoint; save_pretrained writes one"
            )
        self.index, weight_map, self.files = found
        if missing := [file for file in self.files if not (path / file).is_file()]:
            raise ValueError(
                f"{path} lacks {len(missing)} of the {len(self.files)} files that its {self.index or 'config.json'} "
                f"names, the first is {missing[0]}: {AGAIN}"
            )
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            stored = _read_header(path, file)
            # What the index leaves out is loaded all the same, as Transformers does it.
            named = {key for key, of in weight_map.items() if of == file}
            if differing := sorted((named - set(stored)) | (set(stored) & set(self.tensors))):
                raise ValueError(
                    f"{self.index} of {path} says that {differing[0]} is in one file, and the files disagree: {AGAIN}"
                )
            self.tensors |= stored


def find_weights(find: Callable[[str], Path | None]) -> tuple[str | None, dict[str, str], list[str]] | None:
    """Which files hold the weights of a checkpoint, as Transformers looks for them.

    Args:
        find: name of a file of the checkpoint to where it is, None where it is not.

    Returns:
        Name of the index file, or None; what it says, the key of each tensor to its file; and the names of the files in
        order. None where there are no safetensors weights.

    Raises:
        ValueError: config.json or the index is damaged, or names files elsewhere.
    """
    if (config := find("config.json")) is None:
        return None
    name = read_json(config, BaseConfig, "no configuration of a model", AGAIN).get("transformers_weights")
    if name is None:
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        if (name := next((name for name in names if find(name) is not None), None)) is None:
            return None
    name = _weights_name(name, config, WEIGHTS, INDEX)
    if not name.endswith(INDEX):
        return None, {}, [name]
    if (index := find(name)) is None:
        raise ValueError(f"{config} names {name}, which is not there: {AGAIN}")
    weight_map = read_json(index, WeightIndex, "no index of a checkpoint", AGAIN)["weight_map"]
    if not weight_map:
        raise ValueError(f"{index} names no tensors: {AGAIN}")
    weight_map = {key: _weights_name(file, index, WEIGHTS) for key, file in weight_map.items()}
    return name, weight_map, sorted(set(weight_map.values()))


def _weights_name(name: str, source: Path, *endings: str) -> str:
    """A name that a file of the checkpoint gives, of a file below the same folder with one of these endings."""
    name = inside(name, source)
    if not name.endswith(endings):
        raise ValueError(f"{source} names the weights {name!r}, which must end with {' or '.join(endings)}: {AGAIN}")
    return name


def _read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    path = folder / file
    try:
        with safe_open(path, framework="pt"):  # checks offsets, shapes and length, which the Hub's client does not
            pass
        header = parse_local_safetensors_file_metadata(path)
    except (SafetensorError, SafetensorsParsingError) as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error
    with path.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    return {
        key: StoredTensor(file, found.dtype, tuple(found.shape), *(start + at for at in found.data_offsets))
        for key, found in header.tensors.items()
    }


def find_sources(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, list[Source]]:
    """Name of each parameter of a model, which may be on meta, to what Transformers would load it from.

    As `from_pretrained` does it: renamed keys, added or removed prefixes, experts that are stacked while loading. Of
    parameters that come from one tensor together, the first stands for all.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {
        pattern: (tuple(converter.operations), part)
        for converter in converters
        for part, pattern in enumerate(converter.source_patterns)
    }
    parameters = model.state_dict()
    sources: dict[str, list[Source]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, parameters)
        sources.setdefault(name, []).append(Source(key, *of_pattern.get(pattern, ())))
    return sources


def axis_in_source(source: Source, stored: tuple[int, ...], shape: tuple[int, ...], axis: int) -> int | None:
    """Axis of a stored tensor that becomes `axis` of a parameter, (shape), when it is loaded; None where the tensor
    goes through other operations than stacking and transposing, or has another shape than that."""
    axes = list(range(len(shape)))  # axis of the parameter for each axis of the tensor
    for operation in reversed(source.operations):
        if isinstance(operation, MergeModulelist):
            del axes[operation.dim]
        elif isinstance(operation, Transpose):
            if not (operation.check_dims and stored == shape):
                first, second = operation.dim0, operation.dim1
                axes[first], axes[second] = axes[second], axes[first]
        else:
            return None
    if stored != tuple(shape[i] for i in axes) or axis not in axes:
        return None
    return axes.index(axis)
