"""Sequences of token ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy


class SequenceTable:
    """Unique sequences of token ids, in the order in which they were added, without a Python object for each id."""

    def __init__(self) -> None:
        self.starts, self.stops, self.groups = array("q"), array("q"), array("q")
        self._ids, self._ends = array("i"), array("q", [0])
        self._numbers: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, ids: Sequence[int], start: int, stop: int, group: int) -> int:
        """Number of the sequence whose rows from `start` to `stop` are kept; a question's sequences are a group."""
        content = array("i", ids)
        digest = hashlib.blake2b(array("i", (start, stop)).tobytes() + content.tobytes(), digest_size=16).digest()
        number = self._numbers.setdefault(digest, len(self))
        if number == len(self):
            self._ids += content
            self._ends.append(len(self._ids))
            self.starts.append(start)
            self.stops.append(stop)
            self.groups.append(group)
        return number

    def ids(self, number: int) -> numpy.ndarray:
        """Of one sequence, int32; while such a view is alive, nothing can be added."""
        return numpy.frombuffer(self._ids, numpy.int32)[self._ends[number] : self._ends[number + 1]]

    def lengths(self) -> numpy.ndarray:
        return numpy.diff(self._ends)
