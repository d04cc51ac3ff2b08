"""Imports go one way: functional <- tuners <- fitting <- cli, and nothing heavy where only mathematics belongs."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "peft_edit"
STANDARD_LIBRARY = {
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "typing",
}

# Module to the modules of this package that it may import, at the top or inside functions.
ALLOWED = {
    "functional": {"functional"},
    "registration": set(),
    "models": {"models"},
    "processes": set(),
    "activations": {"activations", "data", "models", "processes", "tuners"},
    "data": {"data"},
    "adapters": {"activations", "adapters", "models", "tuners"},
    "tuners": {"adapters", "functional", "models", "registration", "tuners"},
    "fitting": {"activations", "adapters", "functional", "processes", "tuners"},
    "combining": {"activations", "adapters", "fitting", "functional", "models", "tuners"},
    "conversion": {"adapters", "conversion", "functional", "models", "tuners"},
    "exporting": {"adapters", "functional", "models", "tuners"},
    "resuming": set(),
    "merging": {"adapters", "models", "resuming", "tuners", "version"},
    "training": {"activations", "adapters", "functional", "models", "tuners"},
    "selection": {"activations", "adapters", "tuners"},
    "evaluation": {"data", "models", "tuners"},
    "demo": {"activations", "adapters", "data", "evaluation", "fitting", "selection", "training", "tuners"},
}


def imports(file: Path) -> set[tuple[str, ...]]:
    """Absolute names, as tuples of parts, of all that a file imports."""
    package = ("peft_edit", *file.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            found |= {module} if node.module else {(*module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    files = list((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for file in files:
        inside = {name[1] for name in imports(file) if name[0] == "peft_edit" and len(name) > 1}
        assert inside <= ALLOWED[part], f"{file.relative_to(PACKAGE)} imports {inside - ALLOWED[part]}"


def test_every_module_has_its_place():
    modules = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__pycache__", "version", "cli", "templates"} == set(ALLOWED)


def test_mathematics_needs_torch_alone():
    for file in (PACKAGE / "functional").glob("*.py"):
        outside = {name[0] for name in imports(file)} - {"peft_edit"}
        assert outside <= {*STANDARD_LIBRARY, "torch"}
