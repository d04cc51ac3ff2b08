"""The figure of the curves. It needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peft_edit.plotting.style import GREY, as_series, drawn, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .scaling import Curve

COLUMNS = 2
# Inches of a row of axes.
HEIGHT = 1.7


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
        axes.loglog(sizes, expected, color=GREY, linestyle=":", label=f"exponent {curve.expected}")
        axes.loglog(sizes, seconds, color=measured.color, marker=measured.marker, label="measured")
        axes.set(title=curve.name, xlabel=curve.size, ylabel="seconds")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        axes.legend()
    return figure
