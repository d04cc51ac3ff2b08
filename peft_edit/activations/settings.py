"""What a collection is, as meta.json says it, and whether a folder holds the same already."""

from __future__ import annotations

import hashlib
import json
from enum import Enum, auto
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data.prompts import encode_prompts, listed_choices
from ..data.source import source_of
from ..models.fingerprint import active_adapters, adapters_fingerprint, fingerprint
from ..models.kind import check_causal, check_generates
from ..models.sites import find_sites, site_width, takes_input, unwrap
from ..tuners.layer import check_independent_of_padding
from .arguments import CollectArguments
from .store.layout import INDEX, META, StoreShape, check_folder, read_manifest, read_metadata
from .store.shards import has_size


# Questions whose prompts are encoded at once.
CHUNK = 256
# Of these settings a store may have others: fingerprints tell models and data apart.
DESCRIPTIONS = {"model", "revision", "data"}
# These decide how a collection goes on, not what a complete one holds.
BATCHING = {"batch_size", "max_tokens_per_batch"}


def settings_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Dataset, arguments: CollectArguments
) -> dict[str, Any]:
    """All that the contents of a store follow from.

    Raises:
        ValueError: the model, the data or the arguments cannot be collected, whatever the rows are.
    """
    check_causal(model)
    check_independent_of_padding(model)
    if arguments.neutral == "generated" or (arguments.neutral == "auto" and None in data["neutral"]):
        check_generates(model)
    bare = unwrap(model)
    modules = {
        site: find_sites(model, site, layers=arguments.layers, target_modules=arguments.target_modules)
        for site in arguments.chosen_sites
    }
    return {
        "sites": arguments.chosen_sites,
        "tokens": arguments.tokens,
        "neutral": _neutral(data, arguments),
        "answers": arguments.answers,
        **arguments.of_prompts,
        "max_new_tokens": arguments.max_new_tokens,
        "truncate": arguments.truncate,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "hidden_size": _width(bare, modules),
        "modules": {site: {str(layer): name for layer, name in names.items()} for site, names in modules.items()},
        "model": getattr(bare.config, "_name_or_path", None),
        "revision": getattr(bare.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "active_adapters": active_adapters(model),
        "adapters_fingerprint": adapters_fingerprint(model),
        "data": source_of(data),
        "data_fingerprint": _data_fingerprint(data, tokenizer, arguments),
        "batch_size": arguments.batch_size,
        "max_tokens_per_batch": arguments.max_tokens_per_batch,
    }


def _neutral(data: Dataset, arguments: CollectArguments) -> str | None:
    """Where the neutral activations are taken: "auto" is the text of a row that has one, and generated for others."""
    if arguments.neutral != "auto":
        return arguments.neutral
    texts = {text is not None for text in data["neutral"]}
    return " and ".join(name for name, has in (("text", True), ("generated", False)) if has in texts)


def _width(model: nn.Module, modules: dict[str, dict[int, str]]) -> int:
    """Width of the rows of all sites."""
    found = ((site, model.get_submodule(name)) for site, names in modules.items() for name in names.values())
    widths = {site_width(model, module, takes_input(site)) for site, module in found}
    if len(widths) > 1:
        what = ("sites", f" {', '.join(modules)}") if len(modules) > 1 else (Argument("target_modules"),)
        raise ArgumentError(
            *("the ", *what, f" are of different widths, {sorted(widths)}: collect them one by one"),
        )
    return widths.pop()


def _data_fingerprint(data: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: CollectArguments) -> str:
    """Hash of the texts, and of the prompts' token ids: those of another tokenizer or chat template differ."""
    digest = hashlib.sha256()
    if arguments.of_texts:
        for first in range(0, len(data), CHUNK):
            digest.update(json.dumps(tokenizer(data[first : first + CHUNK]["text"])["input_ids"]).encode())
        return digest.hexdigest()[:16]
    data = data.select_columns(["id", "prompt", "positives", "negatives", "neutral", "mc1_choices", "messages"])
    for first in range(0, len(data), CHUNK):
        rows = data[first : first + CHUNK]
        columns = {"messages": rows["messages"], "row_ids": rows["id"], "choices": listed_choices(rows)}
        prompts = encode_prompts(tokenizer, rows["prompt"], **columns, **arguments.of_prompts)
        del rows["mc1_choices"]  # which count where they stand in the prompts
        digest.update(json.dumps([prompts, rows], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def time_of_store(path: Path) -> str | None:
    """The time that the chat template was told when a store was begun; None where there is none, or it was not."""
    return read_metadata(path).get("template_time") if (path / META).exists() else None


class Progress(Enum):
    """How far a collection into a folder is."""

    NEW = auto()
    BEGUN = auto()  # the settings are written
    INDEXED = auto()  # the index too, and some of the shards
    COMPLETE = auto()

    @property
    def has_index(self) -> bool:
        return self in (Progress.INDEXED, Progress.COMPLETE)


def progress_of(path: Path, settings: dict[str, Any], resume: bool) -> Progress:
    """How far the collection into `path` is. A complete store goes back where its files are gone or too short.

    Raises:
        ValueError: the folder holds something else.
    """
    check_folder(path)
    if not (path / META).exists():
        return Progress.NEW
    if not resume:
        read_manifest(path)  # raises where it is no store's: it is replaced
        return Progress.NEW
    metadata = read_metadata(path)
    ignored = DESCRIPTIONS | BATCHING if metadata["complete"] else DESCRIPTIONS
    changed = [name for name in settings if name not in ignored and metadata.get(name) != settings[name]]
    if changed:
        what: list[str | Argument] = []
        for name in changed[:3]:
            what += ["; "] if what else []
            what += [Argument(name) if hasattr(CollectArguments, name) else name]
            what += [f" is {metadata.get(name)!r} there, {settings[name]!r} here"]
        raise ArgumentError(
            *(f"{path} holds a store collected with other arguments (", *what, "): choose another folder, or pass "),
            *(Argument("resume", False), " to replace it"),
        )
    if not (path / INDEX).exists():
        return Progress.BEGUN
    shape = StoreShape.of(metadata)
    whole = all(has_size(path / shard["file"], shape, shard["rows"]) for shard in metadata["shards"])
    return Progress.COMPLETE if metadata["complete"] and whole else Progress.INDEXED
