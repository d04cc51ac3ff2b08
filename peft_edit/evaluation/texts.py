"""Plain texts as batches of tokens, each token predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..models.kind import check_language_model, check_vocabulary
from ..models.run import check_length, input_device, pad
from ..models.sites import unwrap
from ..tuners.layer import check_independent_of_padding


class NotFiniteError(ValueError):
    """Logits that are NaN or infinite."""

    def __init__(self):
        super().__init__(
            "the logits of the texts are NaN or infinite: load the model in a wider dtype (bfloat16 or float32), or "
            "lower the strength of the edit"
        )


def exponential(value: float) -> float:
    """e to a power, infinite where a float cannot hold it."""
    return math.exp(value) if value < 709 else math.inf


@dataclass(frozen=True)
class TextBatch:
    """Some texts.

    Attributes:
        ids, mask: (b, s) int64, token ids and attention mask, on the device that the model expects them on.
    """

    ids: Tensor
    mask: Tensor

    @property
    def read(self) -> int:
        """Number of tokens, without padding."""
        return int(self.mask.sum())

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted: all but the first of each text."""
        return self.read - len(self.ids)

    @property
    def predicting(self) -> Tensor:
        """(b, s) bool, the tokens after each of which one is predicted: all but the last of each text."""
        return functional.pad(self.mask[:, 1:], (0, 1)).bool()  # padding is on the right

    def predict(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (t, V) of the tokens that are predicted, and these tokens, (t,), in the order of `predicting`."""
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[:, :-1]
        scored = self.mask[:, 1:].bool().to(logits.device)
        return logits[scored], self.ids[:, 1:].to(logits.device)[scored]


def text_batches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], batch_size: int, what: str
) -> list[TextBatch]:
    """Batches of texts of about one length, the shortest first; those of fewer than two tokens are left out.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        tokenizer: of that model.
        texts: any.
        batch_size: most texts in a batch.
        what: needs them, for errors: "perplexity".

    Raises:
        ValueError: the model is no causal one or has no LM head, no text has two tokens, one is longer than the model
            takes or has a token without an embedding, or an active edit depends on padding.
    """
    check_language_model(model)
    check_independent_of_padding(model)
    if batch_size < 1:
        raise ArgumentError(Argument("batch_size"), f" must be at least 1, got {batch_size}")
    bare, texts = unwrap(model), list(texts)
    encoded = tokenizer(texts)["input_ids"] if texts else []
    for place, ids in enumerate(encoded):
        check_vocabulary(bare, [ids], f"text {place}")
    encoded = sorted((ids for ids in encoded if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError(f"{what} needs texts of at least two tokens")
    check_length(bare, len(encoded[-1]))
    device = input_device(bare)
    return [TextBatch(*pad(encoded[i : i + batch_size], device)) for i in range(0, len(encoded), batch_size)]
