"""Collect a model's activations at the sites that are edited, for the answers of a contrast set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .fingerprint import fingerprint
from .plan import Plan, Sequence, make_plan
from .prompts import resolve_prompt_format
from .sites import LayerIndices, find_sites, text_config, unwrap
from .store import INDEX, META, ROW_TOKENS, ActivationStore, StoreWriter, read_metadata, remove_store


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
        "max_tokens": max_tokens_per_batch,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(data) == 0:
        raise ValueError("the contrast set is empty: nothing to collect")
    if tokens == "answer":
        neutral, answers = None, "all"
    path = Path(path)
    sites = find_sites(model, site, layers=layers, target_modules=target_modules)
    bare = unwrap(model)
    settings = {
        "site": site,
        "tokens": tokens,
        "neutral": neutral,
        "answers": answers,
        "prompt_format": resolve_prompt_format(tokenizer, prompt_format),
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "seed": seed,
        "hidden_size": text_config(bare).hidden_size,
        "modules": {str(layer): name for layer, name in sites.items()},
        "model": getattr(bare.config, "_name_or_path", None),
        "revision": getattr(bare.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "active_adapters": _active_adapters(model),
        "data_fingerprint": _data_fingerprint(data),
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
                generate=lambda prompts: _greedy_answers(
                    bare, tokenizer, prompts, max_new_tokens, max_tokens_per_batch
                ),
            )
            check_length(bare, len(plan.sequences[0].ids))
            writer = StoreWriter(path, settings, plan.index)
        else:
            writer, plan = earlier
        _run(bare, sites, plan.sequences, writer)
    return writer.finish()


def _earlier_store(path: Path, settings: dict, resume: bool):
    """What is at `path`: None, a complete store, or a writer to go on with and its sequences."""
    if not (path / META).exists():
        return None
    if not resume:
        remove_store(path)
        return None
    metadata = read_metadata(path)
    changed = [name for name in settings if metadata.get(name) != settings[name]]
    if changed:
        what = "; ".join(f"{name} is {metadata.get(name)!r} there, {settings[name]!r} here" for name in changed[:3])
        raise ValueError(
            f"{path} holds a store collected with other arguments ({what}): "
            "choose another folder, or pass resume=False to replace it"
        )
    if metadata["complete"]:
        return ActivationStore(path)
    return StoreWriter.resume(path), Plan.from_index(load_file(path / INDEX))


def _run(model: nn.Module, sites: dict[int, str], sequences: list[Sequence], writer: StoreWriter) -> None:
    """Run the sequences that are not on disk yet and write their rows shard by shard."""
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
    with tqdm(total=len(sequences), initial=done, desc="collecting", unit="seq") as progress:
        for batch in _batches(
            [len(s.ids) for s in remaining], settings["batch_size"], settings["max_tokens_per_batch"]
        ):
            chunk = [remaining[i] for i in batch]
            rows = _batch_rows(model, sites, chunk, mean=settings["tokens"] == "mean")
            for layer, tensor in rows.items():
                _check_finite(tensor, layer, settings["site"], first_row=writer.rows + pending_rows)
                pending[layer].append(tensor.to(dtype).cpu())
            pending_rows += sum(rows_per_sequence[done + i] for i in batch)
            progress.update(len(chunk))
            if pending_rows * row_bytes >= SHARD_BYTES:
                flush()
        flush()


def _batch_rows(model: nn.Module, sites: dict[int, str], batch: list[Sequence], mean: bool) -> dict[int, Tensor]:
    """Layer to the kept rows of a batch, (r, d), in the order of the sequences and positions."""
    device = input_device(model)
    longest = max(len(s.ids) for s in batch)
    # Padded on the right, where a causal model's earlier tokens cannot see it; so any id will do.
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    kept = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, sequence in enumerate(batch):
        input_ids[i, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[i, : len(sequence.ids)] = 1
        kept[i, sequence.start : sequence.stop] = True

    rows: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(module, args, output) -> None:
            h = output[0] if isinstance(output, tuple) else output
            h = h.reshape(len(batch), longest, -1)  # OPT flattens batch and sequence before its MLP
            selected = kept.to(h.device)
            if mean:
                weights = selected / selected.sum(dim=1, keepdim=True)
                rows[layer] = torch.einsum("bs,bsd->bd", weights, h.to(torch.promote_types(h.dtype, torch.float32)))
            else:
                rows[layer] = h[selected]

        return hook

    handles = []
    try:
        for layer, name in sites.items():
            module = model.get_submodule(name)
            if isinstance(module, BaseTunerLayer):
                module = module.base_layer
            # First of the hooks: the edit of a block is a hook too.
            handles.append(module.register_forward_hook(keep(layer), prepend=True))
        # The model without its LM head, whose logits nobody reads.
        model.base_model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _batches(lengths: list[int], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Consecutive indices, as many as fit: lengths fall, so the first of a batch is its longest."""
    batch: list[int] = []
    for i in range(len(lengths)):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def _greedy_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, max_tokens: int
) -> list[list[int]]:
    """The model's own greedy answers, without end of sequence."""
    stop = model.generation_config.eos_token_id if model.generation_config is not None else tokenizer.eos_token_id
    stop = [stop] if isinstance(stop, int) else list(stop or [])
    # Nothing of the model's own sampling, penalties or lengths.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc="generating neutral answers", unit="seq") as progress:
        for batch in _batches([len(prompts[i]) + max_new_tokens for i in order], None, max_tokens):
            rows = [order[i] for i in batch]
            longest = len(prompts[rows[0]])
            input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            for i, row in enumerate(rows):
                input_ids[i, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[i, longest - len(prompts[row]) :] = 1
            device = input_device(model)
            output = model.generate(
                input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for row, ids in zip(rows, output[:, longest:].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
                answers[row] = ids[:end]
            progress.update(len(rows))
    return answers


def input_device(model: nn.Module) -> torch.device:
    """Device that the model expects its token ids on, also where accelerate offloads the embeddings."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_length(model: nn.Module, tokens: int) -> None:
    """Raise ValueError where a sequence of so many tokens is more than the model takes."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"the longest prompt and answer has {tokens} tokens, the model takes {limit}: leave the long rows out"
        )


def _check_finite(rows: Tensor, layer: int, site: str, first_row: int) -> None:
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise ValueError(
            f"layer {layer}: the {site} activations of row {first_row + int(bad.nonzero()[0])} of the store are not "
            "finite: load the model in a wider dtype (bfloat16 or float32)"
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


def _data_fingerprint(data: Dataset) -> str:
    digest = hashlib.sha256()
    for row in data.select_columns(["id", "prompt", "positives", "negatives", "neutral", "messages"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]
