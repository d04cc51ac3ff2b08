"""Figures show the numbers that they are given, and become the same files each time."""

import copy
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from test_cards import hpr_config, results, sea_config

from peft_edit import extras, plotting
from peft_edit.choosing.record import read_sweep
from peft_edit.evaluation.results import read_results
from peft_edit.plotting.settings import change_from_base
from peft_edit.plotting.style import SERIES
from peft_edit.tuners.method import methods
from peft_edit.tuners.shown import LayerCurve, LayerSpectra


BASE = [0.5, 0.25, 0.75, 0.5]


def scores(values):
    mean = sum(values) / len(values)
    return {"mc1": mean, "mc2": mean, "questions": {"mc1": values, "mc2": values}}


def row(key, layers, damage, values=None):
    given = None if values is None else scores(values)
    stopped = None if values else "the damage is too large"
    return {
        **{"key": key, "setting": {"layers": layers, "strength": 1.0}, "damage": damage, "side_effects": {}},
        **{"stopped": stopped, "scores": given, "block_tokens": 1},
    }


SWEEP = {
    "method": "SEA",
    "criterion": "mc2",
    "budget": {"perplexity_ratio": 1.05},
    "base": {"scores": scores(BASE), "block_tokens": 1, "separate": 1},
    "chosen": {"key": "b"},
    "settings": [
        row("a", "0", 0.1, [0.5, 0.5, 0.75, 0.5]),
        row("b", "0-1", 0.4, [1.0, 0.5, 0.75, 0.75]),
        row("c", "0-1", 0.6, [0.5, 0.25, 0.75, 0.5]),
        row("d", "0-2", 1.5, [1.0, 1.0, 1.0, 0.75]),
        row("e", "0-2", 7.0),
        row("f", "0-2", None),
    ],
}


def measure(value, base, half=0.1):
    difference = value - base
    bounds = {"difference_low": difference - half, "difference_high": difference + half, "p_value": 0.5}
    return {"value": value, "low": value - half, "high": value + half, "base": base, "difference": difference, **bounds}


def edited(name="sea", value=0.6, **changes):
    """Results of an adapter, with intervals, categories and side effects."""
    found = results(sea_config(strength=value))
    found["adapters"][0]["name"] = f"/home/me/{name}"
    effects = {
        "texts": found["side_effects"][0]["texts"],
        "perplexity_ratio": 1.25,
        "kl_mean": 0.125,
        "angle": np.pi / 6,
    }
    return read_results(
        {
            **found,
            "measures": {"mc1": measure(value, 0.4), "mc2": measure(0.5, 0.45), "false_to_true": {"value": 0.2}},
            "categories": {
                "Law": {"questions": 2, "measures": {"mc1": measure(0.5, 0.25)}},
                "Health": {"questions": 5, "measures": {"mc1": measure(0.8, 0.6)}},
            },
            "side_effects": [effects],
            **changes,
        }
    )


def line(axes, label):
    return next(found for found in axes.lines if found.get_label() == label)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_front():
    sweep = read_sweep(SWEEP)
    (axes,) = plotting.front_figure(sweep).axes
    assert [list(values) for values in line(axes, "front").get_data()] == [[0.1, 0.4, 1.5], [6.25, 25.0, 43.75]]
    assert line(axes, "1 other settings").get_data()[1] == [0.0]
    assert [values[0] for values in line(axes, "chosen").get_data()] == [0.4, 25.0]
    assert line(axes, "2 stopped early") and "2 beyond \N{RIGHTWARDS ARROW}" in texts(axes)
    (bars,) = (found for found in axes.collections if hasattr(found, "get_segments"))
    half = 1.96 * np.std(change_from_base(sweep, sweep.chosen), ddof=1) / 2
    assert bars.get_segments()[1][:, 1] == pytest.approx([25 - half, 25 + half])
    assert axes.get_xlabel() == "damage, share of the budget (perplexity ratio 1.05)"
    assert axes.get_title(loc="left") == "SEA: 6 settings, 4 questions"


def test_number_of_layers():
    (axes,) = plotting.layer_count_figure(read_sweep(SWEEP)).axes
    best = line(axes, "MC2, best in budget")
    assert list(best.get_xdata()) == [1, 2] and list(best.get_ydata()) == [56.25, 75.0]
    assert line(axes, "MC2, base model").get_ydata()[0] == 50.0
    alone = {**SWEEP, "settings": [row("b", "0", 3.0)]}
    with pytest.raises(ValueError, match="no setting of this sweep was asked for its benefit"):
        plotting.layer_count_figure(read_sweep(alone))


