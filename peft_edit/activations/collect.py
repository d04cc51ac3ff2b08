"""Collect a model's activations at the sites that are edited, for the answers of a contrast set.

Activations are those that an edit of the site receives: before the edit of the site itself, after the active edits of
earlier sites. Sequences are run once each, in batches of similar length, without the LM head; where that means fewer
tokens, a prompt is run once and its key-value cache serves all its answers. Rows are written as they come, so that
memory does not grow with the data.

Under `accelerate launch` or `torchrun` the processes share the work, each with a copy of the model; they end with one
store, that of one process.

A contrast set goes through `encode` (texts -> tokens), `neutral` (prompts -> the model's own answers), `batches`
(tokens -> index), `store.index`, `run` (index -> rows) and `store.writer` (rows -> files). None of them calls one
before it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import takes
from ..data import check_contrast_set
from ..data.chat import today
from ..data.prompts import settled
from ..data.texts import load_texts
from ..models.run import can_share_prompts, inference
from ..models.sites import unwrap
from ..processes import processes
from .arguments import CollectArguments
from .batches import make_index
from .encode import encode
from .neutral import answer_prompts
from .run import read_plan, run_shards
from .settings import Progress, progress_of, settings_of, time_of_store
from .store import ActivationStore, StoreWriter, begin, locked, write_index


logger = logging.getLogger(__name__)


@takes(CollectArguments)
def collect_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset | Iterable[str] | str | os.PathLike,
    path: str | os.PathLike,
    **options: Any,
) -> ActivationStore:
    """Run the answers of a contrast set, or plain texts, through a model and store the activations of its sites.

    A collection that was interrupted, even killed, goes on when the same is called again, and ends with the same bytes.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`, on one device or several. It needs
            no LM head where it generates no neutral answers.
        tokenizer: of that model.
        data: a contrast set, see `load_contrast_set`; with `tokens="all"` texts, see `load_texts`.
        path: folder of the store; created.
        options: see `CollectArguments`.

    Raises:
        ValueError: the options or the data are not as described, the model is no causal one or cannot generate and has
            to, a sequence is longer than it takes, an activation is not finite, an active edit depends on padding,
            another run writes to `path`, or it holds something else.
        OSError: the disk is too small, which is noticed before the first forward pass where possible, or full. What
            was written is kept, and the next call goes on from there.
    """
    arguments, path, bare, together = CollectArguments(**options), Path(path), unwrap(model), processes()
    data = load_texts(data) if arguments.of_texts else check_contrast_set(data)
    begun = together.from_main(time_of_store, path) if arguments.resume else None
    arguments = settled(tokenizer, arguments, begun or together.from_main(today))
    settings = settings_of(model, tokenizer, data, arguments)
    progress = together.from_main(progress_of, path, settings, arguments.resume)
    if progress is Progress.COMPLETE:
        logger.info("%s is complete already and is used as it is", path)
        return ActivationStore(path)
    encoded = None if progress.has_index else together.agree(encode, bare, tokenizer, data, arguments)
    with ExitStack() as stack:
        together.from_main(stack.enter_context, locked(path))
        stack.enter_context(inference(bare))
        # Looked at again: another run may have written in between.
        progress = together.from_main(progress_of, path, settings, arguments.resume)
        if not progress.has_index:
            if encoded is None:
                raise ValueError(f"another run has replaced what was in {path}: run the same again")
            if progress is Progress.NEW:
                together.from_main(begin, path, settings)
            answers = answer_prompts(bare, tokenizer, encoded, arguments, path, together)
            index, needed = make_index(encoded, answers, arguments, settings, share=can_share_prompts(bare))
            together.from_main(write_index, path, index, needed)
            del encoded, answers, index  # tokens are read as they are run
        if progress is not Progress.COMPLETE:
            plan = read_plan(path, arguments.tokens)
            writer = stack.enter_context(StoreWriter(path, plan.shards))
            missing = writer.missing(together.share(plan.shards))
            for shard, rows in stack.enter_context(closing(run_shards(bare, plan, missing, writer.metadata, together))):
                writer.write(shard, rows)
            together.from_main(writer.finish, together.gather(writer.digests))
    return ActivationStore(path)
