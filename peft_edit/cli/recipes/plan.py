"""What a recipe will do: each step's options checked, the files that it writes and reads, and what it follows from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from ...arguments import ArgumentError
from ..config_file import nearest, spelling_in_files, texts_of
from ..options import Bound, Option, as_recorded, bind, default_text, options_of
from ..values import kind_of
from .reading import Recipe, Step


# Files of the run itself, in its folder.
RECORDS, TABLE, TABLE_JSON = "recipe.json", "table.md", "table.json"
# Kinds of options that can name a file or a folder.
PLACES = (Path, str, "repeated")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Planned:
    """A step with its options.

    Attributes:
        step: of the recipe.
        function: of the command.
        options: all of the command.
        texts: name of each to its value, as the command line has it. Outputs, and what is read of earlier ones, have
            their names in the recipe.
        outputs: names of what it writes.
        reads: the earlier steps whose outputs it reads.
    """

    step: Step
    function: Callable
    options: Sequence[Option]
    texts: Mapping[str, Any]
    outputs: Sequence[str]
    reads: Sequence[Planned]

    @property
    def resumes(self) -> bool:
        """Whether the command goes on with what an interrupted run of it has left in the place of its outputs."""
        return "resume" in (option.name for option in self.options)

    def bound(self, folder: Path) -> Bound:
        """The command with checked options, whose outputs lie in a folder."""
        texts = dict(self.texts)
        made = {*self.outputs, *(name for earlier in self.reads for name in earlier.outputs)}
        for option in self.options:
            if kind_of(option.hint, option.metadata) in PLACES and texts[option.name] is not None:
                texts[option.name] = _each(
                    texts[option.name], lambda place: str(folder / place) if output_of(place, made) else place
                )
        spell = spelling_in_files(self.options)
        try:
            return bind(self.function, self.options, texts, spell)
        except ArgumentError as error:
            raise ValueError(f"{self.step.where}: {error.message(spell)}") from error

    @property
    def recorded(self) -> dict[str, Any]:
        """The options, as JSON values, with the names that outputs have in the recipe."""
        return as_recorded(self.options, self.texts)

    @cached_property
    def digest(self) -> str:
        """A hash of all that its outputs follow from: its command and options, the files that it reads, and the same
        of the steps whose outputs it reads."""
        made = {name for earlier in self.reads for name in earlier.outputs}
        files = {
            place: _content(Path(place))
            for option, place in self.places()
            if not option.is_output and not output_of(place, made)
        }
        contents = {
            "command": self.step.command,
            "options": self.recorded,
            "files": files,
            "reads": [earlier.digest for earlier in self.reads],
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]

    def places(self) -> Iterator[tuple[Option, str]]:
        """Options that can name files, and each name."""
        for option in self.options:
            value = self.texts[option.name]
            if kind_of(option.hint, option.metadata) in PLACES and value is not None:
                for place in value if isinstance(value, list) else [value]:
                    yield option, place


def plan(recipe: Recipe, functions: Mapping[str, Callable], folder: Path) -> list[Planned]:
    """The steps of a recipe, all of whose options are checked.

    Args:
        recipe: as it was read.
        functions: name to function of each command.
        folder: of the run.

    Raises:
        ValueError: a step has an unknown option or lacks one, or one that cannot have its value; two steps write the
            same; a file that a step reads is neither there nor made by an earlier step.
    """
    options = {name: options_of(functions[name]) for name in dict.fromkeys(step.command for step in recipe.steps)}
    _check_defaults(recipe, options)
    planned: list[Planned] = []
    for step in recipe.steps:
        planned.append(_planned(step, recipe, functions[step.command], options[step.command], planned))
    _check_outputs(planned)
    for step in planned:
        _check_inputs(step, planned)
        step.bound(folder)
    return planned


def output_of(place: str, outputs: Sequence[str] | set[str]) -> str | None:
    """The output that a place is, or lies in; None where it is none of them."""
    parts = PurePath(place).parts
    return next((name for name in outputs if parts[: len(PurePath(name).parts)] == PurePath(name).parts), None)


def _planned(
    step: Step, recipe: Recipe, function: Callable, options: Sequence[Option], before: list[Planned]
) -> Planned:
    names = [option.name for option in options]
    given = {str(key).replace("-", "_"): value for key, value in recipe.defaults.items()}
    given = {name: value for name, value in given.items() if name in names}
    own = texts_of(step.options, options, step.where)
    shared = texts_of(given, options, f"{recipe.where}, defaults, for {step.command}")
    # what a step sets to null has the command's own default
    shared = {name: text for name, text in shared.items() if name not in _names(step.options)}
    texts = {option.name: default_text(option) for option in options} | shared | own
    if missing := [name for name, text in texts.items() if text is MISSING]:
        raise ValueError(f"{step.where} needs {missing[0]}, and has {', '.join(_names(step.options)) or 'no options'}")
    outputs = [texts[option.name] for option in options if option.is_output and texts[option.name] is not None]
    for name in outputs:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or name in ("", "."):
            raise ValueError(f"{step.where} writes {name}: name a place in the folder of the run, such as store")
    planned = Planned(step, function, options, texts, outputs, [])
    read = {
        earlier.step.number: earlier
        for option, place in planned.places()
        for earlier in before
        if not option.is_output and output_of(place, earlier.outputs)
    }
    return Planned(step, function, options, texts, outputs, list(read.values()))


def _names(options: Mapping[str, Any]) -> list[str]:
    return [str(key).replace("-", "_") for key in options]


def _check_defaults(recipe: Recipe, options: Mapping[str, Sequence[Option]]) -> None:
    known = sorted({option.name for of_command in options.values() for option in of_command})
    for name in _names(recipe.defaults):
        if name not in known:
            raise ValueError(f"{recipe.where}, defaults: no step has an option {name!r}{nearest(name, known)}")


def _check_outputs(steps: Sequence[Planned]) -> None:
    """Raise ValueError where two steps write the same place, or one inside that of the other."""
    written: dict[str, Step] = dict.fromkeys((RECORDS, TABLE, TABLE_JSON))
    for planned in steps:
        for name in planned.outputs:
            for other, step in written.items():
                if output_of(name, [other]) or output_of(other, [name]):
                    by = f"step {step.number} ({step.command}) writes" if step else "the run itself writes"
                    raise ValueError(f"{planned.step.where} writes {name}, and {by} {other}: choose another name")
            written[name] = planned.step


def _check_inputs(planned: Planned, steps: Sequence[Planned]) -> None:
    """Raise ValueError where what a step reads is made by a later one, or is a file that is not there."""
    made = {name: other.step for other in steps for name in other.outputs}
    earlier = [name for name, step in made.items() if step.number < planned.step.number]
    for option, place in planned.places():
        if option.is_output or output_of(place, earlier):
            continue
        if (later := output_of(place, list(made))) is not None:
            step = made[later]
            raise ValueError(
                f"{planned.step.where}: {option.name} is {place}, which step {step.number} ({step.command}) writes: "
                "put that step first"
            )
        if kind_of(option.hint, option.metadata) is not str and not Path(place).exists():
            which = nearest(place, earlier) if earlier else ""
            raise ValueError(f"{planned.step.where}: {option.name} is {place}, which is not there{which}")


def _each(value: str | list[str], change: Callable[[str], str]) -> str | list[str]:
    return [change(part) for part in value] if isinstance(value, list) else change(value)


def _content(place: Path) -> Any:
    """What tells whether a file, or a folder of files, is still the same; None for what is not on this machine."""
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if not place.is_file():
        return None
    digest = hashlib.sha256()
    with place.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
