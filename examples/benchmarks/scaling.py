"""How costs grow: of the fit with demonstrations and hidden size, of edits with rank, tokens and batch, of collection
with data and processes. Each curve's exponent stands beside the one that is expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from peft_edit.tuners.fusing import numbers_are_faster
from peft_edit.tuners.sea.layer import adding_kernel
from peft_edit.tuners.sea.maths import edit_at_once, fit

from .collection import in_processes
from .data import subjects
from .fit import demonstrations
from .hpr_edit import rotate_all
from .machine import processors
from .models import RANK, orthonormal
from .report import Bench, Case, Row
from .timing import Samples, Spread, Timings


HIDDEN = 4096


@dataclass(frozen=True)
class Curve:
    """A cost against a size.

    Attributes:
        name: what is measured, with what stays the same.
        size: what grows, for the axis.
        sizes: its values.
        expected: the exponent, where the work itself dominates.
        why: where that exponent comes from.
    """

    name: str
    size: str
    sizes: Sequence[int]
    expected: float
    why: str


def cases(bench: Bench) -> Iterator[Case]:
    drawn: dict[Curve, Sequence[tuple[float, float]]] = {}
    for curve, call_of in curves(bench).items():
        yield Case(curve.name, partial(measured, bench, curve, call_of, drawn))
    counts = tuple(2**i for i in range(math.floor(math.log2(processors())) + 1))[:4]
    for curve in (
        Curve("collection", "times the data", (1, 2) if bench.quick else (1, 3, 10), 1, "every sequence is run"),
        Curve("collection", "processes", counts, -1, "they share the sequences"),
    ):
        if len(curve.sizes) > 1:
            name = f"{curve.name}, {curve.size}"
            yield Case(name, partial(collected, bench, replace(curve, name=name), drawn))
    if bench.plot is not None:
        yield Case("the plot", partial(plot, bench, drawn), measures=False)


def curves(bench: Bench) -> Mapping[Curve, Callable[[int], Callable[[], object]]]:
    """Each curve to what makes the call of a size."""
    quick, d = bench.quick, 64 if bench.quick else HIDDEN
    rank = min(RANK, d // 4)
    n, width = (80, 96) if quick else (1000, 2048)
    tokens = (1, 4, 16) if quick else (1, 16, 256, 4096)
    return {
        Curve(
            f"SEA's fit, hidden size {width}",
            "demonstrations",
            (20, 40, 80) if quick else (600, 900, 1350, 2000),
            2,
            "Gram matrices of n x n, products of length d",
        ): lambda size: fit_call(bench, size, width),
        Curve(
            f"SEA's fit, {n} demonstrations",
            "hidden size",
            (96, 128, 160) if quick else (1024, 2048, 4096, 8192),
            1,
            "Gram matrices of n x n, products of length d",
        ): lambda size: fit_call(bench, n, size),
        Curve(
            f"SEA's edit of 64 tokens, hidden size {d}",
            "rank",
            (4, 8, 16) if quick else (16, 64, 256, 1024),
            1,
            "thin products of k x d",
        ): lambda size: sea_call(bench, d, size, (1, 64)),
        Curve(
            f"SEA's edit, ranks {rank} + {rank}, hidden size {d}", "tokens", tokens, 1, "each is edited by itself"
        ): lambda size: sea_call(bench, d, rank, (1, size)),
        Curve(
            f"SEA's edit, ranks {rank} + {rank}, sequences of 32, hidden size {d}",
            "batch",
            (1, 2, 4) if quick else (1, 4, 16, 64),
            1,
            "each token is edited by itself",
        ): lambda size: sea_call(bench, d, rank, (size, 32)),
        Curve(f"HPR's rotation, hidden size {d}", "tokens", tokens, 1, "O(d) for each token"): lambda size: hpr_call(
            bench, d, size
        ),
    }


def fit_call(bench: Bench, n: int, d: int) -> Callable[[], object]:
    sets = demonstrations(n, d, bench.device)
    return lambda: fit(*sets)


def random_tokens(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(bench.device, bench.dtype)


def sea_call(bench: Bench, d: int, rank: int, shape: tuple[int, int]) -> Callable[[], object]:
    bases = [orthonormal(rank, d, seed).to(bench.device, bench.dtype) for seed in (0, 1)]
    h = random_tokens(bench, *shape, d)
    way = {"add": adding_kernel(h), "in_python": numbers_are_faster(h)}
    return lambda: edit_at_once(h, *bases, rescale="token", mean_rescale=1.0, strength=1.0, **way)


def hpr_call(bench: Bench, d: int, tokens: int) -> Callable[[], object]:
    a, w = random_tokens(bench, 1, tokens, d), random_tokens(bench, d)
    given = torch.full((tokens,), 0.7, device=bench.device, dtype=bench.dtype)
    return lambda: rotate_all(a, w, given)


def measured(
    bench: Bench,
    curve: Curve,
    call_of: Callable[[int], Callable[[], object]],
    drawn: dict[Curve, Sequence[tuple[float, float]]],
) -> Iterator[Row]:
    """The curve of a call, the sizes taking turns."""
    calls = {str(size): call_of(size) for size in curve.sizes}
    timings = bench.measure(calls, rounds=7, budget=60)
    yield curve_row(bench, curve, timings, drawn, bench.clock)


def collected(bench: Bench, curve: Curve, drawn: dict[Curve, Sequence[tuple[float, float]]]) -> Iterator[Row]:
    """The curve of collections in processes of their own, by the wall clock."""
    subject, samples = subjects(bench)[0], {str(size): Samples() for size in curve.sizes}
    of_data = curve.size == "times the data"
    for _ in range(1 if bench.quick else 3):
        for size in curve.sizes:
            times, number = (size, 1) if of_data else (1 if bench.quick else 3, size)
            data = bench.folder / f"data-{times}"
            if not data.exists():
                subject.data(times).save_to_disk(data)
            elapsed, peak = in_processes(subject, data, bench.folder / "collected", number)
            samples[str(size)].elapsed.append(elapsed)
            samples[str(size)].peak = max(peak, samples[str(size)].peak or 0)
    first, last = (samples[str(size)].peak / 2**20 for size in (curve.sizes[0], curve.sizes[-1]))
    note = f"peak of memory {first:.0f} MiB at the first size, {last:.0f} MiB at the last" if of_data else ""
    yield curve_row(bench, curve, Timings(samples), drawn, "wall", note)


def curve_row(
    bench: Bench,
    curve: Curve,
    timings: Timings,
    drawn: dict[Curve, Sequence[tuple[float, float]]],
    clock: str,
    note: str = "",
) -> Row:
    """The row of a curve, which is kept for the plot: its exponent in each round."""
    seconds = [timings.samples[str(size)].seconds(clock) for size in curve.sizes]
    exponents = [exponent(curve.sizes, found) for found in zip(*seconds, strict=True)]
    points = tuple((size, Spread.of(found).median) for size, found in zip(curve.sizes, seconds, strict=True))
    drawn[curve] = points
    return Row(
        bench.name,
        curve.name,
        f"{curve.size} from {curve.sizes[0]} to {curve.sizes[-1]}",
        f"expected exponent {curve.expected}: {curve.why}",
        "exponent",
        ratio=Spread.of(exponents),
        takes=Spread.of(seconds[-1]),
        note=note,
        points=points,
    )


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the line of least squares through the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return across / sum((a - x_mean) ** 2 for a in x)


def plot(bench: Bench, drawn: Mapping[Curve, Sequence[tuple[float, float]]]) -> Iterator[Row]:
    """Draw the curves that were measured; yields no row but one where there are none."""
    if not drawn:
        yield Row(bench.name, "the plot", skipped="no curve was measured")
        return
    from peft_edit.plotting import save_figure

    from .figure import curves_figure

    save_figure(curves_figure(drawn), bench.plot)
