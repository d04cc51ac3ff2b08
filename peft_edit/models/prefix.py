"""Running only the upper decoder blocks of a model: what enters them is computed once, and used for many edits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..arguments import one_line
from .sites import decoder_blocks, unwrap


logger = logging.getLogger(__name__)


class SharedPrefix:
    """Forward passes of one model over the same batches, with and without its first blocks.

    `recording` keeps what the blocks give in each pass. `skipping` lets the same passes, in the same order, begin at a
    later block: the blocks before it return what was kept, and the model's own code around them runs as ever, so that
    masks, positions and heads are those of its architecture. Edits of a skipped block's output still run.

    Transformers reads the length of a key-value cache from its first layer: skipped blocks put placeholders of the
    right length there.

    Args:
        model: a Transformers model, bare or in a `PeftModel`.
        skips: numbers of first blocks that passes will leave out.
    """

    def __init__(self, model: nn.Module, skips: Iterable[int] = ()):
        bare = unwrap(model)
        self.blocks = [bare.get_submodule(name) for name in decoder_blocks(bare).values()]
        self.skips = sorted(set(skips) - {0})
        # Number of skipped blocks to the outputs of the last of them, one for each pass.
        self._kept: dict[int, list[Any]] = {}
        # Tokens, padding included, times the blocks that have run them.
        self.block_tokens = 0

    def nbytes(self, skip: int) -> int:
        """Memory of what is kept for so many blocks."""
        return sum(_hidden(output).nbytes for output in self._kept[skip])

    def usable(self, skip: int) -> int:
        """The most blocks, at most `skip`, that can be left out."""
        return max((kept for kept in self._kept if kept <= skip), default=0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the blocks give in the passes inside the `with` block, which replaces what was kept before."""
        self._kept = {skip: [] for skip in self.skips}

        def keep(skip: int, block: nn.Module, args: tuple, output: Any) -> None:
            self._kept[skip].append(_copy(output))  # a later block may add to it in place

        handles = [self.blocks[skip - 1].register_forward_hook(partial(keep, skip)) for skip in self.skips]
        try:
            with self._counting(self.blocks):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipping(self, skip: int, first: int = 0) -> Iterator[None]:
        """Leave out so many first blocks in the passes inside the `with` block, those of `recording` from a place on;
        0 leaves out none."""
        kept, current = iter(self._kept[skip][first:] if skip else ()), [None]

        def passed(index: int, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                current[0] = next(kept)
            given = args[0] if args else kwargs["hidden_states"]
            if given.shape[:2] != _hidden(current[0]).shape[:2]:
                raise RuntimeError(f"a pass over {tuple(given.shape)} follows one over {_hidden(current[0]).shape}")
            _fill_cache(self.blocks[index], given, (*args, *kwargs.values()))
            return _copy(current[0])

        skipped = self.blocks[:skip]
        before = [vars(block).get("forward") for block in skipped]  # accelerate has put its own there
        try:
            for index, block in enumerate(skipped):
                block.forward = partial(passed, index)
            with self._counting(self.blocks[skip:]):
                yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward

    @contextmanager
    def _counting(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        def count(block: nn.Module, args: tuple, output: Any) -> None:
            self.block_tokens += _hidden(output).shape[:2].numel()

        handles = [block.register_forward_hook(count) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def reproducing(prefix: SharedPrefix, run: Callable[[], Tensor], tolerance: float) -> dict[int, int]:
    """The numbers of blocks that can be left out of a model's passes, those with which it gives what it gives as a
    whole, to the bytes that are kept for each. Some models hand more than their hidden states from block to block.

    Args:
        prefix: of the model.
        run: makes some passes, the same at each call.
        tolerance: largest difference of what it returns, relative to its largest value.
    """
    with prefix.recording():
        expected = run()
    found = {}
    for skip in prefix.skips:
        try:
            with prefix.skipping(skip):
                given = run()
        # A model that looks for more than hidden states may raise anything: then its blocks are not left out.
        except Exception as error:
            logger.info("the first %d blocks cannot be left out: %s", skip, one_line(error))
            continue
        if float((given - expected).abs().max()) <= tolerance * float(expected.abs().max()):
            found[skip] = prefix.nbytes(skip)
    return found


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _copy(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)((output[0].clone(), *output[1:]))
    return output.clone()


def _fill_cache(block: nn.Module, hidden: Tensor, arguments: tuple) -> None:
    """Let the layers of a block in a cache be as long as if it had run. Their values are read by the block alone."""
    cache = next((value for value in arguments if isinstance(value, Cache)), None)
    if cache is not None:
        placeholder = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
        for layer in sorted({m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)}):
            cache.update(placeholder, torch.zeros_like(placeholder), layer)
