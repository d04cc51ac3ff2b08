"""Values of options as text: a field's type says how they are read from the command line and how they are written."""

from __future__ import annotations

import collections.abc
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from ..arguments import alternatives, choices_of
from ..places import format_layers, parse_layers


# Types of several values.
COLLECTIONS = (list, tuple, collections.abc.Iterable, collections.abc.Sequence)
# What None is called where it is a choice beside texts.
NONE = "none"


def kind_of(hint: Any, metadata: Mapping[str, Any] | None = None) -> Any:
    """How values of a type are written: "choice", "layers" (0-3,7), "texts" (with commas), "json", "repeated", or as a
    bool, a number, text or a path, of which it is the type."""
    if (metadata or {}).get("repeated"):
        return "repeated"
    if choices_of(hint):
        return "choice"
    kinds, members = set(alternatives(hint)) - {NoneType}, _members(hint)
    if dict in map(get_origin, kinds):
        return "json"
    if members:
        return "layers" if int in members else "texts"
    return next((kind for kind in (bool, float, int, Path) if kind in kinds), str)


def _members(hint: Any) -> set[Any]:
    """Types of the values of which a type holds several."""
    return {get_args(kind)[0] for kind in alternatives(hint) if get_origin(kind) in COLLECTIONS}


def _member(hint: Any) -> Any:
    """The type of each value of a repeated option: Path or str."""
    return Path if Path in _members(hint) else str


def parse(text: Any, hint: Any, name: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """The value that a text stands for. Text that is no value of the type stays as it is, for the check of the value.

    Args:
        text: None for an option that was not given, a flag, or a list of a repeated option.
        hint: the type.
        name: of the argument.
        metadata: of the field.
    """
    kind = kind_of(hint, metadata)
    if text is None or kind is bool:
        return text
    if kind == "repeated":
        return [_member(hint)(part) for part in text] or None
    if kind == "choice":
        written = {NONE if choice is None else str(choice): choice for choice in choices_of(hint)}
        return written.get(text, text)
    if kind == "layers":
        return parse_layers(text, name)
    if kind == "texts":
        return text.split(",")
    try:
        return json.loads(text) if kind == "json" else kind(text)
    except ValueError:
        return text


def to_text(value: Any) -> str:
    """How the command line writes a value that is not None."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict) for part in value)):
        return json.dumps(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        values = list(value)
        numbers = values and all(isinstance(part, int) for part in values)
        return format_layers(sorted(values)) if numbers else ",".join(map(str, values))
    return str(value)


def to_json(value: Any, hint: Any, metadata: Mapping[str, Any] | None = None) -> Any:
    """A value as results record it, and as a file of `--config` may give it."""
    if value is None or isinstance(value, (bool, int, float, dict)):
        return value
    kind = kind_of(hint, metadata)
    if kind == "json":
        return value
    if kind in ("texts", "repeated") and not isinstance(value, str):
        return [str(part) for part in value]
    return to_text(value)


def shown_type(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What `--help` shows after an option: the kind of value."""
    kinds = {
        int: "int",
        float: "float",
        Path: "path",
        "repeated": "path" if _member(hint) is Path else "str",
        "layers": "layers",
        "texts": "str,...",
        "json": "json",
    }
    return kinds.get(kind_of(hint, metadata), "str")


def help_of(hint: Any, metadata: Mapping[str, Any]) -> str:
    """An option's help, with its choices where it does not name them."""
    told = metadata["help"]
    names = [str(choice) for choice in choices_of(hint) if choice is not None]
    if all(re.search(rf"\b{name}\b", told) for name in names):
        return told
    *first, last = [*names, NONE] if None in choices_of(hint) else names
    return f"{told.removesuffix('.')}: {', '.join(first)} or {last}."
