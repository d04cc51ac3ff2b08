"""Figures of collecting activations, each ratio from one run, on the demonstration model and the CPU:

OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/collect.py --data-files TruthfulQA.csv

Without --data-files TruthfulQA comes from the Hub. Expect about 10 minutes; --only names the parts to run. Expect fewer
forward passes than pair members by a factor of four, six times the pairs a second of one sequence at a time, a peak of
memory that does not grow with the data, and the same bytes after twenty kills.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import ActivationStore, collect_activations, load_contrast_set
from peft_edit.data import CONTRAST_FEATURES
from peft_edit.data.prompts import encode_answers
from peft_edit.demo import ASSETS
from peft_edit.processes import processes
from peft_edit.tuners.hpr.train import TokenPairs


OPTIONS = {"site": ("mlp", "block"), "tokens": "answer"}
KILLS = 20


def load():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()
    return model, AutoTokenizer.from_pretrained(ASSETS / "model")


def questions(data_files, times=1):
    """TruthfulQA, or several times as many different questions."""
    data = load_contrast_set("truthful_qa", data_files=data_files)
    rows = [
        {**row, "id": n * len(data) + i, "prompt": f"{n} {row['prompt']}" if n else row["prompt"]}
        for n in range(times)
        for i, row in enumerate(data)
    ]
    return Dataset.from_list(rows, features=CONTRAST_FEATURES)


def speed(folder, data_files):
    """Against one sequence at a time: every pair member, as published, and every unique answer."""
    model, tokenizer = load()
    data = questions(data_files)
    rows = tokens = 0

    def count(module, args, kwargs):
        nonlocal rows, tokens
        rows += len(kwargs["input_ids"])
        tokens += kwargs["input_ids"].numel()

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    start, cpu = time.perf_counter(), time.process_time()
    store = collect_activations(model, tokenizer, data, folder / "store", **OPTIONS)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    handle.remove()
    unique = sum(len(set(row["positives"]) | set(row["negatives"])) for row in data)
    members = sum(2 * len(row["positives"]) * len(row["negatives"]) for row in data)
    print(f"{len(data)} questions: {rows:,} sequences run, of which {unique:,} answers and {rows - unique:,} prompts")
    print(f"one for each pair member: {members:,}, {members / unique:.2f} times the answers")
    print(f"{seconds:.1f} s ({cpu:.1f} CPU s), {len(store) / seconds:,.0f} token pairs/s, {tokens:,} tokens run")

    sample = data.select(random.Random(0).sample(range(len(data)), 80))
    for name, once in (("every pair member, one at a time", False), ("every unique answer, one at a time", True)):
        pairs, start_cpu, start = 0, time.process_time(), time.perf_counter()
        for row in sample:
            columns = ([row["positives"]], [row["negatives"]])
            (positives,), (negatives,) = (encode_answers(tokenizer, [row["prompt"]], column) for column in columns)
            several = [(p, n) for p in positives for n in negatives]
            run = [*positives, *negatives] if once else [answer for pair in several for answer in pair]
            with torch.no_grad():
                for answer in run:
                    states = model(torch.tensor([answer.input_ids]), output_hidden_states=True).hidden_states
                    _ = [layer[0, answer.prompt_length :].clone() for layer in states]
            pairs += sum(places(p.answer_ids, n.answer_ids) for p, n in several)
        by_clock = len(store) / seconds / (pairs / (time.perf_counter() - start))
        by_cpu = len(store) / cpu / (pairs / (time.process_time() - start_cpu))
        print(f"times the pairs of {name}: {by_cpu:.1f} in a CPU second, {by_clock:.1f} by the clock")


def places(positive, negative):
    """How many places of two answers make a pair: those from the first that differs."""
    shorter = min(len(positive), len(negative))
    return shorter - next((i for i in range(shorter) if positive[i] != negative[i]), shorter)


def data_folder(folder, data_files, times=1):
    """The data on disk, memory-mapped by whoever collects: its own memory is not what is measured."""
    path = folder / f"data-{times}"
    if not path.exists():
        questions(data_files, times).save_to_disk(path)
    return path


def child_command(store, data, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, __file__, "--child", str(store), str(data)]


def child(*arguments, **options):
    """What the main process of a collection in processes of its own prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = child_command(*arguments, **options)
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def collect_child(store, data):
    data = Dataset.load_from_disk(data)
    model, tokenizer = load()
    print("ready", flush=True)
    start = time.perf_counter()
    collect_activations(model, tokenizer, data, store, **OPTIONS)
    seconds = time.perf_counter() - start
    if processes().is_main:
        # Not ru_maxrss, which a child takes over from its parent.
        status = Path("/proc/self/status").read_text().splitlines()
        peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
        print(json.dumps({"seconds": seconds, "peak": peak}))


