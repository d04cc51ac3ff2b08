"""Which blocks of a model are run once for many edits, within the memory that there is for what enters the others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from ..models.prefix import SharedPrefix, reproducing


logger = logging.getLogger(__name__)
# Largest difference of a model's output with and without its first blocks, relative to its largest value: the same
# kernels on the same numbers.
TOLERANCE = 1e-6


class SharedPasses:
    """Passes of a model over the same batches, from the first block on that an edit changes.

    Args:
        model: without a `PeftModel` around it, its adapters disabled.
        needs: numbers of first blocks that edits leave as they are, one for each edit.
        run: makes the first of the passes, and returns what they give, to see which blocks can be left out.
        samples: share of all passes' tokens that `run` reads, in (0, 1].
        memory: bytes for what is kept.
    """

    def __init__(
        self, model: nn.Module, needs: Iterable[int], *, run: Callable[[], Tensor], samples: float, memory: int
    ):
        wanted = Counter(needs)
        sizes = reproducing(SharedPrefix(model, wanted), run, TOLERANCE)
        if refused := sorted(set(wanted) - set(sizes) - {0}):
            logger.warning(
                "%s hands more from block to block than its hidden states, so that its first %s blocks are run for "
                "each setting",
                type(model).__name__,
                ", ".join(map(str, refused)),
            )
        room = int(memory * samples / max(sizes.values())) if sizes else 0
        self._prefix = SharedPrefix(model, most_useful(wanted, sorted(sizes), room))

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's decoder blocks."""
        return self._prefix.blocks

    @property
    def block_tokens(self) -> int:
        """Tokens, padding included, times the blocks that have run them."""
        return self._prefix.block_tokens

    def recording(self) -> AbstractContextManager[None]:
        """The passes inside the `with` block are those of the model without edits."""
        return self._prefix.recording()

    def skipping(self, need: int, first: int = 0) -> AbstractContextManager[None]:
        """The passes inside the `with` block, from the one with this place on, leave out as many first blocks as were
        kept, at most `need`."""
        return self._prefix.skipping(self._prefix.usable(need), first)


def most_useful(wanted: Counter[int], possible: list[int], room: int) -> list[int]:
    """At most `room` numbers of blocks to leave out, by which the fewest blocks are run.

    Args:
        wanted: number of blocks that an edit leaves as they are, to how many edits do.
        possible: rising, those that can be left out.
    """
    kept = list(possible)

    def loss(skip: int) -> int:
        """Blocks that are run if this one is not kept: edits fall back to the one before it."""
        place = kept.index(skip)
        before = kept[place - 1] if place else 0
        after = kept[place + 1] if place + 1 < len(kept) else max(wanted, default=0) + 1
        return (skip - before) * sum(count for need, count in wanted.items() if skip <= need < after)

    while len(kept) > room:
        kept.remove(min(kept, key=loss))
    return kept
