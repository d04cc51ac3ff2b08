"""Names of a package that wait until they are used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_first_use(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package that imports its names when they are used (PEP 562).

    Args:
        package: its name. What it imports under `if TYPE_CHECKING:`, `from .module import name`, are the names, so that
            type checkers and editors see them too; its submodules are names as well.
    """
    spec = sys.modules[package].__spec__
    source = ast.parse(spec.loader.get_source(package))
    waiting = [part for part in source.body if isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING"]
    lines = [line for part in waiting for line in part.body if isinstance(line, ast.ImportFrom)]
    places = {alias.name: f"{package}.{line.module}" for line in lines for alias in line.names}

    def __getattr__(name: str) -> Any:
        module = sys.modules[package]
        if name in places:
            setattr(module, name, getattr(import_module(places[name]), name))
            return vars(module)[name]
        submodule = f"{package}.{name}"
        try:
            if not name.startswith("_"):
                return import_module(submodule)
        except ModuleNotFoundError as error:
            if error.name != submodule:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return __getattr__, __dir__, sorted(places)
