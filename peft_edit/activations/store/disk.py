"""Full disks, said in one line: what is needed, what is free, and what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...files import NO_SPACE


@contextmanager
def reporting_full_disk(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Say of an error of a full disk what is needed, what is free, and what is kept.

    Args:
        path: folder that is written to.
        needed: bytes that the next file takes.
        kept: what the next run need not do again.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(f"{_no_space(path, needed)}; {kept}") from error


def check_space(path: Path, needed: int) -> None:
    """Raise OSError where a folder's disk has not so many bytes free."""
    if needed > shutil.disk_usage(path).free:
        raise OSError(_no_space(path, needed))


def _no_space(path: Path, needed: int) -> str:
    free = shutil.disk_usage(path).free
    return (
        f"no space left for {path}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; free some, then "
        "run the same again"
    )
