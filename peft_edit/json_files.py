"""JSON that other programs, or other people, wrote: compared with its declared type before anything is done with it.

What a file holds is declared once, as a `TypedDict`. Names of files in it are followed where they stay in its folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from .arguments import alternatives


# Bytes of the longest name of a file on usual filesystems.
LONGEST_NAME = 255
# What a type is called in messages.
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null", list: "a list"}


def read_json(path: Path, declared: Any, what: str, remedy: str) -> Any:
    """The value in a JSON file, of a declared type, see `mismatch`.

    Args:
        path: of the file.
        declared: the type.
        what: what a file is that holds something else: "damaged", "no index of a checkpoint".
        remedy: what to do then.

    Raises:
        ValueError: the file is not there, cannot be read, is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character, "\ud800", could be written nowhere again
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path}: {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is {what} ({error}): {remedy}") from error
    if problem := mismatch(value, declared):
        raise ValueError(f"{path} is {what} ({problem}): {remedy}")
    return value


def digest_of(value: Any) -> str:
    """Hash of JSON values: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def mismatch(value: Any, declared: Any, name: str = "") -> str | None:
    """How a value of JSON differs from a declared type: "shards[2].rows must be an integer, got '12'". None where it
    does not.

    Args:
        value: anything.
        declared: a `TypedDict` (more keys than it has are allowed), `list` or `dict` of a type, `Literal`, `bool`,
            `int` (of 64 bits), `float` (or an integer that one holds), `str`, `None`, `Any`, or a union of these.
        name: of the value; "" for the contents of a file.
    """
    kinds = alternatives(declared)
    for kind in kinds:
        if isinstance(value, dict) and is_typeddict(kind):
            return _keys_mismatch(value, kind, name)
        if get_origin(kind) in (dict, list) and isinstance(value, get_origin(kind)):
            inner, items = get_args(kind)[-1], value.items() if isinstance(value, dict) else enumerate(value)
            found = (mismatch(item, inner, f"{name}[{key!r:.80}]") for key, item in items)
            return next((problem for problem in found if problem), None)
        if _is(value, kind):
            return None
    return f"{name or 'it'} must be {' or '.join(map(_describe, kinds))}, got {value!r:.80}"


def _keys_mismatch(value: dict, declared: Any, name: str) -> str | None:
    """As `mismatch`, for a `TypedDict`."""
    start = f"{name}." if name else ""
    if missing := sorted(declared.__required_keys__ - set(value)):
        return f"no {start}{missing[0]}"
    hints = get_type_hints(declared)
    found = (mismatch(value[key], hint, f"{start}{key}") for key, hint in hints.items() if key in value)
    return next((problem for problem in found if problem), None)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is Any or isinstance(value, bool):
        return kind in (Any, bool)
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)
    return isinstance(kind, type) and not is_typeddict(kind) and isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return WORDS.get(get_origin(kind) or kind, "an object")


def inside(name: object, source: Path | str) -> str:
    """The name of a file below a folder, as a file in that folder, or a list of what is there, gives it.

    Links are followed: the Hub's cache consists of them. A name alone leads nowhere else.

    Args:
        name: anything.
        source: where it stands, for the message.

    Returns:
        The name with "/" between its parts.

    Raises:
        ValueError: it is absolute, leads out of the folder, or can be no name on some system.
    """
    given = name if isinstance(name, str) and name.isprintable() else ""
    parts = PurePosixPath(given).parts
    foreign = "\\" in given or PureWindowsPath(given).drive  # leads elsewhere on Windows
    fits = all(len(part.encode()) <= LONGEST_NAME for part in parts)
    if not parts or parts[0].startswith("/") or ".." in parts or foreign or not fits:
        raise ValueError(
            f"{source} names the file {name!r:.80}, which is none below its folder: download or save it again"
        )
    return "/".join(parts)
