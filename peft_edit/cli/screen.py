"""How answers are shown while they come: in two columns, or one below the other where these have no place."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..explaining import Explanation
from ..explaining.showing import changed_rows, token_view
from ..explaining.tables import escaped
from .common import table, terminal


with suppress(ImportError):  # Windows, whose terminal does it
    import readline  # noqa: F401  lets `input` edit lines

# Narrower than this, two columns hold too few words a line.
TWO_COLUMNS = 60
# Tokens that are told in numbers.
STRONGEST = 3
HEADINGS = {"base": Style(bold=True), "edited": Style(bold=True, color="green")}


def printable(text: str) -> str:
    """Text of a model with what would steer the terminal as Python escapes it, but for the ends of lines."""
    return "\n".join(escaped(line) for line in text.expandtabs().split("\n"))


class Screen:
    """Shows answers on standard output.

    Attributes:
        console: of rich, which knows the terminal. Its colours are off where they are not wanted (`NO_COLOR`) or not
            known, or where the output is no terminal.
    """

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        can_move = self.console.is_terminal and not self.console.is_dumb_terminal
        self._in_columns = can_move and self.console.width >= TWO_COLUMNS

    def tell(self, text: str) -> None:
        """Show a message."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def show_tokens(self, explanation: Explanation) -> None:
        """Show what an edit does to the tokens of a text."""
        color, width = terminal()
        view = token_view(explanation, color=color, width=width)
        self.console.file.write(f"{view}\n\n{table(*changed_rows(explanation, STRONGEST))}\n")

    def show(self, sides: tuple[str, ...], pieces: Iterable[tuple[str, str]]) -> None:
        """Show answers while they come.

        Args:
            sides: who answers.
            pieces: pairs of who answers and the next piece of the answer.
        """
        if self._in_columns and len(sides) > 1:
            self._show_columns(sides, pieces)
        else:
            self._show_lines(pieces)

    def _show_columns(self, sides: tuple[str, ...], pieces: Iterable[tuple[str, str]]) -> None:
        answers = dict.fromkeys(sides, "")
        # What is higher than the terminal is cut while it comes, and shown as a whole at its end.
        with Live(_columns(answers), console=self.console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            for side, piece in pieces:
                answers[side] += piece
                live.update(_columns(answers), refresh=True)

    def _show_lines(self, pieces: Iterable[tuple[str, str]]) -> None:
        shown = None
        for side, piece in pieces:
            if side != shown:
                if shown is not None:
                    self.console.print()
                self.console.print(Text(f"{side}:", HEADINGS[side]))
                shown = side
            self.console.file.write(printable(piece))
            self.console.file.flush()
        if shown is not None:
            self.console.print()


def _columns(answers: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in answers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(side, HEADINGS[side]) for side in answers))
    table.add_row(*(Text(printable(text)) for text in answers.values()))
    return table


def at_keyboard() -> bool:
    """Whether a person types the lines."""
    return sys.stdin.isatty()


def read_line(prompt: str) -> str | None:
    """The next line that is typed or piped in; None at the end. Only a person is asked, on standard error where
    standard output goes elsewhere. Lines are edited, and earlier ones come back, by the arrow keys."""
    try:
        if at_keyboard() and sys.stdout.isatty():
            return input(prompt)
    except EOFError:
        print()
        return None
    if at_keyboard():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
