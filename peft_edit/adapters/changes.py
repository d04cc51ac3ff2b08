"""How far a fit moves activations that it is not meant for: the first sign that an edit does harm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ..arguments import Argument, Note


# Relative change above which edits of some twenty layers of a model of 135 million parameters raised its perplexity
# on other text by a tenth or more.
LARGE = 0.1


class ChangeWarning(UserWarning):
    """A fit moves activations far that it is not meant for."""


def relative_change(chunks: Iterable[Tensor], edit: Callable[[Tensor], Tensor]) -> float:
    """Mean of ||out - h|| / ||h|| over activations, (r, d) each; those that are zero have none.

    Args:
        chunks: the activations.
        edit: h to out.
    """
    total, count = 0.0, 0
    for h in chunks:
        norm = h.norm(dim=1)
        change = ((edit(h) - h).norm(dim=1) / norm)[norm > 0]
        total, count = total + float(change.sum()), count + len(change)
    return total / max(count, 1)


def warn_of_change(changes: Mapping[int, float], rows: str, stacklevel: int = 3) -> None:
    """Warn of the largest relative change, where it is large or not finite.

    Args:
        changes: layer to the mean of ||out - h|| / ||h|| over some rows that are no demonstrations of the behaviour.
        rows: what these rows are, for the warning.
        stacklevel: of the warning.
    """
    if not changes:
        return
    layer = max(changes, key=lambda index: math.inf if math.isnan(changes[index]) else changes[index])
    if changes[layer] <= LARGE:
        return
    warnings.warn(
        Note(
            f"the edit changes {rows} by up to {100 * changes[layer]:.0f} %, at layer {layer}: measure what it does to "
            "other text (peft-edit evaluate with texts); a retain set, fewer layers or a lower ",
            *(Argument("strength"), " make it milder"),
        ),
        ChangeWarning,
        stacklevel=stacklevel,
    )
