"""The index of a store: what is run, in which batches, and which rows each demonstration refers to.

It is written before the first forward pass, so that an interrupted collection goes on with the very same sequences and
batches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...arguments import ArgumentError
from ...files import written
from .disk import check_space, reporting_full_disk
from .format import UNKNOWN_DIGEST, header, memory
from .layout import AGAIN, INDEX


def write_index(path: Path, index: dict[str, Tensor], needed: int = 0) -> None:
    """Write the tensors of a store's index.

    Args:
        path: folder of the store.
        index: name to tensor.
        needed: bytes of the shards that follow.

    Raises:
        OSError: the disk is full, or too small for the shards.
    """
    check_space(path, needed)
    with reporting_full_disk(path, needed, "nothing was collected yet"):
        write_tensors(path / INDEX, index)


def read_index(path: Path, names: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors of a store's index.safetensors, memory-mapped; of `names` those that are there, None for all."""
    with _open_index(path) as tensors:
        found = tensors.keys()
        wanted = found if names is None else [name for name in names if name in found]
        return {name: tensors.get_tensor(name) for name in wanted if name not in without}


def read_token_ids(path: Path, start: int, stop: int) -> Tensor:
    """Part of the token ids in a store's index, (stop - start,) int32, of which nothing stays mapped."""
    with _open_index(path) as tensors:
        return tensors.get_slice("token_ids")[start:stop].clone()


@contextmanager
def _open_index(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path / INDEX, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{path / INDEX} cannot be read ({error}): ", *AGAIN) from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file without the copies of them that the library makes, and with a checksum."""
    # The widest first, as the library does: then each begins at a multiple of the size of its elements.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = hashlib.sha256(header(entries))
    for tensor in tensors.values():
        digest.update(memory(tensor))
    with written(path) as temporary, open(temporary, "wb") as file:
        file.write(header(entries, digest.hexdigest()))
        for tensor in tensors.values():
            file.write(memory(tensor))


def is_whole(path: Path) -> bool:
    """Whether a file is there and as `write_tensors` wrote it, in every byte."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        size = file.read(8)
        # A damaged length may be anything.
        first = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        found = re.search(rb'"sha256":"([0-9a-f]{64})"', first)
        if found is None:
            return False
        unknown = first[: found.start(1)] + UNKNOWN_DIGEST.encode() + first[found.end(1) :]
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(unknown))
        return digest.hexdigest().encode() == found[1]
