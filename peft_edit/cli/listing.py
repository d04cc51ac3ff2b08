"""Which commands there are, read in the files that have them: nothing is imported but the one that is called."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..tuners import METHODS


# The module whose command takes another program's options.
HARNESS = "cli.harness"
# Modules of the package with commands, in the order of use.
MODULES = (
    *("cli.demo", "cli.activations"),
    *(f"tuners.{name}.commands" for name in METHODS),
    *("cli.choose", "cli.evaluate", "cli.explain", "cli.generate", "cli.report", "cli.chat", "cli.ui"),
    *("cli.convert", "cli.export", "cli.merge", "cli.hub", "cli.run", HARNESS),
)
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Listed:
    """A command in the list of all.

    Attributes:
        module: that has its function, "cli.demo".
        function: name of its function.
        help: docstring of its function.
    """

    module: str
    function: str
    help: str

    @property
    def name(self) -> str:
        return command_name(self.function)

    def load(self) -> Callable:
        """Its function."""
        return getattr(import_module(f"{PACKAGE.name}.{self.module}"), self.function)


def command_name(function: str) -> str:
    """Name of a command, by that of its function."""
    return function.replace("_", "-")


def listed_commands() -> Iterator[Listed]:
    """All commands, in the order of use. Each module ends with a line `COMMANDS = [...]` of their functions."""
    for module in MODULES:
        file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        *functions, last = ast.parse(file.read_text(encoding="utf-8")).body
        told = {part.name: ast.get_docstring(part) for part in functions if isinstance(part, ast.FunctionDef)}
        for function in last.value.elts:
            yield Listed(module, function.id, told[function.id])
