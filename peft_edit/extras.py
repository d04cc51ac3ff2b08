"""Packages that come with an extra of this one, and may be missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .arguments import one_line


class MissingExtraError(ImportError, ValueError):
    """A package that an extra brings is not there."""


def import_extra(module: str, extra: str, what: str) -> ModuleType:
    """A module of a package that an extra brings.

    Args:
        module: its name, "matplotlib.figure".
        extra: of this package, "plots".
        what: needs it, "a report".

    Raises:
        MissingExtraError: it, or one that it needs, is not installed, and how to install it; or it cannot be imported.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingExtraError(
            f"{what} needs the package {missing}, which is not installed: pip install 'peft-edit[{extra}]'"
        ) from error
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the package {module.partition('.')[0]}, which cannot be imported ({one_line(error)}): "
            f"install it anew, pip install --force-reinstall 'peft-edit[{extra}]'"
        ) from error
