"""One shard of a store: a safetensors file whose tensors are written a few rows at a time.

Its layout follows from the store's sites, layers, width, dtype and the number of rows, so that nothing but the batch at
hand is in memory, and so that a damaged header is noticed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...files import hidden, publish
from .format import memory
from .layout import StoreShape, shard_name


@dataclass(frozen=True)
class Shard:
    """A part of a store that is written, and lost, as a whole.

    Attributes:
        number: its place among the shards.
        rows: how many it holds.
        sequences: that these rows come from.
    """

    number: int
    rows: int
    sequences: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return shard_name(self.number)


class ShardFile:
    """Writes one shard: `write` rows in any order, then `publish`. As a context manager it leaves nothing half-written.

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
        data = memory(rows.detach().to("cpu", self.shape.dtype))
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def publish(self) -> str:
        """Write the header, sync, and give the file its name; returns the checksum of its tensors."""
        digest = _tensors_digest(self._temporary, self.start)
        os.pwrite(self._file, self.shape.header(self.rows, digest), 0)
        publish(self._temporary, self.path)
        return digest

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
    start = len(shape.header(rows))
    digest = _tensors_digest(path, start)
    with open(path, "rb") as file:
        return digest if file.read(start) == shape.header(rows, digest) else None


def _tensors_digest(path: Path, start: int) -> str:
    """SHA-256 of a file from a place on."""
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()
