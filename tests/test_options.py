"""Commands made from dataclasses, options from YAML files, and how messages name arguments."""

import copy
import inspect
import json
import pickle
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
import test_cli
import typer
import yaml
from conftest import ASSETS
from test_cli import MODEL, TEST, refused

from peft_edit import SEAConfig, cli
from peft_edit.adapters import hub
from peft_edit.arguments import Argument, ArgumentError, Note, check_options, renamed
from peft_edit.cli.options import Fields, Run, command, options_of, spelling
from peft_edit.places import LayerIndices


run = test_cli.run
fitted = test_cli.fitted
COMMANDS = cli.commands()


@dataclass(kw_only=True)
class Brew:
    """Options of every kind."""

    leaves: str = field(metadata={"help": "Leaves.", "positional": True})
    minutes: float = field(default=3.0, metadata={"help": "Time.", "above": 0, "allowed": "above 0 and finite"})
    cups: int | None = field(default=None, metadata={"help": "Cups.", "minimum": 1, "allowed": "of at least 1"})
    kind: Literal["black", "green"] | None = field(default="green", metadata={"help": "Kind."})
    milk: bool = field(default=False, metadata={"help": "Milk."})
    sieve: bool = field(default=True, metadata={"help": "Sieve."})
    spoons: LayerIndices = field(default=None, metadata={"help": "Spoons.", "option": "--layers"})
    spices: list[str] | str | None = field(default=None, metadata={"help": "Spices.", "arguments": ("herbs",)})
    notes: list[Path] | None = field(default=None, metadata={"help": "Notes.", "repeated": True})
    password: str | None = field(default=None, metadata={"help": "Secret.", "secret": True})

    def __post_init__(self):
        check_options(self)


FIT = Fields("centered", "rescale", of=SEAConfig, changes={"centered": {"negatable": True}})


def brew(
    options: Brew,
    fit: Annotated[dict[str, Any], FIT],
    run: Run,
    out: Annotated[Path, {"help": "Pot."}] = Path("pot"),
) -> None:
    """Make tea."""
    made.append(SimpleNamespace(options=options, fit=fit, run=run, out=out))


made: list[SimpleNamespace] = []


