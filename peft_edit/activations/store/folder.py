"""The folder of a store before anything is collected: its lock, and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import files
from .layout import FORMAT_VERSION, META, check_folder, read_manifest, store_files, write_metadata


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other run write to the folder `path`, which is created. The lock of a killed run is free at once.

    Raises:
        ValueError: another run has the folder, it cannot be written to, or holds something else than a store.
    """
    check_folder(path)
    with files.locked(path, f"another run is collecting into {path}: wait for it, or choose another folder"):
        yield


def begin(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a store, and remove what a store with other settings has left there.

    Args:
        path: folder, which is there, see `locked`.
        settings: JSON values that say what is collected; `sites`, `modules`, `hidden_size` and `dtype` say what the
            shards hold.
    """
    if (path / META).exists():
        # First, so that what a killed run leaves of a store does not pass for all of it.
        write_metadata(path, read_manifest(path) | {"complete": False})
    for file in store_files(path):
        if file.name != META:
            file.unlink()
    write_metadata(path, {"format_version": FORMAT_VERSION, **settings, "complete": False, "shards": []})
