"""How figures look, and how they become files. Series differ in lightness, and in their marks or hatches too, so that
they can be told apart in black and white."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from ..arguments import Argument, ArgumentError
from ..extras import import_extra
from ..files import written


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

# Inches; on a phone a figure is as wide as the screen, so that its text must be large for its width.
WIDTH = 5.2
DPI = 160
FORMATS = (".png", ".svg")


class Series(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str
    line: str
    hatch: str


INK, GREY, PAPER = "#1a1a1a", "#767676", "#ffffff"
# From dark to light.
SERIES = (
    Series("#174a84", "o", "-", ""),
    Series("#c8600a", "s", "--", "//"),
    Series("#5f9f93", "^", "-.", ".."),
    Series("#9a4f9e", "D", ":", "xx"),
    Series("#b3a125", "v", (0, (5, 1, 1, 1)), "\\\\"),
    Series("#8c8c8c", "P", (0, (1, 1)), "++"),
)
# A page may give these colours other values, for a dark screen, by variables of these names.
VARIABLES = {INK: "--plot-ink", GREY: "--plot-grey", PAPER: "--plot-paper"} | {
    series.color: f"--plot-{place}" for place, series in enumerate(SERIES, 1)
}
STYLE = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GREY,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
    # Text stays text, and the same figure is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "peft_edit",
    # A page puts its own background behind a figure; a file has a white one.
    "figure.facecolor": "none",
}


def drawn(function: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Let a function that makes a figure make it in this style. It needs matplotlib."""

    @wraps(function)
    def draw(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with import_extra("matplotlib", "plots", "a plot").rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a height in inches and its axes, in a grid. It belongs to nobody but its user: matplotlib keeps no
    list of it."""
    figure = import_extra("matplotlib.figure", "plots", "a plot").Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def as_series(place: int) -> Series:
    """The look of the series at a place; after the last one they begin again."""
    return SERIES[place % len(SERIES)]


def whole_ticks(axes: Axes) -> None:
    """Let the horizontal axis, of layers or counts, have ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """A legend below the axes, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, completely or not at all, on white.

    Args:
        figure: of one of the functions of this folder, or any.
        path: of a .png or .svg file.

    Raises:
        ArgumentError: it has another ending.
        ValueError, OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ArgumentError(Argument("path"), f" must end in {' or '.join(FORMATS)}, got {path}")
    with written(path) as temporary:
        temporary.write_bytes(_rendered(figure, path.suffix, facecolor=PAPER))


def _rendered(figure: Figure, suffix: str, **options: Any) -> bytes:
    metadata = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    with import_extra("matplotlib", "plots", "a plot").rc_context(STYLE):
        figure.savefig(buffer, format=suffix.removeprefix("."), dpi=DPI, metadata=metadata, **options)
    return buffer.getvalue()


def check_any(given: Collection, what: str) -> None:
    """Raise ValueError where there is nothing to draw."""
    if not given:
        raise ValueError(f"there are no {what} to draw: pass at least one")


def svg_text(figure: Figure, name: str, title: str) -> str:
    """A figure as an element of a page, as wide as there is room, whose colours the page may change.

    Args:
        figure: of one of the functions of this folder.
        name: that no other figure of the page has, of letters, digits and hyphens.
        title: what it shows, for those who hear the page.
    """
    from html import escape

    if not re.fullmatch(r"[\w-]+", name, flags=re.ASCII):
        raise ValueError(f"a figure's name must be of letters, digits and hyphens, got {name!r}")
    text = _rendered(figure, ".svg").decode()
    text = text[text.index("<svg") :]
    # Ids are those of a page, on which several figures stand.
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable}, {color})")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Its own size is that on paper.
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" ?', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*" ?', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{escape(title)}" ', 1)
