"""Stores of answer tokens with given rows and pairs, and of plain texts."""

from pathlib import Path

import torch

from peft_edit import ActivationStore
from peft_edit.activations.store import Shard, StoreWriter, begin, write_index


def write_pair_store(path, rows, pairs, *, question=None, shard_rows=None, **settings):
    """Write layer to rows, (t, d), in shards of these sizes, paired as in `pairs`, (p, 2): negative, positive."""
    question = torch.arange(len(pairs)) if question is None else question
    answer_pairs = torch.cat((pairs, torch.ones(len(pairs), 1, dtype=torch.int64)), dim=1)
    sizes = shard_rows or [len(next(iter(rows.values())))]
    shards = [Shard(i, size, size) for i, size in enumerate(sizes)]
    return _write(path, rows, {"answer_pairs": answer_pairs, "question": question}, shards, tokens="answer", **settings)


def write_text_store(path, rows, *, lengths=None, **settings):
    """Write layer to rows, (t, d), of plain texts of these lengths; by default one text."""
    count = len(next(iter(rows.values())))
    counts = torch.tensor(lengths or [count])
    texts = torch.stack((counts.cumsum(dim=0) - counts, counts), dim=1)
    index = {"texts": texts, "question": torch.arange(len(counts))}
    return _write(path, rows, index, [Shard(0, count, len(counts))], tokens="all", **settings)


def _write(path, rows, index, shards, *, modules, site="block", **settings):
    first = next(iter(rows.values()))
    settings = {
        "sites": [site],
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
    write_index(Path(path), index)
    chunks = {layer: tensor.split([shard.rows for shard in shards]) for layer, tensor in rows.items()}
    with StoreWriter(Path(path), shards) as writer:
        for shard in shards:
            writer.write(shard, {f"{site}.{layer}": chunk[shard.number] for layer, chunk in chunks.items()})
        writer.finish()
    return ActivationStore(path)
