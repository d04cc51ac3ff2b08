"""Numbers of each layer: what a method recorded, signatures, spectra, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..tuners.shown import LayerCurve, LayerSpectra
from .style import GREY, INK, SERIES, as_series, check_any, drawn, legend_below, new_figure, whole_ticks


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Singular values below this share of the largest are shown as it.
LEAST_SHARE = 1e-4


@drawn
def curve_figure(curve: LayerCurve, values: Mapping[int, float], edited: Sequence[int] | None = None) -> Figure:
    """A number of each layer that a method recorded.

    Args:
        curve: what it is.
        values: index of the block to the number.
        edited: the blocks that edit, whose marks are filled; None for all.
    """
    figure, axes = new_figure(2.6)
    shown = {index: curve.factor * value for index, value in sorted(values.items())}
    _layer_line(axes, shown, edited)
    if curve.chance is not None:
        axes.axhline(curve.chance, color=GREY, linestyle="--", linewidth=0.9)
        _right_label(axes, curve.chance, "chance")
    axes.set_ylabel(curve.unit)
    axes.set_title(curve.title, loc="left")
    return figure


def _layer_line(axes: Axes, values: Mapping[int, float], edited: Sequence[int] | None, place: int = 0, label: str = ""):
    look = as_series(place)
    axes.plot(list(values), list(values.values()), color=look.color, linestyle=look.line, linewidth=0.9)
    kept = [index for index in values if edited is None or index in edited]
    for indices, fill in ((kept, look.color), ([i for i in values if i not in kept], "none")):
        heights = [values[index] for index in indices]
        told = label if fill != "none" else ""
        axes.plot(indices, heights, look.marker, color=look.color, markerfacecolor=fill, label=told)
    whole_ticks(axes)
    axes.set_xlabel("layer" if edited is None else "layer (filled: it edits)")
    axes.grid(axis="y")


def _right_label(axes: Axes, height: float, text: str) -> None:
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, height), (-2, 2), ha="right", va="bottom", fontsize=7, **place)


@drawn
def signature_figure(spectra: Sequence[LayerSpectra], edited: Sequence[int] | None = None) -> Figure:
    """The signature of each layer: the sum of the singular values of the mean positive and negative activations.

    Args:
        spectra: of the layers.
        edited: see `curve_figure`.
    """
    check_any(spectra, "spectra")
    figure, axes = new_figure(2.6)
    _layer_line(axes, {of.layer: of.signature for of in sorted(spectra, key=lambda of: of.layer)}, edited)
    axes.set_ylabel("sum of singular values")
    axes.set_title("Signature", loc="left")
    return figure


@drawn
def spectrum_figure(spectra: Sequence[LayerSpectra]) -> Figure:
    """The singular values of each layer and direction, as shares of the largest one there, on a logarithmic scale; the
    line is where the adapter cuts.

    Args:
        spectra: of the layers, all with the same directions.
    """
    from matplotlib.colors import LogNorm

    check_any(spectra, "spectra")
    ordered = sorted(spectra, key=lambda of: of.layer)
    names = list(ordered[0].singular_values)
    width = max(len(values) for of in ordered for values in of.singular_values.values())
    figure, grid = new_figure(1.3 + 0.13 * max(8, len(ordered)), 1, len(names), squeeze=False, sharey=True, sharex=True)
    for axes, name in zip(grid[0], names, strict=True):
        shares = np.full((len(ordered), width), np.nan)
        for place, of in enumerate(ordered):
            values = np.array(of.singular_values[name])
            shares[place, : len(values)] = np.maximum(values / values[0], LEAST_SHARE)
        extent = (0.5, width + 0.5, len(ordered) - 0.5, -0.5)
        norm = LogNorm(LEAST_SHARE, 1)
        image = axes.imshow(shares, norm=norm, cmap="gray_r", aspect="auto", extent=extent, interpolation="nearest")
        cuts = [of.ranks[name] + 0.5 for of in ordered]
        # Twice, so that it is seen on light and on dark.
        steps = np.repeat(np.arange(len(ordered) + 1) - 0.5, 2)[1:-1]
        for color, thickness in (("#ffffff", 2.6), (SERIES[1].color, 1.4)):
            axes.plot(np.repeat(cuts, 2), steps, color=color, linewidth=thickness)
        axes.set_title(name, loc="left")
        axes.set_xlabel("direction")
        axes.set_facecolor("none")
    every = max(1, len(ordered) // 10)
    grid[0][0].set_yticks(range(0, len(ordered), every), [str(of.layer) for of in ordered[::every]])
    grid[0][0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(grid[0]), label="share of the largest singular value", aspect=30, pad=0.02)
    bar.outline.set_edgecolor(INK)
    return figure


@drawn
def probe_figure(accuracies: Mapping[str, Mapping[int, float]], edited: Sequence[int] | None = None) -> Figure:
    """How well linear probes tell positive from negative activations of each layer.

    Args:
        accuracies: name of each kind of activations to block index and share in [0, 1].
        edited: see `curve_figure`.
    """
    check_any(accuracies, "accuracies")
    figure, axes = new_figure(2.9)
    for place, (name, values) in enumerate(accuracies.items()):
        _layer_line(axes, {index: 100 * value for index, value in sorted(values.items())}, edited, place, name)
    axes.axhline(50, color=GREY, linestyle="--", linewidth=0.9)
    _right_label(axes, 50, "chance")
    axes.set_ylabel("% of activations told right")
    axes.set_title("Linear probes", loc="left")
    if len(accuracies) > 1:
        legend_below(figure, axes)
    return figure
