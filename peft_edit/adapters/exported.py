"""LoRA adapters that edits were exported to: what the record beside one says of the edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from ..tuners.config import EditConfig
from ..tuners.method import methods


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
        ValueError: the record beside it is damaged.
    """
    if config.peft_type != PeftType.LORA:
        return None
    for method in methods().values():
        file = folder / method.lora_record if method.lora_record else None
        if file is None or not file.exists():
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = {field.name for field in fields(method.config)} - {"peft_type"}
            edit = method.config(**{key: value for key, value in record["source"].items() if key in known})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} does not say what was exported ({error}): export the adapter again") from error
        return Exported(edit, record)
    return None
