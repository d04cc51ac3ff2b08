"""The one way to write: complete or not at all, synced, and with the permissions that the user's umask gives.

Whatever is written gets its name when its bytes are on the disk. Until then it has a hidden name beside its place, so
that both are on one filesystem, also where the place is a symbolic link to another one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


LOCK = ".lock"


@contextmanager
def locked(folder: Path, busy: str, name: str = LOCK) -> Iterator[None]:
    """Let no other run write into a folder, which is created. The lock of a killed run is free at once.

    The lock's file stays where it is: a run that unlinked it would leave the next two runs a file each to lock.

    Args:
        folder: holds the lock's file.
        busy: what to say when another run has the lock.
        name: of the lock's file.

    Raises:
        ValueError: another run has the lock, or the folder cannot be written to.
    """
    lock = FileLock(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(busy) from None
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A hidden path to write a file to, which gets its name `path` when the `with` block ends without an error.

    Through a symbolic link the file that it points to is replaced, and the link stays.
    """
    final = path.resolve()
    temporary = hidden(final)
    mode = _begin(temporary)
    try:
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there: safetensors writes 0600
        publish(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, see `written`."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read, see `written`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def hidden(path: Path) -> Path:
    """Name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, final: Path) -> None:
    """Give a written file its name when its bytes are on the disk, so that it is complete whatever happens."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_permissions(path: Path) -> None:
    """Give a file that a library has written for its user alone the permissions that the umask gives."""
    probe = hidden(path)
    path.chmod(_begin(probe))
    probe.unlink()


def _begin(temporary: Path) -> int:
    """Make an empty file; returns the permissions that the umask gives it."""
    if temporary.exists():  # a killed run has left it, with permissions of its own
        temporary.unlink()
    temporary.touch()
    return temporary.stat().st_mode


@contextmanager
def replaced(folder: Path, last: str) -> Iterator[Path]:
    """A hidden folder, whose files move to `folder` when the `with` block ends without an error.

    Args:
        folder: created where it is missing; other files in it stay.
        last: name of the file without which the others are nothing. The old one goes before the first new file comes,
            and the new one comes last. So an interruption leaves the old files, or the new ones, or files without that
            one: never new files with the old one.

    Raises:
        ValueError: another run is writing into the folder.
    """
    with locked(folder, f"another run is writing {folder}: wait for it, or choose another folder"):
        work = folder / ".new"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
            files = sorted(work.iterdir(), key=lambda file: file.name == last)
            for file in files:
                give_usual_permissions(file)
                sync(file)
            if (work / last).exists():
                (folder / last).unlink(missing_ok=True)
                sync(folder)
            for file in files:
                os.replace(file, (folder / file.name).resolve())
            sync(folder)
        finally:
            shutil.rmtree(work)


@contextmanager
def growing_folder(path: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder that becomes `path` at the end of the `with` block. An interrupted run leaves it, and the next
    one goes on.

    .NAME.partial/       finished files under their names, the one that is being written as FILE.part
    .NAME.partial.json   what is written: a run that finds the same goes on
    .NAME.partial.lock   see `locked`

    Args:
        path: absolute; nothing is there, or an empty folder.
        identity: all that the contents follow from, as JSON holds it. Files that an earlier run of the same has
            finished are in the folder, see `publish`; those of another are removed.

    Raises:
        ValueError: something is at `path`, or another run is writing it.
    """
    work = path.parent / f".{path.name}.partial"
    record = work.with_name(f"{work.name}.json")
    busy = f"another run is writing {path}: wait for it, or choose another folder"
    with locked(path.parent, busy, f"{work.name}.lock"):
        check_free(path)
        work.mkdir(exist_ok=True)
        if any(work.iterdir()) and not record.exists():
            raise ValueError(f"{work} is in the way: remove it")
        if not record.exists() or record.read_text(encoding="utf-8") != json.dumps(identity):
            # The record is written last, so that no file of another run passes for one of this.
            for file in work.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            write_text(record, json.dumps(identity))
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