def test_sweeps_are_read_as_they_were_written():
    read = json.loads(json.dumps(read_sweep(SWEEP).to_dict()))
    kept = {name: read[name] for name in ("method", "criterion", "budget", "base", "settings")}
    assert kept == {name: SWEEP[name] for name in kept}
    assert read["chosen"]["key"] == "b" and read["front"] == ["a", "b", "d"]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s["base"]["scores"].pop("questions"), "no base.scores.questions"),
        (lambda s: s["chosen"].update(key="z"), "the chosen setting is none of the settings"),
        (lambda s: s["settings"][0]["scores"]["questions"].update(mc1=[1.0]), "scores are of 1 and 4 questions"),
        (lambda s: s["settings"][0]["setting"].pop("layers"), "a setting without layers"),
        (lambda s: s.update(criterion="mc3"), "criterion must be"),
    ],
)
def test_sweeps_of_an_older_release_are_refused(change, told, tmp_path):
    changed = copy.deepcopy(SWEEP)
    change(changed)
    (tmp_path / "sweep.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=told) as refused:
        read_sweep(tmp_path)
    assert str(refused.value).endswith("run peft-edit sweep again with this release of peft_edit")
    with pytest.raises(ValueError, match=r"there is no file .*nothing: pass the sweep\.json"):
        read_sweep(tmp_path / "nothing")


def test_measures():
    (axes,) = plotting.measure_figure([read_results(results()), edited()]).axes
    widths = [bar.get_width() for bar in axes.patches if bar.get_width()]
    assert widths == pytest.approx([40, 60, 50, 50])
    assert texts(axes) == ["40.0", "60.0 (+20.0; +10.0 to +30.0)", "50.0", "50.0 (+5.0; -5.0 to +15.0)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MC1", "MC2"]
    assert [list(found.get_xdata()) for found in axes.lines if len(found.get_xdata()) == 2][::2][0] == [50.0, 70.0]
    with pytest.raises(ValueError, match="no measure"):
        plotting.measure_figure([read_results({**results(), "measures": {}})])


def test_categories():
    (axes,) = plotting.category_figure(edited(), "mc1").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Health (5)", "Law (2)"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([80, 50])
    diamonds = [found.get_xdata()[0] for found in axes.lines if found.get_marker() == "D" and len(found.get_xdata())]
    assert diamonds == pytest.approx([60, 25])
    with pytest.raises(ValueError, match="measure 'mc2' is of no category in results, which has mc1 of categories"):
        plotting.category_figure(edited(), "mc2")


def test_side_effects():
    figure = plotting.side_effects_figure([edited(), edited("other", 0.7)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert set(panels) - {""} == {"perplexity ratio", "KL, mean, nats", "angle, degrees"}
    ratio = panels["perplexity ratio"].patches[0]
    assert (ratio.get_x(), ratio.get_width()) == (1.0, 0.25) and texts(panels["angle, degrees"]) == ["30.0", "30.0"]
    assert [label.get_text() for label in panels["perplexity ratio"].get_yticklabels()] == ["sea", "other"]
    rounding = {**edited().side_effects[0], "norm_change": 1e-8}
    panels = plotting.side_effects_figure([edited(side_effects=[rounding])]).axes
    (axes,) = (panel for panel in panels if panel.get_title(loc="left") == "change of norm %")
    assert axes.patches[0].get_width() < 1e-4 * axes.get_xlim()[1], "rounding is no effect"
    with pytest.raises(ValueError, match="run peft-edit evaluate with --adapter and --texts"):
        plotting.side_effects_figure([read_results(results())])


def test_demonstrations():
    found = [(400, edited("more", 0.7)), (100, edited())]
    (axes,) = plotting.demonstrations_figure(found).axes
    assert [list(v) for v in line(axes, "MC1").get_data()] == [[100, 400], pytest.approx([60, 70])]
    assert line(axes, "MC1, base model").get_ydata()[0] == pytest.approx(40)
    with pytest.raises(ValueError, match="measures bbq_accuracy are in none of these results"):
        plotting.demonstrations_figure(found, ["bbq_accuracy"])


def test_layers_that_edit_are_filled():
    curve = LayerCurve("accuracy", "Accuracy", "%", 100, chance=50.0)
    (axes,) = plotting.curve_figure(curve, {3: 0.5, 1: 0.75}, edited=[3]).axes
    joined, filled, hollow = axes.lines[:3]
    assert list(joined.get_xdata()) == [1, 3] and list(joined.get_ydata()) == [75.0, 50.0]
    assert list(filled.get_xdata()) == [3] and list(hollow.get_xdata()) == [1]
    assert hollow.get_markerfacecolor() == "none" and "chance" in texts(axes)


@pytest.mark.parametrize("method", [name for name, method in methods().items() if method.curves])
def test_methods_name_numbers_that_their_layers_have(method):
    """The curves of a method are of keys of its `card_layers`, once it has learnt something."""
    config = methods()[method].config
    sites = {f"model.layers.{i}.self_attn": {"norm": 1.0, "rms": 1.0} for i in range(2)}
    made = {
        "SEA": lambda: sea_config(fit_statistics={s: {"rms": 1.0, "change": 0.1} for s in sea_config().rank_pattern}),
        "HPR": lambda: hpr_config(probe_accuracy={"3": 0.9}),
        "ITI": lambda: config(fit_statistics={s: {"accuracy": [0.7], "heads": [0], "sigma": [1.0]} for s in sites}),
    }.get(method, lambda: config(fit_statistics=sites))()
    for layer in methods()[method].card_layers(made):
        assert all(isinstance(layer[curve.key], float) for curve in methods()[method].curves)


def test_spectra():
    spectra = [LayerSpectra(i, {"positive": [4.0, 2.0], "negative": [8.0]}, {"positive": 1, "negative": 1}, 5.0 + i)
               for i in (2, 7)]  # fmt: skip
    (axes,) = plotting.signature_figure(spectra).axes
    assert [list(v) for v in axes.lines[0].get_data()] == [[2, 7], [7.0, 12.0]]
    positive, negative, _ = plotting.spectrum_figure(spectra).axes
    assert positive.images[0].get_array().tolist() == [[1.0, 0.5]] * 2
    assert negative.images[0].get_array().tolist() == [[1.0, None]] * 2
    assert list(positive.lines[-1].get_xdata()) == [1.5] * 4
    assert [label.get_text() for label in positive.get_yticklabels()] == ["2", "7"]


def test_probes_norms_and_places():
    (axes,) = plotting.probe_figure({"MLP": {0: 0.5, 1: 1.0}, "block": {0: 0.75}}).axes
    assert list(axes.lines[0].get_ydata()) == [50.0, 100.0]
    quantiles = [1.0, 2.0, 3.0, 4.0, 5.0]
    (axes,) = plotting.norms_figure({"positive": {0: quantiles, 4: quantiles}, "edited": {4: quantiles}}).axes
    boxes = [patch.get_path().get_extents() for patch in axes.patches]
    assert len(boxes) == 3 and all((box.ymin, box.ymax) == (2.0, 4.0) for box in boxes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4"]
    points = np.array([[0.0, 1.0], [2.0, 3.0]])
    (axes,) = plotting.scatter_figure({"positive": points}, "PCA, layer 3").axes
    assert axes.collections[0].get_offsets().tolist() == points.tolist()
    assert axes.collections[0].get_label() == "positive (2)"


def test_series_differ_without_colour():
    looks = [(series.marker, series.line, series.hatch) for series in SERIES]
    assert all(len({look[i] for look in looks}) == len(SERIES) for i in range(3))
    assert all(to_hex(series.color) == series.color for series in SERIES)  # as SVG writes them, to be replaced


def test_files(tmp_path):
    for name, start in (("front.png", b"\x89PNG"), ("front.svg", b"<?xml")):
        plotting.save_figure(plotting.front_figure(read_sweep(SWEEP)), tmp_path / name)
        first = (tmp_path / name).read_bytes()
        figure = plotting.front_figure(read_sweep(SWEEP))
        plotting.save_figure(figure, tmp_path / name)
        assert first.startswith(start) and (tmp_path / name).read_bytes() == first and len(first) < 200_000
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg, got .*front\.pdf"):
        plotting.save_figure(figure, tmp_path / "front.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["front.png", "front.svg"]


def test_nothing_is_not_drawn():
    for draw in (plotting.norms_figure, plotting.spectrum_figure, plotting.signature_figure, plotting.probe_figure):
        with pytest.raises(ValueError, match="to draw: pass at least one"):
            draw({})


def test_names_are_text_and_nothing_else():
    """No formulas, and nothing that could leave the picture."""
    figure = plotting.curve_figure(LayerCurve("accuracy", "a $\\foo{ $", "%", 100), {0: 0.5, 1: 0.75})
    assert "$" in plotting.svg_text(figure, "a-b", "title")
    with pytest.raises(ValueError, match="of letters, digits and hyphens, got"):
        plotting.svg_text(figure, 'x"><script>', "title")


def test_elements_of_a_page():
    """Ids are of one figure alone and lead somewhere, colours are variables, and text is text."""
    sweep = read_sweep(SWEEP)
    one, two = (plotting.svg_text(plotting.front_figure(sweep), name, 'a "b" <c>') for name in ("one", "two"))
    for name, text in (("one", one), ("two", two)):
        root = ElementTree.fromstring(text)
        assert root.attrib["aria-label"] == 'a "b" <c>' and "width" not in root.attrib and "viewBox" in root.attrib
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        assert all(found.startswith(f"{name}-") for found in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= ids
        assert "var(--plot-ink, #1a1a1a)" in text and "var(--plot-1, #174a84)" in text
        assert ">front</text>" in text and not re.search(r'(href|src)="http', text)


def test_without_matplotlib(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ValueError) as refused:
        plotting.front_figure(read_sweep(SWEEP))
    told = "a plot needs the package matplotlib, which is not installed: pip install 'peft-edit[plots]'"
    assert str(refused.value) == told


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), min_size=1, max_size=6))
def test_any_sweep_can_be_drawn(found):
    rows = [row(str(i), "0", damage, [benefit] * 4) for i, (damage, benefit) in enumerate(found)]
    sweep = read_sweep({**SWEEP, "settings": rows, "chosen": {"key": "0"}})
    (axes,) = plotting.front_figure(sweep).axes
    x, y = line(axes, "front").get_data()
    assert list(x) == sorted(x) and list(y) == sorted(y)
    assert axes.get_xlim()[1] >= max(1.0, *(damage for damage, _ in found))
