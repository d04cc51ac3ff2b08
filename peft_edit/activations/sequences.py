"""A contrast set in tokens: what encoding hands on to batching."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy


_integers = partial(array, "q")


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


@dataclass
class Encoded:
    """A contrast set in tokens: each unique sequence once, and the demonstrations, which refer to them.

    Attributes:
        table: the sequences; a question's are a group, numbered as the questions are.
        row_ids: id of each question.
        pairs: for each demonstration, or pair of answers, three: its question, and the numbers of its sequences,
            negative and positive. For each plain text one: the number of its sequence.
        places: `tokens="answer"`: for each pair two, the first place within the answers that differs, and the number
            of places.
        neutral: question to the number of its neutral sequence; None where there are no neutral activations.
        prompts: token ids of the prompts that the model has to answer, each once.
        waiting: for each question whose neutral activation waits for an answer two: its number, and that of its prompt.
    """

    table: SequenceTable = field(default_factory=SequenceTable)
    row_ids: array = field(default_factory=_integers)
    pairs: array = field(default_factory=_integers)
    places: array = field(default_factory=_integers)
    neutral: dict[int, int] | None = None
    prompts: list[array] = field(default_factory=list)
    waiting: array = field(default_factory=_integers)

    def add_neutral(self, group: int, ids: Sequence[int]) -> None:
        """Add a question's neutral sequence, of which the last token counts."""
        self.neutral[group] = self.table.add(ids, len(ids) - 1, len(ids), group)
