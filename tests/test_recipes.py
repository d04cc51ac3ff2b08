"""Every recipe of examples/recipes runs on the demonstration model, with few rows."""

import json
from pathlib import Path

import pytest
import test_cli
import yaml
from conftest import ASSETS
from peft import get_peft_model
from test_cli import MODEL
from transformers import AutoModelForCausalLM

from peft_edit import MeanDifferenceConfig, cli
from peft_edit.adapters.save import save_adapter
from peft_edit.cli.recipes.plan import plan
from peft_edit.cli.recipes.reading import read_recipe


run = test_cli.run
RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples" / "recipes").glob("*.yaml"))
FUNCTIONS = cli.commands()
DEMONSTRATIONS, TEST = str(ASSETS / "demonstrations.jsonl"), str(ASSETS / "test.jsonl")
# Values with which a recipe, where it has the variable, does with the demonstration model what it does with its own.
SMALL = {
    "model": MODEL,
    "folder": str(ASSETS),
    **dict.fromkeys(("data", "demonstrations", "truthful", "fair"), DEMONSTRATIONS),
    **dict.fromkeys(("questions", "truthful_questions"), TEST),
    **dict.fromkeys(("texts", "tuning_texts", "retain"), str(ASSETS / "unrelated.txt")),
    **dict.fromkeys(("demonstrations_split", "train_split", "held_out_split", "test_split", "questions_split")),
    **dict.fromkeys(("demonstrations_limit", "train_limit"), 24),
    **dict.fromkeys(("held_out_limit", "test_limit", "questions_limit", "truthful_limit", "fair_limit"), 8),
    **{
        "retain_limit": 8,
        "held_out_skip": 24,
        "test_skip": 32,
        "layers": "3-4",
        "first_layers": "0-1",
        "layer": 3,
        "sea_layers": "3-4",
        "choices_of_layers": ["3-4"],
        "retain_top_k": 2,
        "num_heads": 2,
        **dict.fromkeys(("perplexity_ratio", "largest_kl_p95"), 100),
    },
    **{"max_new_tokens": 2, "max_steps": 4, "train_batch": 16, "batch_size": 256, "prompt_format": "plain"},
    **{
        "numbers": [8, 16],
        **{name: [0.99] for name in ("energies", "positive_energies", "negative_energies")},
        "retain_energies": [0.9],
        "seeds": [0],
        "top_k": 2,
        "top_ks": [1, 2],
        "gates": [0.5],
        "alphas": [1],
        "epochs": 1,
        "strengths": [1, 2],
        "input_scale": 3.0,
    },
    "best_of": [1, 2],
}


def settings(recipe, values):
    """`--set` for each of the values whose variable a recipe has."""
    variables = yaml.safe_load(recipe.read_text())["variables"]
    return [f"{name}={json.dumps(value)}" for name, value in values.items() if name in variables]


@pytest.fixture(scope="module", autouse=True)
def inputs(tmp_path_factory):
    """A few short texts for perplexity, and an adapter for the recipe that compares adapters."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = (ASSETS / "unrelated.txt").read_text().splitlines()
    (folder / "texts.txt").write_text("".join(line[:120] + "\n" for line in lines[:4]))
    SMALL["texts"] = str(folder / "texts.txt")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    save_adapter(get_peft_model(model, MeanDifferenceConfig(layers_to_transform=[3])), folder / "adapter")
    SMALL["adapters"] = [{"name": "constant", "folder": str(folder / "adapter")}]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_run_on_the_demonstration_model(recipe, run, tmp_path):
    arguments = [part for setting in settings(recipe, SMALL) for part in ("--set", setting)]
    status, _, err = run("run", recipe, *arguments, "--out", tmp_path / "out")
    assert status == 0, err
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    results = (tmp_path / "out" / "results").rglob("*.json")
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in results)
    assert written["recipe"] == recipe.stem and sorted(row["results"] for row in written["rows"]) == files
    assert any(not row["adapters"] for row in written["rows"]) and any(row["adapters"] for row in written["rows"])
    assert all(row["measures"]["mc1"]["value"] >= 0 for row in written["rows"])
    assert any(row["side_effects"] for row in written["rows"])
    for answers in (tmp_path / "out").glob("answers/*.jsonl"):
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        assert [row["model"] for row in rows] == ["base", "edited"] * 8
        assert all(len(row.get("candidates", [0])) == int(answers.stem.split("-")[-1]) for row in rows)
        assert json.loads(answers.with_suffix(".json").read_text())["models"]["edited"]["answers"] == 8


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_are_checked_at_full_scale(recipe, tmp_path):
    """With their own values, and the files that they ask for."""
    own = settings(recipe, {name: SMALL[name] for name in ("adapters", "folder", "texts", "tuning_texts", "retain")})
    read = read_recipe(recipe, own, list(FUNCTIONS))
    assert read.name == recipe.stem and read.description.endswith(".")
    steps = plan(read, FUNCTIONS, tmp_path / "out")
    assert steps and not (tmp_path / "out").exists()
    first = recipe.read_text().splitlines()[0]
    assert first.startswith(f"# peft-edit run examples/recipes/{recipe.name} --set texts=")
    asked = [name for name, value in yaml.safe_load(recipe.read_text())["variables"].items() if isinstance(value, dict)]
    assert [part.lstrip("'").split("=")[0] for part in first.split("--set ")[1:]] == sorted(
        asked, key=lambda name: name != "texts"
    )
    with pytest.raises(ValueError, match=r"needs the variable (texts|folder|retain|adapters), (a|the) .*: pass --set"):
        read_recipe(recipe, [], list(FUNCTIONS))
