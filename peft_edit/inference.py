"""Running a model: its mode, device and batches, and greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .sites import text_config


def batches(lengths: list[int], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Consecutive indices, as many as fit: lengths fall, so the first of a batch is its longest."""
    batch: list[int] = []
    for i in range(len(lengths)):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int | None,
    max_tokens: int,
) -> list[list[int]]:
    """The model's own greedy answers, without end of sequence."""
    longest = max(map(len, prompts))
    check_length(model, longest, "prompt")
    check_length(model, longest + max_new_tokens, "prompt and generated answer", "lower max_new_tokens")
    own = model.generation_config
    stop = own.eos_token_id if own is not None else tokenizer.eos_token_id
    stop = [stop] if isinstance(stop, int) else list(stop or [])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc="generating neutral answers", unit="seq", leave=None) as progress:
        for batch in batches([len(prompts[i]) + max_new_tokens for i in order], batch_size, max_tokens):
            rows = [order[i] for i in batch]
            input_ids, mask = pad([prompts[row] for row in rows], input_device(model), side="left")
            # `generate` fills in from the model's own configuration, and its penalties and beams are not greedy.
            model.generation_config = config
            try:
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
            finally:
                model.generation_config = own
            for row, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
                answers[row] = ids[:end]
            progress.update(len(rows))
    return answers


def pad(rows: Sequence[Sequence[int]], device: torch.device, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch, (b, s) int64 each. On the right, where a causal model's earlier tokens
    cannot see the padding, unless something is to be generated. As the padding is masked, any id will do: 0."""
    tensors = [torch.tensor(row) for row in rows]
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


def check_length(
    model: nn.Module, tokens: int, what: str = "prompt and answer", remedy: str = "leave the long rows out"
) -> None:
    """Raise ValueError where a sequence of so many tokens is more than the model takes."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"the longest {what} has {tokens} tokens, the model takes {limit}: {remedy}")
