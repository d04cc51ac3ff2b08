"""Loading an adapter of SEA against one of LoRA, dense projections, and the file's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from .models import Shape, random_model, sharing, with_lora, with_sea
from .report import Bench, Case, Row
from .timing import Elapsed, clocked


WEIGHTS = "adapter_model.safetensors"
READ = "reading the file"
# The published code stores (d, d) projections of all layers; of so many they still fit everywhere.
DENSE_LAYERS = 4


def cases(bench: Bench) -> Iterator[Case]:
    for shape in bench.shapes[:2]:
        rank = min(48, shape.hidden // 4)
        name = f"adapter of all {shape.layers} blocks of {shape.name}, ranks {rank} + {rank}"
        yield Case(name, partial(against_lora, bench, name, shape, rank), needs=shape.parameters * bench.element)
        part = shape.of_layers(DENSE_LAYERS)
        name = f"adapter of {part.name}"
        yield Case(
            name,
            partial(against_dense, bench, name, part),
            needs=part.parameters * bench.element + part.layers * 4 * shape.hidden**2 * 4,
        )


def load(base: nn.Module, folder: Path, device: torch.device) -> Elapsed:
    """Load an adapter into a model that shares the weights of another and is not timed."""
    model = sharing(base)
    with clocked(device) as elapsed:
        PeftModel.from_pretrained(model, folder)
    return elapsed()


def against_lora(bench: Bench, case: str, shape: Shape, rank: int) -> Iterator[Row]:
    base, blocks = random_model(shape, bench.device, bench.dtype), range(shape.layers)
    ours, lora = f"SEA {rank} + {rank}", f"LoRA of rank {2 * rank}"
    folders = {ours: bench.folder / f"{shape.name}-sea", lora: bench.folder / f"{shape.name}-lora"}
    with_sea(sharing(base), blocks, rank).save_pretrained(folders[ours])
    with_lora(sharing(base), blocks, 2 * rank).save_pretrained(folders[lora])
    loading = {name: partial(load, base, folder, bench.device) for name, folder in folders.items()}
    # From the operating system's cache, as the others.
    reading = {READ: lambda: [t.clone() for t in load_file(folders[ours] / WEIGHTS, device=str(bench.device)).values()]}
    timings = bench.measure({**loading, **reading}, rounds=5)
    size, of_lora = ((folder / WEIGHTS).stat().st_size / 1e6 for folder in folders.values())
    note = f"the file of SEA has {size:.1f} MB, that of LoRA, which has factors of the wide side too, {of_lora:.1f} MB"
    yield from bench.rows(case, timings, ours, {lora: "LoRA", READ: "limit"}, note)


def against_dense(bench: Bench, case: str, shape: Shape) -> Iterator[Row]:
    base = random_model(shape, bench.device, bench.dtype)
    rank, d = min(48, shape.hidden // 4), shape.hidden
    folder, dense = bench.folder / f"{shape.name}-sea", bench.folder / f"{shape.name}-dense.pt"
    with_sea(sharing(base), range(shape.layers), rank).save_pretrained(folder)
    torch.save([torch.rand(shape.layers, d, d) for _ in range(2)], dense)
    ours, published = f"SEA {rank} + {rank}", "torch.load of dense projections"
    timings = bench.measure(
        {
            ours: partial(load, base, folder, bench.device),
            published: lambda: torch.load(dense, map_location=bench.device),
        },
        rounds=5,
    )
    note = f"{(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB against {dense.stat().st_size / 1e6:,.0f} MB"
    dense.unlink()
    yield from bench.rows(case, timings, ours, {published: "published"}, note)
