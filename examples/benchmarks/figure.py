"""The figure of the curves. It needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from peft_edit.plotting.style import GREY, as_series, drawn, legend_below, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .scaling import Curve

COLUMNS = 2
# Inches of a row of axes, and letters of a line of its title.
HEIGHT, TITLE = 1.9, 28


@drawn
def curves_figure(curves: Mapping[Curve, Sequence[tuple[float, float]]]) -> Figure:
    """Seconds against size, both logarithmic, and the slope that is expected, through the last point of each curve."""
    rows = -(-len(curves) // COLUMNS)
    figure, grid = new_figure(HEIGHT * rows, rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    measured = as_series(0)
    for axes, (curve, points) in zip(grid.flat, curves.items(), strict=False):
        sizes, seconds = zip(*points, strict=True)
        expected = [seconds[-1] * (size / sizes[-1]) ** curve.expected for size in sizes]
        axes.loglog(sizes, expected, color=GREY, linestyle=":", label="expected slope, through the last point")
        axes.loglog(sizes, seconds, color=measured.color, marker=measured.marker, label="measured")
        axes.set(title=fill(curve.name, TITLE), xlabel=f"{curve.size} (exponent {curve.expected})", ylabel="seconds")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        ends = (min(seconds), max(seconds))
        axes.set_yticks(ends, [f"{end:.2g}" for end in ends], minor=False)
        axes.minorticks_off()
    legend_below(figure, grid.flat[0])
    return figure
