"""Arguments: checked as their fields declare them, and named in errors as whoever reads the message writes them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


T = TypeVar("T")

_NOT_GIVEN = inspect.Parameter.empty  # the same in every process


@dataclass(frozen=True)
class Argument:
    """An argument in a message, with a value where one is meant: `truncate`, `truncate=True`."""

    name: str
    value: Any = _NOT_GIVEN

    @property
    def has_value(self) -> bool:
        return self.value is not _NOT_GIVEN

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}" if self.has_value else self.name


def spelt(parts: tuple[str | Argument, ...], spell: Callable[[Argument], str] = str) -> str:
    """A message of text and arguments, each argument spelt by a function: by default as a call in Python has it."""
    return "".join(spell(part) if isinstance(part, Argument) else part for part in parts)


class ArgumentError(ValueError):
    """A value that an argument cannot have, or that does not go with others.

    Args:
        parts: text, and arguments. As text the error names arguments as a call in Python does, `truncate=True`; the
            command line has its own `spell`, and prints `--truncate`. Text, what users gave included, stays as it is.
    """

    def __init__(self, *parts: str | Argument):
        super().__init__(spelt(parts))
        self.parts = parts

    def __reduce__(self):  # processes send it to each other
        return type(self), self.parts

    def message(self, spell: Callable[[Argument], str]) -> str:
        """The message with each argument spelt by a function."""
        return spelt(self.parts, spell)


class Note(str):
    """Text for people that names arguments, which the command line spells its own way, as it does in an error."""

    def __new__(cls, *parts: str | Argument):
        note = super().__new__(cls, spelt(parts))
        note.parts = parts
        return note

    def __getnewargs__(self):
        return self.parts

    def message(self, spell: Callable[[Argument], str]) -> str:
        """The text with each argument spelt by a function."""
        return spelt(self.parts, spell)


def one_line(error: BaseException) -> str:
    """An error's message without line ends, for an error about it: those of other libraries have several lines."""
    return " ".join(str(error).split())


def parts_of(error: BaseException) -> tuple[str | Argument, ...]:
    """The message of an error, for an error about it."""
    return error.parts if isinstance(error, ArgumentError) else (str(error),)


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raise ArgumentError unless value is one of the choices."""
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        raise ArgumentError(Argument(name), f" must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_options(options: Any, names: tuple[str, ...] | None = None) -> None:
    """Raise ArgumentError unless fields of a dataclass are as they are declared.

    A field's type gives its choices (`Literal`), whether it is a number, a flag or text, and whether None is allowed.
    Its metadata may give bounds, "minimum", "maximum" and "above", of which an infinite value is outside; "allowed"
    says them in words, and "remedy" what to do.

    Args:
        options: the dataclass.
        names: of the fields; None for all.
    """
    hints = hints_of(type(options))
    for field in dataclasses.fields(options):
        if names is None or field.name in names:
            check_value(field.name, getattr(options, field.name), hints[field.name], field.metadata)


def takes(options: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a function whose `**options` are the fields of a dataclass: its signature shows them with their
    defaults, and a keyword that is none of them raises TypeError with the nearest one."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        kinds = inspect.Parameter
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not kinds.VAR_KEYWORD]
        fields = [p.replace(kind=kinds.KEYWORD_ONLY) for p in inspect.signature(options).parameters.values()]
        names = [parameter.name for parameter in (*own, *fields)]

        @wraps(function)
        def checked(*args: Any, **keywords: Any) -> T:
            for name in keywords:
                if name not in names:
                    raise TypeError(f"{function.__name__}() has no argument {name!r}{nearest(name, names)}")
            return function(*args, **keywords)

        checked.__signature__ = inspect.signature(function).replace(parameters=[*own, *fields])
        return checked

    return decorate


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: ": did you mean 'gate'?", or all that are."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {found[0]!r}?" if found else f": it has {', '.join(known)}"


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(kind)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The choices of a type made of `Literal` and None; none where any value of a type will do."""
    kinds = alternatives(hint)
    literal = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return (*((None,) if types.NoneType in kinds else ()), *literal) if literal else ()


def check_value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless a value is as its field is declared, see `check_options`.

    Args:
        name: of the argument.
        value: anything.
        hint: the field's type. What is neither a choice, a flag, text, a dict nor a number is not checked.
        metadata: of the field.
    """
    if choices := choices_of(hint):
        return check_choice(name, value, choices)
    kinds = set(alternatives(hint)) - {types.NoneType}
    optional = types.NoneType in alternatives(hint)
    if value is None and optional:
        return None
    what, fits = None, True
    if kinds == {bool}:
        what, fits = "True or False", isinstance(value, bool)
    elif kinds == {str}:
        what, fits = "text", isinstance(value, str)
    elif all(get_origin(kind) is dict for kind in kinds):
        what, fits = "a dict of JSON values", isinstance(value, dict) and _is_json(value)
    elif kinds and kinds <= {int, float}:
        what, fits = "a number" if float in kinds else "an integer", _is_number(value, kinds, metadata)
        what += f" {metadata['allowed']}" if "allowed" in metadata else ""
    if fits:
        return None
    allowed = f"{what}, or None" if optional else what
    remedy = f": {metadata['remedy']}" if "remedy" in metadata else ""
    raise ArgumentError(Argument(name), f" must be {allowed}, got {value!r}{remedy}")


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


def _is_number(value: Any, kinds: set[type], metadata: Mapping[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if float in kinds else int):
        return False
    within = metadata.get("minimum", float("-inf")) <= value <= metadata.get("maximum", float("inf"))
    # JSON and Python have integers that no float holds.
    return within and abs(value) <= sys.float_info.max and value > metadata.get("above", float("-inf"))


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Let errors inside the `with` block carry other names of arguments: those of the caller.

    Args:
        names: of the function that is called, to the caller's.
    """
    try:
        yield
    except ArgumentError as error:
        parts = (
            replace(part, name=names.get(part.name, part.name)) if isinstance(part, Argument) else part
            for part in error.parts
        )
        raise ArgumentError(*parts) from error
