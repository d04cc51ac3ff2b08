"""Stores of answer tokens with given rows and pairs."""

from pathlib import Path

import torch

from peft_edit import ActivationStore
from peft_edit.activations.store import Shard, StoreWriter, begin, write_index


def write_pair_store(path, rows, pairs, *, modules, question=None, shard_rows=None, site="block", **settings):
    """Write layer to rows, (t, d), in shards of these sizes, paired as in `pairs`, (p, 2): negative, positive."""
    count, d = next(iter(rows.values())).shape
    settings = {
        "sites": [site],
        "tokens": "answer",
        "dtype": str(next(iter(rows.values())).dtype).removeprefix("torch."),
        "hidden_size": d,
        "modules": {site: modules},
        "model": None,
        "fingerprint": None,
        "active_adapters": [],
        **settings,
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    begin(Path(path), settings)
    question = torch.arange(len(pairs)) if question is None else question
    answer_pairs = torch.cat((pairs, torch.ones(len(pairs), 1, dtype=torch.int64)), dim=1)
    write_index(Path(path), {"answer_pairs": answer_pairs, "question": question})
    sizes = shard_rows or [count]
    chunks = {layer: tensor.split(sizes) for layer, tensor in rows.items()}
    shards = [Shard(i, size, size) for i, size in enumerate(sizes)]
    with StoreWriter(Path(path), shards) as writer:
        for shard in shards:
            writer.write(shard, {f"{site}.{layer}": chunk[shard.number] for layer, chunk in chunks.items()})
        writer.finish()
    return ActivationStore(path)


def write_text_store(path, rows, *, modules, lengths=None, site="block", **settings):
    """Write layer to rows, (t, d), of plain texts of these lengths; by default one text."""
    first = next(iter(rows.values()))
    settings = {
        "sites": [site],
        "tokens": "all",
        "dtype": str(first.dtype).removeprefix("torch."),
        "hidden_size": first.shape[1],
        "modules": {site: modules},
        "model": None,
        "fingerprint": None,
        "active_adapters": [],
        **settings,
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    begin(Path(path), settings)
    counts = torch.tensor(lengths or [len(first)])
    texts = torch.stack((counts.cumsum(dim=0) - counts, counts), dim=1)
    write_index(Path(path), {"texts": texts, "question": torch.arange(len(counts))})
    shard = Shard(0, len(first), len(counts))
    with StoreWriter(Path(path), [shard]) as writer:
        writer.write(shard, {f"{site}.{layer}": tensor for layer, tensor in rows.items()})
        writer.finish()
    return ActivationStore(path)
