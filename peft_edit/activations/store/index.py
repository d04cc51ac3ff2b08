"""Writing the index of a store: what is run, in which batches, and which rows each demonstration refers to.

It is written before the first forward pass, so that an interrupted collection goes on with the very same sequences and
batches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ...files import written
from .disk import check_space, reporting_full_disk
from .format import header, memory
from .layout import INDEX


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
