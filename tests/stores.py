"""Stores of answer tokens with given rows and pairs."""

from pathlib import Path

import torch

from peft_edit.activations.store import StoreWriter


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
    writer = StoreWriter(path, settings)
    writer.begin()
    question = torch.arange(len(pairs)) if question is None else question
    answer_pairs = torch.cat((pairs, torch.ones(len(pairs), 1, dtype=torch.int64)), dim=1)
    writer.write_index({"answer_pairs": answer_pairs, "question": question})
    chunks = {layer: tensor.split(shard_rows or [count]) for layer, tensor in rows.items()}
    for i in range(len(shard_rows or [count])):
        writer.add({f"{site}.{layer}": chunk[i] for layer, chunk in chunks.items()})
    return writer.finish()
