"""Perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..models.run import (
    check_length,
    inference,
    input_device,
    pad,
)
from ..models.sites import runnable, unwrap
from ..tuners.layer import check_independent_of_padding


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, batch_size: int = 16
) -> float:
    """Perplexity over all tokens of some texts after each one's first: exp of the mean negative log-likelihood."""
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ArgumentError(Argument("batch_size"), f" must be at least 1, got {batch_size}")
    model, bare = runnable(model), unwrap(model)
    texts = list(texts)
    encoded = tokenizer(texts)["input_ids"] if texts else []
    encoded = sorted((ids for ids in encoded if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError("perplexity needs texts of at least two tokens")
    check_length(bare, len(encoded[-1]))
    total, count = 0.0, 0
    with inference(model):
        for start in tqdm(range(0, len(encoded), batch_size), desc="perplexity", unit="batch", leave=None):
            batch = encoded[start : start + batch_size]
            ids, mask = pad(batch, input_device(bare))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            scored, targets = mask[:, 1:].bool().to(logits.device), ids[:, 1:].to(logits.device)
            total += float(functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))
            count += int(scored.sum())
    return math.exp(total / count)
