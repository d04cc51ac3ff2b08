"""The pictures of a report: which ones there are, and what stands below each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..choosing.sweep import Sweep
from ..evaluation.results import Results
from ..evaluation.showing import LABELS, SHIFT
from ..plotting import (
    category_figure,
    curve_figure,
    demonstrations_figure,
    front_figure,
    layer_count_figure,
    measure_figure,
    norms_figure,
    probe_figure,
    scatter_figure,
    side_effects_figure,
    signature_figure,
    spectrum_figure,
)
from ..plotting.damage import side_effect_rows
from ..plotting.measures import measure_rows
from ..tuners.config import EditConfig
from ..tuners.method import method_of
from .activations import MASSIVE, StoredEdit


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More categories than these make no picture that fits a page.
MOST_CATEGORIES = 60


@dataclass(frozen=True)
class Picture:
    """A figure in a page.

    Attributes:
        name: of its files, and of its place in the page.
        title: what it shows, in a line.
        caption: how it is read.
        figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def of_results(results: Sequence[Results]) -> Iterator[Picture]:
    """Measures, and those of the categories, for each data set."""
    groups = _by_rows(results)
    for number, group in enumerate(groups, 1):
        end = f"-{number}" if len(groups) > 1 else ""
        if measure_rows(group):
            yield Picture(
                f"measures{end}",
                f"Measures of {_data(group[0])}",
                "Lines are 95 % intervals over the questions. In brackets the change from the base model, and its "
                "interval, which is narrower than the bars suggest: both models answer the same questions.",
                measure_figure(group),
            )
        for found in group:
            yield from _of_categories(found, end)


def _of_categories(found: Results, end: str) -> Iterator[Picture]:
    if not found.adapters or not 2 <= len(found.categories) <= MOST_CATEGORIES or found.strength != 1:
        return
    for name in found.measures:
        having = [c for c in found.categories.values() if c["measures"].get(name, {}).get("value") is not None]
        if name in LABELS and name not in SHIFT and having:
            label = LABELS[name]
            yield Picture(
                f"categories-{name.replace('_', '-')}{end}",
                f"{label} by category, {_data(found)}",
                "In brackets behind a category the number of its questions; lines are 95 % intervals over these. Of "
                "many categories some differ by chance.",
                category_figure(found, name),
            )


def of_side_effects(results: Sequence[Results]) -> Iterator[Picture]:
    """What happens to other texts."""
    if side_effect_rows(results):
        yield Picture(
            "side-effects",
            "Effects on other text",
            "Without any effect the ratio is 1 and everything else 0. KL is the divergence of the next token's "
            "distribution from the base model's.",
            side_effects_figure(results),
        )


def of_experiment(recipe: str, results: Sequence[Results], counted: Sequence[tuple[int, Results]]) -> Iterator[Picture]:
    """The rows of a recipe's table beside each other."""
    for number, group in enumerate(_by_rows(results), 1):
        if measure_rows(group):
            caption = "The first rows are the base model's. Lines are 95 % intervals over the questions."
            title = f"All of {recipe}, {_data(group[0])}"
            yield Picture(f"experiment-{number}", title, caption, measure_figure(group))
    if len(counted) > 1:
        yield Picture(
            "demonstrations",
            "Measures by the number of demonstrations",
            "Lines are 95 % intervals over the questions; the horizontal ones are the base model's.",
            demonstrations_figure(counted),
        )


def of_sweep(sweep: Sweep) -> Iterator[Picture]:
    """Benefit and damage of the settings that were tried."""
    yield Picture(
        "front",
        "Benefit and damage of the settings",
        "Right of the dashed line the damage is more than the budget allows. The front has the settings than which "
        "none has both more benefit and less damage; its lines are 95 % intervals over the validation questions. The "
        "chosen one has the least damage of those within a standard error of the best.",
        front_figure(sweep),
    )
    if len({found.setting["layers"] for found in sweep.found if found.scores}) > 1:
        yield Picture(
            "layer-count",
            "Measures by the number of edited layers",
            "Of each number the best setting within the budget; small marks are the other settings. The best of many "
            "settings is better than it would be on other questions.",
            layer_count_figure(sweep),
        )


def of_layers(config: EditConfig) -> Iterator[Picture]:
    """What the method recorded of each layer."""
    method = method_of(config)
    layers = [layer for layer in method.card_layers(config) if layer["index"] is not None]
    edited = [layer["index"] for layer in layers if layer.get("edits", True)]
    for curve in method.curves:
        values = {layer["index"]: layer[curve.key] for layer in layers if layer.get(curve.key) is not None}
        if len(values) > 1:
            caption = "As the configuration of the adapter has it."
            some = edited if len(edited) < len(layers) else None
            name = f"layers-{curve.key.replace('_', '-')}"
            yield Picture(name, f"{curve.title}, by layer", caption, curve_figure(curve, values, some))


def of_stored(stored: StoredEdit) -> Iterator[Picture]:
    """What is seen of stored activations."""
    if spectra := stored.spectra():
        yield Picture(
            "signature",
            "Signature by layer",
            "The sum of the singular values of the mean positive and negative activations: the larger, the more a "
            "layer tells them apart.",
            signature_figure(spectra),
        )
        yield Picture(
            "spectrum",
            "Spectrum by layer and direction",
            "Darker is larger. Directions left of the line are those that the adapter uses.",
            spectrum_figure(spectra),
        )
    probes, edited = stored.probes(), sorted(stored.layers)
    if probes:
        caption = "A probe is fitted to the activations of one half of the questions and asked about the other half's."
        yield Picture("probes", "Accuracy of linear probes by layer", caption, probe_figure(probes, edited))
    yield Picture(
        "norms",
        "Norms of activations before and after the edit",
        "Boxes hold the middle half, whiskers reach from the 5th to the 95th percentile. Each layer is edited for "
        "itself, on what the base model gives it.",
        norms_figure(stored.norms()),
    )
    accuracy = next(iter(probes.values()), {}) or _recorded_accuracy(stored.config)
    best = max(edited, key=lambda index: accuracy.get(index, 0.0))
    for title, points in stored.in_plane(best):
        yield Picture(
            title.split(",")[0].lower().replace(" ", "-"),
            title,
            "Each mark is the activation of one token. Distances in the plane are not those between activations. Those "
            f"with a norm over {MASSIVE} times the median, as the first token of a text mostly has, are left out.",
            scatter_figure(points, title),
        )


def _recorded_accuracy(config: EditConfig) -> dict[int, float]:
    """Of a method's own probes."""
    method = method_of(config)
    keys = [curve.key for curve in method.curves if curve.chance is not None]
    return {layer["index"]: layer[key] for layer in method.card_layers(config) for key in keys if key in layer}


def _by_rows(results: Sequence[Results]) -> list[list[Results]]:
    groups: dict[tuple, list[Results]] = {}
    for found in results:
        groups.setdefault(found.rows, []).append(found)
    return [sorted(group, key=lambda found: (bool(found.adapters), found.strength)) for group in groups.values()]


def _data(found: Results) -> str:
    """What the data set is called, in a line."""
    name = found.data["name"] or ", ".join(found.data["files"] or ()) or "a data set"
    parts = (name.rpartition("/")[2], found.data["subset"], found.data["split"])
    return f"{' '.join(filter(None, parts))} ({len(found.ids)} questions)"
