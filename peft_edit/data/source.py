"""Where the rows of a contrast set come from: kept in the data set's `info`, which selecting rows does not change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo

from .rows import CONTRAST_FEATURES


# What a split of all rows is called in an `info`, which knows no nameless ones.
ALL = "all"


def source_info(
    name: str | None, subset: str | None, files: Iterable[str], split: str | None, rows: int
) -> DatasetInfo:
    """The `info` of a contrast set.

    Args:
        name: of the data set; of a local file without its folders.
        subset: of the data set.
        files: local copies that were read in place of the Hub; of a local file none, whose name says so.
        split: of the data set; None for all rows.
        rows: how many the data set, or its split or subset, has.
    """
    of_all = split or ALL
    return DatasetInfo(
        dataset_name=name,
        config_name=subset,
        features=CONTRAST_FEATURES,
        splits=SplitDict({of_all: SplitInfo(of_all, num_examples=rows)}),
        download_checksums={os.path.basename(os.path.normpath(file)): {} for file in files} or None,
    )


def source_of(data: Dataset) -> dict[str, Any]:
    """Where the rows of a contrast set come from, as JSON values: `name`, `subset`, `split`, `files` (None where no
    local copy was read), `rows`, and `of_rows`, the number of rows before any were left out; None for what is not
    known."""
    info, split = data.info, None if data.split is None else str(data.split)
    known = (info.splits or {}).get(split or ALL)
    of_rows = known.num_examples if known is not None else None
    return {
        "name": info.dataset_name,
        "subset": info.config_name,
        "split": split,
        "files": sorted(info.download_checksums) if info.download_checksums else None,
        "rows": len(data),
        "of_rows": None if of_rows is not None and of_rows < len(data) else of_rows,  # rows of several were joined
    }


def rows_digest(data: Dataset) -> str:
    """Hash of the rows of a contrast set in their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for row in data.select_columns(list(CONTRAST_FEATURES)).with_format(None):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def file_names(data_files: object) -> list[str]:
    """Names of the files that `load_contrast_set` was given in place of the Hub's."""
    if data_files is None:
        return []
    return [data_files] if isinstance(data_files, (str, Path)) else [os.fspath(file) for file in data_files]
