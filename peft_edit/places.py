"""Names of places: decoder blocks, sites in a block, tokens of an answer. They are plain values, so that options are
declared and read without torch and PEFT."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Literal, SupportsIndex, get_args

from .arguments import Argument, ArgumentError


# No model has as many decoder blocks.
MOST_LAYERS = 10_000

# What of a decoder block is edited or collected: the output of its MLP's output projection, its own, or what its
# attention's heads put out, which is the input of the attention's output projection.
OutputSite = Literal["mlp", "block"]
Site = Literal[OutputSite, "attention"]
LayerIndices = int | Iterable[int] | None
# Tokens of an answer that make one row of it.
RowTokens = Literal["last", "mean", "random"]
ROW_TOKENS = get_args(RowTokens)
# Tokens of which each is a row: those of the answers, and those of plain texts.
EVERY_TOKEN = ("answer", "all")


def normalise_layers(layers: LayerIndices, name: str = "layers") -> list[int] | None:
    """Sorted list of distinct block indices, which JSON can hold; None stays None (all blocks).

    Args:
        layers: block indices, 0 the first.
        name: of the argument or field that holds them, for the error.

    Raises:
        ValueError: an index is not an integer of 0 or more, or there is none.
    """
    if layers is None:
        return None
    indices = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not indices or any(isinstance(i, bool) or not isinstance(i, SupportsIndex) or i < 0 for i in indices):
        raise ArgumentError(
            Argument(name), f" must be block indices of 0 or more, got {layers!r}: pass an int, a list or a range"
        )
    return sorted({operator.index(i) for i in indices})


def parse_layers(text: str, name: str = "layers") -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    layers: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise ArgumentError(Argument(name), f" must be numbers and rising ranges such as 0-3,7, got {text!r}")
        if int(bounds[2] or bounds[1]) >= MOST_LAYERS:  # a range is written out before a model is asked for its own
            raise ArgumentError(Argument(name), f" must be block indices below {MOST_LAYERS}, got {text!r}")
        layers.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return sorted(layers)


def format_layers(layers: list[int]) -> str:
    """[0, 1, 2, 3, 7] -> "0-3,7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
