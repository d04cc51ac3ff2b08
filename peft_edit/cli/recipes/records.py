"""Which steps of a recipe have been done in a folder, and from what."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypedDict

from ...files import write_json
from ...json_files import read_json
from .plan import RECORDS, Planned


VERSION = 1
# In place of a digest, while what was written before is removed.
NOTHING = ""


class Contents(TypedDict):
    """Of the file of the records."""

    version: int
    # What a step writes, to the digest of the step that last began to write it.
    made: dict[str, str]
    # Digests of the steps that were done, to what they were.
    done: dict[str, Any]


class Records:
    """The records of a folder: a step is done where what it writes was last written by a step of the same digest,
    which was done, and is still there.

    Args:
        folder: of the run.

    Raises:
        ValueError: the file of the records is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / RECORDS
        self.contents: Contents = {"version": VERSION, "made": {}, "done": {}}
        if self.file.exists():
            self.contents = read_json(self.file, Contents, "no record of a recipe", "choose another folder")

    def is_done(self, planned: Planned) -> bool:
        """Whether a step need not be done again."""
        digest, made = planned.digest, self.contents["made"]
        there = all((self.folder / name).exists() for name in planned.outputs)
        return there and digest in self.contents["done"] and all(made.get(n) == digest for n in _names(planned))

    def check(self, planned: Planned) -> None:
        """Raise ValueError where something that no record tells of is in the place of what a step writes."""
        for name in planned.outputs:
            if (self.folder / name).exists() and name not in self.contents["made"]:
                raise ValueError(
                    f"{planned.step.where} writes {self.folder / name}, which is there, and not from a run of a "
                    "recipe: move it away, or choose another folder"
                )

    def begin(self, planned: Planned) -> None:
        """Say that a step begins. What it writes is removed where it is of other options, and where its command cannot
        go on with it."""
        digest, made, done = planned.digest, self.contents["made"], self.contents["done"]
        goes_on = planned.resumes and digest not in done and all(made.get(n) == digest for n in planned.outputs)
        done.pop(digest, None)
        if not goes_on:
            # Before anything is removed, so that no record tells of what is gone.
            made.update(dict.fromkeys(_names(planned), NOTHING))
            self._write()
            for name in planned.outputs:
                place = self.folder / name
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)
        made.update(dict.fromkeys(_names(planned), digest))
        self._write()

    def end(self, planned: Planned) -> None:
        """Say that a step is done."""
        current = set(self.contents["made"].values())
        kept = {key: value for key, value in self.contents["done"].items() if key in current}
        self.contents["done"] = {**kept, planned.digest: {"command": planned.step.command, "options": planned.recorded}}
        self._write()

    def _write(self) -> None:
        write_json(self.file, self.contents)


def _names(planned: Planned) -> list[str]:
    """What a step is known by: its outputs, or its place in the recipe where it has none."""
    return list(planned.outputs) or [f"step {planned.step.number}, {planned.step.command}"]
