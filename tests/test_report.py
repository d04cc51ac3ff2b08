"""`peft-edit report`, in this process and in a browser: what is on the page, that it asks for nothing else and is
accessible, and bad input."""

import json
import re
import sys

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ASSETS
from peft import PeftModel
from test_cards import FINGERPRINT, hpr_config, results
from test_cli import MODEL, refused, run  # noqa: F401 - a fixture
from test_plots import SWEEP, edited
from transformers import AutoModelForCausalLM

from peft_edit import ActivationStore, extras, load_contrast_set
from peft_edit.cli import main
from peft_edit.evaluation.results import read_results
from peft_edit.plotting.stored import QUANTILES
from peft_edit.reporting.activations import EDITED, MASSIVE, StoredEdit, without_massive
from peft_edit.reporting.experiment import by_demonstrations, read_experiment
from peft_edit.reporting.flipped import flipped_ids
from peft_edit.reporting.pages import html_of, sections_of
from peft_edit.tuners.layer import edit_layers


TEST, OTHER = ASSETS / "test.jsonl", ASSETS / "unrelated.txt"


def done(*arguments):
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["peft-edit", *map(str, arguments)])
        main()
    assert not stopped.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with an adapter, its stores, its results and sweep, and its report with all that one can have."""
    folder = tmp_path_factory.mktemp("report")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(OTHER.read_text().splitlines()[:4]))
    done("collect", MODEL, ASSETS / "demonstrations.jsonl", folder / "store", "--limit", 150)
    done("collect", MODEL, "--texts", texts, folder / "retain")
    done("fit-sea", MODEL, folder / "store", folder / "sea", "--centered", "--rescale", "none", "--strength", 1.5)
    (folder / "sea" / "sweep.json").write_text(json.dumps(SWEEP))
    rows = ["--adapter", folder / "sea", "--texts", texts, "--limit", 40, "--resamples", 50, "--batch-size", 64]
    done("evaluate", MODEL, TEST, *rows, "--json", folder / "sea" / "results.json")
    given = ["--store", folder / "store", "--retain", folder / "retain", "--data", TEST, "--limit", 40, "--flipped", 1]
    done("report", folder / "sea", *given, "--out", folder / "new" / "report.html", "--figures", folder / "pictures")
    return folder


def page_of(folder):
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


def test_the_page_has_what_it_was_given(made):
    page = page_of(made)
    headings = re.findall(r'<h2 id="[^"]+">(.+?)</h2>', page)
    assert headings[:6] == [
        *("Results", "Side effects", "Questions that flipped", "Choice of the setting", "Layers", "Stored activations")
    ]
    assert {"Configuration", "Data", "Limits", "Citation"} <= set(headings)
    measured = json.loads((made / "sea" / "results.json").read_text())
    mc1 = measured["measures"]["mc1"]
    cell = f"{100 * mc1['value']:.1f} ({100 * mc1['difference']:+.1f}; "
    assert page.count(cell) == 2, "in the table, and in the picture"
    names = {file.stem for file in (made / "pictures").iterdir()}
    stored = {"signature", "spectrum", "probes", "norms", "principal-components", "t-sne"}
    assert names == {"measures", "side-effects", "front", "layer-count", "layers-change", *stored}
    assert {file.suffix for file in (made / "pictures").iterdir()} == {".png", ".svg"}
    assert page.count("<svg ") == len(names) == page.count("<figcaption>")


def test_questions_that_flipped_are_those_whose_answer_changes(made):
    found = read_results(made / "sea" / "results.json")
    data = {row["id"]: row for row in load_contrast_set(TEST)}
    pairs = {b["id"]: (b, q) for b, q in zip(found.base_questions, found.questions, strict=True)}
    every = flipped_ids(found, 1000)
    for direction, (before, after) in {"false to true": (False, True), "true to false": (True, False)}.items():
        changed = {i for i, (b, q) in pairs.items() if b["mc1"] is before and q["mc1"] is after}
        assert set(every[direction]) == changed
        moved = [abs(pairs[i][1]["mc2"] - pairs[i][0]["mc2"]) for i in every[direction]]
        assert moved == sorted(moved, reverse=True)
        assert flipped_ids(found, 1)[direction] == every[direction][:1]
    (first,) = flipped_ids(found, 1)["false to true"]
    page, row = page_of(made), data[first]
    assert f"False to true: question {first}</h3>" in page and f'<p class="prompt">{row["prompt"]}</p>' in page
    answer = (row["mc1_choices"] or row["positives"])[0]
    likelihood = pairs[first][1]["log_likelihoods"][answer]
    assert f"<td>{answer}</td><td>yes</td>" in page and f"<td>{likelihood:.2f}</td>" in page
    shown = re.search(r'<p class="tv-text">(.+?)</p>', page[page.index(f"question {first}</h3>") :], flags=re.DOTALL)[1]
    assert answer in re.sub(r"<[^>]+>", "", shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(made, browser, scheme):
    page = browser.new_page(color_scheme=scheme, viewport={"width": 375, "height": 800})
    asked, told = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.goto((made / "new" / "report.html").as_uri())
    assert asked == [page.url] and told == []
    assert page.evaluate("document.documentElement.scrollWidth") == 375, "nothing is wider than a phone"
    assert page.evaluate("document.scripts.length") == 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    ink = page.evaluate("getComputedStyle(document.querySelector('svg.plot text')).fill")
    assert ink == {"light": "rgb(26, 26, 26)", "dark": "rgb(232, 232, 232)"}[scheme]
    found = Axe().run(page).response["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


def test_stored_activations_before_and_after(made):
    """Against a plain use of the layers."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), made / "sea")
    stored = StoredEdit(model, made / "store", made / "retain")
    store = ActivationStore(made / "store")
    norms = stored.norms()
    for layer in edit_layers(model):
        index = int(layer.site.split(".")[2])
        with torch.no_grad():
            after = layer.edit(store.negative(index), "default")
        for name, rows in (("negative", store.negative(index)), ("negative" + EDITED, after)):
            expected = torch.quantile(rows.float().norm(dim=1), torch.tensor(QUANTILES)).tolist()
            assert norms[name][index] == pytest.approx(expected, rel=1e-5)
    assert set(stored.layers) == set(range(5)) == set(norms["positive"])
    assert [of.ranks for of in stored.spectra()] == [
        dict(zip(("positive", "negative"), ranks, strict=True))
        for ranks in model.peft_config["default"].rank_pattern.values()
    ]
    (pca, points), (tsne, _) = stored.in_plane(3)
    assert pca == "Principal components, layer 3" and tsne == "t-SNE, layer 3"
    assert list(points) == ["positive", "negative", "neutral", "retain", "negative, edited"]
    assert points["positive"].shape == (150, 2) and 0 < len(points["retain"]) <= 200


