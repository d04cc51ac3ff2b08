"""Collect a model's activations at the sites that are edited, for the answers of a contrast set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .contrast import check_contrast_set
from .fingerprint import fingerprint
from .inference import batches, check_length, greedy_answers, inference, input_device, pad
from .plan import Plan, Sequence, make_plan
from .prompts import encode_prompts, resolve_prompt_format
from .sites import LayerIndices, find_sites, is_linear, out_features, text_config, unwrap
from .store import (
    META,
    ROW_TOKENS,
    ActivationStore,
    StoreWriter,
    check_free,
    read_index,
    read_metadata,
    remove_store,
    store_files,
)
from .tuners.editing import EditLayer


logger = logging.getLogger(__name__)

# A shard is written when it holds this many bytes, which bounds the memory that collection takes.
SHARD_BYTES = 256 * 2**20
CHOICES = {
    "site": ("mlp", "block"),
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
    site: str = "mlp",
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
    resume: bool = True,
) -> ActivationStore:
    """Run the answers of a contrast set through a model and store the activations of one site on disk.

    Activations are those that an edit of the site receives: before the edit of the site itself, after the active
    edits of earlier sites. Sequences are run once each, in batches of similar length, without the LM head.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        tokenizer: of that model.
        data: a contrast set, see `load_contrast_set`.
        path: folder of the store; created.
        site: "mlp" for the output of the MLP's output projection, "block" for the output of the decoder block.
        target_modules: names or regular expression of other modules, one in a block.
        layers: indices of the blocks; None for all.
        tokens: which tokens of an answer: "last", "mean", "random" (one row an answer), "answer" (every token).
        neutral: where the neutral activation is taken: "generated", the last token of the model's own greedy answer;
            "prompt", the last token of the prompt; "text", the last token of the `neutral` column. "auto": "text" where
            the column has one, else "generated". None for none, which `tokens="answer"` implies.
        answers: which answers demonstrate: the "first" of each list, a "random" one, or "all", every positive with
            every negative. `tokens="answer"` takes all.
        prompt_format: "auto", "chat" or "plain", see `encode_answers`.
        max_new_tokens: longest generated answer.
        batch_size: most sequences in a batch; None for no limit of its own.
        max_tokens_per_batch: most tokens in a batch, padding included.
        dtype: of the store: "float32", "bfloat16" or "float16".
        seed: of the random answers and tokens.
        resume: continue or reuse a store at `path` that was begun with the same arguments; False replaces it.

    Raises:
        ValueError: an argument or the data are not as described, a sequence is longer than the model takes, an
            activation is not finite, or `path` holds something else.
    """
    for name, value in {"site": site, "tokens": tokens, "neutral": neutral, "answers": answers, "dtype": dtype}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
    for name, value in {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "max_tokens_per_batch": max_tokens_per_batch,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_contrast_set(data)
    if tokens == "answer":
        neutral, answers = None, "all"
    path = Path(path)
    sites = find_sites(model, site, layers=layers, target_modules=target_modules)
    bare = unwrap(model)
    prompt_format = resolve_prompt_format(tokenizer, prompt_format)
    settings = {
        "site": site,
        "tokens": tokens,
        "neutral": neutral,
        "answers": answers,
        "prompt_format": prompt_format,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "seed": seed,
        "hidden_size": _width(bare, sites),
        "modules": {str(layer): name for layer, name in sites.items()},
        "model": getattr(bare.config, "_name_or_path", None),
        "revision": getattr(bare.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "active_adapters": _active_adapters(model),
        "data_fingerprint": _data_fingerprint(data, tokenizer, prompt_format),
        "batch_size": batch_size,
        "max_tokens_per_batch": max_tokens_per_batch,
    }
    earlier = _earlier_store(path, settings, resume)
    if isinstance(earlier, ActivationStore):
        logger.info("%s is complete already and is used as it is", path)
        return earlier

    with inference(bare):
        if earlier is None:
            plan = make_plan(
                tokenizer,
                data,
                **{name: settings[name] for name in ("tokens", "neutral", "answers", "prompt_format", "seed")},
                generate=lambda prompts: greedy_answers(
                    bare, tokenizer, prompts, max_new_tokens, batch_size, max_tokens_per_batch
                ),
            )
            check_length(bare, len(plan.sequences[0].ids))
            if (path / META).exists():
                remove_store(path)
            writer = StoreWriter(path, settings, plan.index)
        else:
            writer, plan = earlier
        _run(bare, sites, plan, writer)
    return writer.finish()


def _earlier_store(path: Path, settings: dict, resume: bool):
    """What is at `path`: None, a complete store, or a writer to go on with and its sequences."""
    if not (path / META).exists():
        check_free(path)
        return None
    if not resume:
        store_files(path)  # raises where it cannot be replaced
        return None
    metadata = read_metadata(path)
    # The batches decide how a collection goes on, not what a complete one holds; the fingerprint tells models apart.
    ignored = {"model", "revision"} | ({"batch_size", "max_tokens_per_batch"} if metadata["complete"] else set())
    changed = [name for name in settings if name not in ignored and metadata.get(name) != settings[name]]
    if changed:
        what = "; ".join(f"{name} is {metadata.get(name)!r} there, {settings[name]!r} here" for name in changed[:3])
        raise ValueError(
            f"{path} holds a store collected with other arguments ({what}): "
            "choose another folder, or pass resume=False to replace it"
        )
    if metadata["complete"]:
        return ActivationStore(path)
    return StoreWriter.resume(path), Plan.from_index(read_index(path))


def _run(model: nn.Module, sites: dict[int, str], plan: Plan, writer: StoreWriter) -> None:
    """Run the sequences that are not on disk yet and write their rows shard by shard."""
    sequences = plan.sequences
    settings = writer.metadata
    dtype = getattr(torch, settings["dtype"])
    row_bytes = len(sites) * settings["hidden_size"] * dtype.itemsize
    done = 0
    rows_per_sequence = [1 if settings["tokens"] in ROW_TOKENS else s.stop - s.start for s in sequences]
    on_disk = writer.rows
    while on_disk > 0:
        on_disk -= rows_per_sequence[done]
        done += 1

    pending: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    pending_rows = 0

    def flush() -> None:
        nonlocal pending_rows
        if pending_rows:
            writer.add({f"{settings['site']}.{layer}": torch.cat(rows) for layer, rows in pending.items()})
            for rows in pending.values():
                rows.clear()
            pending_rows = 0

    remaining = sequences[done:]
    with tqdm(total=len(sequences), initial=done, desc="collecting", unit="seq", leave=None) as progress:
        for batch in batches([len(s.ids) for s in remaining], settings["batch_size"], settings["max_tokens_per_batch"]):
            chunk = [remaining[i] for i in batch]
            rows = _batch_rows(model, sites, chunk, mean=settings["tokens"] == "mean")
            for layer, tensor in rows.items():
                tensor = tensor.to(dtype)
                _check_finite(tensor, layer, plan, first_row=writer.rows + pending_rows)
                pending[layer].append(tensor.cpu())
            pending_rows += sum(rows_per_sequence[done + i] for i in batch)
            progress.update(len(chunk))
            if pending_rows * row_bytes >= SHARD_BYTES:
                flush()
        flush()


def _batch_rows(model: nn.Module, sites: dict[int, str], batch: list[Sequence], mean: bool) -> dict[int, Tensor]:
    """Layer to the kept rows of a batch, (r, d), in the order of the sequences and positions."""
    input_ids, mask = pad([sequence.ids for sequence in batch], input_device(model))
    kept = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, sequence in enumerate(batch):
        kept[i, sequence.start : sequence.stop] = True

    rows: dict[int, Tensor] = {}

    def keep(layer: int, name: str):
        def hook(module, args, output) -> None:
            h = output[0] if type(output) in (tuple, list) else output
            shape = tuple(h.shape[:-1]) if isinstance(h, Tensor) else ()
            if shape not in (tuple(input_ids.shape), (input_ids.numel(),)):
                found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(
                    f"{name} gives {found} for input of shape {tuple(input_ids.shape)}, not one activation for each "
                    "position of each row: choose another site or target_modules"
                )
            h = h.reshape(*input_ids.shape, -1)  # OPT flattens batch and sequence before its MLP
            selected = kept.to(h.device)
            if mean:
                h = h.to(torch.promote_types(h.dtype, torch.float32))
                weights = selected.to(h.dtype) / selected.sum(dim=1, keepdim=True)
                rows[layer] = torch.einsum("bs,bsd->bd", weights, h)
            else:
                rows[layer] = h[selected]

        return hook

    handles = []
    try:
        for layer, name in sites.items():
            # First of the hooks: the edit of a block is a hook too.
            handles.append(
                _before_edit(model.get_submodule(name)).register_forward_hook(keep(layer, name), prepend=True)
            )
        # The model without its LM head, whose logits nobody reads.
        model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _before_edit(module: nn.Module) -> nn.Module:
    """The module whose output the edit of a site receives: what the edit wraps, other methods' adapters included."""
    inner = module
    while isinstance(inner, BaseTunerLayer):
        if isinstance(inner, EditLayer):
            return inner.base_layer
        inner = inner.base_layer
    return module


