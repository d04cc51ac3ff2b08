"""Save an adapter so that its folder changes only when all of it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files import check_writable, replaced
from .card import README, has_own_readme
from .read import read_config


def check_adapter_folder(path: Path, method: str, *others: str) -> None:
    """Raise ValueError unless nothing is at `path`, or an empty folder, or an adapter of a method, or a folder
    with one of the files `others`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a folder for the adapter")
    check_writable(path)
    # Hidden files, and weights without a configuration, may be what a save has left that was killed.
    if not path.exists() or all(file.name.startswith(".") for file in path.iterdir()):
        return
    config = path / CONFIG_NAME
    if not config.exists():
        if not any((path / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, *others)):
            raise ValueError(f"{path} holds something else than an adapter: choose another folder")
        return
    try:
        found = read_config(path).peft_type.value
    except ValueError:
        found = "unknown"
    if found != method:
        raise ValueError(f"{path} holds an adapter of another method ({found}, not {method}): choose another folder")


@contextmanager
def adapter_folder(path: Path, method: str, *others: str) -> Iterator[Path]:
    """A temporary folder whose files move to `path` when the block ends without an error. A README.md there that is the
    user's own is kept.

    Raises:
        ValueError: the folder holds something else than an adapter, see `check_adapter_folder`.
    """
    check_adapter_folder(path, method, *others)
    with replaced_adapters(path) as work:
        yield work


@contextmanager
def replaced_adapters(path: Path) -> Iterator[Path]:
    """A temporary folder whose files, those of an adapter and of others in folders in it, move to `path` when the block
    ends without an error, see `files.replaced`. A README.md there that is the user's own is kept."""
    with replaced(path, last=CONFIG_NAME) as work:
        yield work
        for card in work.rglob(README):
            if has_own_readme((path / card.relative_to(work)).parent):
                card.unlink()


def save_adapter(model: PeftModel, path: Path, texts: Mapping[str, str] | None = None, *others: str) -> None:
    """Save an adapter, with further files of these names and texts. A README.md that is the user's own is kept. For
    `others` see `check_adapter_folder`.

    Raises:
        ValueError: the folder holds something else than an adapter.
    """
    with adapter_folder(Path(path), model.active_peft_config.peft_type.value, *others) as temporary:
        model.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
