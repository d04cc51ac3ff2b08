"""Running a model: its mode, device and batches, caches of prompts, and answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .sites import decoder_blocks, text_config


def cache_name(model: nn.Module) -> str | None:
    """What the forward pass of a Transformers model calls its key-value cache: "cache" since Transformers 5.24,
    "past_key_values" before; None for a model without one."""
    parameters = inspect.signature(type(model.base_model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def can_share_prompts(model: nn.Module) -> bool:
    """Whether the cache of a prompt can be copied for several answers, with the results of running both together.

    It can where the state is that of attention alone (recurrent states cannot be picked apart), and where the position
    embedding does not depend on how long the whole sequence is.
    """
    config = text_config(model)
    # XLM's "cache" is none of Transformers', and has no switch.
    if cache_name(model) is None or getattr(model, "_is_stateful", False) or not hasattr(config, "use_cache"):
        return False
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type", "default") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def prompt_cache(model: nn.Module, prompts: Sequence[Sequence[int]], common: int = 0) -> Cache:
    """Key-value cache of prompts of one length, of which the first `common` ids are the same: those are run once.

    The model is one of which `can_share_prompts` is true. Its LM head, whose logits nobody reads, is left out.
    """
    ids, name = torch.tensor([list(prompt) for prompt in prompts], device=input_device(model)), cache_name(model)
    cache = None
    if common:
        cache = select_rows(prompt_cache(model, [prompts[0][:common]]), [0] * len(ids))
    output = model.base_model(
        input_ids=ids[:, common:], attention_mask=torch.ones_like(ids), use_cache=True, **{name: cache}
    )
    return output[name]


def select_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache with some rows of another, in any order and number; the other stays as it is."""
    selected = copy.copy(cache)
    # A forward pass puts new tensors in the place of a layer's, so that a shallow copy is a layer of its own.
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(torch.tensor(rows))
    return selected


def batch_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batches: Iterable[Sequence[int]],
    max_new_tokens: int,
    progress: TokenProgress | None = None,
    choosing: Callable[[Sequence[int]], LogitsProcessor] | None = None,
) -> Iterator[list[list[int]]]:
    """The model's own answers, without end of sequence, batch by batch.

    Args:
        model: without a `PeftModel` around it.
        tokenizer: of the model.
        prompts: token ids of each.
        batches: which places in `prompts` are answered together.
        max_new_tokens: of an answer.
        progress: moves in tokens of prompts and of answers of full length.
        choosing: a batch to what gives the next token of each of its sequences the highest score; None for the most
            likely one.
    """
    stop = stop_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0
    )
    for batch in batches:
        input_ids, mask = pad([prompts[i] for i in batch], input_device(model), side="left")
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if choosing is not None:
            inputs["logits_processor"] = LogitsProcessorList([choosing(batch)])
        tokens = sum(len(prompts[i]) + max_new_tokens for i in batch)
        with generating_by(model, config), nullcontext() if progress is None else progress.over(tokens):
            output = model.generate(**inputs, generation_config=config)
        rows = output[:, input_ids.shape[1] :].tolist()
        yield [ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))] for ids in rows]


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which a model's answer ends."""
    own = model.generation_config
    stop = own.eos_token_id if own is not None else tokenizer.eos_token_id
    return [stop] if isinstance(stop, int) else list(stop or [])


@contextmanager
def generating_by(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Let a model have a generation configuration inside the `with` block: `generate` fills in what it is not given
    from the model's own, whose penalties, beams and sampling are not meant.

    Args:
        model: without a `PeftModel` around it.
        config: of all that is meant.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def batches_within(lengths: Sequence[int], batch_size: int | None, max_tokens: int) -> Iterator[range]:
    """Consecutive places, as many as fit: lengths fall, so the first of a batch is its longest."""
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or (i + 1 - first) * lengths[first] > max_tokens or i - first == batch_size:
            yield range(first, i)
            first = i


def pad(rows: Sequence[Sequence[int]], device: torch.device, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, (b, s) int64 each. On the right, where a causal model's earlier tokens
    cannot see the padding, unless something is to be generated. As the padding is masked, any id will do: 0."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    ids, mask = (
        pad_sequence(batch, batch_first=True, padding_side=side)
        for batch in (tensors, [torch.ones_like(tensor) for tensor in tensors])
    )
    return ids.to(device), mask.to(device)


def input_device(model: nn.Module) -> torch.device:
    """Device that the model expects its token ids on, also where accelerate offloads the embeddings."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)


# How bars of tokens are shown; a bar that moves by unequal steps must not guess how often to look at the clock.
TOKEN_BAR = {"unit": "token", "unit_scale": True, "miniters": 0}


class TokenProgress:
    """Moves a bar of tokens while batches run, with each decoder block, so that a long batch does not look stuck.

    Args:
        model: without a `PeftModel` around it.
        bar: with an `update`.
    """

    def __init__(self, model: nn.Module, bar: tqdm):
        self.bar = bar
        try:
            self._blocks = [model.get_submodule(name) for name in decoder_blocks(model).values()]
        except ValueError:  # they cannot be told: the bar moves after each batch
            self._blocks = []
        self._tokens, self._passed, self._shown = 0, 0.0, 0

    @contextmanager
    def over(self, tokens: int) -> Iterator[None]:
        """Move the bar by so many tokens while the batch inside the `with` block runs, in any number of passes: at
        most by those that pass through the blocks, and by the rest at the end."""
        self._tokens, self._passed, self._shown = tokens, 0.0, 0
        handles = [block.register_forward_hook(self._advance) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._show(tokens)

    def _advance(self, block: nn.Module, args: tuple, output: Tensor | tuple | list) -> None:
        if torch.compiler.is_compiling():
            return
        h = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(h, Tensor):
            self._passed += h.shape[:-1].numel() / len(self._blocks)
            self._show(min(self._tokens, int(round(self._passed, 6))))

    def _show(self, tokens: int) -> None:
        """Move the bar on to so many of the batch's tokens: whole ones, whose sum is exact."""
        self.bar.update(tokens - self._shown)
        self._shown = tokens


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def length_limit(model: nn.Module) -> int | None:
    """Most tokens in a sequence that the model takes; None where its configuration does not tell."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return None if limit is not None and limit < 1 else limit  # XLNet has -1


def check_length(
    model: nn.Module, tokens: int, what: str = "prompt and answer", remedy: str = "leave the long rows out"
) -> None:
    """Raise ValueError where a sequence of so many tokens is more than the model takes."""
    limit = length_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"the longest {what} has {tokens} tokens, the model takes {limit}: {remedy}")
