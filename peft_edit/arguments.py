"""Arguments: checked as their fields declare them, and named in errors as whoever reads the message writes them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_NOT_GIVEN = object()


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


class ArgumentError(ValueError):
    """A value that an argument cannot have, or that does not go with others.

    Args:
        parts: text, and arguments. As text the error names arguments as a call in Python does, `truncate=True`; the
            command line has its own `spell`, and prints `--truncate`. Text, what users gave included, stays as it is.
    """

    def __init__(self, *parts: str | Argument):
        super().__init__("".join(map(str, parts)))
        self.parts = parts

    def __reduce__(self):  # processes send it to each other
        return type(self), self.parts

    def message(self, spell: Callable[[Argument], str]) -> str:
        """The message with each argument spelt by a function."""
        return "".join(spell(part) if isinstance(part, Argument) else part for part in self.parts)


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
    hints = _hints(type(options))
    for field in dataclasses.fields(options):
        if names is None or field.name in names:
            _check(field.name, getattr(options, field.name), hints[field.name], field.metadata)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The choices of a type made of `Literal` and None; none where any value of a type will do."""
    kinds = alternatives(hint)
    literal = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return (*((None,) if types.NoneType in kinds else ()), *literal) if literal else ()


def _check(name: str, value: Any, hint: Any, metadata: Any) -> None:
    if choices := choices_of(hint):
        return check_choice(name, value, choices)
    kinds = alternatives(hint)
    if set(kinds) - {bool, int, float, str, types.NoneType} or (value is None and types.NoneType in kinds):
        return None
    optional = ", or None" if types.NoneType in kinds else ""
    remedy = f": {metadata['remedy']}" if "remedy" in metadata else ""
    if bool in kinds and not isinstance(value, bool):
        raise ArgumentError(Argument(name), f" must be True or False, got {value!r}{remedy}")
    if str in kinds and not isinstance(value, str):
        raise ArgumentError(Argument(name), f" must be text{optional}, got {value!r}{remedy}")
    if int not in kinds and float not in kinds:
        return None
    what = "a number" if float in kinds else "an integer"
    allowed = f"{what} {metadata['allowed']}" if "allowed" in metadata else what
    number = (int, float) if float in kinds else int
    fits = isinstance(value, number) and not isinstance(value, bool)
    fits = fits and metadata.get("minimum", float("-inf")) <= value <= metadata.get("maximum", float("inf"))
    fits = fits and value > metadata.get("above", float("-inf"))
    if not fits or abs(value) == float("inf"):
        raise ArgumentError(Argument(name), f" must be {allowed}{optional}, got {value!r}{remedy}")
    return None