def _check_finite(rows: Tensor, layer: int, plan: Plan, first_row: int) -> None:
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        row = first_row + int(bad.nonzero()[0])
        raise ValueError(
            f"layer {layer}: the activations of row {row} of the store ({plan.describe_row(row)}) are not finite: "
            "load the model and store in a wider dtype (bfloat16 or float32)"
        )


def _active_adapters(model: nn.Module) -> list[str]:
    return sorted(
        {
            name
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and not module.disable_adapters
            for name in module.active_adapters
        }
    )


def _width(model: nn.Module, sites: dict[int, str]) -> int:
    """Width of the rows of all sites."""
    modules = (model.get_submodule(name) for name in sites.values())
    widths = {out_features(m) if is_linear(m) else text_config(model).hidden_size for m in modules}
    if len(widths) > 1:
        raise ValueError(f"the target_modules are of different widths, {sorted(widths)}: collect them one by one")
    return widths.pop()


def _data_fingerprint(data: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> str:
    """Hash of the texts, and of the prompts' token ids: those of another tokenizer or chat template differ."""
    columns = {"messages": list(data["messages"]), "row_ids": list(data["id"])}
    prompts = encode_prompts(tokenizer, list(data["prompt"]), prompt_format=prompt_format, **columns)
    digest = hashlib.sha256(json.dumps(prompts).encode())
    for row in data.select_columns(["id", "prompt", "positives", "negatives", "neutral", "messages"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]
