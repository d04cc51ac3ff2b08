"""A folder that appears when all of it is written, and whose writing goes on after an interruption.

.NAME.partial/       finished files under their names, the one that is being written as FILE.part
.NAME.partial.json   what is written: a run that finds the same goes on
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def growing_folder(path: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder that becomes `path` at the end of the `with` block.

    Args:
        path: absolute; nothing is there, or an empty folder.
        identity: all that the contents follow from, as JSON holds it. Files that an earlier run of the same has
            finished are in the folder, see `finish`; those of another are removed.

    Raises:
        ValueError: something is at `path`, or another run is writing it.
    """
    work, record = path.parent / f".{path.name}.partial", path.parent / f".{path.name}.partial.json"
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, path):
        check_free(path)
        if any(work.iterdir()) and not record.exists():
            raise ValueError(f"{work} is in the way: remove it")
        if not record.exists() or record.read_text(encoding="utf-8") != json.dumps(identity):
            # The record is written last, so that no file of another run passes for one of this.
            for file in work.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            record.write_text(json.dumps(identity), encoding="utf-8")
            sync(record)
        try:
            yield work
        except BaseException:
            if not any(work.iterdir()):  # there is nothing to go on from
                record.unlink()
                work.rmdir()
            raise
        sync(work)
        os.replace(work, path)
        record.unlink()
        sync(path.parent)


def check_free(path: Path) -> None:
    """Raise ValueError unless a finished folder can get this name."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: choose another folder")
    if path.is_mount():
        raise ValueError(f"{path} is a mount point, which no finished folder can replace: choose a folder inside it")
    above = next(parent for parent in path.parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise ValueError(f"{above} cannot be written to: choose another folder")


def finish(part: Path, file: Path) -> None:
    """Give a file its name only when its bytes are on the disk, so that it is complete whatever happens."""
    sync(part)
    os.replace(part, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(work: Path, path: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The system ends this when the process ends, however it ends."""
    import fcntl  # not on Windows, where the rest of the package can be imported

    busy = f"another run is writing {path}: wait for it, or choose another folder"
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        # A run that ended in between has moved the folder to its final name.
        if not work.exists() or os.fstat(descriptor).st_ino != work.stat().st_ino:
            raise ValueError(busy)
        yield
    finally:
        os.close(descriptor)
