"""What a sweep has finished, one line of JSON each, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import append_line, locked, whole_lines
from ..json_files import digest_of


JOURNAL = "sweep.jsonl"
LOCK = ".sweep.lock"


class Journal:
    """Rows by their keys, which tell what was measured and from what.

    Args:
        folder: holds the file; None to keep the rows in memory only.
        origin: all that rows follow from, as JSON values, besides what each is of. Those of another stay in the file,
            and are not read.
    """

    def __init__(self, folder: Path | None, origin: Mapping[str, Any]):
        self._path = None if folder is None else folder / JOURNAL
        self._origin = digest_of(origin)
        self._rows: dict[str, dict[str, Any]] = {}
        for line in [] if self._path is None else whole_lines(self._path):
            try:
                row = json.loads(line)
                self._rows[row["key"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self._path} has a line that no sweep wrote ({error}): remove the file") from error

    def key(self, of: Any) -> str:
        """Of a row, given what it is of as JSON values."""
        return digest_of([self._origin, of])

    def get(self, of: Any) -> dict[str, Any] | None:
        """The row of something, where it is finished."""
        return self._rows.get(self.key(of))

    def add(self, of: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a finished row, which is returned with its key."""
        keyed = {"key": self.key(of), **row}
        # As it is read again: the same whether the sweep was interrupted or not.
        text = json.dumps(keyed)
        if self._path is not None:
            append_line(self._path, text)
        self._rows[keyed["key"]] = json.loads(text)
        return self._rows[keyed["key"]]


@contextmanager
def journal_in(folder: Path | None, origin: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in a folder, which no other sweep writes to meanwhile; raises ValueError where one does."""
    if folder is None:
        yield Journal(None, origin)
        return
    with locked(folder, f"another sweep is writing {folder}: wait for it, or choose another folder", LOCK):
        yield Journal(folder, origin)
