"""A store of activations that someone has already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ...arguments import Argument, ArgumentError, check_choice
from ...models.dtypes import FLOATING, dtype_name, is_quantised
from ...places import ROW_TOKENS, Site, normalise_layers
from .folder import begin, locked
from .index import write_index
from .shards import Shard
from .writer import StoreWriter


SIGNS = ("positive", "negative", "neutral")


def write_row_store(
    path: Path,
    sets: Mapping[str, Mapping[int, Tensor]],
    *,
    site: str,
    tokens: str,
    modules: Mapping[int, str] | None,
) -> None:
    """Write a store of one row an answer, see `ActivationStore.from_tensors`; `sets` maps sign to layer to (n, d)."""
    check_choice("site", site, get_args(Site))
    check_choice("tokens", tokens, ROW_TOKENS)
    layers = _check_tensors(sets)
    first = sets["positive"][layers[0]]
    n, d = first.shape
    settings = {
        "sites": [site],
        "tokens": tokens,
        "hidden_size": d,
        "modules": {site: {str(layer): (modules or {}).get(layer) for layer in layers}},
        "dtype": dtype_name(first.dtype),
        "model": None,
        "revision": None,
        "fingerprint": None,
        "active_adapters": [],
    }
    index = dict(zip(SIGNS, torch.arange(3 * n).view(3, n), strict=True)) | {"question": torch.arange(n)}
    shard = Shard(0, rows=3 * n, sequences=3 * n)
    with locked(path):
        if any(not file.name.startswith(".") for file in path.iterdir()):
            raise ValueError(f"{path} is not empty: choose another folder")
        begin(path, settings)
        write_index(path, index)
        with StoreWriter(path, [shard]) as writer:
            writer.write(shard, {f"{site}.{i}": torch.cat([sets[sign][i] for sign in SIGNS]) for i in layers})
            writer.finish()


def _check_tensors(sets: Mapping[str, Mapping[int, Tensor]]) -> list[int]:
    """The layers of all sets; raises ValueError where layers, shapes or dtypes differ."""
    positive, negative, neutral = (sets[sign] for sign in SIGNS)
    layers = normalise_layers(list(positive))
    if not set(layers) == set(negative) == set(neutral):
        names = [Argument(sign) for sign in SIGNS]
        raise ArgumentError(
            *(names[0], ", ", names[1], " and ", names[2]),
            f" must have the same layers, got {layers}, {list(negative)} and {list(neutral)}",
        )
    first = positive[layers[0]]
    for name, tensors in sets.items():
        for layer, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"every value must be a tensor, got {name}[{layer}] of {type(tensor).__name__}")
            if tensor.dim() != 2 or tensor.shape != first.shape:
                raise ValueError(
                    f"every tensor must be (demonstrations, hidden size) = {tuple(first.shape)}, "
                    f"got {name}[{layer}] of shape {tuple(tensor.shape)}"
                )
            if is_quantised(tensor.dtype) or tensor.dtype != first.dtype:
                raise ValueError(
                    f"every tensor must be of the same dtype, one of {', '.join(map(dtype_name, FLOATING.values()))}, "
                    f"got {name}[{layer}] of {dtype_name(tensor.dtype)} and positive[{layers[0]}] of "
                    f"{dtype_name(first.dtype)}"
                )
    return layers
