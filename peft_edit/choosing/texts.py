"""The damage of many edits on the same texts, for which the base model is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluation.side_effects import SideEffects, SideEffectsMeter, disabled_adapters
from ..evaluation.texts import text_batches
from ..models.fingerprint import active_adapters
from ..models.run import inference
from ..models.sites import unwrap
from .sharing import SharedPasses


class SharedTexts:
    """Texts, the base model's logits on them, and what enters its blocks.

    The logits are kept where they take at most `memory` bytes. Else they are computed again for each edit, from the
    latest block on that is kept.

    Args:
        model: the base model, or one with adapters, which are disabled here.
        tokenizer: of the model.
        texts: any.
        batch_size: most texts in a forward pass.
        memory: bytes.
        needs: numbers of first blocks that edits leave as they are, one for each edit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        batch_size: int,
        memory: int,
        needs: Iterable[int],
    ):
        self.batches = text_batches(model, tokenizer, texts, batch_size, "a measure of damage")
        self.tokens = sum(batch.predicted for batch in self.batches)
        self.positions = sum(batch.ids.numel() for batch in self.batches)
        first = self.batches[:1]
        bare = unwrap(model)
        weight = bare.get_output_embeddings().weight
        self.keeps_logits = self.tokens * weight.shape[0] * weight.element_size() <= memory
        self._logits: list[Tensor] = []
        with disabled_adapters(model) if active_adapters(model) else nullcontext(), inference(bare):
            self.passes = SharedPasses(
                bare,
                needs,
                run=lambda: self._predict(bare, first),
                samples=sum(batch.ids.numel() for batch in first) / self.positions,
                memory=memory,
            )
            with self.passes.recording():
                for batch in tqdm(self.batches, desc="base model on texts", unit="batch", leave=None):
                    logits, _ = batch.predict(bare)
                    if self.keeps_logits:
                        self._logits.append(logits)

    @staticmethod
    def _predict(model: nn.Module, batches) -> Tensor:
        return torch.cat([batch.predict(model)[0] for batch in batches])

    def measure(
        self, model: nn.Module, need: int, stop: Callable[[SideEffectsMeter], str | None] = lambda meter: None
    ) -> tuple[SideEffects, str | None]:
        """The side effects of the model's active adapters.

        Args:
            model: the model with adapters.
            need: number of first blocks that they leave as they are.
            stop: says after each batch why no more need be read, or None.

        Returns:
            The side effects on what was read, and what `stop` said.
        """
        meter, reason = SideEffectsMeter(), None
        with inference(model):
            for i, batch in enumerate(self.batches):
                with self.passes.skipping(need, first=i), meter.observing(model, batch):
                    edited, targets = batch.predict(model)
                meter.update(self._base_logits(model, i), edited, targets)
                if i + 1 < len(self.batches) and (reason := stop(meter)):
                    break
        return meter.result(), reason

    def _base_logits(self, model: nn.Module, i: int) -> Tensor:
        if self.keeps_logits:
            return self._logits[i]
        with disabled_adapters(model), self.passes.skipping(len(self.passes.blocks), first=i):
            return self.batches[i].predict(model)[0]
