"""What a run that was interrupted leaves in an adapter's folder, to go on from. It is no part of the adapter."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# A method that resumes keeps what it needs, besides Trainer's checkpoints, in a file whose name ends with this.
UNFINISHED = ".unfinished.json"


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder of an adapter's folder is of a run that was interrupted."""
    return path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or path.name.endswith(UNFINISHED)
