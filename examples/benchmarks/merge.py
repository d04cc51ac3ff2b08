"""Figures of merging a checkpoint: time against copying its files, and peak memory.

    OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/merge.py

It makes a random checkpoint of 2.5 GB in several files, in bfloat16 with the widths of a 7-billion-parameter Llama,
and a SEA adapter of rank 52 + 52 in every layer, below the folder given by --out; merges it in a process of its own;
and removes all of it again. The copy reads, writes and syncs the same files. Merge and copy take turns; the ratio is of
their medians. What to expect: a ratio of at most 1.5, and a peak below 4 times the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from peft_edit import SEAConfig, merge_checkpoint
from peft_edit.tuners.sea import SEALayer


RANK = 52
FILE_BYTES = 6e8


def structure(layers: int, hidden: int) -> torch.nn.Module:
    """A Llama without weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_checkpoint(model: torch.nn.Module, folder: Path) -> int:
    """Write random weights, file by file; returns the bytes of the largest tensor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        if size and size + 2 * tensor.numel() > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor.shape
        size += 2 * tensor.numel()
    weight_map = {}
    for i, shapes in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(2 * tensor.numel() for tensor in model.state_dict().values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
    return max(2 * tensor.numel() for tensor in model.state_dict().values())


def write_adapter(model: torch.nn.Module, folder: Path) -> None:
    adapted = get_peft_model(model, SEAConfig(rescale="none"))
    config = adapted.peft_config["default"]
    for layer in adapted.modules():
        if isinstance(layer, SEALayer):
            factors = [torch.linalg.qr(torch.randn(layer.features, RANK)).Q.T.contiguous() for _ in range(2)]
            layer.set_factors("default", *factors)
            config.rank_pattern[layer.site] = [RANK, RANK]
            config.fit_statistics[layer.site] = {"mean_rescale": 1.0, "relative_error": 0.0, "strength": 1.0}
    adapted.save_pretrained(folder)


def copy(source: Path, target: Path) -> None:
    """Read, write and sync every file."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            while data := read.read(2**23):
                write.write(data)
            write.flush()
            os.fsync(write.fileno())


def child(base: str, adapter: str, out: str) -> None:
    """Merge in this process, or copy where the adapter is ""; prints seconds and the growth of the peak memory, in
    bytes."""
    before = peak_memory()
    start = time.perf_counter()
    if adapter:
        merge_checkpoint(base, adapter, out, device="cpu")
    else:
        copy(Path(base), Path(out))
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_memory() - before]))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes. `getrusage` would count that of its parent too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main(folder: Path, layers: int, hidden: int, repeats: int) -> None:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    base.mkdir()
    model = structure(layers, hidden)
    largest = write_checkpoint(model, base)
    write_adapter(model, adapter)
    os.sync()
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    print(f"Checkpoint: {sum(files) / 1e9:.2f} GB in {len(files)} files, the largest tensor has {largest / 1e6:.0f} MB")
    merges, copies, peaks = [], [], []
    for _ in range(repeats):
        # Both in processes of their own: how fast a virtual machine writes depends on what ran just before.
        for what, seconds in (("", copies), (str(adapter), merges)):
            arguments = [sys.executable, __file__, "--child", str(base), what, str(out)]
            result = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
            took, peak = json.loads(result.stdout.splitlines()[-1])
            seconds.append(took)
            shutil.rmtree(out)
        peaks.append(peak)
    merge, copied = (sorted(seconds)[repeats // 2] for seconds in (merges, copies))
    print(f"Merge of rank {RANK} + {RANK} in {layers} layers, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"  {merge:.1f} s, reading, writing and syncing the files {copied:.1f} s: ratio {merge / copied:.2f}")
    print(f"  each ratio: {', '.join(f'{m / c:.2f}' for m, c in zip(merges, copies, strict=True))}")
    print(
        f"  peak memory above the imported package: {max(peaks) / 1e6:.0f} MB, {max(peaks) / largest:.2f} of the "
        "largest tensor"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="where the checkpoints are made; takes 6 GB for a while")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.out, prefix="merge-benchmark-") as temporary:
            main(Path(temporary), arguments.layers, arguments.hidden, arguments.repeats)
