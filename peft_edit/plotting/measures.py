"""Measures with their intervals: of a model and its edits, of categories, of numbers of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import Argument, ArgumentError
from ..evaluation.comparing import check_comparable
from ..evaluation.results import Results
from ..evaluation.showing import LABELS, SHIFT, percent
from .style import INK, as_series, drawn, legend_below, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Mapping[str, float | None]


@drawn
def measure_figure(results: Sequence[Results]) -> Figure:
    """Measures of the base model and of edits, in percent, with their 95 % intervals over the questions; beside each
    edit's the change from the base model's, with the paired interval.

    Args:
        results: on the same questions.

    Raises:
        ValueError: there are none, or they cannot stand side by side.
    """
    check_comparable(results)
    rows = measure_rows(results)
    if not rows:
        raise ValueError("these results have no measure: evaluate on a contrast set that has answers")
    names = list(dict.fromkeys(row[1] for row in rows))
    figure, axes = new_figure(0.75 + 0.27 * len(rows) + 0.12 * len({row[0] for row in rows}))
    _bars(axes, [(label, names.index(name), measure) for label, name, measure in rows])
    axes.set_xlabel("%")
    for place, name in enumerate(names):
        axes.barh(0, 0, color=as_series(place).color, hatch=as_series(place).hatch, edgecolor=INK, label=name)
    legend_below(figure, axes)
    return figure


def measure_rows(results: Sequence[Results]) -> list[tuple[str, str, Measure]]:
    """Of each measure, the model's name and what is known of it; the base model's once, before its edits."""
    rows = []
    for name in dict.fromkeys(name for found in results for name in found.measures if name not in SHIFT):
        measured = [found for found in results if name in found.measures]
        alone = [found.measures[name] for found in measured if not found.adapters]
        base = alone[:1] or [{"value": found.measures[name]["base"]} for found in measured][:1]
        rows += [(LABELS.get(name, name), "base model", measure) for measure in base]
        rows += [(LABELS.get(name, name), row_name(f), f.measures[name]) for f in measured if f.adapters]
    return [row for row in rows if row[2]["value"] is not None]


def row_name(results: Results) -> str:
    """What results are called among others: their adapters and strength."""
    if not results.adapters:
        return "base model"
    names = " + ".join(adapter["name"].rstrip("/").rpartition("/")[2] for adapter in results.adapters)
    return names if results.strength == 1 else f"{names}, strength {results.strength:g}"


def _bars(axes: Axes, rows: Sequence[tuple[str, int, Measure]]) -> None:
    """Horizontal bars: label of the group, place of the series, the measure."""
    at, ticks, before = 0.0, {}, None
    for label, series, measure in rows:
        at += 1.0 if label == before or before is None else 1.45
        before = label
        _bar(axes, at, series, measure)
        ticks.setdefault(label, []).append(at)
    axes.set_yticks([sum(places) / len(places) for places in ticks.values()], list(ticks))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _bar(axes: Axes, at: float, series: int, measure: Measure, height: float = 0.86) -> None:
    look, value = as_series(series), 100 * measure["value"]
    axes.barh(at, value, height=height, color=look.color, hatch=look.hatch, edgecolor=INK, linewidth=0.6)
    reach = max(value, 0.0)
    if None not in (low := measure.get("low"), high := measure.get("high")):
        axes.plot([100 * low, 100 * high], [at, at], color=INK, linewidth=1.6, marker="|", markersize=5)
        axes.plot([100 * low, 100 * high], [at, at], color="#ffffff", linewidth=0.5)
        reach = max(reach, 100 * high)
    axes.annotate(
        change_text(measure), (reach, at), (4, 0), textcoords="offset points", va="center", fontsize=7, color=INK
    )


def change_text(measure: Measure) -> str:
    """The value, and the change from the base model's with its interval."""
    shown = percent(measure["value"])
    difference, low = measure.get("difference"), measure.get("difference_low")
    if difference is None:
        return shown
    bounds = f"; {percent(low, '+')} to {percent(measure['difference_high'], '+')}" if low is not None else ""
    return f"{shown} ({percent(difference, '+')}{bounds})"


