"""Perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..models.kind import check_language_model, check_vocabulary
from ..models.run import TOKEN_BAR, TokenProgress, check_length, inference, input_device, pad
from ..models.sites import runnable, unwrap
from ..tuners.layer import check_independent_of_padding


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, batch_size: int = 16
) -> float:
    """Perplexity over all tokens of some texts after each one's first: exp of the mean negative log-likelihood.

    Raises:
        ValueError: the model is no causal one or has no LM head, no text has two tokens, one is longer than the model
            takes or has a token without an embedding, or an active edit depends on padding.
    """
    check_language_model(model)
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ArgumentError(Argument("batch_size"), f" must be at least 1, got {batch_size}")
    model, bare = runnable(model), unwrap(model)
    texts = list(texts)
    encoded = tokenizer(texts)["input_ids"] if texts else []
    for place, ids in enumerate(encoded):
        check_vocabulary(bare, [ids], f"text {place}")
    encoded = sorted((ids for ids in encoded if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError("perplexity needs texts of at least two tokens")
    check_length(bare, len(encoded[-1]))
    total, count = 0.0, 0
    total_tokens = sum(map(len, encoded))
    with inference(model), tqdm(total=total_tokens, desc="perplexity", leave=None, **TOKEN_BAR) as bar:
        progress = TokenProgress(bare, bar)
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            ids, mask = pad(batch, input_device(bare))
            with progress.over(sum(map(len, batch))):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            scored, targets = mask[:, 1:].bool().to(logits.device), ids[:, 1:].to(logits.device)
            total += float(functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))
            count += int(scored.sum())
    return math.exp(total / count)
