"""Activations before and after an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import INK, as_series, check_any, drawn, legend_below, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the norms, what a box plot shows: whiskers, box, median.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Room for the boxes of a layer, of the distance to the next.
BOXES = 0.8


@drawn
def norms_figure(norms: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Norms of activations by layer, as box plots: the box is the middle half, its line the median, and the whiskers
    reach from the 5th to the 95th percentile.

    Args:
        norms: name of each group, such as "positive", to block index and the five `QUANTILES` of the norms.
    """
    check_any(norms, "norms")
    layers = sorted({index for of_group in norms.values() for index in of_group})
    figure, axes = new_figure(3.2)
    width = BOXES / len(norms)
    for place, (name, of_group) in enumerate(norms.items()):
        look = as_series(place)
        at = [layers.index(index) + (place - (len(norms) - 1) / 2) * width for index in of_group]
        stats = [
            {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high, "fliers": []}
            for low, q1, median, q3, high in of_group.values()
        ]
        lines = {"color": INK, "linewidth": 0.7}
        boxes = axes.bxp(
            stats, at, widths=0.85 * width, patch_artist=True, showfliers=False, manage_ticks=False,
            boxprops={"facecolor": look.color, "edgecolor": INK, "linewidth": 0.7, "hatch": look.hatch},
            medianprops={"color": INK, "linewidth": 1.4}, whiskerprops=lines, capprops=lines,
        )  # fmt: skip
        boxes["boxes"][0].set_label(name)
    every = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), every), [str(index) for index in layers[::every]])
    if max(of[-1] for group in norms.values() for of in group.values()) > 20 * min(
        of[0] + 1e-12 for group in norms.values() for of in group.values()
    ):
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of an activation")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    legend_below(figure, axes)
    return figure


@drawn
def scatter_figure(points: Mapping[str, np.ndarray], title: str) -> Figure:
    """Activations of one layer in the plane.

    Args:
        points: name of each group to its points, (n, 2).
        title: how they came into the plane.
    """
    check_any(points, "points")
    figure, axes = new_figure(3.9)
    for place, (name, group) in enumerate(points.items()):
        look = as_series(place)
        axes.scatter(group[:, 0], group[:, 1], s=14, marker=look.marker, facecolors="none" if place % 2 else look.color,
                     edgecolors=look.color, linewidths=0.8, alpha=0.75, label=f"{name} ({len(group)})")  # fmt: skip
    axes.set_title(title, loc="left")
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("second coordinate")
    axes.spines[["right", "top"]].set_visible(True)
    axes.tick_params(labelsize=7)
    legend_below(figure, axes)
    return figure
