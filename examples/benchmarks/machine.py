"""The machine that measures: what it is, and whether something fits its memory and its disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from peft_edit.evaluation.results import versions


GB = 1e9
# Share of the free memory, or disk, that a case may take: the rest is for what is on the way.
USABLE = 0.9
CPU_INFO = Path("/proc/cpuinfo")


class DoesNotFitError(Exception):
    """A case that needs more memory, or disk, than there is."""


def description(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code, JSON values."""
    found = {
        "cpu": _cpu_name(),
        "logical_processors": processors(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "device": device.type,
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "device_memory_gb": round(properties.total_memory / GB, 1),
            "cuda": torch.version.cuda,
        }
    return found


def in_words(machine: dict[str, Any]) -> str:
    """The description in one line."""
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, {machine['device_memory_gb']} GB; "
    return (
        f"{device}{machine['cpu']}, {machine['logical_processors']} logical processors, {machine['threads']} of them "
        f"used, {machine['memory_gb']} GB, load {machine['load_average']}; torch {machine['versions']['torch']}, "
        f"Transformers {machine['versions']['transformers']}, PEFT {machine['versions']['peft']}"
    )


def _cpu_name() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processors() -> int:
    """Logical ones that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


def check_fits(needed: float, device: torch.device) -> None:
    """Raise DoesNotFitError where a case needs more bytes than a device has free."""
    _check(needed, free_memory(device), "memory")


def check_disk(needed: float, folder: Path) -> None:
    """Raise DoesNotFitError where a case writes more bytes than are free where a folder lies."""
    _check(needed, shutil.disk_usage(folder).free, "disk")


def _check(needed: float, free: int, what: str) -> None:
    if needed > USABLE * free:
        raise DoesNotFitError(f"needs {needed / GB:.1f} GB of {what}, {free / GB:.1f} GB are free")
