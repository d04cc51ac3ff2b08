"""What an export as LoRA leaves beside the adapter, read again for its card: it may come from somebody else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict, get_type_hints

from peft import LoraConfig

from .export_lora import LoRAExport, SiteExport


SiteRecord = TypedDict("SiteRecord", get_type_hints(SiteExport))
# The contents of `RECORD`.
LoRARecord = TypedDict("LoRARecord", {**get_type_hints(LoRAExport), "sites": list[SiteRecord]})


def contradiction(record: Mapping[str, Any], config: LoraConfig) -> str | None:
    """What cannot be in a `LoRARecord` beside the LoRA adapter of this configuration, or None."""
    rank, most = record["rank"], record["max_lora_rank"]
    if rank != config.r:
        return f"rank is {rank}, the adapter has {config.r}"
    if most is not None and most < rank:
        return f"max_lora_rank is {most}, rank is {rank}"
    if record["lora_bias"] != config.lora_bias:
        return f"lora_bias is {record['lora_bias']}, that of the adapter {config.lora_bias}"
    if wrong := [note for note in record["notes"] if not note or not note.isprintable()]:
        return f"a note is {wrong[0]!r:.80}"
    for place, site in enumerate(record["sites"]):
        if not 0 < site["rank"] <= site["exact_rank"] <= site["factor_rank"]:
            ranks = [site[name] for name in ("rank", "exact_rank", "factor_rank")]
            return f"sites[{place}] has rank, exact_rank and factor_rank {ranks}"
        for name in ("truncation_error", "rescale_error"):
            if not 0 <= site[name] < math.inf:
                return f"sites[{place}].{name} is {site[name]}"
    if (highest := max((site["rank"] for site in record["sites"]), default=0)) != rank:
        return f"the highest rank of a site is {highest}, that of the adapter {rank}"
    return None
