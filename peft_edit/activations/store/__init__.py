"""Activations on disk: memory-mapped safetensors shards, an index of rows, and meta.json that says what they are.

    meta.json           what was collected, from which model, and the manifest of the shards
    index.safetensors   which row belongs to which demonstration; the token ids that were run, and in which batches
    shard-00000.safetensors, ...   one tensor per site and layer, "mlp.0": (rows of this shard, d)

Each unique sequence is run and stored once; the index refers to its rows as often as it is needed. The index and each
shard hold a checksum. A shard appears under its name complete or not at all, so that it can be written by any process
and checked by itself.
"""

from .folder import begin, locked
from .index import write_index
from .layout import (
    FORMAT_VERSION,
    INDEX,
    META,
    StoreShape,
    check_folder,
    is_whole,
    read_index,
    read_manifest,
    read_metadata,
    read_token_ids,
)
from .reader import ActivationStore, Store, open_pairs, open_store
from .shards import Shard, ShardFile, has_size
from .writer import StoreWriter


__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "META",
    "ActivationStore",
    "Shard",
    "ShardFile",
    "Store",
    "StoreShape",
    "StoreWriter",
    "begin",
    "check_folder",
    "has_size",
    "is_whole",
    "locked",
    "open_pairs",
    "open_store",
    "read_index",
    "read_manifest",
    "read_metadata",
    "read_token_ids",
    "write_index",
]
