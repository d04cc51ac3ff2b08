"""Save an adapter so that its folder changes only when all of it is written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel

from .cards import README, has_own_readme


def check_adapter_folder(path: Path, method: str, *others: str) -> None:
    """Raise ValueError unless nothing is at `path`, or an empty folder, or an adapter of a method ("SEA", "HPR"), or a
    folder with one of the files `others`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder for the adapter")
    # Hidden files may be what a run has left that was killed.
    if not path.exists() or all(file.name.startswith(".") for file in path.iterdir()):
        return
    config = path / "adapter_config.json"
    if not config.exists():
        if not any((path / name).exists() for name in others):
            raise ValueError(f"{path} holds something else than an adapter: choose another folder")
        return
    try:
        found = json.loads(config.read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        found = "unknown"
    if found != method:
        raise ValueError(f"{path} holds an adapter of another method ({found}, not {method}): choose another folder")


def save_adapter(model: PeftModel, path: Path, texts: Mapping[str, str] | None = None, *others: str) -> None:
    """Save an adapter, with further files of these names and texts. A README.md of the user's is kept. For
    `others` see `check_adapter_folder`.

    Raises:
        ValueError: the folder holds something else than an adapter.
    """
    check_adapter_folder(path, model.active_peft_config.peft_type.value, *others)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        model.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            (Path(temporary) / name).write_text(text, encoding="utf-8")
        for file in Path(temporary).iterdir():
            if file.name == README and has_own_readme(path):
                continue
            os.replace(file, path / file.name)
