"""Writing a store, by one process or several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import files
from .disk import reporting_full_disk
from .index import write_tensors
from .layout import (
    FORMAT_VERSION,
    INDEX,
    META,
    STORE_FILE,
    StoreShape,
    check_folder,
    read_manifest,
)
from .reader import ActivationStore
from .shards import ShardFile, shard_digest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other run write to the folder `path`, which is created. The lock of a killed run is free at once.

    Raises:
        ValueError: another run has the folder, it cannot be written to, or holds something else than a store.
    """
    check_folder(path)
    with files.locked(path, f"another run is collecting into {path}: wait for it, or choose another folder"):
        yield


class StoreWriter:
    """Writes a store shard by shard. A killed run is continued by the next one with the same settings, and ends with
    the same bytes.

    Args:
        path: folder, see `locked`.
        settings: JSON values that say what is collected; `sites`, `modules`, `hidden_size` and `dtype` say what the
            shards hold.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]):
        self.path = Path(path)
        self.metadata = {"format_version": FORMAT_VERSION, **settings, "complete": False, "shards": []}
        self.shape = StoreShape.of(self.metadata)

    def begin(self) -> None:
        """Write the settings; what a store with other settings has left there is removed."""
        if (self.path / META).exists():
            # First, so that what a killed run leaves of a store does not pass for all of it.
            self._write_metadata(read_manifest(self.path) | {"complete": False})
        for file in self._files():
            if file.name != META:
                file.unlink()
        self._write_metadata(self.metadata)

    def _files(self) -> list[Path]:
        """Files of the store, the index first: without it shards are nothing."""
        found = [file for file in self.path.iterdir() if STORE_FILE.fullmatch(file.name) and file.name != files.LOCK]
        return sorted(found, key=lambda file: file.name != INDEX)

    def write_index(self, index: dict[str, Tensor]) -> None:
        write_tensors(self.path / INDEX, index)

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def digest(self, number: int, rows: int) -> str | None:
        """Checksum of a shard; None where it is not there, or damaged."""
        return shard_digest(self.shard(number), self.shape, rows)

    def open_shard(self, number: int, rows: int) -> ShardFile:
        return ShardFile(self.shard(number), self.shape, rows)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard at once: "site.layer" to (rows, d)."""
        rows = len(next(iter(tensors.values())))
        number = len(self.metadata["shards"])
        with self.open_shard(number, rows) as shard:
            for name, tensor in tensors.items():
                shard.write(name, 0, tensor)
            shard.finish()
        self.list_shard(rows, self.digest(number, rows))

    def list_shard(self, rows: int, digest: str) -> None:
        """Append a written shard to the manifest."""
        shards = self.metadata["shards"]
        first_row = shards[-1]["first_row"] + shards[-1]["rows"] if shards else 0
        file = self.shard(len(shards)).name
        shards.append({"file": file, "first_row": first_row, "rows": rows, "sha256": digest})

    def finish(self) -> ActivationStore:
        """Write the manifest: from now on the store can be read."""
        for file in self._files():
            if file.name.startswith((".", "generated-")):
                file.unlink()
        self.metadata["complete"] = True
        self._write_metadata(self.metadata)
        return ActivationStore(self.path)

    def _write_metadata(self, metadata: dict[str, Any]) -> None:
        text = json.dumps(metadata, indent=2) + "\n"
        with reporting_full_disk(self.path, len(text), "what was collected is kept"):
            files.write_text(self.path / META, text)
