"""Options of a command from a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ..arguments import Argument, ArgumentError, choices_of, one_line
from .options import Option
from .values import kind_of, parse, to_text


# How a value must be written, where it is not.
WRITTEN = {
    "layers": "layers such as 0-3,7, or a list of numbers",
    "texts": "text or a list of texts",
    "repeated": "a path or a list of paths",
}


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def read_config(file: Path, options: Sequence[Option]) -> dict[str, Any]:
    """The options that a file gives, by name, as the command line would: text, flags, and lists of repeated options.

    Args:
        file: a mapping from names of options, without the dashes before them, to values.
        options: those of the command.

    Raises:
        ValueError: it is no such file, or it has a key that is no option or a value that the option cannot have.
    """
    return texts_of(read_mapping(file, "options to values, such as 'layers: 0-3'"), options, str(file))


def texts_of(content: Mapping[Any, Any], options: Sequence[Option], where: str) -> dict[str, Any]:
    """The options that YAML gives, as `read_config` gives them.

    Args:
        content: name of each option to its value.
        options: those of the command.
        where: it stands, for messages.

    Raises:
        ValueError: a key is no option, or an option cannot have its value.
    """
    given: dict[str, Any] = {}
    by_name = {option.name: option for option in options}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            raise ValueError(f"{where}: {key!r} is no option of this command{nearest(name, list(by_name))}")
        if name in given:
            raise ValueError(f"{where}: {key} is given twice: leave one out")
        option = by_name[name]
        try:
            text = _as_text(value, option)
            if text is not None:
                option.check(parse(text, option.hint, name, option.metadata), name)
        except ArgumentError as error:
            raise ValueError(f"{where}: {error.message(spelling_in_files(options))}") from error
        if text is not None:
            given[name] = text
    return given


def read_mapping(file: Path, what: str) -> Mapping[Any, Any]:
    """What a YAML file holds, a mapping; raises ValueError for another one.

    Args:
        file: the file.
        what: it maps from and to, for messages.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"there is no file {file} with {what.split()[0]}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} must be a mapping from {what}, got {type(content).__name__}")
    return content


def _as_text(value: Any, option: Option) -> Any:
    """A value as the command line would give it; None where it is null, which leaves the option's default."""
    kind, name = kind_of(option.hint, option.metadata), option.name
    if value is None and (option.default is None or None in choices_of(option.hint)):
        return None if option.default is None else "none"
    listed = isinstance(value, list) and all(isinstance(part, (str, int)) for part in value)
    if kind is bool:
        option.check(value, name)
        return value
    if kind in WRITTEN:
        if kind == "repeated" and listed:
            return [str(part) for part in value]
        if isinstance(value, str):
            return [value] if kind == "repeated" else value
        if not (listed or (kind == "layers" and isinstance(value, int))) or isinstance(value, bool):
            raise ArgumentError(Argument(name), f" must be {WRITTEN[kind]}, got {value!r}")
    elif kind == "json":
        option.check(value, name)
    elif kind in (int, float):
        if not isinstance(value, (str, Real)) or isinstance(value, bool):  # YAML takes 5e-4 for text
            option.check(value, name)
    elif not isinstance(value, str):
        what = "one of the choices" if kind == "choice" else "text"
        raise ArgumentError(Argument(name), f" must be {what}, got {value!r}: put it in quotes")
    return to_text(value)


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message about a name that is none of these."""
    close = get_close_matches(name, names, n=1)
    return f": did you mean {close[0]}?" if close else f", which has {', '.join(sorted(names))}"


def spelling_in_files(options: Sequence[Option]) -> Callable[[Argument], str]:
    """How files write an argument: as the option that functions call so, else by its own name."""

    def spell(argument: Argument) -> str:
        called = [option.name for option in options if option.answers_to(argument.name)]
        name = (called or [argument.name])[0]
        if not argument.has_value:
            return name
        plain = argument.value is None or isinstance(argument.value, bool)
        return f"{name}: {json.dumps(argument.value) if plain else to_text(argument.value)}"

    return spell
