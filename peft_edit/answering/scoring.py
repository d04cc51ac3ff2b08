"""Functions that tell how good answers are: found by their names, and their results checked."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..arguments import Argument, ArgumentError, one_line
from .options import LIKELIHOOD


Score = Callable[[dict[str, Any], list[str]], Any]


def scorer(score: str | Score) -> Score | None:
    """The function of a score, "module:function" or itself; None for the log-likelihood, which needs none.

    The module is looked for in the folder that the process runs in too.

    Raises:
        ValueError: there is no such function, or its module cannot be imported.
    """
    if score == LIKELIHOOD:
        return None
    if callable(score):
        return score
    name, colon, function = score.partition(":") if isinstance(score, str) else ("", "", "")
    if not (name and colon and function.isidentifier()):
        raise ArgumentError(Argument("score"), f" must be {LIKELIHOOD} or module:function, got {score!r}")
    try:
        with _here():
            found = getattr(importlib.import_module(name), function, None)
    except Exception as error:  # the module's own code may raise anything
        raise ArgumentError(
            Argument("score", score),
            f": the module {name} cannot be imported ({type(error).__name__}: {one_line(error)})",
        ) from error
    if not callable(found):
        raise ArgumentError(Argument("score", score), f": the module {name} has no function {function}")
    return found


def name_of(score: str | Score) -> str:
    """What records call a score."""
    return score if isinstance(score, str) else f"{score.__module__}:{getattr(score, '__qualname__', score)}"


@contextmanager
def _here() -> Iterator[None]:
    """Let modules of the folder that the process runs in be found, as `python` finds them."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def scores_of(function: Score, row: Mapping[str, Any], answers: Sequence[str]) -> list[float]:
    """What a function says of the answers to a row.

    Raises:
        ValueError: it raises an error, or gives something else than as many numbers.
    """
    name, place = name_of(function), f"row {row['id']}"
    try:
        scores = [float(score) for score in function(dict(row), list(answers))]
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(
            f"the score {name} failed on {place} ({type(error).__name__}: {one_line(error)}): it is to take a row and "
            "a list of answers, and to give as many numbers"
        ) from error
    if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"the score {name} gave {scores} for the {len(answers)} answers to {place}: it is to give as many numbers"
        )
    return scores
