"""What edits do to other text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.comparing import check_comparable
from ..evaluation.results import Results
from ..evaluation.showing import SIDE_EFFECTS
from .measures import row_name
from .style import INK, as_series, drawn, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The perplexity itself says nothing beside its ratio; a ratio counts from 1.
SHOWN = tuple(name for name in SIDE_EFFECTS if name != "perplexity")
TITLES = {"perplexity_ratio": "perplexity ratio"}
UNHARMED = {"perplexity_ratio": 1.0}


@drawn
def side_effects_figure(results: Sequence[Results]) -> Figure:
    """Side effects of edits, of each measure a panel with a bar for each edit and set of texts; without any effect the
    ratio is 1, and the others are 0.

    Args:
        results: of edits; those of base models have no side effects.

    Raises:
        ValueError: they have no side effects, or cannot stand side by side.
    """
    check_comparable(results)
    rows = side_effect_rows(results)
    if not rows:
        raise ValueError("these results have no side effects: run peft-edit evaluate with --adapter and --texts")
    names = [name for name in SHOWN if any(effects.get(name) is not None for _, effects in rows)]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure, grid = new_figure(lines * (0.62 + 0.24 * len(rows)) + 0.1, lines, columns, squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        title, factor, decimals = SIDE_EFFECTS[name]
        start = UNHARMED.get(name, 0.0)
        for at, (_, effects) in enumerate(rows):
            if effects.get(name) is not None:
                value, look = factor * effects[name], as_series(at)
                axes.barh(at, value - start, left=start, color=look.color, hatch=look.hatch, edgecolor=INK, height=0.7)
                place = max(value, start), at
                shown = f"{value:.{decimals}f}"
                axes.annotate(shown, place, (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(start, color=INK, linewidth=0.8)
        axes.set_title(TITLES.get(name, title), loc="left", fontsize=8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(x=0.25)
        # What is rounded to nothing is drawn as nothing.
        least = 2 * 10.0**-decimals
        values = [factor * effects[name] for _, effects in rows if effects.get(name) is not None]
        if max(abs(value - start) for value in values) < least:
            axes.set_xlim(start - least * any(value < start for value in values), start + least)
        axes.locator_params(axis="x", nbins=4)
    grid[0][0].invert_yaxis()
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    return figure


def side_effect_rows(results: Sequence[Results]) -> list[tuple[str, dict[str, Any]]]:
    """Name of edit and texts to the effects."""
    edited = [(found, effects) for found in results if found.adapters for effects in found.side_effects]
    several_edits = len({found.where for found, _ in edited}) > 1
    several_texts = len({effects["texts"].get("file") for _, effects in edited}) > 1
    rows = []
    for found, effects in edited:
        parts = [row_name(found)] if several_edits or not several_texts else []
        parts += [effects["texts"].get("file") or "texts"] if several_texts else []
        rows.append((", ".join(parts), effects))
    return [(label, dict(effects)) for label, effects in rows if any(effects.get(n) is not None for n in SHOWN)]
