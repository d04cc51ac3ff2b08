"""Packages that come with an extra of this one, and may be missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(module: str, extra: str, what: str) -> ModuleType:
    """A module of a package that an extra brings.

    Args:
        module: its name, "matplotlib.figure".
        extra: of this package, "plots".
        what: needs it, "a report".

    Raises:
        ValueError: it, or one that it needs, is not installed, and how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise ValueError(
            f"{what} needs the package {missing}, which is not installed: pip install 'peft-edit[{extra}]'"
        ) from error
