"""Rows of results: each is a ratio of two durations measured in one run, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from peft_edit.files import write_json

from .machine import in_words
from .models import SHAPES, Shape
from .timing import Spread, Timings, measure


# What a row compares with: our own plain form of what is published, the unedited model, LoRA in PEFT, the limit that
# counted bytes and operations set, other software that does the same; or of a curve the exponent that is expected.
Kind = Literal["published", "base", "LoRA", "limit", "other", "exponent"]
HEADINGS = ("", "what", "against", "ratio", "quartiles", "by the clock", "takes", "memory")
# Bytes; less is not told from what the process does besides.
LEAST_PEAK = 1e6
UNITS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        benchmark: its name.
        case: what is measured, with its sizes.
        what: of the things measured there, the one that the ratio is of.
        against: what it is compared with.
        kind: what that is.
        ratio: how many times as long the other takes, by the clock that counts on the device: CPU seconds on a CPU,
            where other programs run too, seconds of the wall clock on a GPU. Above 1, `what` is faster. Of a curve the
            exponent.
        clock: the same by the wall clock.
        takes: seconds of `what`, by the clock that counts.
        peak: bytes that it takes; None where unknown.
        note: in words.
        points: of a curve, size and seconds of each.
        skipped, failed: why there is no ratio.
    """

    benchmark: str
    case: str
    what: str = ""
    against: str = ""
    kind: Kind | None = None
    ratio: Spread | None = None
    clock: Spread | None = None
    takes: Spread | None = None
    peak: int | None = None
    note: str = ""
    points: tuple[tuple[float, float], ...] | None = None
    skipped: str | None = None
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without those that the row does not have."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    def cells(self) -> tuple[str, ...]:
        """Of a table with `HEADINGS`."""
        if self.ratio is None:
            reason = f"skipped: {self.skipped}" if self.skipped else f"failed: {self.failed}"
            return (self.case, self.what, reason, "", "", "", "", "")
        write = _share if self.kind in ("base", "LoRA", "limit") else _times
        if self.kind == "exponent":
            write = "{:.2f}".format
        return (
            self.case,
            self.what,
            self.against,
            write(self.ratio.median),
            f"{write(self.ratio.low)} to {write(self.ratio.high)}" if self.ratio.low != self.ratio.high else "",
            write(self.clock.median) if self.clock else "",
            _seconds(self.takes.median) if self.takes else "",
            f"{self.peak / 1e6:,.0f} MB" if self.peak and self.peak >= LEAST_PEAK else "",
        )


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.0f} x"


def _share(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _seconds(seconds: float) -> str:
    unit, name = next(((unit, name) for unit, name in UNITS if seconds >= unit), UNITS[-1])
    return f"{seconds / unit:.3g} {name}"


@dataclass(frozen=True)
class Case:
    """What is measured at a time.

    Attributes:
        name: with the sizes.
        run: yields its rows, each when it is measured; called where it fits.
        needs: bytes of the device's memory.
        measures: whether it takes time of its own; else it runs also when that is over.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    needs: float = 0
    measures: bool = True


@dataclass(frozen=True)
class Bench:
    """What benchmarks are given.

    Attributes:
        device: on which they run.
        folder: for files, removed at the end.
        quick: whether everything is small: a trial of the benchmarks, not of the package.
        model: folder of a real model; None without one.
        plot: file for the figure of the curves; None for none.
        shapes: of the models with random weights.
        name: of the benchmark that runs.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    model: Path | None = None
    plot: Path | None = None
    shapes: tuple[Shape, ...] = SHAPES
    name: str = field(default="", compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the models."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def element(self) -> int:
        """Bytes of an element of the models."""
        return self.dtype.itemsize

    def measure(self, calls: Mapping[str, Callable[[], object]], *, rounds: int, **options: Any) -> Timings:
        """Time calls in turn, see `timing.measure`."""
        return measure(calls, self.device, rounds=3 if self.quick else rounds, small=self.quick, **options)

    @property
    def clock(self) -> str:
        """That counts, see `Row`."""
        return "wall" if self.device.type == "cuda" else "cpu"

    def rows(
        self,
        case: str,
        timings: Timings,
        what: str,
        against: Mapping[str, Kind],
        note: str = "",
        clock: str | None = None,
    ) -> Iterator[Row]:
        """Rows of one of some calls against others, by their names in `timings`.

        Args:
            case: its name.
            timings: of all of them.
            what: name of the call.
            against: names of the others, and what they are.
            note: in words.
            clock: that counts, where it is not that of the device.
        """
        clock = clock or self.clock
        for other, kind in against.items():
            yield Row(
                self.name,
                case,
                what,
                other,
                kind,
                ratio=timings.ratio(what, other, clock),
                clock=timings.ratio(what, other, "wall"),
                takes=timings.spread(what, clock),
                peak=timings.samples[what].peak,
                note=note,
            )


class Report:
    """All rows, written to a file whenever there is one more.

    Args:
        path: of the JSON; None for none.
        machine: its description.
        settings: what was asked for.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any], settings: dict[str, Any]):
        self.path, self.machine, self.settings = path, machine, settings
        self.rows: list[Row] = []
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            rows = [row.to_dict() for row in self.rows]
            write_json(self.path, {"machine": self.machine, "settings": self.settings, "rows": rows})

    def table(self) -> str:
        """The rows as tables of Markdown, one for each benchmark, below a line about the machine."""
        parts = [in_words(self.machine)]
        for benchmark in dict.fromkeys(row.benchmark for row in self.rows):
            rows = [row for row in self.rows if row.benchmark == benchmark]
            lines = [(benchmark, *HEADINGS[1:]), ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
            notes = dict.fromkeys(f"{row.case}: {row.note}" for row in rows if row.note)
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            parts += [f"- {note}" for note in notes]
        return "\n\n".join(parts)
