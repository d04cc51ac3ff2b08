"""`peft-edit run`: steps are checked before the first one runs, done once, and done again where something changed."""

import json
import shutil

import pytest
import test_cli
import yaml
from conftest import ASSETS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import MODEL, refused

from peft_edit import cli
from peft_edit.cli.options import options_of
from peft_edit.cli.recipes.reading import read_recipe, substituted


run = test_cli.run
DEMONSTRATIONS, TEST = str(ASSETS / "demonstrations.jsonl"), str(ASSETS / "test.jsonl")
EVALUATE = {"data": TEST, "limit": 6, "batch_size": 256}
RECIPE = {
    "name": "myths",
    "description": "Two fits.",
    "variables": {"model": MODEL, "rows": 12, "energy": 0.99, "data": DEMONSTRATIONS},
    "defaults": {"model": "${model}"},
    "steps": [
        {"collect": {"data": "${data}", "limit": "${rows}", "layers": "3-4", "out": "store"}},
        {"evaluate": {**EVALUATE, "json": "results/base.json"}},
        {
            "for": {"kind": ["token", "none"]},
            "steps": [
                {
                    "fit-sea": {
                        "store": "store",
                        "rescale": "${kind}",
                        "positive_energy": "${energy}",
                        "out": "sea-${kind}",
                    }
                },
                {"evaluate": {**EVALUATE, "adapter": "sea-${kind}", "json": "results/${kind}.json"}},
            ],
        },
    ],
}
STEPS = 6


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, with changes, and returns its file."""

    def write(**changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
        return file

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run of the recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["peft-edit", "run", str(folder / "recipe.yaml"), "--out", str(folder / "out")])
        cli.main()
    assert not stopped.value.code
    return folder / "out"


@pytest.fixture
def done(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "out")


def files_of(folder):
    """Each file of a run to its bytes, but for what tells where and how long."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix == ".safetensors":
            kept[name] = path.read_bytes()
    table = json.loads((folder / "table.json").read_text())
    return kept, [(row["results"], row["measures"]) for row in table["rows"]]


def ran(out):
    """Numbers of the steps that were run, and of those that were not."""
    titles = [line for line in out.splitlines() if line.startswith("[")]
    assert [title.split("]")[0] for title in titles] == [f"[{n}/{STEPS}" for n in range(1, STEPS + 1)][: len(titles)]
    again = [n for n, title in enumerate(titles, 1) if not title.endswith("(done)")]
    return again, len(titles) - len(again)


def test_a_recipe_makes_a_table_of_its_results(finished):
    table = json.loads((finished / "table.json").read_text())
    assert [row["results"] for row in table["rows"]] == [f"results/{n}.json" for n in ("base", "token", "none")]
    for row in table["rows"]:
        result = json.loads((finished / row["results"]).read_text())
        assert row["measures"] == result["measures"] and row["questions"] == 6
    assert table["variables"] == RECIPE["variables"] and table["recipe"] == "myths"
    lines = (finished / "table.md").read_text().splitlines()
    assert lines[0] == "# myths" and "Two fits." in lines
    mc1 = 100 * table["rows"][1]["measures"]["mc1"]["value"]
    assert any(line.startswith(f"| results/token | test.jsonl | 6 | {mc1:.1f} (") for line in lines)


def test_nothing_is_done_twice(done, recipe, run, tmp_path):
    names = ("table.md", "table.json", ".lock")
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file() and path.name not in names}
    status, out, _ = run("run", recipe(), "--out", done, "--json", tmp_path / "results.json")
    assert status == 0 and ran(out) == ([], STEPS)
    results, table = (json.loads(file.read_text()) for file in (tmp_path / "results.json", done / "table.json"))
    assert results.pop("command") == "run" and results.pop("options")["out"] == str(done) and results == table
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # also in another place, and under another name
    moved = done.rename(done.with_name("moved"))
    status, out, _ = run("run", recipe(name="other"), "--out", moved)
    assert status == 0 and ran(out) == ([], STEPS)


