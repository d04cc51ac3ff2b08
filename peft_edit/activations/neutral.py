"""Second stage of a collection: prompts -> the model's own answers, whose last tokens give neutral activations.

Each batch of answers is kept in a file of its own until the store is complete, so that none is generated twice.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import files
from ..json_files import read_json
from ..models.run import TokenProgress, batch_answers, batches_within
from ..processes import Processes
from .arguments import CollectArguments
from .sequences import Encoded
from .store.disk import reporting_full_disk


def answer_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    arguments: CollectArguments,
    path: Path,
    together: Processes,
) -> list[array]:
    """Greedy answers to the prompts of a contrast set, in their order; the processes share the work.

    Args:
        model: without a `PeftModel` around it.
        tokenizer: of the model.
        encoded: the contrast set in tokens.
        arguments: with the limits of batches and answers.
        path: folder of the store, where answers are kept.
        together: the processes that collect.
    """
    prompts, new = encoded.prompts, arguments.max_new_tokens
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    lengths = [len(prompts[i]) + new for i in order]
    limits = arguments.batch_size, arguments.max_tokens_per_batch
    batches = [[order[i] for i in places] for places in batches_within(lengths, *limits)]
    kept = [path / f"generated-{number:05d}.json" for number in range(len(batches))]

    mine = together.share(range(len(batches)))
    missing = [number for number in mine if _read(kept[number], batches[number]) is None]
    total, left = (sum(len(prompts[i]) + new for number in some for i in batches[number]) for some in (mine, missing))
    with together.bar("generating neutral answers", total, total - left) as bar:
        wanted, progress = [batches[number] for number in missing], TokenProgress(model, bar)
        generated = batch_answers(model, tokenizer, prompts, wanted, new, progress)
        for number, found in zip(missing, generated, strict=True):
            with reporting_full_disk(path, 0, "the answers so far are kept"):
                files.write_text(kept[number], json.dumps(found))
    together.wait()

    answers = [array("i")] * len(prompts)
    for file, batch in zip(kept, batches, strict=True):
        for place, answer in zip(batch, _read(file, batch), strict=True):
            answers[place] = array("i", answer)
    return answers


def _read(file: Path, batch: list[int]) -> list[list[int]] | None:
    """Kept answers of a batch; None where they are not there, or damaged."""
    try:
        answers = read_json(file, list[list[int]], "damaged", "it is generated again")
    except ValueError:
        return None
    whole = len(answers) == len(batch) and all(0 <= token < 2**31 for answer in answers for token in answer)
    return answers if whole else None