def memory(folder, data_files):
    """Peak of a process that collects, and of one that collects ten times as much."""
    found = [child(folder / f"memory-{n}", data_folder(folder, data_files, n)) for n in (1, 10)]
    for times, result in zip((1, 10), found, strict=True):
        print(f"{times} times TruthfulQA: peak {result['peak']:.0f} MiB, {result['seconds']:.0f} s")
    print(f"peak of ten times as much: {100 * (found[1]['peak'] / found[0]['peak'] - 1):+.1f} %")
    shutil.rmtree(folder / "memory-10")


def two(folder, data_files):
    """Two processes of one thread each against one."""
    data = data_folder(folder, data_files)
    for i in range(3):
        stores = [folder / f"{name}-{i}" for name in ("one", "two")]
        seconds = [child(store, data, processes=n)["seconds"] for n, store in enumerate(stores, 1)]
        ratio, same = seconds[0] / seconds[1], contents(stores[0]) == contents(stores[1])
        print(f"one process {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {ratio:.2f} times; the same bytes: {same}")


def contents(store):
    return {file.name: file.read_bytes() for file in store.iterdir()}


def kills(folder, data_files):
    """Kill a collection at random instants and let it go on."""
    data, whole, store = data_folder(folder, data_files), folder / "whole", folder / "killed"
    seconds = child(whole, data)["seconds"]
    chance, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen(child_command(store, data), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()  # "ready"
        time.sleep(chance.uniform(0, seconds / 5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        process.stdout.close()
    shards = len(list(store.glob("shard-*")))
    child(store, data)
    same = contents(store) == contents(whole)
    print(f"{killed} kills, after the last {shards} shards were written; the same bytes: {same}")


def reading(folder, data_files):
    """A store of token pairs into the batches that HPR is trained on."""
    if not (folder / "store").exists():
        model, tokenizer = load()
        collect_activations(model, tokenizer, questions(data_files), folder / "store", **OPTIONS)
    dataset = TokenPairs(ActivationStore(folder / "store", "block"), range(5))
    order = torch.randperm(len(dataset)).tolist()
    for batch in (16, 256):
        size, start, cpu = 0, time.perf_counter(), time.process_time()
        before = anonymous_memory()
        for first in range(0, min(len(order), 600 * batch), batch):
            size += dataset.__getitems__(order[first : first + batch])["activations"].nbytes
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        grown = anonymous_memory() - before
        by_cpu, by_clock = size / 1e6 / cpu, size / 1e6 / seconds
        print(f"batches of {batch} pairs: {by_cpu:,.0f} MB/s of a core, {by_clock:,.0f} by the clock, {grown:+.0f} MiB")


def anonymous_memory():
    """MiB that are not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


PARTS = {"speed": speed, "reading": reading, "memory": memory, "two": two, "kills": kills}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-files", help="TruthfulQA.csv")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for name in arguments.only:
            print(f"\n{name}: {PARTS[name].__doc__}")
            PARTS[name](folder, arguments.data_files)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--child"]:
        collect_child(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
