"""This package as a plug-in of PEFT, which has no place for one: what PEFT is told when this package is
imported. What saves adapters and describes them is imported when one is saved."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from .tuners import METHODS


if TYPE_CHECKING:
    from .tuners.config import EditConfig


def starts_command_line() -> bool:
    """Whether this process is `peft-edit`, or `python -m peft_edit.cli`, called `-m` until Python has found it.

    PEFT takes seconds to import. There a command registers the methods when it runs, so that help is shown at once.
    A process that the command line starts has its `sys.argv`, but was not called so.
    """
    called = sys.argv[0] if sys.argv else ""
    if called == "-m":
        return "peft_edit.cli" in sys.orig_argv
    return PurePath(called).name in ("peft-edit", "peft-edit.exe") and called in sys.orig_argv


def register() -> None:
    """Let PEFT know the methods. Doing it again changes nothing."""
    from .tuners.config import EditConfig
    from .tuners.registration import save_into, write_cards_with

    for name in METHODS:
        import_module(f"{__package__}.tuners.{name}.model")
    write_cards_with(EditConfig, _write_card)
    save_into(EditConfig, _replaced)


def _write_card(folder: Path, config: EditConfig) -> None:
    from .adapters.card import write_card_of_saved

    write_card_of_saved(folder, config)


def _replaced(folder: Path) -> AbstractContextManager[Path]:
    from .adapters.save import replaced_adapters

    return replaced_adapters(folder)
