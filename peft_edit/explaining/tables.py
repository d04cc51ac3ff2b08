"""Tables of an explanation: its tokens, and its sites."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from .explain import Explanation, SiteExplanation, TokenChange


# Columns of a token in a table of a terminal, so that the table has 80.
LONGEST_TOKEN = 9
# Of letters in Persian and of emoji: they take no room and steer nothing.
JOINERS = ("\u200c", "\u200d")


def columns(character: str) -> int:
    """Of a terminal that a character takes which prints."""
    if unicodedata.category(character) in ("Mn", "Me") or character in JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def prints(character: str) -> bool:
    """Whether a character can be shown as it is: letters, spaces of any width, and what joins letters."""
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in JOINERS


def escaped(text: str) -> str:
    """Text with what does not print as Python escapes it, so that it cannot do anything to a terminal."""
    return "".join(c if prints(c) else c.encode("unicode_escape").decode() for c in text)


def quoted(token: str, longest: int = LONGEST_TOKEN) -> str:
    """A token in quotes, as spaces are part of it; one of more columns is cut."""
    shown = escaped(token)
    if sum(map(columns, shown)) > longest:
        while sum(map(columns, shown)) > longest - 2:
            shown = shown[:-1]
        shown += ".."
    return f'"{shown}"'


def changed_rows(
    explanation: Explanation, count: int | None = None, longest: int = LONGEST_TOKEN
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of tokens: the divergence after each, the change and what gains and loses most.

    Args:
        explanation: of the text.
        count: so many tokens with the largest divergence, the largest first; None for all in their order.
        longest: columns of a token that is not cut.
    """
    places = range(len(explanation))
    if count is not None:
        places = sorted(places, key=lambda i: -explanation.kl[i])[:count]
    rows = [
        [
            str(i),
            quoted(explanation.tokens[i], longest),
            f"{explanation.kl[i]:.3f}",
            f"{explanation.change[i]:.3f}",
            _moved(explanation.gained[i], longest),
            _moved(explanation.lost[i], longest),
        ]
        for i in places
    ]
    return ["place", "after", "KL", "change", "gains most", "loses most"], rows


def _moved(changes: Sequence[TokenChange], longest: int) -> str:
    return "".join(f"{quoted(c.token, longest)} {c.base:.2f}>{c.edited:.2f}" for c in changes[:1])


def site_rows(explanation: Explanation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of sites: how many of the tokens each touches, and what it does to these on average;
    the gate's probabilities are those of all tokens."""
    several = len({site.adapter for site in explanation.sites}) > 1
    layers = [site.layer for site in explanation.sites]
    named = None in layers or len(set(layers)) * (1 + several) < len(layers)
    gated = any(site.gate is not None for site in explanation.sites)
    header = ["site" if named else "layer", *(["adapter"] if several else []), "touched", "change", "angle", "norm"]
    rows = [
        [
            site.name if named else str(site.layer),
            *([site.adapter] if several else []),
            f"{sum(site.touched)}/{len(site.touched)}",
            f"{_mean(site, site.change):.3f}",
            f"{math.degrees(_mean(site, site.angle_rad)):.1f} deg",
            f"{100 * (_mean(site, site.norm_ratio, 1.0) - 1):+z.1f} %",
            *([_range(site.gate)] if gated else []),
        ]
        for site in explanation.sites
    ]
    return [*header, *(["gate, least to most"] if gated else [])], rows


def _mean(site: SiteExplanation, values: Sequence[float], of_none: float = 0.0) -> float:
    """Of the touched tokens."""
    found = [value for value, touched in zip(values, site.touched, strict=True) if touched]
    return sum(found) / len(found) if found else of_none


def _range(gate: Sequence[float] | None) -> str:
    return "" if gate is None else f"{min(gate):.3f} to {max(gate):.3f}"
