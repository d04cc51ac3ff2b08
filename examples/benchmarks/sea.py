"""Figures of SEA: fit and edit against their dense forms, size of the adapter, and the demonstration.

    OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/sea.py

Every ratio is of two measurements in the same run; times are CPU seconds of the whole process. The dense fit takes
about a minute and 1 GB. What to expect: the fit at least 20 times cheaper, the edit of one token at least 30 times
in a loop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_edit.demo import run
from peft_edit.tuners.sea.maths import edit, fit, project


def cpu_seconds(*calls: Callable, repeats: int = 1) -> list[tuple[float, object]]:
    """Median CPU seconds and last result of each call, the calls taking turns."""
    times, results = [[] for _ in calls], [None] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.process_time()
            results[i] = call()
            times[i].append(time.process_time() - start)
    return [(sorted(t)[repeats // 2], result) for t, result in zip(times, results, strict=True)]


def demonstrations(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H = Z, H+ and H- = 0.8 Z + 0.6 E: Gaussian, column i scaled by i^-0.62; (n, d) float64 each."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.62)
    z, positive, negative = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale for _ in range(3))
    return z, 0.8 * z + 0.6 * positive, 0.8 * z + 0.6 * negative


def dense_bases(neutral, positive, negative, energy: float) -> list[torch.Tensor]:
    """The fit as it is published: a singular value decomposition of each (d, d) cross-covariance."""
    bases = []
    for answers in (positive, negative):
        u, s, _ = torch.linalg.svd(neutral.T @ answers / len(neutral))
        share = s.square().cumsum(dim=0) / s.square().sum()
        bases.append(u[:, : int((share < energy).sum()) + 1].T)
    return bases


def projector_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spectral norm of A^T A - B^T B for bases of one rank: the sine of the largest angle between their spans."""
    return float(torch.linalg.matrix_norm(b - (b @ a.T) @ a, ord=2))


def benchmark_fit(n: int, d: int) -> None:
    sets = demonstrations(n, d)
    fit(*(tensor[:64] for tensor in sets))  # start the threads
    [(thin_seconds, thin)] = cpu_seconds(lambda: fit(*sets), repeats=3)
    [(dense_seconds, dense)] = cpu_seconds(lambda: dense_bases(*sets, energy=0.998))
    bases = [thin.positive.basis, thin.negative.basis]
    print(f"Fit, n = {n}, d = {d}, one layer, energy 0.998")
    print(f"  ranks: {[len(b) for b in bases]}, dense {[len(b) for b in dense]}")
    if [len(b) for b in bases] == [len(b) for b in dense]:
        distance = max(projector_distance(a, b) for a, b in zip(bases, dense, strict=True))
        print(f"  distance of the projectors: {distance:.1e}")
    print(
        f"  CPU seconds: {thin_seconds:.2f}, dense {dense_seconds:.2f}: {dense_seconds / thin_seconds:.0f} times less"
    )

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.safetensors"
        save_file({str(i): basis.float().contiguous() for i, basis in enumerate(bases)}, file)
        size, dense_size = 32 * file.stat().st_size, 32 * 2 * d * d * 4
    print(f"  adapter of 32 such layers: {size / 1e6:.1f} MB, dense projections {dense_size / 1e9:.2f} GB")


def benchmark_edit(d: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q.T.contiguous() for _ in range(2)]
    plus, minus = bases[0].T @ bases[0], torch.eye(d) - bases[1].T @ bases[1]
    h = torch.randn(1, 1, d, generator=generator)
    positive, negative = (partial(project, basis=basis) for basis in bases)

    def thin() -> torch.Tensor:
        return edit(h, positive, negative, rescale="none")

    def dense() -> torch.Tensor:
        return h @ plus + h @ minus

    def thin_token() -> torch.Tensor:
        return edit(h, positive, negative)

    # One thread: to wake a second one takes longer than the thin products do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        alone = [cpu_seconds(call, repeats=201)[0] for call in (thin, thin_token, dense)]
        in_turns = cpu_seconds(thin, thin_token, dense, repeats=201)
    torch.set_num_threads(threads)
    y, expected = alone[0][1], alone[2][1]
    print(f"Edit of one token, d = {d}, ranks {rank} + {rank}, float32, one thread, against two dense d x d products")
    print(f"  largest relative difference: {float((y - expected).abs().max() / expected.abs().max()):.1e}")
    # In turns the dense products, which fit no cache, throw the thin factors out of theirs, as a model's weights do.
    for how, measured in (("each in a loop", alone), ("in turns", in_turns)):
        none, token, full = (seconds for seconds, _ in measured)
        print(
            f"  {how}: {1e6 * none:.0f} us (rescale none), {1e6 * token:.0f} us (token), dense {1e6 * full:.0f} us: "
            f"{full / none:.0f} and {full / token:.0f} times faster"
        )


def benchmark_demonstration() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        results = run(Path(folder))
        seconds = time.perf_counter() - start
    base = results["rows"][0]
    print(f"Demonstration, {results['questions']} held-out questions, {seconds:.0f} s")
    for row in results["rows"]:
        print(
            f"  {row['model']:<41}MC1 {100 * row['mc1']:.1f} ({100 * (row['mc1'] - base['mc1']):+.1f})  "
            f"MC2 {100 * row['mc2']:.1f} ({100 * (row['mc2'] - base['mc2']):+.1f})  "
            f"perplexity ratio {row['perplexity'] / base['perplexity']:.3f}"
        )
    print(
        f"  logits, reloaded against edited: {results['reloaded_difference']:.1e}, "
        f"merged against edited: {results['merged_difference']:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="demonstrations of the fit")
    parser.add_argument("--d", type=int, default=4096, help="hidden size")
    arguments = parser.parse_args()
    benchmark_edit(arguments.d, rank=64)
    benchmark_fit(arguments.n, arguments.d)
    benchmark_demonstration()
