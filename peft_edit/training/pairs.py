"""The token pairs of a store as the data of a training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..activations.store import ActivationStore


class TokenPairs(Dataset):
    """The token pairs of a store, whole batches at a time: slices of memory-mapped tensors.

    Args:
        store: with `tokens="answer"`.
        layers: indices of the decoder blocks to read.
        retain: with `tokens="all"`: texts to leave alone, of which a batch has as many tokens as pairs; None for none.
        seed: of their choice.
    """

    def __init__(
        self, store: ActivationStore, layers: Iterable[int], retain: ActivationStore | None = None, seed: int = 0
    ):
        self.store, self.layers = store, list(layers)
        self.pairs = store.pairs()
        self.retain, self.seed = retain, seed
        self.retained_rows = None if retain is None else retain.text_tokens()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Batch of B pairs: "activations", (B, layers, 2, d), the positive one of each pair first; "retained", (B,
        layers, d), where there are texts to leave alone."""
        pairs = self.pairs[torch.as_tensor(indices)]  # (B, 2): negative, positive
        activations = self.store.gather(pairs.flip(1).T.flatten(), self.layers)  # (layers, 2 B, d)
        batch = {"activations": activations.unflatten(1, (2, len(pairs))).permute(2, 0, 1, 3)}
        if self.retain is not None:
            rows = self._drawn(indices)
            batch["retained"] = self.retain.gather(rows, self.layers).transpose(0, 1)
        return batch

    def _drawn(self, indices: list[int]) -> Tensor:
        """Rows to leave alone, drawn by which pairs are beside them: the same after a resumption, and in every worker,
        and others in every epoch."""
        digest = hashlib.blake2b(f"{self.seed} {list(map(int, indices))}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return self.retained_rows[torch.randint(len(self.retained_rows), (len(indices),), generator=generator)]
