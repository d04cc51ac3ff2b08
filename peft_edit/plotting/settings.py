"""Benefit and damage of the settings of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..choosing.sweep import Sweep
from ..choosing.trial import Found
from ..evaluation.showing import LABELS
from ..places import parse_layers
from ..tuners.method import methods
from .style import GREY, INK, SERIES, drawn, legend_below, new_figure, whole_ticks


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Half a 95 % interval, in standard errors.
HALF_INTERVAL = 1.96
# Measures of a budget in words.
MEASURES = {"perplexity_ratio": "perplexity ratio", "kl_p95": "KL p95", "kl_mean": "mean KL"}


@drawn
def front_figure(sweep: Sweep) -> Figure:
    """Benefit against damage of each setting of a sweep, and the front: the settings than which none has both more
    benefit and less damage.

    The benefit is the change of the criterion from the base model, in percentage points; the bars of the front are 95 %
    intervals over the questions, paired. The damage is the largest share of a limit of the budget that a setting uses.
    Settings whose benefit was not asked for stand on the lower edge.
    """
    figure, axes = new_figure(3.5)
    measured = [found for found in sweep.found if found.benefit is not None]
    others, front = [found for found in measured if found not in sweep.front], sweep.front
    if others:
        points = _points(sweep, others)
        axes.plot(*points, "o", color=GREY, markerfacecolor="none", label=f"{len(others)} other settings", zorder=2)
    look = SERIES[0]
    damage, benefit = _points(sweep, front)
    axes.errorbar(
        damage, benefit, yerr=[_half(sweep, found) for found in front], color=look.color, linewidth=0.8, fmt="none"
    )
    axes.plot(damage, benefit, drawstyle="steps-post", color=look.color, marker=look.marker, label="front", zorder=3)
    chosen = _points(sweep, [sweep.chosen])
    axes.plot(*chosen, "*", color=SERIES[1].color, markeredgecolor=INK, markersize=13, label="chosen", zorder=4)
    _unmeasured(axes, sweep, _damage_axis(axes, sweep))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.annotate("base model", (1, 0), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", va="bottom", fontsize=7)  # fmt: skip
    axes.set_ylabel(f"change of {LABELS[sweep.criterion]}, percentage points")
    axes.set_title(title_of(sweep), loc="left")
    axes.grid(axis="y")
    legend_below(figure, axes, 4)
    return figure


def title_of(sweep: Sweep) -> str:
    """The method, and the numbers of settings and of questions."""
    method = methods().get(sweep.method)
    questions = len(sweep.base.scores.questions[sweep.criterion])
    return f"{method.short if method else sweep.method}: {len(sweep.found)} settings, {questions} questions"


def change_from_base(sweep: Sweep, found: Found) -> np.ndarray:
    """(q,), the change of the criterion of each question from the base model, in percentage points."""
    base = np.array(sweep.base.scores.questions[sweep.criterion], dtype=np.float64)
    return 100 * (np.array(found.of_questions, dtype=np.float64) - base)


def _points(sweep: Sweep, found: Sequence[Found]) -> tuple[list[float], list[float]]:
    return [row.damage for row in found], [float(change_from_base(sweep, row).mean()) for row in found]


def _half(sweep: Sweep, found: Found) -> float:
    changes = change_from_base(sweep, found)
    return HALF_INTERVAL * float(changes.std(ddof=1)) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0


def _unmeasured(axes: Axes, sweep: Sweep, end: float) -> None:
    """Marks on the lower edge for settings without a benefit; those beyond the end of the axis are counted there."""
    damages = [found.damage for found in sweep.found if found.benefit is None]
    if not damages:
        return
    shown, at = [damage for damage in damages if damage <= end], axes.get_xaxis_transform()
    label = f"{len(damages)} stopped early"
    axes.plot([], [], "|", color=INK, markersize=9, label=label)
    if shown:
        axes.plot(shown, [0.0] * len(shown), "|", color=INK, markersize=9, transform=at, clip_on=False)
    if beyond := len(damages) - len(shown):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"{beyond} beyond \N{RIGHTWARDS ARROW}", (1, 0), (0, 3), fontsize=7, **place)


def _damage_axis(axes: Axes, sweep: Sweep) -> float:
    """Name the axis of damage. Returns its end, a little beyond the settings that were measured."""
    damages = [found.damage for found in sweep.found if found.benefit is not None]
    end = 1.1 * max(1.0, *damages)
    axes.set_xlim(min(0.0, *damages), end)
    axes.axvline(1, color=INK, linestyle="--", linewidth=0.9)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate("budget", (1, 1), (3, -2), fontsize=7, **place)
    limits = " and ".join(f"{MEASURES.get(name, name)} {limit:g}" for name, limit in sweep.limits.items())
    axes.set_xlabel(f"damage, share of the budget ({limits})")
    return end


@drawn
def layer_count_figure(sweep: Sweep) -> Figure:
    """MC1 and MC2 by the number of edited layers, in percent: of each number the best settings within the budget are
    joined, the others are the small marks; the base model's are the horizontal lines.

    Raises:
        ValueError: no setting was measured.
    """
    figure, axes = new_figure(3.1)
    measured = [(len(parse_layers(found.setting["layers"])), found) for found in sweep.found if found.scores]
    if not measured:
        raise ValueError("no setting of this sweep was asked for its benefit: raise the budget, or try milder settings")
    for name, look in zip(("mc1", "mc2"), SERIES, strict=False):
        counts = [count for count, _ in measured]
        values = [100 * getattr(found.scores, name) for _, found in measured]
        axes.plot(counts, values, look.marker, color=look.color, markersize=3, alpha=0.5)
        best: dict[int, float] = {}
        for count, found in sorted(measured, key=lambda pair: pair[0]):
            if found.damage <= 1:
                best[count] = max(best.get(count, 0.0), 100 * getattr(found.scores, name))
        line = {"color": look.color, "linestyle": look.line}
        axes.plot(list(best), list(best.values()), marker=look.marker, label=f"{LABELS[name]}, best in budget", **line)
        base = 100 * getattr(sweep.base.scores, name)
        axes.axhline(base, linewidth=0.8, label=f"{LABELS[name]}, base model", **line)
    whole_ticks(axes)
    axes.set_xlabel("edited layers")
    axes.set_ylabel("%")
    axes.set_title(title_of(sweep), loc="left")
    axes.grid(axis="y")
    legend_below(figure, axes, 2)
    return figure