def test_massive_activations_are_left_out_of_the_plane():
    """Beside one of them all others were a point."""
    groups = {"positive": torch.eye(4), "retain": torch.tensor([[0.0, 900, 0, 0], [0, MASSIVE, 0, 0]])}
    left = without_massive(groups)
    assert torch.equal(left["positive"], groups["positive"]) and torch.equal(left["retain"], groups["retain"][1:])


def test_experiments(tmp_path):
    """The table of a recipe names results beside it, and their adapters say how many demonstrations they had."""
    table = {"recipe": "r", "rows": []}
    for count, value in ((400, 0.7), (100, 0.6)):
        folder = tmp_path / f"sea-{count}"
        of_edit = results(
            **{"adapters": [{"name": str(folder), "method": "HPR", "config": "c", "weights": str(count)}]}
        )
        hpr_config(fitted_on={"data": "d", "questions": count, "token_pairs": 9}).save_pretrained(folder)
        of_edit["measures"]["mc1"]["value"] = value
        (tmp_path / f"{count}.json").write_text(json.dumps(of_edit))
        table["rows"].append({"results": f"{count}.json"})
    (tmp_path / "table.json").write_text(json.dumps(table))
    recipe, found = read_experiment(tmp_path / "table.json")
    assert recipe == "r" and [of.measures["mc1"]["value"] for of in found] == [0.7, 0.6]
    counted = by_demonstrations(found, "HPR", tmp_path)
    assert [(count, of.measures["mc1"]["value"]) for count, of in counted] == [(100, 0.6), (400, 0.7)]
    assert by_demonstrations(found, "SEA", tmp_path) == []
    table["rows"][0]["results"] = "../elsewhere.json"
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="none below its folder"):
        read_experiment(tmp_path / "table.json")


def test_markdown_is_text_where_it_is_html():
    page = html_of("a <script>alert(1)</script>\n\n| x |\n|---:|\n| `<b>` |\n")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<code>&lt;b&gt;</code>" in page
    assert '<th scope="col" style="text-align:right">' in page and 'tabindex="0"' in page
    title, intro, sections = sections_of("---\na: b\n---\n<!-- m -->\n# T\n\nintro\n\n## One\n\n1\n\n## Two\n\n2\n")
    assert (title, intro, sections) == ("T", "intro", {"One": "1", "Two": "2"})


def test_results_keep_their_categories():
    assert edited().categories["Law"]["measures"]["mc1"]["difference"] == 0.25
    bad = results(base_questions=[])
    with pytest.raises(ValueError, match="base_questions are others than questions"):
        read_results(bad)
    assert (
        read_results(results()).base_questions is None and read_results(results()).model["fingerprint"] == FINGERPRINT
    )


def test_bad_input(made, run, tmp_path, monkeypatch):  # noqa: F811
    def told(*arguments):
        return refused(run, "report", *arguments, "--out", tmp_path / "r.html")

    sea, held = made / "sea", made / "sea" / "results.json"
    assert "pass that too" in told(sea, "--retain", made / "retain")
    old = json.loads(held.read_text())
    (tmp_path / "old.json").write_text(json.dumps({**old, "version": 1}))
    assert "has version 1 of the results, this release reads 2: evaluate again" in told(
        sea, "--results", tmp_path / "old.json"
    )
    (tmp_path / "alone.json").write_text(json.dumps({**old, "base_questions": None}))
    alone = told(sea, "--results", tmp_path / "alone.json", "--data", TEST)
    assert "the questions that flipped are not in these results" in alone and "leave --data out" in alone
    assert "--data has other rows than" in told(sea, "--data", TEST, "--limit", 39)
    other = tmp_path / "other"
    other.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (other / file).write_bytes((sea / file).read_bytes())
    nothing = told(other)
    assert f"{other} has no results.json" in nothing and f"run peft-edit evaluate with --adapter {other}" in nothing
    assert "there is no file" in told(sea, "--sweep", tmp_path / "no.json")
    assert "there is no file" in told(sea, "--table", tmp_path / "no.json")
    assert "--figures" in told(sea, "--figures", held)
    assert "is a folder: choose a file" in refused(run, "report", sea, "--out", tmp_path)
    assert not (tmp_path / "r.html").exists()

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    assert told(sea).endswith("which is not installed: pip install 'peft-edit[plots]'")
