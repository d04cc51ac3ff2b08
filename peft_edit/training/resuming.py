"""A training on the command line that was interrupted: what it was, and the checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from ..adapters import unfinished
from ..arguments import Argument, ArgumentError
from ..files import write_json


class Interrupted:
    """What a training on the command line leaves in its folder while it is not finished: checkpoints, and beside them
    its settings.

    Args:
        out: folder of the training.
        command: its name, "train-hpr".

    Attributes:
        name: of the file with the settings.
    """

    def __init__(self, out: Path, command: str):
        self.out, self.command = out, command
        self.name = f"{command.replace('-', '_')}{unfinished.UNFINISHED}"

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints, the last one last."""
        found = self.out.glob("checkpoint-*")
        numbered = {int(number): folder for folder in found if (number := folder.name.partition("-")[2]).isdecimal()}
        return [numbered[number] for number in sorted(numbered)]

    def check_checkpoints(self) -> None:
        """Raise ValueError for checkpoints that are of no training with this command."""
        if self.checkpoints and not (self.out / self.name).exists():
            raise ValueError(f"{self.out} has checkpoints that {self.command} did not write: choose another folder")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Say what the checkpoints that will come are of."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / self.name, settings)

    def end(self) -> None:
        """Remove the checkpoints."""
        for folder in self.checkpoints:
            shutil.rmtree(folder)
        (self.out / self.name).unlink()  # last: it says whose the checkpoints are

    def last_checkpoint(self, settings: Mapping[str, Any], resume: bool) -> str | None:
        """The checkpoint to go on from, or None. Without `resume` all checkpoints are deleted.

        Args:
            settings: all that the training follows from, as JSON values by the names of its options.
            resume: go on where there is one.

        Raises:
            ValueError: the training that was interrupted has other settings, or its settings cannot be read.
        """
        complete = [folder for folder in self.checkpoints if _is_complete(folder)]
        if not resume or not complete:
            for folder in self.checkpoints:
                shutil.rmtree(folder)
            return None
        again = ("pass ", Argument("resume", False), " to begin again")
        try:
            before = dict(json.loads((self.out / self.name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ArgumentError(
                f"{self.out} has checkpoints and no readable {self.name} ({error}): ", *again
            ) from error
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            parts: list[str | Argument] = []
            for name in changed[:3]:
                there = f" is {before.get(name)!r} there, {settings[name]!r} here"
                parts += ["; " if parts else "", Argument(name), there]
            raise ArgumentError(
                f"{self.out} holds a training that was interrupted, with other arguments (",
                *parts,
                "): choose another folder, or ",
                *again,
            )
        return str(complete[-1])


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
