"""Collecting activations against one sequence at a time, and reading a store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from peft_edit import ActivationStore, collect_activations
from peft_edit.processes import processes
from peft_edit.tuners.hpr.train import TokenPairs

from . import published
from .data import Subject, counted, matrix_products, subjects
from .merge import peak_memory
from .report import Bench, Case, Row
from .timing import LIMIT, Elapsed, Work


# Every answer token, at both sites.
OPTIONS = {"site": ("mlp", "block"), "tokens": "answer"}
OURS = "collect_activations"
PAIRS = "every pair member, one at a time"
ONCE = "every unique answer, one at a time"


def cases(bench: Bench) -> Iterator[Case]:
    for subject in subjects(bench):
        name = f"{subject.questions} questions of TruthfulQA, every answer token at both sites, {subject.name}"
        yield Case(name, partial(against_one_at_a_time, bench, name, subject))
    if bench.device.type == "cuda":
        return  # what reads is the processor
    name = "reading a store of token pairs"
    yield Case(name, partial(reading, bench, name, subjects(bench)[0]))


def against_one_at_a_time(bench: Bench, case: str, subject: Subject) -> Iterator[Row]:
    model, tokenizer, data = subject.model(), subject.tokenizer(), subject.data()

    def collect() -> None:
        with TemporaryDirectory(dir=bench.folder) as folder:
            collect_activations(model, tokenizer, data, Path(folder) / "store", **OPTIONS)

    def one_at_a_time(once: bool) -> int:
        return published.collect_pairs(model, tokenizer, data, once)

    passed = counted(model, collect)
    work = matrix_products(collect, subject.dtype)
    timings = bench.measure(
        {OURS: collect, PAIRS: lambda: one_at_a_time(False), ONCE: lambda: one_at_a_time(True)},
        rounds=3,
        budget=60,
        slow=() if bench.quick else (PAIRS,),
        work=work,
    )
    members = sum(2 * len(row["positives"]) * len(row["negatives"]) for row in data)
    unique = sum(len(set(row["positives"]) | set(row["negatives"])) for row in data)
    note = f"{passed.sequences:,} sequences are run, {unique:,} unique answers and the prompts, whose caches they "
    note += f"share; one for each member of a pair would be {members:,}; the limit is the matrix products alone"
    yield from bench.rows(case, timings, OURS, {PAIRS: "published", ONCE: "published", LIMIT: "limit"}, note)


def reading(bench: Bench, case: str, subject: Subject) -> Iterator[Row]:
    """Batches as HPR's training takes them, in memory of the CPU."""
    path = bench.folder / "read"
    collect_activations(subject.model(), subject.tokenizer(), subject.data(), path, **OPTIONS)
    store = ActivationStore(path, "block")
    dataset = TokenPairs(store, store.layers)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for batch in (16, 256):
        indices = (order * (batch // len(order) + 1))[:batch]
        size = dataset.__getitems__(indices)["activations"].nbytes
        ours = f"batches of {batch} pairs"
        timings = bench.measure(
            {ours: lambda indices=indices: dataset.__getitems__(indices)},
            rounds=21,
            work=Work(bytes=2 * size),
        )
        note = f"{ours}: {size / 1e6 / timings.spread(ours, 'cpu').median:,.0f} MB a CPU second"
        yield from bench.rows(case, timings, ours, {LIMIT: "limit"}, note)


# In processes of their own, for memory and for several at a time


def in_processes(subject: Subject, data: Path, store: Path, number: int = 1) -> tuple[Elapsed, int]:
    """Collect in so many processes of one thread: how long it took, without their start, and the peak of the main one's
    memory in bytes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"] if number > 1 else []
    arguments = [subject.folder, data, store, subject.device.type]
    command = [sys.executable, *launch, "-m", __name__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    shutil.rmtree(store)
    found = json.loads(printed.splitlines()[-1])
    return Elapsed(found["wall"], found["cpu"]), found["peak"]


def child(folder: str, data: str, store: str, device: str) -> None:
    """Collect as one of the processes; the main one prints what `in_processes` returns."""
    subject = Subject("", Path(folder), 0, torch.device(device), torch.float32)
    model, tokenizer, rows = subject.model(), subject.tokenizer(), Dataset.load_from_disk(data)
    cpu, start = time.process_time(), time.perf_counter()
    collect_activations(model, tokenizer, rows, store, **OPTIONS)
    found = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak": peak_memory()}
    if processes().is_main:
        print(json.dumps(found))


if __name__ == "__main__":
    child(*sys.argv[1:])
