"""The command line of the benchmarks, `python -m examples.benchmarks`."""

from __future__ import annotations

import argparse
import difflib
import gc
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch
from tqdm.auto import tqdm

from peft_edit.arguments import one_line
from peft_edit.extras import import_extra
from peft_edit.files import check_writable

from .machine import DoesNotFitError, check_fits, description
from .models import SHAPES, TINY
from .report import Bench, Case, Report, Row


# In the order in which they run, each in the module of its name.
BENCHMARKS = (
    *("fit", "edit", "merge", "hpr-edit", "hpr-training", "collection", "evaluation", "sweep", "loading", "decoding"),
    "scaling",
)
DEVICES = ("cpu", "cuda")
INTERRUPTED, WRONG_USE = 130, 2


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: {message}\n")


def known(what: str, value: str, choices: Sequence[str]) -> str:
    """The value; raises ArgumentTypeError, with the nearest choice and all of them, where it is none."""
    if value in choices:
        return value
    found = difflib.get_close_matches(value, choices, n=1)
    suggestion = f"did you mean {found[0]!r}? " if found else ""
    raise argparse.ArgumentTypeError(f"there is no {what} {value!r}: {suggestion}There are {', '.join(choices)}")


def device_of(value: str) -> torch.device:
    """The device of a name that this machine has."""
    if known("device", value, DEVICES) == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"torch {torch.__version__} finds no CUDA device here: take --device cpu, or a machine with a GPU"
        )
    return torch.device(value)


def model_folder(value: str) -> Path:
    """A folder with a model."""
    if not (Path(value) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{value} is no folder of a model: it has no config.json")
    return Path(value)


def output(value: str) -> Path:
    """A file that can be written."""
    path = Path(value)
    try:
        check_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: pass a file")
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: pass a file in a folder that exists")
    return path


def plot_file(value: str) -> Path:
    """A file for a figure."""
    from peft_edit.plotting.style import FORMATS

    if Path(value).suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{value} must end in {' or '.join(FORMATS)}")
    try:
        import_extra("matplotlib", "plots", "a plot")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return output(value)


def positive(value: str) -> float:
    """A number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {value}")
    return number


def parser() -> Parser:
    made = Parser(prog="python -m examples.benchmarks", description=__doc__, allow_abbrev=False)
    names = f"benchmarks to run, by default all: {', '.join(BENCHMARKS)}"
    made.add_argument("names", metavar="NAME", nargs="*", type=lambda v: known("benchmark", v, BENCHMARKS), help=names)
    made.add_argument("--device", type=device_of, default="cpu", help="cpu (float32) or cuda (bfloat16)")
    made.add_argument("--json", type=output, help="write the results to this file, after each row")
    made.add_argument("--model", type=model_folder, help="folder of a real model, to be measured too")
    names = [shape.name for shape in SHAPES]
    sizes = f"shape of a model with random weights, may be repeated; by default all: {', '.join(names)}; or none"
    made.add_argument("--shape", action="append", type=lambda v: known("shape", v, [*names, "none"]), help=sizes)
    made.add_argument("--plot", type=plot_file, help="write the curves of `scaling` to this .png or .svg file")
    made.add_argument("--minutes", type=positive, default=math.inf, help="begin nothing more after so many minutes")
    made.add_argument("--quick", action="store_true", help="everything small: tries the benchmarks, measures nothing")
    return made


def cases_of(name: str, bench: Bench) -> list[Case]:
    return list(import_module(f".{name.replace('-', '_')}", __package__).cases(replace(bench, name=name)))


def rows_of(benchmark: str, case: Case, bench: Bench) -> Iterator[Row]:
    """The rows of a case as they are measured; one with the reason where it does not fit, or fails."""
    try:
        check_fits(case.needs, bench.device)
        yield from case.run()
    except (DoesNotFitError, torch.OutOfMemoryError, MemoryError) as error:
        yield Row(benchmark, case.name, skipped=one_line(error) or "no memory was left")
    except Exception as error:
        # The others are measured all the same, on a machine that may be lent for minutes.
        traceback.print_exc()
        yield Row(benchmark, case.name, failed=f"{type(error).__name__}: {one_line(error)}")
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def run(cases: Sequence[tuple[str, Case]], report: Report, bench: Bench, minutes: float = math.inf) -> None:
    """Measure cases of benchmarks, of which none begins after so many minutes."""
    begun = time.perf_counter()
    with tqdm(cases, unit="case", leave=None) as progress:
        for name, case in progress:
            progress.set_description(f"{name}: {case.name}")
            if case.measures and time.perf_counter() - begun > 60 * minutes:
                report.add(Row(name, case.name, skipped=f"the {minutes:g} minutes were over"))
                continue
            for row in rows_of(name, case, bench):
                report.add(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 where a case failed, 2 for what cannot be run, and 130 after
    an interruption."""
    options = parser().parse_args(arguments)
    names = [name for name in BENCHMARKS if name in options.names] or list(BENCHMARKS)
    if options.plot is not None and "scaling" not in names:
        parser().error("--plot draws the curves of the benchmark scaling: name that too, or leave the plot out")
    if options.shape is not None and len(set(options.shape)) > 1 and "none" in options.shape:
        parser().error("argument --shape: none beside others: give shapes, or none alone")
    chosen = tuple(shape for shape in SHAPES if options.shape is None or shape.name in options.shape)
    shapes = (TINY,) if options.quick else chosen
    settings = {
        "names": names,
        "shapes": [shape.name for shape in shapes],
        "quick": options.quick,
        "model": options.model and str(options.model),
    }
    status = 0
    with tempfile.TemporaryDirectory(prefix="peft-edit-benchmarks-") as folder:
        bench = Bench(options.device, Path(folder), options.quick, options.model, options.plot, shapes)
        cases = [(name, case) for name in names for case in cases_of(name, bench)]
        if not cases:
            parser().error("there is nothing to measure: leave out --shape none, or name other benchmarks")
        try:
            report = Report(options.json, description(options.device), settings)
        except OSError as error:
            parser().error(f"argument --json: {options.json} cannot be written: {error.strerror}")
        try:
            run(cases, report, bench, options.minutes)
        except KeyboardInterrupt:
            status = INTERRUPTED
    print(report.table())
    if status == INTERRUPTED:
        kept = f", {options.json} holds it" if options.json else ""
        print(f"interrupted: above is what was measured{kept}", file=sys.stderr)
    return status or int(any(row.failed for row in report.rows))


if __name__ == "__main__":
    # A time limit ends a run by this signal: what was measured is shown then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
