"""Fits of SEA: one layer against dense decompositions, and the layers of a model from a store."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peft import get_peft_model
from torch import Tensor

from peft_edit import ActivationStore, SEAConfig, fit_sea
from peft_edit.tuners.layer import edit_layers
from peft_edit.tuners.sea.maths import fit
from peft_edit.tuners.sea.spectra import LeftFactor

from . import published
from .models import skeleton
from .report import Bench, Case, Row
from .timing import LIMIT, Work


ENERGY = 0.998
SIZES = ((2000, 2048), (2000, 4096))  # demonstrations and hidden size
QUICK = ((80, 96),)
OURS, DENSE, GRAMS = "fit", "dense float64 decompositions", "its three Gram products"


def cases(bench: Bench) -> Iterator[Case]:
    for n, d in QUICK if bench.quick else SIZES:
        name = f"SEA, one layer, {n} demonstrations, hidden size {d}"
        yield Case(name, partial(one_layer, bench, name, n, d), needs=8 * (6 * n * d + 6 * d * d))
    n, d = QUICK[0] if bench.quick else SIZES[-1]
    layers = 32 if bench.device.type == "cuda" else 2
    name = f"SEA, {layers} layers from a store, {n} demonstrations, hidden size {d}"
    yield Case(name, partial(from_store, bench, name, layers, n, d), needs=8 * 12 * n * d + layers * 300 * d * 4)


def demonstrations(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """H = Z, H+ and H- = 0.8 Z + 0.6 E: Gaussian, column i scaled by i^-0.62; (n, d) float64 each."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.62)
    drawn = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale for _ in range(3))
    z, positive, negative = (tensor.to(device) for tensor in drawn)
    return z, 0.8 * z + 0.6 * positive, 0.8 * z + 0.6 * negative


def least_work(n: int, d: int) -> Work:
    """Without the total energy no rank is known, and that takes the Gram matrices of the three sets on the smaller
    side, one half of each, as they are symmetric."""
    return Work(flops=3 * n * d * min(n, d), dtype=torch.float64)


def projector_distance(a: Tensor, b: Tensor) -> float:
    """Spectral norm of A^T A - B^T B for bases of one rank: the sine of the largest angle between their spans."""
    return float(torch.linalg.matrix_norm(b - (b @ a.T) @ a, ord=2))


def one_layer(bench: Bench, case: str, n: int, d: int) -> Iterator[Row]:
    sets = demonstrations(n, d, bench.device)
    found = {}

    def keep(name: str, result: object) -> None:
        found[name] = result

    timings = bench.measure(
        {
            OURS: lambda: keep(OURS, fit(*sets, positive_energy=ENERGY, negative_energy=ENERGY)),
            GRAMS: lambda: [LeftFactor(activations).gram for activations in sets],
            DENSE: lambda: keep(DENSE, published.sea_bases(*sets, ENERGY)),
        },
        rounds=5,
        slow=() if bench.quick else (DENSE,),
        work=least_work(n, d),
    )
    bases, dense = [found[OURS].positive.basis, found[OURS].negative.basis], found[DENSE]
    ranks, dense_ranks = ([len(basis) for basis in of] for of in (bases, dense))
    note = f"ranks {ranks}, of the dense decompositions {dense_ranks}"
    if ranks == dense_ranks:
        distance = max(projector_distance(a, b) for a, b in zip(bases, dense, strict=True))
        note += f", distance of the projectors {distance:.0e}"
    yield from bench.rows(case, timings, OURS, {DENSE: "published", GRAMS: "limit", LIMIT: "limit"}, note)


def from_store(bench: Bench, case: str, layers: int, n: int, d: int) -> Iterator[Row]:
    sets = [activations.float().cpu() for activations in demonstrations(n, d, torch.device("cpu"))]
    columns = (dict.fromkeys(range(layers), activations) for activations in sets)
    names = ("neutral", "positive", "negative")
    path = bench.folder / "fit-store"
    store = ActivationStore.from_tensors(path, **dict(zip(names, columns, strict=True)), site="mlp", tokens="last")
    model = get_peft_model(skeleton(d, layers, bench.device, bench.dtype), SEAConfig(rescale="none"))
    one = least_work(n, d)
    what = f"fit_sea of {layers} layers"
    timings = bench.measure(
        {what: lambda: fit_sea(model, store, allow_fingerprint_mismatch=True)},
        rounds=3,
        work=Work(flops=layers * one.flops, dtype=one.dtype),
    )
    size = sum(p.nbytes for layer in edit_layers(model) for name, p in layer.named_parameters() if "sea_" in name)
    note = f"the adapter takes {size / 1e6:.1f} MB, dense projections {layers * 2 * d * d * 4 / 1e6:,.0f} MB"
    yield from bench.rows(case, timings, what, {LIMIT: "limit"}, note)