@pytest.mark.parametrize(
    "changed, again",
    [
        (["--set", "energy=0.9"], [3, 4, 5, 6]),
        (["--set", "rows=10"], [1, 3, 4, 5, 6]),
        (["--set", "energy=0.990"], []),
    ],
)
def test_what_changed_is_done_again_with_all_that_follows(changed, again, done, recipe, run, tmp_path):
    status, out, _ = run("run", recipe(), "--out", done, *changed, "--dry-run")
    assert status == 0 and ran(out)[0] == again
    status, out, _ = run("run", recipe(), "--out", done, *changed)
    assert status == 0 and ran(out)[0] == again
    if again:
        status, _, _ = run("run", recipe(), "--out", tmp_path / "fresh", *changed)
        assert status == 0 and files_of(done) == files_of(tmp_path / "fresh")


def test_a_file_that_changed_and_one_that_is_gone_count(done, recipe, run, tmp_path):
    (done / "results" / "none.json").unlink()
    status, out, _ = run("run", recipe(), "--out", done)
    assert status == 0 and ran(out)[0] == [6]
    copy = tmp_path / "questions.jsonl"
    lines = (ASSETS / "demonstrations.jsonl").read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:20]))
    changes = ["--out", done, "--set", f"data={copy}"]
    assert ran(run("run", recipe(), *changes)[1])[0] == [1, 3, 4, 5, 6]
    assert ran(run("run", recipe(), *changes)[1])[0] == []
    copy.write_text("".join(lines[20:40]))
    assert ran(run("run", recipe(), *changes)[1])[0] == [1, 3, 4, 5, 6]


def test_a_killed_run_goes_on_to_the_same_results(finished, recipe, run, tmp_path, monkeypatch):
    """Killed again and again: at every step, when it has begun, and when its command is done and its record is not."""
    from peft_edit.cli import run as module
    from peft_edit.cli.options import Bound

    go = Bound.run

    def killed(numbers, when):
        """Runs the steps of these numbers, the last of them not at all or without its record."""
        left = list(numbers)

        def run_step(self):
            if self.function is module.run:
                return go(self)
            del left[0]
            if left or when == "after":
                go(self)
            if not left:
                raise KeyboardInterrupt

        return run_step

    for at in range(1, STEPS + 1):
        for when in ("before", "after"):
            # The last of them has no record of the time before.
            numbers = [at] if when == "after" or at == 1 else [at - 1, at]
            with monkeypatch.context() as patch:
                patch.setattr(Bound, "run", killed(numbers, when))
                status, out, _ = run("run", recipe(), "--out", tmp_path / "out")
            assert status == 130 and ran(out)[0] == numbers
    status, out, _ = run("run", recipe(), "--out", tmp_path / "out")
    assert status == 0 and ran(out)[0] == [STEPS]
    assert files_of(tmp_path / "out") == files_of(finished)


def test_a_step_killed_while_it_replaces_is_not_done(done, recipe, run, monkeypatch):
    from peft_edit.cli.recipes import records

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.shutil, "rmtree", killed)
        assert run("run", recipe(), "--out", done, "--set", "energy=0.9")[0] == 130
    # with the old options too, as nobody knows what is left
    assert ran(run("run", recipe(), "--out", done)[1])[0] == [3]


