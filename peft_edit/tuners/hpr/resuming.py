"""A training on the command line that was interrupted: what it was, and the checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from ...adapters import unfinished
from ...arguments import Argument, ArgumentError
from ...files import write_json


# Settings of a training that is not finished, beside its checkpoints.
UNFINISHED = f"train_hpr{unfinished.UNFINISHED}"


def checkpoints(out: Path) -> list[Path]:
    """Checkpoints of an unfinished training, the last one last."""
    folders = (folder for folder in out.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal())
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def _is_complete(checkpoint: Path) -> bool:
    """Whether a training can go on from it exactly: a run may have been killed while it was written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # What torch writes is a ZIP archive, whose directory stands at its end.
    written = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return isinstance(state, dict) and "global_step" in state and len(written) > 2 and all(map(is_zipfile, written))


def check_checkpoints(out: Path) -> None:
    """Raise ValueError for checkpoints that are of no training on the command line."""
    if checkpoints(out) and not (out / UNFINISHED).exists():
        raise ValueError(f"{out} has checkpoints that train-hpr did not write: choose another folder")


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Say what the checkpoints that will come are of."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / UNFINISHED, settings)


def end(out: Path) -> None:
    """Remove the checkpoints."""
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    (out / UNFINISHED).unlink()  # last: it says whose the checkpoints are


def last_checkpoint(out: Path, settings: Mapping[str, Any], resume: bool) -> str | None:
    """The checkpoint to go on from, or None. Without `resume` all checkpoints are deleted.

    Args:
        out: folder of the training.
        settings: all that the training follows from, as JSON values by the names of its options.
        resume: go on where there is one.

    Raises:
        ValueError: the training that was interrupted has other settings, or its settings cannot be read.
    """
    complete = [folder for folder in checkpoints(out) if _is_complete(folder)]
    if not resume or not complete:
        for folder in checkpoints(out):
            shutil.rmtree(folder)
        return None
    again = ("pass ", Argument("resume", False), " to begin again")
    try:
        before = dict(json.loads((out / UNFINISHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"{out} has checkpoints and no readable {UNFINISHED} ({error}): ", *again) from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        parts: list[str | Argument] = []
        for name in changed[:3]:
            there = f" is {before.get(name)!r} there, {settings[name]!r} here"
            parts += ["; " if parts else "", Argument(name), there]
        raise ArgumentError(
            f"{out} holds a training that was interrupted, with other arguments (",
            *parts,
            "): choose another folder, or ",
            *again,
        )
    return str(complete[-1])
