"""Save an adapter so that its folder changes only when all of it is written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel


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


# In a card that the package writes: without it the card is the user's.
OWN_CARD = "<!-- Written by peft_edit, which replaces it at the next save: remove this line to keep your own text. -->"


@contextmanager
def adapter_folder(path: Path, method: str, *others: str) -> Iterator[Path]:
    """A temporary folder whose files move to `path` when the block ends without an error. A README.md that is there and
    that the user may have written is kept.

    Raises:
        ValueError: the folder holds something else than an adapter, see `check_adapter_folder`.
    """
    check_adapter_folder(path, method, *others)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            card = path / file.name
            if card.name == "README.md" and card.exists() and OWN_CARD not in card.read_text(encoding="utf-8"):
                continue
            os.replace(file, card)


def save_adapter(model: PeftModel, path: Path, texts: Mapping[str, str] | None = None, *others: str) -> None:
    """Save an adapter, with further files of these names and texts. A README.md that is there already is kept. For
    `others` see `check_adapter_folder`.

    Raises:
        ValueError: the folder holds something else than an adapter.
    """
    with adapter_folder(path, model.active_peft_config.peft_type.value, *others) as temporary:
        model.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
