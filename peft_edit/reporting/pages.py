"""Parts of a page: Markdown as HTML, and a card in its sections."""

from __future__ import annotations

import re
from html import escape

from markdown_it import MarkdownIt
from markupsafe import Markup


def html_of(markdown: str) -> Markup:
    """Markdown as HTML. HTML in it is text, and what is wider than a phone can be scrolled, by keys too."""
    found = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    found = found.replace("<table>", scrolling_start("Table") + "<table>").replace("</table>", "</table></div>")
    found = found.replace("<th>", '<th scope="col">').replace("<th style", '<th scope="col" style')
    return Markup(found.replace("<pre>", '<pre tabindex="0" role="group" aria-label="Code">'))


def scrolling_start(label: str) -> str:
    """The start tag of a `div` whose contents can be scrolled sideways."""
    return f'<div class="scroll" role="group" aria-label="{escape(label)}" tabindex="0">'


def sections_of(card: str) -> tuple[str, str, dict[str, str]]:
    """A model card without its metadata: its title, what stands before its first section, and its sections by their
    headings, in Markdown."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).strip()
    intro, *parts = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
    title, _, intro = intro.partition("\n")
    sections = dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
    return title.removeprefix("# ").strip(), intro.strip(), sections