def call(*arguments):
    """What `brew` was called with, or the exception."""
    app = typer.Typer()
    app.command()(command(brew, elsewhere=lambda: options_of(COMMANDS["collect"])))
    app(list(map(str, arguments)), standalone_mode=False)
    return made.pop()


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file."""

    def write(content) -> Path:
        path = tmp_path / "options.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_each_field_is_an_option_of_its_type():
    arguments = "assam --minutes 4 --cups 2 --kind none --milk --no-sieve --layers 0-2,7 --spices mint,sage"
    given = call(*arguments.split(), "--notes", "a", "--notes", "b", "--centered", "--out", "kettle")
    assert given.options == Brew(
        leaves="assam",
        minutes=4.0,
        cups=2,
        kind=None,
        milk=True,
        sieve=False,
        spoons=[0, 1, 2, 7],
        spices=["mint", "sage"],
        notes=[Path("a"), Path("b")],
    )
    assert given.fit == {"centered": True, "rescale": "token"} and given.out == Path("kettle")


def test_defaults_are_those_of_the_fields():
    given = call("assam")
    assert given.options == Brew(leaves="assam") and given.out == Path("pot")
    assert given.fit == {"centered": False, "rescale": "token"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--minutes 0", "--minutes must be a number above 0 and finite, got 0.0"),
        ("--minutes inf", "--minutes must be a number above 0 and finite, got inf"),
        ("--minutes long", "--minutes must be a number above 0 and finite, got 'long'"),
        ("--cups 1.5", "--cups must be an integer of at least 1, got '1.5'"),
        ("--kind red", "--kind must be one of None, 'black', 'green', got 'red'"),
        ("--layers 3-1", "--layers must be numbers and rising ranges such as 0-3,7, got '3-1'"),
        ("--rescale norm", "--rescale must be one of 'token', 'none', 'mean', 'average', got 'norm'"),
    ],
)
def test_values_are_checked_as_declared(arguments, message):
    with pytest.raises(ValueError) as error:
        call("assam", *arguments.split())
    assert str(error.value) == message


EVERYTHING = {
    "leaves": "assam",
    "minutes": "4e-1",  # YAML 1.1 takes it for text
    "cups": 2,
    "kind": None,
    "milk": True,
    "sieve": False,
    "layers": [0, 1, 5],
    "spices": ["mint", "sage"],
    "notes": ["a", "b"],
    "out": "kettle",
}


def test_a_file_gives_options(file):
    given = call("--config", file(EVERYTHING))
    assert given.options == Brew(
        leaves="assam",
        minutes=0.4,
        cups=2,
        kind=None,
        milk=True,
        sieve=False,
        spoons=[0, 1, 5],
        spices=["mint", "sage"],
        notes=[Path("a"), Path("b")],
    )
    assert given.out == Path("kettle")


def test_the_command_line_goes_before_the_file(file):
    path = file(EVERYTHING)
    given = call("darjeeling", "--cups", 5, "--sieve", "--config", path, "--notes", "c", "--layers", "3")
    assert (given.options.leaves, given.options.cups, given.options.sieve) == ("darjeeling", 5, True)
    assert given.options.notes == [Path("c")] and given.options.spoons == [3] and given.options.minutes == 0.4


@pytest.mark.parametrize("value", ["0-2,7", 3, [2, 0]])
def test_layers_in_a_file(file, value):
    expected = {"0-2,7": [0, 1, 2, 7], 3: [3]}.get(value if isinstance(value, (str, int)) else None, [0, 2])
    assert call("assam", "--config", file({"layers": value})).options.spoons == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"minuts": 3}, "'minuts' is no option of this command: did you mean minutes?"),
        ({"water": 3}, "'water' is no option of this command, which has centered, cups, "),
        ({"config": "x"}, "'config' is no option of this command"),
        ({"cups": "many"}, "cups must be an integer of at least 1, got 'many'"),
        ({"cups": 1.5}, "cups must be an integer of at least 1, got '1.5'"),
        ({"cups": True}, "cups must be an integer of at least 1, got True"),
        ({"minutes": [1]}, "minutes must be a number above 0 and finite, got [1]"),
        ({"minutes": None}, "minutes must be a number above 0 and finite, got None"),
        ({"milk": "yes please"}, "milk must be True or False, got 'yes please'"),
        ({"kind": "red"}, "kind must be one of None, 'black', 'green', got 'red'"),
        ({"kind": 3}, "kind must be one of the choices, got 3: put it in quotes"),
        ({"leaves": 3}, "leaves must be text, got 3: put it in quotes"),
        ({"out": {"a": 1}}, "out must be text, got {'a': 1}"),
        ({"layers": "x"}, "layers must be numbers and rising ranges"),
        ({"layers": {"a": 1}}, "layers must be layers such as 0-3,7, or a list of numbers, got {'a': 1}"),
        ({"spices": 3}, "spices must be text or a list of texts, got 3"),
        ({"notes": 3}, "notes must be a path or a list of paths, got 3"),
        ("milk: true\nmi-lk: true", "'mi-lk' is no option of this command"),
        ("- a", " must be a mapping from options to values, such as 'layers: 0-3', got list"),
        ("a: [", " is no YAML: "),
        ("", " must be a mapping"),
    ],
    ids=str,
)
def test_what_a_file_cannot_have(file, content, expected):
    path = file(content)
    with pytest.raises(ValueError) as error:
        call("assam", "--config", path)
    assert str(error.value).startswith(str(path)) and expected in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.yaml with options"):
        call("assam", "--config", tmp_path / "nowhere.yaml")


def test_a_run_records_its_options(file):
    arguments = "assam --kind none --milk --layers 0,1,2 --spices mint --notes a --password p"
    given = call(*arguments.split())
    recorded = given.run.record({"tea": 1})
    assert recorded["command"] == "brew" and recorded["tea"] == 1 and "password" not in recorded["options"]
    assert recorded["options"] == {
        **{"leaves": "assam", "minutes": 3.0, "cups": None, "kind": None, "milk": True, "sieve": True},
        **{"layers": "0-2", "spices": ["mint"], "notes": ["a"], "centered": False, "rescale": "token", "out": "pot"},
    }
    again = call("--config", file(json.loads(json.dumps(recorded["options"]))))
    assert again.run.options == recorded["options"]
    again.options.password = "p"
    assert again.options == given.options


@pytest.mark.parametrize(
    ("argument", "spelt"),
    [
        (Argument("cups"), "--cups"),
        (Argument("cups", 2), "--cups 2"),
        (Argument("milk"), "--milk"),
        (Argument("milk", True), "--milk"),
        (Argument("milk", False), "milk=False"),
        (Argument("sieve", False), "--no-sieve"),
        (Argument("centered", False), "--no-centered"),
        (Argument("kind", "black"), "--kind black"),
        (Argument("kind", None), "--kind none"),
        (Argument("cups", None), "cups=None"),
        (Argument("spoons", [0, 1, 2, 7]), "--layers 0-2,7"),
        (Argument("spoons"), "--layers"),
        (Argument("layers"), "--layers"),
        (Argument("herbs", ["mint", "sage"]), "--spices mint,sage"),
        (Argument("out", "my pot"), "--out 'my pot'"),
        (Argument("leaves"), "leaves"),
        (Argument("adapter_name"), "adapter_name"),
        (Argument("tokens", "answer"), "tokens='answer'"),
    ],
    ids=str,
)
def test_arguments_are_spelt_as_options(argument, spelt):
    assert spelling(options_of(brew))(argument) == spelt


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("collect with ", Argument("tokens", "answer")), "collect with --tokens answer"),
        (("again (", Argument("resume", False), ")"), "again (--no-resume)"),
        (("pass another ", Argument("tokens")), "pass another tokens"),
        (("lower ", Argument("cups")), "lower --cups"),
    ],
    ids=str,
)
def test_only_values_are_advised_of_options_that_other_commands_have(monkeypatch, parts, message):
    def fail(self):
        raise ArgumentError(*parts)

    monkeypatch.setattr(Brew, "__post_init__", fail)
    with pytest.raises(ValueError) as error:
        call("assam")
    assert str(error.value) == message


def test_errors_and_notes_survive_copies():
    parts = ("pass ", Argument("truncate", True), " or leave runs/truncate=True")
    for made_of in (ArgumentError(*parts), Note(*parts)):
        for copied in (copy.deepcopy(made_of), pickle.loads(pickle.dumps(made_of))):
            assert str(copied) == "pass truncate=True or leave runs/truncate=True"
            assert copied.message(lambda argument: "--truncate") == "pass --truncate or leave runs/truncate=True"


def test_arguments_are_renamed_for_the_caller():
    with (
        pytest.raises(ArgumentError, match="pass another data_revision, not seed=1"),
        renamed(revision="data_revision"),
    ):
        raise ArgumentError("pass another ", Argument("revision"), ", not ", Argument("seed", 1))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_each_option_and_an_example(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(name, "--help")
    assert status == 0 and f"Example: peft-edit {name}" in out
    for option in options_of(COMMANDS[name]):
        line = next(
            line
            for line in out.splitlines()
            if line.strip().split(" ")[0].rstrip(",") == option.flag or line.strip().startswith(f"{option.flag} ")
        )
        assert option.metadata["help"].rstrip(".") in line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_has_options_that_the_command_has(name):
    example = inspect.getdoc(COMMANDS[name]).partition(f"Example: peft-edit {name}")[2].split("\n\n")[0]
    flags = {option.flag for option in options_of(COMMANDS[name])}
    assert {word for word in shlex.split(example) if word.startswith("--")} <= flags


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("card", "demo")])
def test_every_command_takes_a_file(run, file, name):
    known = "json" if any(option.flag == "--json" for option in options_of(COMMANDS[name])) else "revision"
    wrong = {known[:1] + known[2:]: "x"}
    line = refused(run, name, "--config", file(wrong))
    assert (
        line == f"peft-edit: {file(wrong)}: {next(iter(wrong))!r} is no option of this command: did you mean {known}?"
    )


def test_an_option_is_given_once_in_a_file(run, file):
    path = file("store_dtype: float32\nstore-dtype: float16\n")
    assert refused(run, "collect", "--config", path) == f"peft-edit: {path}: store-dtype is given twice: leave one out"


def test_options_of_an_evaluation_from_a_file(fitted, run, file, tmp_path):
    path = file({"model": MODEL, "data": TEST, "limit": 5, "adapter": str(fitted / "sea"), "batch-size": 256})
    status, out, _ = run("evaluate", "--config", path, "--limit", 4, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert status == 0 and "Questions: 4" in out
    options = results["options"]
    assert results["command"] == "evaluate" and options["limit"] == 4 and options["batch_size"] == 256
    assert options["adapter"] == results["adapters"][0]["name"] == str(fitted / "sea") and options["dtype"] == "auto"
    assert "config" not in options and len(options) == len(
        [o for o in options_of(COMMANDS["evaluate"]) if not o.is_secret]
    )
    options["json"] = str(tmp_path / "again.json")
    assert run("evaluate", "--config", file(options))[0] == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again.pop("options") == options and again == {name: results[name] for name in again}


def test_results_beside_an_adapter_record_the_options(fitted):
    fit = json.loads((fitted / "sea" / "sea_fit.json").read_text())
    assert fit["command"] == "fit-sea" and fit["options"]["centered"] is True and fit["options"]["site"] is None
    assert fit["options"]["store"] == str(fitted / "store") and fit["demonstrations"] == 400


def test_a_token_is_never_recorded(run, tmp_path, monkeypatch):
    commit = SimpleNamespace(repo_url=SimpleNamespace(repo_id="user/name"), oid="0", commit_url="u", pr_url=None)
    monkeypatch.setattr(hub, "push_folder", lambda *args, **kwargs: commit)
    assert (
        run("push", tmp_path / "adapter", "user/name", "--token", "hf_secret", "--json", tmp_path / "push.json")[0] == 0
    )
    text = (tmp_path / "push.json").read_text()
    assert "hf_secret" not in text and json.loads(text)["options"]["repo_id"] == "user/name"


@pytest.mark.parametrize(
    "name", ["top_k_5", "truncate=True", "layers_to_transform", "a  b", "resume=False, threshold="]
)
def test_what_users_name_is_printed_as_given(fitted, run, tmp_path, name):
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    assert f"{folder} is no activation store" in refused(run, "fit-sea", MODEL, folder, tmp_path / "out")
    assert str(folder) in refused(run, "select", MODEL, folder, fitted / "store", tmp_path / "out", "--top-k", 1)
    assert f"the folder {folder} has no config.json" in refused(run, "evaluate", folder, TEST)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate"], "peft-edit: Missing argument 'model': see peft-edit evaluate --help"),
        (["evaluate", MODEL, TEST, "--limits", 3], "peft-edit: No such option: --limits"),
        (["evaluat"], "peft-edit: No such command 'evaluat'"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line(run, arguments, expected):
    assert refused(run, *arguments).startswith(expected)


def test_without_arguments_the_help_is_shown(run):
    status, out, _ = run()
    assert status == 0 and all(f"  {name} " in out for name in COMMANDS)


def test_messages_of_commands_speak_of_their_options(run, tmp_path):
    data = ["truthful_qa", "--data-files", ASSETS / "nowhere.csv"]
    assert "change --data-files" in refused(run, "evaluate", MODEL, *data)
    line = refused(run, "evaluate", MODEL, "truthful_qa", "--data-files", test_cli.REAL, "--data-revision", "v1")
    assert "--data-revision v1 has no meaning" in line
    assert "--skip 500 leaves none" in refused(run, "evaluate", MODEL, TEST, "--skip", 500)
    assert "--device must be auto" in refused(run, "merge", MODEL, tmp_path, tmp_path / "out", "--device", "tpu")
    assert "--private needs --push" in refused(run, "merge", MODEL, tmp_path, tmp_path / "out", "--private")
