"""An explanation as text for a terminal and as HTML: how strongly each token is edited, and what that does to the next.

Two things are shown of each token, in levels: the edit, by the largest change ||out - in|| / ||in|| at any site, and
the divergence KL(base || edited) of what comes after it. The edit tells where a method acts; the divergence whether it
matters there. So the colour goes by the divergence, which differs between tokens for every method, and tokens that are
edited are underlined; without colour both stand in lines of marks below the text.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .explain import Explanation
from .style import TOKEN_VIEW_CSS
from .tables import changed_rows, columns, escaped, prints, site_rows


__all__ = ["TOKEN_VIEW_CSS", "changed_rows", "site_rows", "token_page", "token_view", "token_view_html"]

# From where on a level goes; level 0 is below the first. A token that is touched at all has level 1 of the edit.
CHANGE_LEVELS = (0.0, 0.1, 0.3, 1.0)
KL_LEVELS = (0.01, 0.1, 0.3, 1.0)
MARKS = " .-=#"
# Black on backgrounds of 256 colours that get darker, white on the last.
COLOURS = ("", "38;5;16;48;5;230", "38;5;16;48;5;222", "38;5;16;48;5;208", "38;5;231;48;5;124")
UNDERLINE = "4"
LABELS = {"edit": "edit ", "kl": "KL   "}
# Of a token on a page.
LONGEST_TOKEN = 40


@dataclass(frozen=True)
class _Piece:
    """Tokens that make whole characters, and the highest levels of them."""

    text: str
    place: int
    edit: int
    kl: int


def _pieces(explanation: Explanation) -> list[_Piece]:
    pieces: list[_Piece] = []
    edit = kl = 0
    values = zip(explanation.tokens, explanation.touched, explanation.change, explanation.kl, strict=True)
    for place, (text, touched, change, divergence) in enumerate(values):
        edit = max(edit, _edit_level(touched, change))
        kl = max(kl, bisect_right(KL_LEVELS, divergence))
        if text or place + 1 == len(explanation):
            pieces.append(_Piece(text, place, edit, kl))
            edit = kl = 0
    return pieces


def _edit_level(touched: bool, change: float) -> int:
    return max(1, bisect_right(CHANGE_LEVELS, change)) if touched else 0


def token_view(explanation: Explanation, *, color: bool, width: int = 80) -> str:
    """The text for a terminal, below each line of it a line of marks for the edit and one for the divergence, and a
    legend.

    Args:
        explanation: of the text.
        color: whether the terminal shows colours: then tokens have a background by their divergence too, and those that
            are edited are underlined. Nothing is lost without.
        width: columns of the terminal, at least 20.

    Returns:
        Lines of at most so many columns. What does not print, line ends in the text included, is written as Python
        escapes it.
    """
    room = max(width, 20) - len(LABELS["edit"])
    lines = []
    for cells in _wrapped(list(_cells(explanation)), room):
        lines.append(" " * len(LABELS["edit"]) + _painted(cells, color))
        for name, label in LABELS.items():
            marks = "".join(cell.mark(name) * cell.columns for cell in cells)
            if marks.strip():
                lines.append(label + marks.rstrip())
    return "\n".join([*lines, "", *_legend(max(width, 20))])


def _legend(width: int) -> Iterator[str]:
    for what, levels in (("edit, largest |out - in| / |in|", CHANGE_LEVELS), ("KL, nats", KL_LEVELS)):
        named = (f"from {level:g}" if level else "any" for level in levels)
        # A mark stays on the line of what it means.
        marks = ", ".join(f"{mark} {name}".replace(" ", "\xa0") for mark, name in zip(MARKS[1:], named, strict=True))
        lines = textwrap.wrap(f"{what}: {marks}", width, subsequent_indent="  ", break_on_hyphens=False)
        yield from (line.replace("\xa0", " ") for line in lines)


@dataclass(frozen=True)
class _Cell:
    """A character as it is shown, with what combines with it."""

    text: str
    columns: int
    piece: _Piece
    ends_line: bool = False

    def mark(self, name: str) -> str:
        """Of its token's level; none below the space before a word, so that the words' marks stand apart."""
        return " " if self.text == " " and self.piece.text.strip() else MARKS[getattr(self.piece, name)]


def _cells(explanation: Explanation) -> Iterator[_Cell]:
    for piece in _pieces(explanation):
        held = None
        for character in piece.text:
            if held and not columns(character):
                held = _Cell(held.text + character, held.columns, piece)
                continue
            if held:
                yield held
            held = None
            if prints(character):
                held = _Cell(character, columns(character), piece)
                continue
            *shown, last = escaped(character)
            yield from (_Cell(part, 1, piece) for part in shown)
            yield _Cell(last, 1, piece, ends_line=character == "\n")
        if held:
            yield held


def _wrapped(cells: Sequence[_Cell], room: int) -> Iterator[list[_Cell]]:
    """Lines of cells, which end at spaces where they can."""
    line: list[_Cell] = []
    for cell in cells:
        if sum(c.columns for c in line) + cell.columns > room:
            if cell.text == " ":
                yield line
                line = []
                continue
            space = next((i for i in range(len(line) - 1, 0, -1) if line[i].text == " "), None)
            yield line if space is None else line[:space]
            line = [] if space is None else line[space + 1 :]
        line.append(cell)
        if cell.ends_line:
            yield line
            line = []
    if line:
        yield line


def _painted(cells: Sequence[_Cell], color: bool) -> str:
    """Cells as text, those of one look together."""
    if not color:
        return "".join(cell.text for cell in cells).rstrip()
    text, look = "", ""
    for cell in cells:
        codes = ";".join(filter(None, (UNDERLINE if cell.piece.edit else "", COLOURS[cell.piece.kl])))
        if codes != look:
            text += ("\x1b[0m" if look else "") + (f"\x1b[{codes}m" if codes else "")
            look = codes
        text += cell.text
    return text + ("\x1b[0m" if look else "")


def token_view_html(explanation: Explanation) -> str:
    """The text as a fragment of HTML, which needs `TOKEN_VIEW_CSS` once on its page, and a table of all tokens that
    opens below it. The background of a token is its divergence, the line below it the edit."""
    spans = []
    header, rows = changed_rows(explanation, longest=LONGEST_TOKEN)
    for piece in _pieces(explanation):
        told = "; ".join(f"{name} {cell}" for name, cell in zip(header[2:], rows[piece.place][2:], strict=True) if cell)
        text = escape(piece.text).replace("\n", "&#8629;\n")
        spans.append(f'<span class="tv-token tv-kl{piece.kl} tv-edit{piece.edit}" title="{escape(told)}">{text}</span>')
    table = _table_html(header, rows, "Table of tokens")
    return (
        f'<div class="tv-view">\n<p class="tv-text">{"".join(spans)}</p>\n{_legend_html()}\n'
        f"<details><summary>Each token in numbers</summary>\n{table}\n</details>\n</div>\n"
    )


def token_page(explanation: Explanation, title: str) -> str:
    """A page with the view of one text alone: it asks for no other file, and runs nothing."""
    page = ":root { color-scheme: light dark; font-family: sans-serif; } main { margin: auto; max-width: 60em; }\n"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{page}{TOKEN_VIEW_CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{token_view_html(explanation)}"
        f'<h2>Sites</h2>\n<div class="tv-view">\n{_table_html(*site_rows(explanation), "Table of sites")}\n</div>\n'
        "</main>\n</body>\n</html>\n"
    )


def _legend_html() -> str:
    def samples(kind: str, levels: Sequence[float]) -> str:
        named = (f"from {level:g}" if level else "any" for level in levels)
        return " ".join(f'<span class="tv-token tv-{kind}{i}">{name}</span>' for i, name in enumerate(named, 1))

    return (
        f'<p class="tv-legend">Background: KL divergence after the token, nats: {samples("kl", KL_LEVELS)}. '
        f"Line: change of the activation at the site that changes most, as a share of its norm: "
        f"{samples('edit', CHANGE_LEVELS)}.</p>"
    )


def _table_html(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="tv-scroll" role="group" aria-label="{label}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )
