"""Imports go one way, and nothing heavy stands where only mathematics belongs."""

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

METHODS = sorted(folder.name for folder in (PACKAGE / "tuners").iterdir() if (folder / "method.py").exists())

# Folders (and single modules) of the package to those that they may import, at the top or inside functions.
ALLOWED = {
    "files": set(),
    "arguments": set(),
    "extras": set(),
    "processes": {"models"},
    "version": set(),
    "importing": set(),
    "places": set(),
    "plugin": {"adapters", "tuners"},
    "json_files": {"arguments"},
    "models": {"json_files"},
    "data": {"arguments"},
    "tuners": {"arguments", "files", "json_files", "models"},
    "activations": {"activations/store", "arguments", "data", "files", "json_files", "models", "processes", "tuners"},
    "activations/store": {"arguments", "files", "json_files", "models"},
    "adapters": {"activations/store", "data", "evaluation", "files", "json_files", "models", "tuners"},
    "training": {"activations/store", "adapters", "files", "models", "tuners"},
    "merging": {"adapters", "files", "models", "tuners", "version"},
    "evaluation": {"data", "json_files", "models", "tuners", "version"},
    "choosing": {
        *("activations/store", "adapters", "data", "evaluation", "files", "json_files", "models", "tuners"),
    },
    "answering": {"data", "evaluation", "files", "json_files", "models", "tuners"},
    "chatting": {"adapters", "answering", "data", "explaining", "extras", "files", "models", "tuners"},
    "explaining": {"data", "evaluation", "models", "tuners"},
    "plotting": {"choosing", "evaluation", "extras", "files", "models", "tuners"},
    "reporting": {
        *("activations/store", "adapters", "choosing", "data", "evaluation", "explaining", "extras", "files"),
        *("json_files", "models", "plotting", "tuners"),
    },
    "demo": {"activations", "adapters", "data", "evaluation", "files", "tuners"},
    "cli": {
        *("activations", "activations/store", "adapters", "answering", "arguments", "chatting", "choosing", "data"),
        *(
            "demo",
            "evaluation",
            "explaining",
            "extras",
            "files",
            "json_files",
            "merging",
            "models",
            "plotting",
            "plugin",
        ),
        *("processes", "reporting", "training", "tuners"),
    },
    # A method builds on all this, on no other method, and only its commands and its evidence on what runs it.
    **{
        f"tuners/{method}": {"activations/store", "adapters", "files", "models", "processes", "training", "tuners"}
        for method in METHODS
    },
}
# What all may import: errors name arguments everywhere, options name places.
EVERYWHERE = {"arguments", "importing", "places"}
MORE = {"commands": {"cli"}, "evidence": {"demo"}, "settings": {"choosing", "json_files"}}
# What makes a tuner of PEFT knows nothing of folders and stores.
TUNER = ("config", "layer", "model")
# What only computes needs torch alone.
MATHEMATICS = sorted(file for name in ("maths", "spectra", "subspaces") for file in PACKAGE.glob(f"tuners/*/{name}.py"))


def part_of(module: tuple[str, ...]) -> str:
    """The folder of the table that a module is in, given its name without the package's: the innermost one."""
    places = ("/".join(module[:length]) for length in range(len(module), 0, -1))
    return next((place for place in places if place in ALLOWED), module[0])


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


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.stem != "__init__"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(file):
    part = part_of(file.relative_to(PACKAGE).with_suffix("").parts)
    inside = {part_of(name[1:]) for name in imports(file) if name[0] == "peft_edit" and len(name) > 1}
    allowed = ALLOWED[part] | EVERYWHERE | {part}
    if part.startswith("tuners/"):
        allowed = (
            {"models", "tuners", part, *EVERYWHERE} if file.stem in TUNER else allowed | MORE.get(file.stem, set())
        )
    assert inside <= allowed


@pytest.mark.parametrize("file", MATHEMATICS, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_mathematics_needs_torch_alone(file):
    own = ("peft_edit", *file.relative_to(PACKAGE).parts[:-1])
    outside = {name[0] for name in imports(file) if name[: len(own)] != own and name[:2] != ("peft_edit", "arguments")}
    assert outside <= {*STANDARD_LIBRARY, "torch"}
