from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ..arguments import ArgumentError
from ..files import check_writable, locked
from . import common
from .config_file import spelling_in_files
from .listing import HARNESS, listed_commands
from .options import Run
from .recipes.plan import TABLE, Planned, plan
from .recipes.reading import read_recipe
from .recipes.records import Records


# Modules whose commands are no steps of a recipe: this one, and those that talk to a person or have other options.
NO_STEPS = ("cli.run", "cli.chat", "cli.ui", HARNESS)


def run(
    recipe: Annotated[Path, {"help": "Recipe: YAML file with the steps of an experiment.", "positional": True}],
    output: common.Output,
    run: Run,
    settings: Annotated[
        list[str] | None,
        {"help": "Value of one of its variables, name=value. May be repeated.", "option": "--set", "repeated": True},
    ] = None,
    out: Annotated[
        Path | None, {"help": "Folder of all that the steps write. Default: the recipe's name.", "output": True}
    ] = None,
    dry_run: Annotated[bool, {"help": "Check the recipe, and show what would be done."}] = False,
) -> None:
    """Do a whole experiment, from collection to a table of results. Run it again to go on after an interruption.

    A step is done again only where its options, the files that it reads, or the steps before it have changed.

    Example: peft-edit run examples/recipes/sea-truthfulqa.yaml --set model=meta-llama/Llama-2-7b-chat-hf --out sea
    """
    from ..processes import processes
    from .evaluate import evaluate
    from .recipes.table import write_table

    if processes().count > 1:
        raise ValueError("run is for one process: start it without a launcher, and its single commands with one")
    known = {listed.name: listed for listed in listed_commands() if listed.module not in NO_STEPS}
    read = read_recipe(recipe, settings or (), list(known))
    folder = Path(read.name) if out is None else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the run")
    check_writable(folder)
    functions = {name: known[name].load() for name in {step.command for step in read.steps}}
    steps = plan(read, functions, folder)
    results = [_results(planned) for planned in steps if planned.function is evaluate]
    if dry_run:
        _run_steps(steps, folder, dry_run)
        return
    with locked(folder, f"another run is writing {folder}: wait for it, or choose another folder"):
        _run_steps(steps, folder, dry_run)
        shown, values = write_table(read, folder, results)
    output.write(run.record(values))
    print(f"{shown}\nTable: {folder / TABLE}" if results else f"Folder: {folder}")


def _results(planned: Planned) -> str:
    """Name of the file of results of an evaluation."""
    name = planned.texts["json"]
    if name is None:
        raise ValueError(f"{planned.step.where} needs json, the file of its results, such as 'json: results/base.json'")
    return name


def _run_steps(steps: Sequence[Planned], folder: Path, dry_run: bool) -> None:
    """Do the steps that are not done yet."""
    records = Records(folder)
    undone = set()
    for planned in steps:
        step = planned.step
        title = f"[{step.number}/{len(steps)}] {step.command}"
        if planned.outputs:
            title += f": {', '.join(planned.outputs)}"
        if records.is_done(planned) and not undone & {earlier.step.number for earlier in planned.reads}:
            print(f"{title} (done)", flush=True)
            continue
        records.check(planned)
        print(title, flush=True)
        if dry_run:
            undone.add(step.number)
            continue
        records.begin(planned)
        _run_step(planned, folder)
        records.end(planned)


def _run_step(planned: Planned, folder: Path) -> None:
    """Run a step's command. Its errors say which step it is."""
    bound, where = planned.bound(folder), planned.step.where
    for name in planned.outputs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        bound.run()
    except ArgumentError as error:
        raise ValueError(f"{where}: {error.message(spelling_in_files(planned.options))}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


COMMANDS = [run]
