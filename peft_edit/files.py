"""The one way to write: complete or not at all, synced, and with the permissions that the user's umask gives.

Whatever is written gets its name when its bytes are on the disk. Until then it has a hidden name beside its place, so
that both are on one filesystem, also where the place is a symbolic link to another one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError


LOCK = ".lock"
# Where the new files of a folder are until all are written.
NEW = ".peft_edit.new"
# What is read of a file at once, bytes.
BLOCK = 2**16
# Numbers of the errors of a full disk, or of a quota or a limit that is used up.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resolved(path: Path) -> Path:
    """The absolute path without links; raises ValueError where they lead back to themselves."""
    try:
        return path.resolve()
    except RuntimeError as error:  # before Python 3.13, which leaves it to whoever opens the path
        raise ValueError(f"{path} is a loop of symbolic links: choose another path") from error


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Let the error of a full disk say which path is meant: that of an open file does not, and safetensors has an error
    of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = [n for n in NO_SPACE if f"(os error {n})" in str(error) or n == getattr(error, "errno", None)]
        if not found:
            raise
        raise OSError(found[0], os.strerror(found[0]), str(path)) from error


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
def locked_place(path: Path) -> Iterator[None]:
    """Let one process of a user at a time write a place on this machine. The lock's file is with the temporary ones, so
    that none stays beside what others get; raises ValueError as `locked` does."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME")
    place = hashlib.sha256(f"{user} {resolved(path)}".encode()).hexdigest()[:16]
    busy = f"another run is writing {path}: wait for it, or choose another place"
    with locked(Path(tempfile.gettempdir()), busy, f"peft_edit-{place}.lock"):
        yield


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A hidden path to write a file to, which gets its name `path` when the `with` block ends without an error.

    Each call has a path of its own, so that two writers of one file do not mix. Through a symbolic link the file that
    it points to is replaced, and the link stays.
    """
    final = resolved(path)
    if final.exists() and not final.is_file():  # a device, for example, would be gone
        raise ValueError(f"{path} is no file that can be replaced: choose another path")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        with naming_full_disk(path):
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


def append_line(path: Path, text: str) -> None:
    """Add a line, or several, to a text file, on the disk when this returns. One that was cut off by an interruption
    goes first."""
    with naming_full_disk(path), path.open("a+b") as file:
        file.truncate(_end_of_lines(file))
        file.write(f"{text}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that `append_line` wrote, without one that was cut off; none of one that is not there."""
    held = path.read_bytes() if path.exists() else b""
    return held[: held.rfind(b"\n") + 1].decode().split("\n")[:-1]


def hidden(path: Path) -> Path:
    """Name of a file while its only writer writes it."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, final: Path) -> None:
    """Give a written file its name when its bytes are on the disk, so that it is complete whatever happens."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_permissions(path: Path) -> None:
    """Give a file that a library has written for its user alone the permissions that the umask gives."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()


@contextmanager
def replaced(folder: Path, last: str) -> Iterator[Path]:
    """A hidden folder, whose files move to `folder` when the `with` block ends without an error, those in folders in it
    to folders of the same names.

    One process of a user at a time replaces a folder on this machine, see `locked_place`.

    Args:
        folder: created where it is missing; other files in it stay.
        last: name of the file without which the others of a folder are nothing. The old one goes before the first new
            file comes, and the new one comes last. So an interruption leaves the old files, or the new ones, or files
            without that one: never new files with the old one.

    Raises:
        ValueError: another run is writing into the folder, or it cannot be written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_place(folder):
        made, work = not folder.exists(), folder / NEW
        try:
            folder.mkdir(exist_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error
        try:
            with naming_full_disk(folder):
                yield work
                _move(work, folder, last)
        finally:
            shutil.rmtree(work)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _move(work: Path, folder: Path, last: str) -> None:
    """Move the files of a folder into another; see `replaced` for their order."""
    new = sorted((file for file in work.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    targets = {file: resolved(folder / file.relative_to(work)) for file in new}
    staged: dict[Path, Path] = {}
    try:
        for file, target in targets.items():
            if target.is_dir():
                raise ValueError(f"{target} is a folder, where a file is to be written: move it away")
            target.parent.mkdir(parents=True, exist_ok=True)
            give_usual_permissions(file)
            staged[target] = hidden(target)  # beside its place, which a link may have put on another filesystem
            shutil.move(file, staged[target])
            sync(staged[target])
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise
    try:
        _publish_all(staged, last)
    except KeyboardInterrupt:  # now all are there, or soon
        _publish_all(staged, last)
        raise


def _publish_all(staged: dict[Path, Path], last: str) -> None:
    """Give written files their names, in this order; called again, it goes on."""
    for target, temporary in staged.items():
        if target.name == last and temporary.exists():
            target.unlink(missing_ok=True)
            sync(target.parent)
    for target, temporary in staged.items():
        if temporary.exists():
            os.replace(temporary, target)
            sync(target.parent)


@contextmanager
def growing_folder(path: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder that becomes `path` at the end of the `with` block. An interrupted run leaves it, and the next
    one goes on.

    .NAME.partial/       finished files under their names, the one that is being written as FILE.part
    .NAME.partial.json   what is written: a run that finds the same goes on
    .NAME.partial.lock   see `locked`

    Args:
        path: nothing is there, or an empty folder.
        identity: all that the contents follow from, as JSON holds it. Files that an earlier run of the same has
            finished are in the folder, see `publish`; those of another are removed.

    Raises:
        ValueError: something is at `path`, or another run is writing it.
    """
    path = resolved(path)
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
            with naming_full_disk(path):
                yield work
        except BaseException:
            if not any(work.iterdir()):  # there is nothing to go on from
                record.unlink()
                work.rmdir()
            raise
        for folder in (work, *(file for file in work.rglob("*") if file.is_dir())):
            sync(folder)
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


def check_writable(path: Path, what: str = "") -> None:
    """Raise ValueError where nothing can be written at a path, before the work is done."""
    resolved(path)
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir() and above != path:
        raise ValueError(f"{what or path} lies below the file {above}: choose another path")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{what or path} cannot be written to: choose another path")