CASES = {
    "step": (
        lambda r: r["steps"].append({"colect": {}}),
        "recipe.yaml, step 7: there is no command 'colect': did you mean collect?",
    ),
    "key": (lambda r: r.update(step=[]), "recipe.yaml: 'step' is no part of a recipe: did you mean steps?"),
    "no steps": (lambda r: r.update(steps=[]), "steps must be a list of steps"),
    "two commands": (lambda r: r["steps"].append({"a": {}, "b": {}}), "a step is one command and its options"),
    "option": (
        lambda r: r["steps"][0]["collect"].update(layer=3),
        "step 1 (collect): 'layer' is no option of this command: did you mean layers?",
    ),
    "value": (
        lambda r: r["steps"][2]["steps"][0]["fit-sea"].update(rescale="nine"),
        "step 3 (fit-sea): rescale must be one of",
    ),
    "range": (
        lambda r: r["steps"][0]["collect"].update(limit=0),
        "step 1 (collect): limit must be an integer of at least 1",
    ),
    "layers": (
        lambda r: r["steps"][0]["collect"].update(layers="4-3"),
        "step 1 (collect): layers must be numbers and rising ranges",
    ),
    "missing": (lambda r: r["steps"][2]["steps"][0]["fit-sea"].pop("store"), "step 3 (fit-sea) needs store, and has"),
    "missing data": (lambda r: r["steps"][1]["evaluate"].pop("data"), "step 2 (evaluate) needs data"),
    "variable": (
        lambda r: r["steps"][0]["collect"].update(limit="${row}"),
        "step 1 (collect): there is no variable 'row': did you mean rows?",
    ),
    "in text": (
        lambda r: r["variables"].update(rows=[1]) or r["steps"][0]["collect"].update(out="s-${rows}", limit=1),
        "the variable rows is [1], which cannot stand inside text 's-${rows}'",
    ),
    "default": (
        lambda r: r["defaults"].update(modle=1),
        "defaults: no step has an option 'modle': did you mean model?",
    ),
    "default value": (
        lambda r: r["defaults"].update(limit="many"),
        "defaults, for collect: limit must be an integer of at least 1, got 'many'",
    ),
    "twice": (
        lambda r: r["steps"][2]["steps"][0]["fit-sea"].update(out="sea"),
        "step 5 (fit-sea) writes sea, and step 3 (fit-sea) writes sea: choose another name",
    ),
    "inside": (
        lambda r: r["steps"][1]["evaluate"].update(json="store/base.json"),
        "step 2 (evaluate) writes store/base.json, and step 1 (collect) writes store",
    ),
    "reserved": (
        lambda r: r["steps"][1]["evaluate"].update(json="table.json"),
        "writes table.json, and the run itself writes table.json",
    ),
    "outside": (
        lambda r: r["steps"][0]["collect"].update(out="../store"),
        "step 1 (collect) writes ../store: name a place in the folder of the run",
    ),
    "order": (
        lambda r: r["steps"].insert(0, r["steps"].pop(2)),
        "step 1 (fit-sea): store is store, which step 5 (collect) writes: put that step first",
    ),
    "no file": (
        lambda r: r["steps"][1]["evaluate"].update(texts="nothing.txt"),
        "step 2 (evaluate): texts is nothing.txt, which is not there",
    ),
    "near": (
        lambda r: r["steps"][2]["steps"][0]["fit-sea"].update(store="stor"),
        "step 3 (fit-sea): store is stor, which is not there: did you mean store?",
    ),
    "no results": (
        lambda r: r["steps"][1]["evaluate"].pop("json"),
        "step 2 (evaluate) needs json, the file of its results",
    ),
    "for": (
        lambda r: r["steps"][2].update({"for": {"kind": "token"}}),
        "for kind must be a list of values, got 'token'",
    ),
    "for rows": (
        lambda r: r["steps"][2].update({"for": [{"kind": 1}, {"knd": 2}]}),
        "a list of mappings with the same variables",
    ),
    "for taken": (
        lambda r: r["steps"][2].update({"for": {"rows": [1]}}),
        "for rows: the recipe has a variable of this name",
    ),
    "for keys": (
        lambda r: r["steps"][2].update(step=1),
        "a repetition has the keys for and steps, got for, steps, step",
    ),
    "name": (lambda r: r.update(name="a/b"), "name must be of letters, digits, - and _"),
    "itself": (lambda r: r["steps"].append({"run": {"recipe": "x"}}), "there is no command 'run'"),
    "together": (lambda r: r["steps"][1]["evaluate"].update(strength=2), "step 2 (evaluate): strength needs adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_recipes_are_refused_before_anything_is_done(case, tmp_path, run):
    change, message = CASES[case]
    recipe = json.loads(json.dumps(RECIPE))
    change(recipe)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    line = refused(run, "run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert message in line and "--" not in line.replace(str(tmp_path), "")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(recipe, run, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "--set must be name=value, got 'rows'" in refused(run, "run", recipe(), *out, "--set", "rows")
    assert "has no variable 'row': did you mean rows?" in refused(run, "run", recipe(), *out, "--set", "row=1")
    assert "--set rows: '[' is no YAML" in refused(run, "run", recipe(), *out, "--set", "rows=[")
    asks = recipe(variables={**RECIPE["variables"], "model": {"required": "the base model"}})
    line = refused(run, "run", asks, *out)
    assert line.endswith("needs the variable model, the base model: pass --set model=...")
    assert "there is no file" in refused(run, "run", tmp_path / "none.yaml", *out)
    (tmp_path / "list.yaml").write_text("- collect\n")
    assert "must be a mapping from name, description" in refused(run, "run", tmp_path / "list.yaml", *out)
    (tmp_path / "twice.yaml").write_text("name: a\nsteps:\n- collect: {limit: 3, out: store, limit: 4}\n")
    line = refused(run, "run", tmp_path / "twice.yaml", *out)
    assert "twice.yaml is no YAML: limit is given twice" in line and "line 3, column 35" in line
    (tmp_path / "file").write_text("")
    assert "is a file: choose a folder" in refused(run, "run", recipe(), "--out", tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_what_others_have_made_is_left_alone(recipe, run, tmp_path):
    (tmp_path / "out" / "store").mkdir(parents=True)
    (tmp_path / "out" / "store" / "mine").write_text("mine")
    status, _, err = run("run", recipe(), "--out", tmp_path / "out")
    assert status == 2 and "which is there, and not from a run of a recipe: move it away" in err
    assert (tmp_path / "out" / "store" / "mine").read_text() == "mine"
    (tmp_path / "out" / "recipe.json").write_text("{}")
    status, _, err = run("run", recipe(), "--out", tmp_path / "out")
    assert status == 2 and "recipe.json is no record of a recipe" in err


def test_the_error_of_a_step_says_which(recipe, run, tmp_path):
    steps = [*RECIPE["steps"][:2], {"fit-sea": {"store": "store", "layers": "0", "out": "sea"}}]
    status, out, err = run("run", recipe(steps=steps), "--out", tmp_path / "out")
    line = err.splitlines()[-1]
    assert status == 2 and "[2/3] evaluate: results/base.json" in out
    assert line.startswith("peft-edit: ") and "recipe.yaml, step 3 (fit-sea): " in line
    assert not (tmp_path / "out" / "sea").exists()


def test_results_that_cannot_stand_side_by_side_are_refused(recipe, run, tmp_path):
    steps = [{"evaluate": {**EVALUATE, "json": "a.json"}}, {"evaluate": {**EVALUATE, "skip": 1, "json": "b.json"}}]
    status, _, err = run("run", recipe(steps=steps), "--out", tmp_path / "out")
    assert status == 2 and "must agree in questions" in err and not (tmp_path / "out" / "table.md").exists()


def test_every_command_says_what_it_writes():
    for name, function in cli.commands().items():
        for option in options_of(function):
            writes = option.name in ("out", "json", "html", "figures")
            assert option.is_output == writes, (name, option.name)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers(), max_size=2))


@settings(max_examples=30)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), VALUES, min_size=1), st.data())
def test_variables_keep_their_types(values, data):
    name = data.draw(st.sampled_from(sorted(values)))
    assert substituted({"a": [f"${{{name}}}"]}, values, "here") == {"a": [values[name]]}
    if isinstance(values[name], (str, int)) and not isinstance(values[name], bool):
        assert substituted(f"<${{{name}}}>", values, "here") == f"<{values[name]}>"


def test_repetitions_are_nested_and_combined(tmp_path):
    steps = [
        {
            "for": {"a": [1, 2], "b": "${several}"},
            "steps": [{"for": [{"c": "x"}, {"c": "y"}], "steps": [{"make": {"v": "${a}${b}${c}"}}]}],
        }
    ]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"variables": {"several": [3]}, "steps": steps}))
    read = read_recipe(tmp_path / "r.yaml", ["several=[5, 6]"], ["make"])
    assert [step.options["v"] for step in read.steps] == [a + b + c for a in "12" for b in "56" for c in "xy"]
    assert [step.number for step in read.steps] == list(range(1, 9)) and read.name == "r"


def test_a_run_is_for_one_process(recipe, run, monkeypatch, tmp_path):
    from peft_edit.processes import Processes

    monkeypatch.setattr("peft_edit.processes.processes", lambda: Processes(0, 2))
    assert "run is for one process" in refused(run, "run", recipe(), "--out", tmp_path / "out")
