"""LoRA adapters that edits were exported to: what the record beside one says of the edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from ..arguments import one_line
from ..json_files import read_json
from ..tuners.config import EditConfig
from ..tuners.method import Method, methods


WHAT, AGAIN = "no record of this export", "export the adapter again"


@dataclass(frozen=True)
class Exported:
    """What a LoRA adapter was exported from.

    Attributes:
        config: of the edit.
        record: what its method wrote beside the LoRA adapter, `Method.lora_record`.
    """

    config: EditConfig
    record: Mapping[str, Any]


def read_exported(folder: Path, config: PeftConfig) -> Exported | None:
    """What the adapter in a folder was exported from; None where it is no export.

    Raises:
        ValueError: the record beside it is damaged, or of another adapter.
    """
    if config.peft_type != PeftType.LORA:
        return None
    for method in methods().values():
        file = folder / method.lora_record if method.lora_record else None
        if file is None or not file.exists():
            continue
        record = read_json(file, method.lora_contents, WHAT, AGAIN)
        if problem := method.lora_contradiction(record, config):
            raise ValueError(f"{file} is {WHAT} ({problem}): {AGAIN}")
        return Exported(_source(file, method, record["source"]), record)
    return None


def _source(file: Path, method: Method, source: Mapping[str, Any]) -> EditConfig:
    """The configuration of the edit; fields of another release are left out."""
    if source.get("peft_type") != method.name:
        raise ValueError(
            f"{file} is {WHAT} (source.peft_type must be {method.name!r}, got {source.get('peft_type')!r:.80}): {AGAIN}"
        )
    known = {field.name for field in fields(method.config)} - {"peft_type"}
    try:
        return method.config(**{key: value for key, value in source.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is {WHAT} (source: {one_line(error)}): {AGAIN}") from error
