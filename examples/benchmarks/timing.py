"""Durations of calls that take turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch


# A sample of a short call is of as many in a row as take this long, seconds: the clock is read far more often than it
# moves otherwise.
SAMPLE_SECONDS = 0.005
# Rounds that are made however long they take.
LEAST_ROUNDS = 3
# Seconds between two looks at the memory of the process.
LOOK_SECONDS = 0.002
LIMIT = "limit"


@dataclass(frozen=True)
class Elapsed:
    """Seconds of the clock, and of all processors together that the process kept busy."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Collection[float]) -> Spread:
        values = sorted(values)
        if len(values) == 1:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Work:
    """The least that something must do, counted: what bounds it where nothing else does.

    Attributes:
        bytes: that must pass between memory and processor.
        flops: of matrix products, additions and multiplications.
        dtype: of these.
    """

    bytes: float = 0
    flops: float = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Samples:
    """Of one call.

    Attributes:
        elapsed: of each round.
        peak: bytes that it took at its highest above what there was before, its result included; None where unknown.
    """

    elapsed: list[Elapsed] = field(default_factory=list)
    peak: int | None = None

    def seconds(self, clock: str) -> list[float]:
        return [getattr(elapsed, clock) for elapsed in self.elapsed]


@dataclass(frozen=True)
class Timings:
    """Name to samples of calls that took turns; under `LIMIT` those of the counted work, where any was given."""

    samples: Mapping[str, Samples]

    def spread(self, name: str, clock: str) -> Spread:
        """Seconds, by the clock "wall" or "cpu"."""
        return Spread.of(self.samples[name].seconds(clock))

    def ratio(self, name: str, other: str, clock: str) -> Spread:
        """How many times as long the other call takes, round by round: above 1, the call is faster."""
        own, others = self.samples[name].seconds(clock), self.samples[other].seconds(clock)
        rounds = max(len(own), len(others))
        # A call that is too slow to be repeated is compared with every round of the other.
        return Spread.of([others[min(i, len(others) - 1)] / own[min(i, len(own) - 1)] for i in range(rounds)])


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    budget: float = math.inf,
    slow: Collection[str] = (),
    in_turns: bool = False,
    work: Work | None = None,
    training: bool = False,
    small: bool = False,
) -> Timings:
    """Time calls in turn, A B C A B C ..., after two rounds of warm-up, in the second of which memory is watched.

    Args:
        calls: name to function. One that times a part of itself returns `Elapsed`.
        device: on which they compute; its work is waited for.
        rounds: how many.
        budget: seconds after which no further round begins; there are at least `LEAST_ROUNDS`.
        slow: names of calls that run once, in the first round, without warm-up.
        in_turns: whether a sample is of one call also where it is short: then each finds the caches as the others left
            them, as a model's weights do.
        work: whose limit is measured beside them, from this machine's bandwidth and rate of matrix products in the same
            rounds.
        training: whether gradients are recorded.
        small: whether short samples and rates of what fits the caches will do.
    """
    probes = {} if work is None else _probes(device, work, small)
    every = {**calls, **{name: probe.call for name, probe in probes.items()}}
    samples = {name: Samples() for name in every}
    loops = dict.fromkeys(every, 1)
    with torch.set_grad_enabled(training), _without_collector():
        for name in (name for name in every if name not in slow):
            _timed(every[name], device, 1)
            with watched_memory(device) as peak:
                elapsed = _timed(every[name], device, 1)
            samples[name].peak = peak.bytes
            if not in_turns and not small and name in calls:
                loops[name] = max(1, math.ceil(SAMPLE_SECONDS / elapsed.wall))
        start = time.perf_counter()
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() - start > budget:
                break
            # Another begins each round: the first finds caches that nothing has warmed.
            order = [*every.items()]
            for name, call in (*order[number % len(order) :], *order[: number % len(order)]):
                if name not in slow:
                    samples[name].elapsed.append(_timed(call, device, loops[name]))
                elif number == 0:
                    with watched_memory(device) as peak:
                        samples[name].elapsed.append(_timed(call, device, 1))
                    samples[name].peak = peak.bytes
            gc.collect()
    if work is not None:
        samples[LIMIT] = Samples([*_limits(work, probes, samples)])
    return Timings({name: samples[name] for name in (*calls, *([LIMIT] if work else []))})


def synchronise(device: torch.device) -> None:
    """Wait for all that a device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clocked(device: torch.device) -> Iterator[Callable[[], Elapsed]]:
    """Gives a function that tells, when the `with` block has ended, how long it took."""
    synchronise(device)
    cpu, wall = time.process_time(), time.perf_counter()
    found: list[Elapsed] = []
    yield lambda: found[0]
    synchronise(device)
    found.append(Elapsed(time.perf_counter() - wall, time.process_time() - cpu))


def _timed(call: Callable[[], object], device: torch.device, loops: int) -> Elapsed:
    result = None
    with clocked(device) as elapsed:
        for _ in range(loops):
            result = call()
    if isinstance(result, Elapsed):
        return result
    return Elapsed(elapsed().wall / loops, elapsed().cpu / loops)


@contextmanager
def _without_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Peak:
    """Bytes, known when the block has ended."""

    bytes: int = 0


@contextmanager
def watched_memory(device: torch.device) -> Iterator[Peak]:
    """Tells by how much memory grows at its highest inside the `with` block: that of PyTorch on a GPU, else that of
    this process."""
    peak = Peak()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        synchronise(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while True:
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)
            if done.wait(LOOK_SECONDS):
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
        peak.bytes = max(peak.bytes, process.memory_info().rss - before)
    finally:
        done.set()
        watcher.join()


@dataclass(frozen=True)
class _Probe:
    """A call that does a known amount of work of one kind, `amount` bytes or flops, as fast as PyTorch can."""

    call: Callable[[], object]
    amount: float


# Bytes that are read to measure the bandwidth: more than any cache holds.
READ_BYTES = {"cpu": 2**27, "cuda": 2**31}
# Rows of the square matrices whose product measures the rate.
PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}
# By so much smaller where only the benchmarks are tried.
SMALLER = 16


def _probes(device: torch.device, work: Work, small: bool) -> dict[str, _Probe]:
    """Of the bandwidth and of the rate of matrix products, as far as the work has any of them."""
    probes, less = {}, SMALLER if small else 1
    if work.bytes:
        columns = 4096
        matrix = torch.zeros(READ_BYTES[device.type] // (4 * columns * less), columns, device=device)
        vector = torch.zeros(columns, device=device)
        probes["reading memory"] = _Probe(lambda: matrix @ vector, matrix.nbytes)
    if work.flops:
        rows = PRODUCT_ROWS[device.type] // less
        square = torch.randn(rows, rows, device=device).to(work.dtype)
        probes["matrix product"] = _Probe(lambda: square @ square, 2 * rows**3)
    return probes


def _limits(work: Work, probes: Mapping[str, _Probe], samples: Mapping[str, Samples]) -> Iterator[Elapsed]:
    """The least seconds that the work takes, by the rates of each round: memory and products may overlap."""
    amounts = {"reading memory": work.bytes, "matrix product": work.flops}
    shares = {name: amounts[name] / probe.amount for name, probe in probes.items()}
    for found in zip(*(samples[name].elapsed for name in probes), strict=True):
        pairs = list(zip(shares.values(), found, strict=True))
        yield Elapsed(*(max(share * getattr(e, clock) for share, e in pairs) for clock in ("wall", "cpu")))
