from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .. import files
from ..arguments import Argument, ArgumentError
from . import common
from .options import Fields, Run


if TYPE_CHECKING:
    from ..evaluation.results import Results
    from ..reporting import Material

# What is looked for in the adapter's folder.
RESULTS = "results.json"
OF_RESULTS = Fields(
    changes={
        "data": {
            "help": "Contrast set of the results: shows what the edit does to questions that flipped.",
            "positional": False,
            "default": None,
        }
    }
)


def report(
    adapter: common.PositionalAdapter,
    model: Annotated[common.LoadedModelOptions, common.BASE_OF_ADAPTER],
    data: Annotated[common.DataOptions, OF_RESULTS],
    run: Run,
    out: Annotated[Path, {"help": "Page to write.", "output": True}] = Path("report.html"),
    results: Annotated[
        list[Path] | None,
        {
            "help": f"What evaluate --json wrote. May be repeated. Default: {RESULTS} in the adapter's folder.",
            "repeated": True,
        },
    ] = None,
    sweep: Annotated[
        Path | None, {"help": "The sweep that chose it. Default: sweep.json in the adapter's folder, if any."}
    ] = None,
    table: Annotated[Path | None, {"help": "table.json of a recipe: other edits beside this one."}] = None,
    store: Annotated[Path | None, {"help": "Store that it was learnt from: spectra, probes, norms, t-SNE."}] = None,
    retain: common.Retain = None,
    flipped: Annotated[
        int, {"help": "Questions that flipped, of each direction.", "minimum": 1, "allowed": "of at least 1"}
    ] = 3,
    figures: Annotated[
        Path | None, {"help": "Folder to write each picture to, as PNG and SVG.", "output": True}
    ] = None,
    base_model: Annotated[
        str | None, {"help": "Id of the base model on the Hub, where the adapter names a local folder."}
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Write a report on an adapter: one HTML page with tables, plots, and what it does to single tokens.

    Example: peft-edit report sea-truthful --results results.json --store store
    """
    from ..extras import import_extra
    from ..plotting import save_figure
    from ..plotting.style import FORMATS
    from ..reporting import report_page

    _check_places(out, figures)
    import_extra("matplotlib", "plots", "a report")
    if retain is not None and store is None:
        raise ArgumentError(Argument("retain"), " is shown beside a ", Argument("store"), ": pass that too")
    material = _material(adapter, results, sweep, table, base_model)
    stored = _stored(adapter, model, store, retain, allow_fingerprint_mismatch)
    shown = _flipped(adapter, model, data, material, flipped, allow_fingerprint_mismatch)
    page, pictures = report_page(replace(material, stored=stored, flipped=shown))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            for suffix in FORMATS:
                save_figure(picture.figure, figures / f"{picture.name}{suffix}")
        print(f"Pictures: {figures}")
    print(f"Report, {len(pictures)} pictures, {len(page.encode()) / 1e3:.0f} kB: {out}")


def _check_places(out: Path, figures: Path | None) -> None:
    """Raise ArgumentError where something could not be written, before the work is done."""
    for name, path in (("out", out), ("figures", figures)):
        if path is None:
            continue
        try:
            files.check_writable(path)
        except ValueError as error:
            raise ArgumentError(Argument(name), f" {error}") from error
    if out.exists() and not out.is_file():
        raise ArgumentError(Argument("out"), f" {out} is a folder: choose a file")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ArgumentError(Argument("figures"), f" {figures} is a file: choose a folder")


def _material(
    adapter: str, results: list[Path] | None, sweep: Path | None, table: Path | None, base_model: str | None
) -> Material:
    """What files say of an adapter."""
    from ..adapters import hub
    from ..adapters.card import check_results
    from ..adapters.read import local_adapter
    from ..choosing.record import read_sweep
    from ..choosing.sweep import RECORD
    from ..evaluation.results import read_results
    from ..reporting import Material
    from ..reporting.experiment import by_demonstrations, read_experiment

    folder = Path(local_adapter(adapter))
    config = hub.read_edit_config(folder)
    if results is None:
        results = [folder / RESULTS]
        if not results[0].exists():
            raise ArgumentError(
                f"{adapter} has no {RESULTS}, so that there is nothing to report: run peft-edit evaluate with ",
                f"--adapter {adapter} and --json results.json, and pass that file as ",
                Argument("results"),
            )
    check_results([read_results(result) for result in results], config, config, folder)
    if sweep is None and (folder / RECORD).exists():
        sweep = folder / RECORD
    recipe, experiment = ("", []) if table is None else read_experiment(table)
    counted = by_demonstrations(experiment, config.peft_type.value, table.parent) if experiment else []
    return Material(
        folder=folder,
        config=config,
        results=results,
        sweep=None if sweep is None else read_sweep(sweep),
        recipe=recipe,
        experiment=experiment,
        counted=counted,
        base_model=base_model,
    )


def _stored(adapter, model, store, retain, allow_fingerprint_mismatch):
    """The adapter on the structure of its base model, and the stored activations; None without a store."""
    from ..reporting.activations import StoredEdit

    if store is None:
        return None
    structure = common.load_structure(common.base_of(model, adapter))
    adapted = common.load_adapter(structure, adapter, allow_fingerprint_mismatch)
    return StoredEdit(adapted, store, retain, allow_fingerprint_mismatch=allow_fingerprint_mismatch)


def _flipped(adapter, model, data, material: Material, most: int, allow_fingerprint_mismatch):
    """The questions that flipped; None without their data."""
    from ..data.source import rows_digest
    from ..evaluation.results import read_results
    from ..reporting.flipped import best_of, flipped_questions

    if data.data is None:
        return None
    contrast = common.load_data(data)
    found: Results = best_of([read_results(result) for result in material.results], rows_digest(contrast))
    base, tokenizer = common.load_model(common.base_of(model, adapter))
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    return flipped_questions(adapted, tokenizer, contrast, found, most)


COMMANDS = [report]
