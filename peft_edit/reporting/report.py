"""A report on an adapter: one page that asks for no other file and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..adapters.card import GivenResults, model_card
from ..adapters.markdown import cell, code
from ..choosing.sweep import Sweep, varied
from ..evaluation.results import Results, read_results, versions
from ..explaining.showing import TOKEN_VIEW_CSS, token_view_html
from ..plotting import svg_text
from ..tuners.config import EditConfig
from . import pictures
from .activations import StoredEdit
from .flipped import Flipped, as_rows
from .pages import html_of, scrolling_start, sections_of
from .pictures import Picture


# Sections of the card that stand where they belong among the pictures; the others follow in the card's order.
PLACED = ("Results", "Side effects", "Layers", "Limits", "Citation")


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Attributes:
        folder: of the adapter.
        config: of the adapter.
        results: what `peft-edit evaluate --json` wrote, of the base model and with the adapter.
        sweep: that the adapter was chosen by.
        stored: activations that it was learnt from.
        flipped: questions that it answers otherwise, with what it does to their tokens; None where they were not
            looked for.
        recipe, experiment: name of a recipe, and results of its rows.
        counted: results by the number of demonstrations.
        base_model: id of the base model on the Hub, where the configuration names a local folder.
    """

    folder: Path
    config: EditConfig
    results: Sequence[GivenResults]
    sweep: Sweep | None = None
    stored: StoredEdit | None = None
    flipped: Sequence[Flipped] | None = None
    recipe: str = ""
    experiment: Sequence[Results] = ()
    counted: Sequence[tuple[int, Results]] = ()
    base_model: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, HTML, pictures below that, and more HTML."""

    heading: str
    text: Markup
    pictures: Sequence[Picture] = ()
    more: Markup | None = None

    @property
    def anchor(self) -> str:
        """Where links lead."""
        return self.heading.lower().replace(" ", "-")


def report_page(material: Material) -> tuple[str, list[Picture]]:
    """The report as HTML, and the pictures in it.

    Its tables and words about the adapter are those of the model card, which is made of the same results.

    Raises:
        ValueError: results of another kind, that do not match each other or the adapter; or matplotlib is not
            installed.
    """
    read = [read_results(result) for result in material.results]
    card = model_card(material.config, results=material.results, folder=material.folder, base_model=material.base_model)
    title, intro, of_card = sections_of(str(card))
    sections = [section for section in _sections(material, read, of_card) if section.text or section.pictures]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters["svg"] = lambda p: Markup(svg_text(p.figure, p.name, f"{p.title}. {p.caption}"))
    page = environment.get_template("report.html").render(
        title=title,
        name=material.folder.name,
        intro=html_of(intro),
        sections=sections,
        styles=Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8") + TOKEN_VIEW_CSS),
        versions=", ".join(f"{name} {version}" for name, version in _versions(read).items()),
    )
    return page, [picture for section in sections for picture in section.pictures]


def _versions(read: Sequence[Results]) -> dict[str, str]:
    """Of the packages that took part in the first evaluation, or in this report."""
    return dict(next((found.versions for found in read if found.versions), versions()))


def _sections(material: Material, read: Sequence[Results], of_card: dict[str, str]) -> Iterator[Section]:
    """In the order of the page."""
    yield Section("Results", html_of(of_card.get("Results", "")), list(pictures.of_results(read)))
    edited = [found for found in read if found.adapters]
    yield Section("Side effects", html_of(of_card.get("Side effects", "")), list(pictures.of_side_effects(edited)))
    if material.flipped is not None:
        yield Section("Questions that flipped", _flipped(material.flipped))
    if material.sweep is not None:
        yield Section("Choice of the setting", _of_sweep(material.sweep), list(pictures.of_sweep(material.sweep)))
    if material.experiment:
        text = html_of("All results of the recipe that this adapter is part of.")
        found = pictures.of_experiment(material.recipe, material.experiment, material.counted)
        yield Section("Experiment", text, list(found))
    yield Section("Layers", html_of(of_card["Layers"]), list(pictures.of_layers(material.config)))
    if material.stored is not None:
        store = material.stored.store
        text = html_of(f"Of `{store.path.name}`: {len(store)} {store.counted}, {len(store.layers)} layers.")
        yield Section("Stored activations", text, list(pictures.of_stored(material.stored)))
    for heading, text in of_card.items():
        if heading not in PLACED:
            more = _calibration(material.config) if heading == "Configuration" else None
            yield Section(heading, html_of(text), more=more)
    for heading in ("Limits", "Citation"):
        yield Section(heading, html_of(of_card[heading]))


def _calibration(config: EditConfig) -> Markup | None:
    """The budget of damage that a calibration let it meet."""
    of = config.calibration
    if not {"dial", "value", "kl_p95", "budget", "tokens"} <= set(of):
        return None
    return html_of(
        f"Calibrated: {code(of['dial'])} was set to {of['value']:.4g}, at which the 95th percentile of the divergence "
        f"from the base model is {of['kl_p95']:.3f} nats, of a budget of {of['budget']:g}, over {of['tokens']} tokens."
    )


def _of_sweep(sweep: Sweep) -> Markup:
    """What was tried, and the front as a table."""
    shown = sweep.front if sweep.chosen in sweep.front else [*sweep.front, sweep.chosen]
    axes = list(varied(sweep.found, sweep.chosen))
    base = sweep.base.scores
    rows = [
        [
            *(code(json.dumps(found.setting[name])) for name in axes),
            *_scores(found.scores),
            f"{found.damage:.2f}",
            "yes" if found is sweep.chosen else "no",
        ]
        for found in sorted(shown, key=lambda found: found.damage)
    ]
    rows.insert(0, ["base model", *[""] * (len(axes) - 1), *_scores(base), "0", "no"])
    limits = " and ".join(f"{code(name)} {limit:g}" for name, limit in sweep.limits.items())
    within = sum(found.damage <= 1 for found in sweep.found)
    return html_of(
        f"{len(sweep.found)} settings were tried on {len(base.questions[sweep.criterion])} validation questions, with "
        f"a budget of {limits}; {within} are within it. Damage is the largest share of a limit that is used.\n\n"
        + _markdown([*map(code, axes), "MC1 %", "MC2 %", "damage", "chosen"], rows)
    )


def _scores(scores: Any) -> list[str]:
    return [f"{100 * scores.mc1:.1f}", f"{100 * scores.mc2:.1f}"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def _flipped(flipped: Sequence[Flipped]) -> Markup:
    """The questions, their answers, and the view of the tokens of the edit's answer."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_FLIPPED)
    return Markup(
        template.render(
            flipped=[
                (question, as_rows(question), Markup(token_view_html(question.explanation))) for question in flipped
            ],
            scrolling=Markup(scrolling_start("Answers")),
        )
    )


_FLIPPED = """\
{% if not flipped %}
<p>No question is answered otherwise, by MC1.</p>
{% else %}
<p>Questions whose answer by MC1 changes, those whose MC2 changes most. Log-likelihoods are in nats. Below each question
stands the answer that the edited model chooses, token by token.</p>
{% for question, rows, view in flipped %}
<h3>{{ question.direction[0] | upper }}{{ question.direction[1:] }}: question {{ question.id }}</h3>
<p class="prompt">{{ question.prompt }}</p>
{{ scrolling }}<table>
<thead><tr><th scope="col">answer</th><th scope="col">right</th><th scope="col">base</th><th scope="col">edited</th>
<th scope="col">chosen by</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.answer }}</td><td>{{ row.right }}</td><td>{{ row.base }}</td><td>{{ row.edited }}</td>
<td>{{ row.chosen }}</td></tr>
{% endfor %}
</tbody></table></div>
{{ view }}
{% endfor %}
{% endif %}
"""
