"""Writing the rows of a store, by one process or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from .disk import reporting_full_disk
from .layout import StoreShape, read_metadata, store_files, write_metadata
from .shards import Shard, ShardFile, shard_digest


logger = logging.getLogger(__name__)


class StoreWriter:
    """Writes shards from their rows. A killed run is continued by the next one, and ends with the same bytes.

    As a context manager it leaves no half-written shard.

    Args:
        path: folder, in which the settings and the index stand already, see `begin` and `write_index`.
        shards: all of the store.

    Attributes:
        digests: number of each shard that is known to be whole, to its checksum.
    """

    def __init__(self, path: Path, shards: Sequence[Shard]):
        self.path, self.shards = path, shards
        self.metadata = read_metadata(path)
        self.shape = StoreShape.of(self.metadata)
        self.digests: dict[int, str] = {}
        self._sequences = sum(shard.sequences for shard in shards)
        self._kept = 0  # of them
        self._file: ShardFile | None = None
        self._row = 0
        self._open = ExitStack()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of some shards that are not there, or damaged."""
        for shard in shards:
            file = self.path / shard.file
            digest = shard_digest(file, self.shape, shard.rows)
            if digest is not None:
                self._keep(shard, digest)
            elif file.exists():
                logger.warning("%s is damaged: it is collected again", file)
        return [shard for shard in shards if shard.number not in self.digests]

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Append rows to a shard, "site.layer" to (r, d). With its last row the shard is on the disk."""
        needed, kept = shard.rows * self.shape.row_bytes, f"{self._kept:,} of {self._sequences:,} sequences are kept"
        with reporting_full_disk(self.path, needed, kept):
            if self._file is None:
                self._file = self._open.enter_context(ShardFile(self.path / shard.file, self.shape, shard.rows))
                self._row = 0
            for name, rows in tensors.items():
                self._file.write(name, self._row, rows)
            self._row += len(rows)
            if self._row == shard.rows:
                self._keep(shard, self._file.publish())
                self._open.close()
                self._file = None

    def _keep(self, shard: Shard, digest: str) -> None:
        self.digests[shard.number] = digest
        self._kept += shard.sequences

    def finish(self, digests: Sequence[Mapping[int, str]] = ()) -> None:
        """Write the manifest: from now on the store can be read.

        Args:
            digests: those of all writers that wrote shards.
        """
        for of_writer in digests:
            self.digests |= of_writer
        for file in store_files(self.path):
            if file.name.startswith((".", "generated-")):
                file.unlink()
        listed, first_row = [], 0
        for shard in self.shards:
            digest = self.digests[shard.number]
            listed.append({"file": shard.file, "first_row": first_row, "rows": shard.rows, "sha256": digest})
            first_row += shard.rows
        write_metadata(self.path, self.metadata | {"complete": True, "shards": listed})