@drawn
def category_figure(results: Results, measure: str = "mc1") -> Figure:
    """A measure of each category of the questions, in percent, with its 95 % interval; the base model's is the diamond.

    Args:
        results: of a contrast set whose questions have categories.
        measure: a name in `results.measures`.

    Raises:
        ValueError: there are no categories, or none has the measure.
    """
    found = {
        name: (category["questions"], category["measures"][measure])
        for name, category in results.categories.items()
        if category["measures"].get(measure, {}).get("value") is not None
    }
    if not found:
        have = ", ".join(dict.fromkeys(n for c in results.categories.values() for n in c["measures"])) or "none"
        raise ArgumentError(
            Argument("measure"), f" {measure!r} is of no category in {results.where}, which has {have} of categories"
        )
    figure, axes = new_figure(0.9 + 0.22 * len(found))
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    for at, (_, (_, of_category)) in enumerate(ordered):
        _bar(axes, at, 2 if of_category["base"] is not None else 0, of_category, height=0.7)
        if of_category["base"] is not None:
            axes.plot(100 * of_category["base"], at, "D", color=INK, markerfacecolor="#ffffff", markersize=5)
    axes.set_yticks(range(len(ordered)), [f"{name} ({count})" for name, (count, _) in ordered], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel(f"{LABELS.get(measure, measure)}, %")
    _frame(axes)
    if any(of["base"] is not None for _, (_, of) in ordered):
        axes.plot([], [], "D", color=INK, markerfacecolor="#ffffff", label="base model")
        legend_below(figure, axes)
    return figure


@drawn
def demonstrations_figure(found: Sequence[tuple[int, Results]], measures: Sequence[str] = ("mc1", "mc2")) -> Figure:
    """Measures by the number of demonstrations that an edit was learnt from, in percent, with 95 % intervals over the
    questions; the base model's are the horizontal lines.

    Args:
        found: pairs of that number, 1 or more, and results of the edit; all on the same questions.
        measures: names in `Results.measures`.

    Raises:
        ValueError: there are none, they have none of the measures, or they cannot stand side by side.
    """
    check_comparable([results for _, results in found])
    ordered = sorted(found, key=lambda pair: pair[0])
    names = [name for name in measures if any(name in results.measures for _, results in ordered)]
    if not names:
        raise ArgumentError(Argument("measures"), f" {', '.join(measures)} are in none of these results: pass others")
    figure, axes = new_figure(3.1)
    for place, name in enumerate(names):
        points = [
            (count, r.measures[name]) for count, r in ordered if r.measures.get(name, {}).get("value") is not None
        ]
        _line_with_bounds(axes, points, place, LABELS.get(name, name))
    axes.set_xscale("log")
    counts = sorted({count for count, _ in ordered})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("demonstrations")
    axes.set_ylabel("%")
    axes.grid(axis="y")
    legend_below(figure, axes, 4)
    return figure


def _line_with_bounds(axes: Axes, points: Sequence[tuple[int, dict[str, Any]]], place: int, label: str) -> None:
    look = as_series(place)
    counts, values = [count for count, _ in points], [100 * measure["value"] for _, measure in points]
    axes.plot(counts, values, color=look.color, marker=look.marker, linestyle=look.line, label=label)
    for (count, measure), value in zip(points, values, strict=True):
        if measure["low"] is not None:
            # Rounding may put a bound past the value.
            bounds = [[max(0, value - 100 * measure["low"])], [max(0, 100 * measure["high"] - value)]]
            axes.errorbar([count], [value], yerr=bounds, color=look.color, linewidth=0.8)
    base = next((measure["base"] for _, measure in points if measure["base"] is not None), None)
    if base is not None:
        axes.axhline(100 * base, color=look.color, linestyle=look.line, linewidth=0.8, label=f"{label}, base model")
