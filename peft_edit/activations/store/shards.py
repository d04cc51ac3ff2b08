"""One shard of a store: a safetensors file whose tensors are written a few rows at a time.

Its layout follows from the store's sites, layers, width, dtype and the number of rows, so that nothing but the batch at
hand is in memory, and so that a damaged header is noticed. The library writes whole tensors only; the format is
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import hidden, publish, written
from ...models.dtypes import safetensors_name
from .layout import dtype_of


UNKNOWN_DIGEST = "0" * 64
READ_BYTES = 2**20


@dataclass(frozen=True)
class StoreShape:
    """What all shards of a store have in common.

    Attributes:
        names: of the tensors, "site.layer".
        width: d.
        dtype: of all of them.
    """

    names: tuple[str, ...]
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> StoreShape:
        """Of the store with this meta.json."""
        modules = metadata["modules"]
        names = [f"{site}.{layer}" for site in metadata["sites"] for layer in sorted(modules[site], key=int)]
        return cls(tuple(names), metadata["hidden_size"], dtype_of(metadata))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all tensors."""
        return len(self.names) * self.width * self.dtype.itemsize

    def header(self, rows: int, digest: str = UNKNOWN_DIGEST) -> bytes:
        """First bytes of a shard with so many rows, up to its tensors."""
        return _header(dict.fromkeys(self.names, (self.dtype, (rows, self.width))), {"sha256": digest})


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """First bytes of a file with tensors of these dtypes and shapes, one after the other."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": safetensors_name(dtype), "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file without the copies of them that the library makes, and with a checksum."""
    # The widest first, as the library does: then each begins at a multiple of the size of its elements.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = hashlib.sha256(_header(entries, {"sha256": UNKNOWN_DIGEST}))
    for tensor in tensors.values():
        digest.update(_bytes(tensor))
    with written(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(entries, {"sha256": digest.hexdigest()}))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def is_whole(path: Path) -> bool:
    """Whether a file is there and as `write_tensors` wrote it, in every byte."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        size = file.read(8)
        # A damaged length may be anything.
        header = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        found = re.search(rb'"sha256":"([0-9a-f]{64})"', header)
        if found is None:
            return False
        unknown = header[: found.start(1)] + UNKNOWN_DIGEST.encode() + header[found.end(1) :]
        return _digest(file.fileno(), len(header), hashlib.sha256(unknown)).encode() == found[1]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


class ShardFile:
    """Writes one shard: `write` rows in any order, then `finish`. As a context manager it leaves nothing half-written.

    Args:
        path: of the finished shard; until then it has a hidden name.
        shape: of the store.
        rows: of this shard.

    Raises:
        OSError: the disk is full, which is noticed before the first row is written.
    """

    def __init__(self, path: Path, shape: StoreShape, rows: int):
        self.path, self.shape, self.rows = path, shape, rows
        self.start = len(shape.header(rows))
        self.size = self.start + rows * shape.row_bytes
        self._temporary = hidden(path)

    def __enter__(self) -> ShardFile:
        self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(self._file, 0, self.size)
            else:
                os.truncate(self._file, self.size)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write rows, (r, d), of one tensor from `first_row` on."""
        width = self.shape.width * self.shape.dtype.itemsize
        place = self.start + (self.shape.names.index(name) * self.rows + first_row) * width
        data = _bytes(rows.detach().to("cpu", self.shape.dtype))
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def finish(self) -> None:
        """Write the header, sync, and give the file its name."""
        os.pwrite(self._file, self.shape.header(self.rows, _digest(self._file, self.start)), 0)
        publish(self._temporary, self.path)

    def __exit__(self, kind: type | None, *error: object) -> None:
        os.close(self._file)
        if kind is not None:
            self._temporary.unlink(missing_ok=True)


def has_size(path: Path, shape: StoreShape, rows: int) -> bool:
    """Whether a shard is there and as long as its rows; what they are is not looked at."""
    return path.is_file() and path.stat().st_size == len(shape.header(rows)) + rows * shape.row_bytes


def shard_digest(path: Path, shape: StoreShape, rows: int) -> str | None:
    """Checksum of a shard's tensors; None where the file is missing, truncated or altered in any byte."""
    if not has_size(path, shape, rows):
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        start = len(shape.header(rows))
        digest = _digest(file, start)
        return digest if os.pread(file, start, 0) == shape.header(rows, digest) else None
    finally:
        os.close(file)


def _digest(file: int, place: int, digest: hashlib._Hash | None = None) -> str:
    """SHA-256 of an open file from a place on, after what `digest` has seen."""
    digest = hashlib.sha256() if digest is None else digest
    while data := os.pread(file, READ_BYTES, place):
        digest.update(data)
        place += len(data)
    return digest.hexdigest()
