"""Collect a model's activations at the sites that are edited, for the answers of a contrast set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import check_contrast_set
from ..data.prompts import encode_prompts, listed_choices, resolve_prompt_format
from ..files import write_text
from ..models.fingerprint import active_adapters, adapters_fingerprint, fingerprint
from ..models.run import batches_within, can_share_prompts, greedy_answers, inference, length_limit
from ..models.sites import LayerIndices, find_sites, is_linear, out_features, text_config, unwrap
from ..processes import Processes, processes
from ..tuners.layer import check_independent_of_padding
from .encode import CHUNK, Draft, Options, make_draft
from .plan import Batch, Plan
from .recorder import Recorder
from .run import Runner
from .store import (
    INDEX,
    META,
    ROW_TOKENS,
    ActivationStore,
    StoreShape,
    StoreWriter,
    check_folder,
    has_size,
    is_whole,
    locked,
    read_index,
    read_manifest,
    read_metadata,
    read_token_ids,
)
from .store.disk import check_space, reporting_full_disk


logger = logging.getLogger(__name__)

SITES = ("mlp", "block")
CHOICES = {
    "tokens": (*ROW_TOKENS, "answer"),
    "neutral": ("auto", "generated", "prompt", "text", None),
    "answers": ("first", "random", "all"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def collect_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    path: str | os.PathLike,
    *,
    site: str | Sequence[str] = "mlp",
    target_modules: Iterable[str] | str | None = None,
    layers: LayerIndices = None,
    tokens: str = "last",
    neutral: str | None = "auto",
    answers: str = "first",
    prompt_format: str = "auto",
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    max_tokens_per_batch: int = 8192,
    dtype: str = "float32",
    seed: int = 0,
    truncate: bool = False,
    resume: bool = True,
) -> ActivationStore:
    """Run the answers of a contrast set through a model and store the activations of its sites on disk.

    Activations are those that an edit of the site receives: before the edit of the site itself, after the active
    edits of earlier sites. Sequences are run once each, in batches of similar length, without the LM head; where that
    means fewer tokens, a prompt is run once and its key-value cache serves all its answers. Rows are written as they
    come, so that memory does not grow with the data.

    A collection that was interrupted, even killed, goes on when the same is called again, and ends with the same bytes.
    Under `accelerate launch` or `torchrun` the processes share the work, each with a copy of the model; they end with
    one store, that of one process.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`, on one device or several.
        tokenizer: of that model.
        data: a contrast set, see `load_contrast_set`.
        path: folder of the store; created.
        site: "mlp" for the output of the MLP's output projection, "block" for the output of the decoder block, or
            ("mlp", "block") for both in one pass.
        target_modules: names or regular expression of other modules, one in a block.
        layers: indices of the blocks; None for all.
        tokens: which tokens of an answer: "last", "mean", "random" (one row an answer), "answer" (every token).
        neutral: where the neutral activation is taken: "generated", the last token of the model's own greedy answer;
            "prompt", the last token of the prompt; "text", the last token of the `neutral` column. "auto": "text" where
            the column has one, else "generated". None for none, which `tokens="answer"` implies.
        answers: which answers demonstrate: the "first" of each list, a "random" one, or "all", every positive with
            every negative. `tokens="answer"` takes all.
        prompt_format: "auto" (chat where the tokenizer has a template, else plain), "chat", "plain", "few_shot_qa" or
            "lettered_choices", see `encode_answers`.
        max_new_tokens: longest generated answer.
        batch_size: most sequences in a batch; None for no limit of its own.
        max_tokens_per_batch: most tokens in a batch, padding included. Cached prompts can take as many again.
        dtype: of the store: "float32", "bfloat16" or "float16".
        seed: of the random answers and tokens.
        truncate: cut prompts on the left, BOS excepted, where a row's longest answer is more than the model takes.
        resume: continue or reuse a store at `path` that was begun with the same arguments; False replaces it.

    Raises:
        ValueError: an argument or the data are not as described, a sequence is longer than the model takes, an
            activation is not finite, an active edit depends on padding, another run writes to `path`, or it holds
            something else.
        OSError: the disk is too small, which is noticed before the first forward pass where possible, or full. What
            was written is kept, and the next call goes on from there.
    """
    for name, value in {"tokens": tokens, "neutral": neutral, "answers": answers, "dtype": dtype}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
    for name, value in {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "max_tokens_per_batch": max_tokens_per_batch,
    }.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    sites = [site] if isinstance(site, str) else list(dict.fromkeys(site or ()))
    if not sites or set(sites) - set(SITES):
        raise ValueError(f"site must be one of {', '.join(map(repr, SITES))} or both, got {site!r}")
    if len(sites) > 1 and target_modules is not None:
        raise ValueError("target_modules replace one site: collect several sites without them")
    check_contrast_set(data)
    check_independent_of_padding(model)
    if tokens == "answer":
        neutral, answers = None, "all"
    path, bare, together = Path(path), unwrap(model), processes()
    modules = {s: find_sites(model, s, layers=layers, target_modules=target_modules) for s in sites}
    options = Options(
        tokens=tokens,
        neutral=neutral,
        answers=answers,
        prompt_format=resolve_prompt_format(tokenizer, prompt_format),
        seed=seed,
        max_new_tokens=max_new_tokens,
        truncate=truncate,
        limit=length_limit(bare),
        vocabulary=bare.get_input_embeddings().weight.shape[0],
    )
    settings = {
        "sites": sites,
        "tokens": tokens,
        "neutral": neutral,
        "answers": answers,
        "prompt_format": options.prompt_format,
        "max_new_tokens": max_new_tokens,
        "truncate": truncate,
        "dtype": dtype,
        "seed": seed,
        "hidden_size": _width(bare, modules),
        "modules": {s: {str(layer): name for layer, name in names.items()} for s, names in modules.items()},
        "model": getattr(bare.config, "_name_or_path", None),
        "revision": getattr(bare.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "active_adapters": active_adapters(model),
        "adapters_fingerprint": adapters_fingerprint(model),
        "data": {"name": data.info.dataset_name, "split": data.split and str(data.split), "rows": len(data)},
        "data_fingerprint": _data_fingerprint(data, tokenizer, options.prompt_format),
        "batch_size": batch_size,
        "max_tokens_per_batch": max_tokens_per_batch,
    }
    if together.from_main(lambda: _stage(path, settings, resume)) == "complete":
        logger.info("%s is complete already and is used as it is", path)
        return ActivationStore(path)
    with ExitStack() as stack:
        together.from_main(lambda: stack.enter_context(locked(path)) if together.is_main else None)
        # Looked at again: another run may have ended in between.
        stage = together.from_main(lambda: _stage(path, settings, resume))
        if stage != "complete":
            stack.enter_context(inference(bare))
            writer = StoreWriter(path, settings if stage == "new" else read_metadata(path))
            collection = _Collection(bare, tokenizer, writer, together)
            if stage != "running":
                collection.plan(data, options, begun=stage == "begun")
            collection.run()
    together.wait()
    return ActivationStore(path)


def _stage(path: Path, settings: dict[str, Any], resume: bool) -> str:
    """How far the collection into `path` is: "new", "begun" (settings are written), "running" (the index too, and some
    of the shards) or "complete". A complete store goes back where its files are gone or too short."""
    check_folder(path)
    if not (path / META).exists():
        return "new"
    if not resume:
        read_manifest(path)  # raises where it is no store's: it is replaced
        return "new"
    metadata = read_metadata(path)
    # The batches decide how a collection goes on, not what a complete one holds; the fingerprint tells models apart.
    ignored = {"model", "revision", "data"}
    ignored |= {"batch_size", "max_tokens_per_batch"} if metadata["complete"] else set()
    changed = [name for name in settings if name not in ignored and metadata.get(name) != settings[name]]
    if changed:
        what = "; ".join(f"{name} is {metadata.get(name)!r} there, {settings[name]!r} here" for name in changed[:3])
        raise ValueError(
            f"{path} holds a store collected with other arguments ({what}): "
            "choose another folder, or pass resume=False to replace it"
        )
    if not (path / INDEX).exists():
        return "begun"
    shape = StoreShape.of(metadata)
    whole = all(has_size(path / shard["file"], shape, shard["rows"]) for shard in metadata["shards"])
    return "complete" if metadata["complete"] and whole else "running"


@dataclass
class _Collection:
    """The steps of a collection, each of which an interrupted run leaves such that the next one goes on from it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    writer: StoreWriter
    together: Processes

    @property
    def settings(self) -> dict[str, Any]:
        return self.writer.metadata

    def plan(self, data: Dataset, options: Options, begun: bool) -> None:
        """Write the settings, let the model answer prompts, and write the index."""
        draft = self.together.agree(lambda: make_draft(self.tokenizer, data, options))
        if draft.prompts and self.model.base_model is self.model:
            raise ValueError(
                f"{type(self.model).__name__} cannot generate neutral answers: load the model with its LM head "
                "(AutoModelForCausalLM), or pass neutral='prompt'"
            )
        if not begun:
            self.together.from_main(self.writer.begin)
        limits = self.settings["batch_size"], self.settings["max_tokens_per_batch"]
        answers = self._answers(draft, limits)
        index = draft.finish(
            answers,
            share=can_share_prompts(self.model),
            batch_size=limits[0],
            max_tokens=limits[1],
            row_bytes=self.writer.shape.row_bytes,
        )
        self.together.from_main(lambda: self._write_index(index))

    def _write_index(self, index: dict[str, Tensor]) -> None:
        plan = Plan(index, self.settings["tokens"])
        needed = sum(map(plan.rows, range(len(plan)))) * self.writer.shape.row_bytes
        check_space(self.writer.path, needed)
        with reporting_full_disk(self.writer.path, needed, "nothing was collected yet"):
            self.writer.write_index(index)

    def _answers(self, draft: Draft, limits: tuple[int | None, int]) -> list[list[int]]:
        """The model's own answers, each batch of which is kept in a file of its own until the index is written."""
        if not draft.prompts:
            return []
        order = sorted(range(len(draft.prompts)), key=lambda i: -len(draft.prompts[i]))
        new = self.settings["max_new_tokens"]
        all_batches = [
            [order[i] for i in batch] for batch in batches_within([len(draft.prompts[i]) + new for i in order], *limits)
        ]
        files = [self.writer.path / f"generated-{number:05d}.json" for number in range(len(all_batches))]
        mine = self.together.share(range(len(all_batches)))
        missing = [number for number in mine if _read_answers(files[number], all_batches[number]) is None]
        done = sum(len(all_batches[number]) for number in mine) - sum(len(all_batches[number]) for number in missing)
        with self._progress("generating neutral answers", sum(len(all_batches[n]) for n in mine), done) as progress:
            wanted = [all_batches[number] for number in missing]
            answers = greedy_answers(self.model, self.tokenizer, draft.prompts, wanted, new)
            for number, batch in zip(missing, answers, strict=True):
                with reporting_full_disk(self.writer.path, 0, "the answers so far are kept"):
                    write_text(files[number], json.dumps(batch))
                progress.update(len(batch))
        self.together.wait()
        answers: list[list[int]] = [[]] * len(draft.prompts)
        for file, batch in zip(files, all_batches, strict=True):
            for place, answer in zip(batch, _read_answers(file, batch), strict=True):
                answers[place] = answer
        return answers

    def run(self) -> None:
        """Collect the shards that are missing, and write the manifest."""
        path, writer = self.writer.path, self.writer
        index = read_index(path, without=["token_ids"])
        plan = Plan(index, self.settings["tokens"], partial(read_token_ids, path))
        if not is_whole(path / INDEX):
            raise ValueError(f"{path / INDEX} is damaged: delete it to have it written again")
        rows = [plan.shard_rows(number) for number in range(len(plan.shards))]
        mine = self.together.share(range(len(plan.shards)))
        digests = {number: writer.digest(number, rows[number]) for number in mine}
        for number, digest in digests.items():
            if digest is None and writer.shard(number).exists():
                logger.warning("%s is damaged: it is collected again", writer.shard(number))
        sizes = {number: sum(len(batch.sequences) for batch in plan.shards[number]) for number in mine}
        done = sum(size for number, size in sizes.items() if digests[number] is not None)
        names = {
            f"{s}.{layer}": name for s, of_site in self.settings["modules"].items() for layer, name in of_site.items()
        }
        meter = _Meter(self._progress("collecting", sum(sizes.values()), done))
        with meter.progress, Recorder(self.model, names, mean=self.settings["tokens"] == "mean") as recorder:
            runner = Runner(self.model, plan, recorder)
            for number in (number for number in mine if digests[number] is None):
                size = rows[number] * writer.shape.row_bytes
                kept = f"{meter.progress.n:,} of {len(plan):,} sequences are kept"
                with reporting_full_disk(path, size, kept), writer.open_shard(number, rows[number]) as shard:
                    first_row = 0
                    for batch in plan.shards[number]:
                        found = runner.run(batch)
                        for name, tensor in found.items():
                            tensor = tensor.to(writer.shape.dtype)
                            _check_finite(tensor, name, plan, batch)
                            shard.write(name, first_row, tensor)
                        first_row += len(tensor)
                        meter.update(plan, batch, first_row * writer.shape.row_bytes)
                    shard.finish()
                meter.written += size
                digests[number] = writer.digest(number, rows[number])
        everyone = self.together.gather(digests)
        if self.together.is_main:
            digests = {number: digest for some in everyone for number, digest in some.items()}
            for number, count in enumerate(rows):
                writer.list_shard(count, digests[number])
            writer.finish()

    def _progress(self, what: str, total: int, done: int) -> tqdm:
        if self.together.count > 1:
            what = f"{what}, process {self.together.index + 1} of {self.together.count}"
        # Bars of several processes would overwrite each other.
        hidden = not self.together.is_main
        return tqdm(total=total, initial=done, desc=what, unit="seq", leave=None, disable=hidden or total == 0)


def _read_answers(file: Path, batch: list[int]) -> list[list[int]] | None:
    """Generated answers of a batch; None where they are not there, or damaged."""
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return answers if isinstance(answers, list) and len(answers) == len(batch) else None


class _Meter:
    """What the progress bar shows beside sequences: tokens per second and the size on disk."""

    def __init__(self, progress: tqdm):
        self.progress = progress
        self.written = 0
        self._tokens = 0
        self._start = time.monotonic()

    def update(self, plan: Plan, batch: Batch, bytes_of_shard: int) -> None:
        self._tokens += sum(len(plan.ids(i)) for i in batch.sequences)
        rate = self._tokens / (time.monotonic() - self._start)
        size = (self.written + bytes_of_shard) / 1e6
        self.progress.set_postfix_str(f"{rate:,.0f} tokens/s, {size:,.1f} MB", refresh=False)
        self.progress.update(len(batch.sequences))


def _check_finite(rows: Tensor, name: str, plan: Plan, batch: Batch) -> None:
    if rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite():  # a sum hides no NaN or infinity
        return
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        ends = torch.tensor([plan.rows(i) for i in batch.sequences]).cumsum(dim=0)
        number = batch.sequences[int((ends <= row).sum())]
        site, _, layer = name.partition(".")
        raise ValueError(
            f"layer {layer}: the activations ({site}) of {plan.describe(number)} are not finite: "
            "load the model and store in a wider dtype (bfloat16 or float32)"
        )


def _width(model: nn.Module, modules: dict[str, dict[int, str]]) -> int:
    """Width of the rows of all sites."""
    found = (model.get_submodule(name) for names in modules.values() for name in names.values())
    widths = {out_features(m) if is_linear(m) else text_config(model).hidden_size for m in found}
    if len(widths) > 1:
        raise ValueError(f"the target_modules are of different widths, {sorted(widths)}: collect them one by one")
    return widths.pop()


def _data_fingerprint(data: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> str:
    """Hash of the texts, and of the prompts' token ids: those of another tokenizer or chat template differ."""
    digest = hashlib.sha256()
    data = data.select_columns(["id", "prompt", "positives", "negatives", "neutral", "mc1_choices", "messages"])
    for first in range(0, len(data), CHUNK):
        rows = data[first : first + CHUNK]
        columns = {"messages": rows["messages"], "row_ids": rows["id"], "choices": listed_choices(rows)}
        prompts = encode_prompts(tokenizer, rows["prompt"], prompt_format=prompt_format, **columns)
        del rows["mc1_choices"]  # which count where they stand in the prompts
        digest.update(json.dumps([prompts, rows], sort_keys=True).encode())
    return digest.hexdigest()[:16]
