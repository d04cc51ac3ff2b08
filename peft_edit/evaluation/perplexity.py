"""Perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.run import TOKEN_BAR, TokenProgress, inference
from ..models.sites import runnable, unwrap
from .texts import NotFiniteError, exponential, text_batches


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, batch_size: int = 16
) -> float:
    """Perplexity over all tokens of some texts after each one's first: exp of the mean negative log-likelihood.

    Raises:
        ValueError: the model is no causal one or has no LM head, no text has two tokens, one is longer than the model
            takes or has a token without an embedding, an active edit depends on padding, or logits are NaN or infinite.
    """
    batches = text_batches(model, tokenizer, texts, batch_size, "perplexity")
    model, bare = runnable(model), unwrap(model)
    total, count = 0.0, 0
    total_tokens = sum(batch.read for batch in batches)
    with inference(model), tqdm(total=total_tokens, desc="perplexity", leave=None, **TOKEN_BAR) as bar:
        progress = TokenProgress(bare, bar)
        for batch in batches:
            with progress.over(batch.read):
                logits, targets = batch.predict(model)
            total += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
            count += batch.predicted
    if not math.isfinite(total):
        raise NotFiniteError
    return exponential(total / count)
