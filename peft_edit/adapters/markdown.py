"""Names that others chose, as a file or a data set, in Markdown: shown as they are, and no part of its syntax."""

from __future__ import annotations

import re


def plain(name: object) -> str:
    """A name in one line, of printable characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(name))


def code(name: object) -> str:
    """A name as a code span, whatever backticks it has."""
    text = plain(name) or " "
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{text}{space}{fence}"


def cell(text: str) -> str:
    """Markdown of one line as the cell of a table."""
    return text.replace("|", "\\|")
