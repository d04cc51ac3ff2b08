"""Read a recipe: its variables get their values, and its steps are listed, those of `for` once for each value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...arguments import one_line
from ..config_file import nearest, read_mapping


KEYS = ("name", "description", "variables", "defaults", "steps")
REFERENCE = re.compile(r"\$\{([^{}]*)\}")
# Of a variable without a default: what it is, for the message that asks for it.
REQUIRED = "required"
NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Step:
    """A step of a recipe, with variables replaced.

    Attributes:
        number: from 1.
        command: its name.
        options: name, as the recipe writes it, to value.
        where: it stands, for messages.
    """

    number: int
    command: str
    options: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Recipe:
    """A recipe with values for its variables.

    Attributes:
        name, description: of the experiment.
        variables: name to value.
        steps: all, in their order.
        defaults: options of every step whose command has them.
        where: its file, for messages.
    """

    name: str
    description: str
    variables: Mapping[str, Any]
    steps: Sequence[Step]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def read_recipe(file: Path, settings: Sequence[str], commands: Sequence[str]) -> Recipe:
    """The recipe in a file.

    Args:
        file: YAML, see `peft_edit.cli.recipes`.
        settings: values of variables, "name=value", where value is YAML.
        commands: names of those that a step may run.

    Raises:
        ValueError: the file is no recipe, a step is of no command, or a variable is unknown or has no value.
    """
    content = read_mapping(file, "name, description, variables, defaults and steps")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{file}: {key!r} is no part of a recipe{nearest(str(key), KEYS)}")
    parts = {"variables": {}, "defaults": {}, "name": file.stem, "description": "", **content}
    for key, kind in (("variables", Mapping), ("defaults", Mapping), ("name", str), ("description", str)):
        if not isinstance(parts[key], kind):
            what = "text" if kind is str else "a mapping"
            raise ValueError(f"{file}: {key} must be {what}, got {parts[key]!r}")
    if not re.fullmatch(r"[\w.-]*\w", parts["name"]):
        raise ValueError(f"{file}: name must be of letters, digits, - and _, as a folder's, got {parts['name']!r}")
    values = _values(parts["variables"], settings, str(file))
    numbers = itertools.count(1)
    steps = list(_listed(parts.get("steps"), values, str(file), numbers, commands))
    defaults = substituted(parts["defaults"], values, f"{file}, defaults")
    return Recipe(parts["name"], parts["description"], values, steps, defaults, str(file))


def _values(declared: Mapping[str, Any], settings: Sequence[str], where: str) -> dict[str, Any]:
    """Each variable's value: its default, or what was set."""
    if wrong := [name for name in declared if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise ValueError(f"{where}: the variable {wrong[0]!r} must be a word of letters, digits and _")
    values = dict(declared)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set must be name=value, got {setting!r}")
        if name not in values:
            known = nearest(name, list(values)) if values else ": the recipe has none"
            raise ValueError(f"{where} has no variable {name!r}{known}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name}: {text!r} is no YAML: {one_line(error)}") from error
    for name, value in values.items():
        if isinstance(value, Mapping) and set(value) == {REQUIRED}:
            raise ValueError(f"{where} needs the variable {name}, {value[REQUIRED]}: pass --set {name}=...")
    return values


def _listed(
    steps: Any, values: Mapping[str, Any], where: str, numbers: Iterator[int], commands: Sequence[str]
) -> Iterator[Step]:
    """The steps of a list, those of `for` as often as it says."""
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{where}: steps must be a list of steps, such as '- collect: {{...}}', got {steps!r}")
    for step in steps:
        if isinstance(step, Mapping) and "for" in step:
            if set(step) != {"for", "steps"}:
                raise ValueError(f"{where}: a repetition has the keys for and steps, got {', '.join(map(str, step))}")
            for more in _rounds(step["for"], values, where):
                yield from _listed(step["steps"], {**values, **more}, where, numbers, commands)
            continue
        number = next(numbers)
        if not isinstance(step, Mapping) or len(step) != 1:
            raise ValueError(
                f"{where}, step {number}: a step is one command and its options, such as '- collect: {{...}}', "
                f"got {step!r}"
            )
        ((command, options),) = step.items()
        if command not in commands:
            raise ValueError(
                f"{where}, step {number}: there is no command {command!r}{nearest(str(command), commands)}"
            )
        place = f"{where}, step {number} ({command})"
        if not isinstance(options, Mapping):
            raise ValueError(f"{place} must be a mapping from options to values, got {options!r}")
        yield Step(number, command, substituted(options, values, place), place)


def _rounds(repeated: Any, values: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The variables of each round of a `for`."""
    repeated = substituted(repeated, values, f"{where}, for")
    if isinstance(repeated, Mapping):
        for name, several in repeated.items():
            if not isinstance(several, list) or not several:
                raise ValueError(f"{where}: for {name} must be a list of values, got {several!r}")
        rounds = [dict(zip(repeated, chosen, strict=True)) for chosen in itertools.product(*repeated.values())]
    else:
        rounds = repeated if isinstance(repeated, list) else []
    names = [set(row) if isinstance(row, Mapping) else None for row in rounds]
    if not rounds or not names[0] or names.count(names[0]) < len(names):
        raise ValueError(
            f"{where}: for must be a mapping from variables to lists of values, or a list of mappings with the same "
            f"variables, got {repeated!r}"
        )
    if taken := [name for name in names[0] if name in values]:
        raise ValueError(f"{where}: for {taken[0]}: the recipe has a variable of this name: choose another")
    return [dict(row) for row in rounds]


def substituted(value: Any, values: Mapping[str, Any], where: str) -> Any:
    """A value with each ${variable} replaced. Text that is nothing else becomes the variable's value, of any type.

    Raises:
        ValueError: there is no such variable, or its value is none that text can hold.
    """
    if isinstance(value, Mapping):
        return {key: substituted(part, values, where) for key, part in value.items()}
    if isinstance(value, list):
        return [substituted(part, values, where) for part in value]
    if not isinstance(value, str):
        return value

    def lookup(name: str) -> Any:
        if name not in values:
            known = nearest(name, list(values)) if values else ": the recipe has none"
            raise ValueError(f"{where}: there is no variable {name!r}{known}")
        return values[name]

    def in_text(match: re.Match) -> str:
        found = lookup(match[1])
        if isinstance(found, bool) or not isinstance(found, (str, int, float)):
            raise ValueError(f"{where}: the variable {match[1]} is {found!r}, which cannot stand inside text {value!r}")
        return str(found)

    whole = REFERENCE.fullmatch(value)
    return lookup(whole[1]) if whole else REFERENCE.sub(in_text, value)
