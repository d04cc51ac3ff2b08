"""Merging SEA: one weight against a dense product, a model in memory against LoRA, a checkpoint against a copy."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from peft_edit import merge_checkpoint
from peft_edit.tuners.sea.maths import merge, project

from . import published
from .machine import check_disk
from .models import RANK, Shape, orthonormal, random_model, sharing, structure, with_lora, with_sea
from .report import Bench, Case, Row
from .timing import LIMIT, Elapsed, Samples, Timings, Work, clocked


# Of each sign, in the checkpoint.
CHECKPOINT_RANK = 52
FILE_BYTES = 6e8
COPY_BYTES = 2**23


def cases(bench: Bench) -> Iterator[Case]:
    for shape in bench.shapes[:2]:
        name = f"one MLP output weight of {shape.name}, {shape.hidden} x {shape.intermediate}"
        needs = (6 * shape.hidden * shape.intermediate + 4 * shape.hidden**2) * 4
        yield Case(name, partial(one_weight, bench, name, shape), needs=needs)
        layers = min(shape.layers, 4 if bench.device.type == "cpu" else shape.layers)
        part = shape.of_layers(layers)
        name = f"merge_and_unload, {part.name}"
        needs = 2 * part.parameters * bench.element
        yield Case(name, partial(in_memory, bench, name, part), needs=needs)
    for shape in bench.shapes[:2][-1:]:
        part = shape.of_layers(min(shape.layers, 5))
        name = f"checkpoint of {part.name}, bfloat16"
        yield Case(name, partial(checkpoint, bench, name, part, rounds=1 if bench.quick else 3))


def one_weight(bench: Bench, case: str, shape: Shape) -> Iterator[Row]:
    rank = min(RANK, shape.hidden // 4)
    bases = [orthonormal(rank, shape.hidden, seed).to(bench.device) for seed in (0, 1)]
    plus, minus = published.sea_projections(*bases)
    positive, negative = (partial(project, basis=basis, columns=True) for basis in bases)
    weight = torch.randn(shape.hidden, shape.intermediate, device=bench.device)
    ours, dense = f"two thin products, ranks {rank} + {rank}", "dense (P+ + P-) W"
    work = Work(bytes=2 * weight.nbytes, flops=8 * rank * weight.numel())
    timings = bench.measure(
        {
            ours: lambda: merge(weight, positive, negative, rescale="none"),
            dense: lambda: published.sea_merge(weight, plus, minus),
        },
        rounds=5,
        work=work,
    )
    yield from bench.rows(case, timings, ours, {dense: "published", LIMIT: "limit"})


def in_memory(bench: Bench, case: str, shape: Shape) -> Iterator[Row]:
    base = random_model(shape, bench.device, bench.dtype)
    rank, blocks = min(RANK, shape.hidden // 4), range(shape.layers)

    def merged(make, *args, **fields) -> Elapsed:
        adapted = make(sharing(base, own="down_proj"), blocks, *args, **fields)
        with clocked(bench.device) as elapsed:
            adapted.merge_and_unload()
        return elapsed()

    ours, lora = f"SEA {rank} + {rank}", f"LoRA of rank {2 * rank}"
    calls = {
        ours: lambda: merged(with_sea, rank, rescale="none"),
        lora: lambda: merged(with_lora, 2 * rank),
    }
    timings = bench.measure(calls, rounds=3)
    yield from bench.rows(case, timings, ours, {lora: "LoRA"})


def write_checkpoint(model: nn.Module, folder: Path) -> int:
    """Write random weights of a structure, in bfloat16, file by file; returns the bytes of the largest tensor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name in shapes:
        if files[-1] and sum(sizes[n] for n in files[-1]) + sizes[name] > FILE_BYTES:
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: (0.02 * torch.randn(shapes[name])).bfloat16() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
    return max(sizes.values())


def copy(source: Path, target: Path) -> None:
    """Read, write and sync every file."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            while data := read.read(COPY_BYTES):
                write.write(data)
            write.flush()
            os.fsync(write.fileno())


def in_child(base: Path, adapter: Path | None, out: Path, device: str) -> tuple[Elapsed, int]:
    """Merge, or copy where there is no adapter: how long it took, and by how many bytes the peak of this process's
    memory grew."""
    before = peak_memory()
    cpu, start = time.process_time(), time.perf_counter()
    if adapter is not None:
        merge_checkpoint(base, adapter, out, device=device)
    else:
        copy(base, out)
    return Elapsed(time.perf_counter() - start, time.process_time() - cpu), peak_memory() - before


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes. `getrusage` would count that of its parent too; where
    there is no `/proc`, that of this moment."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return found[0] if found else psutil.Process().memory_info().rss


def checkpoint(bench: Bench, case: str, shape: Shape, rounds: int) -> Iterator[Row]:
    """Each in a process of its own: how fast a virtual machine writes depends on what ran just before."""
    base, adapter, out = (bench.folder / name for name in ("base", "adapter", "merged"))
    model = structure(shape.config, torch.bfloat16)
    check_disk(2 * 2 * sum(tensor.numel() for tensor in model.state_dict().values()), bench.folder)
    base.mkdir()
    largest = write_checkpoint(model, base)
    rank = min(CHECKPOINT_RANK, shape.hidden // 4)
    with_sea(model, range(shape.layers), rank, rescale="none").save_pretrained(adapter)
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    ours, copied = f"merge_checkpoint, ranks {rank} + {rank}", "reading, writing and syncing the files"
    samples, spawn = {ours: Samples(), copied: Samples()}, multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for name, given in ((copied, None), (ours, adapter)):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                elapsed, peak = pool.submit(in_child, base, given, out, bench.device.type).result()
            samples[name].elapsed.append(elapsed)
            samples[name].peak = max(peak, samples[name].peak or 0)
            shutil.rmtree(out)
    for folder in (base, adapter):
        shutil.rmtree(folder)
    peak = samples[ours].peak
    note = (
        f"{sum(files) / 1e9:.2f} GB in {len(files)} files; the peak of memory is {peak / largest:.2f} of the largest "
    )
    note += f"tensor, {largest / 1e6:,.0f} MB"
    yield from bench.rows(case, Timings(samples), ours, {copied: "limit"}, note, clock="wall")
