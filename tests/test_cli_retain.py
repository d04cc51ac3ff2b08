"""Retain sets on the command line: texts to a store, and the store to SEA and HPR."""

import json

import pytest
from conftest import ASSETS
from test_cli import MODEL, refused
from test_cli import run as run  # a fixture

from peft_edit import ActivationStore


DEMONSTRATIONS = ASSETS / "demonstrations.jsonl"


@pytest.fixture
def retain(run, tmp_path):
    status, out, _ = run("collect", MODEL, tmp_path / "retain", "--texts", ASSETS / "unrelated.txt", "--limit", 40)
    assert status == 0 and "text tokens of 40 texts, 5 layers" in out
    return tmp_path / "retain"


def test_texts_are_collected_at_both_sites(run, retain, tmp_path):
    store = ActivationStore(retain)
    assert (store.tokens, store.sites, store.metadata["data"]["name"]) == ("all", ["mlp", "block"], "unrelated.txt")
    status, out, _ = run("inspect", retain)
    assert status == 0 and "tokens:          all\n" in out and "texts:           40\n" in out
    texts = ASSETS / "unrelated.txt"
    status, _, _ = run("collect", MODEL, texts, tmp_path / "same", "--tokens", "all", "--limit", 40)
    assert status == 0 and ActivationStore(tmp_path / "same").metadata["sites"] == ["mlp", "block"]
    status, _, _ = run("collect", MODEL, tmp_path / "one", "--texts", texts, "--limit", 5, "--site", "mlp")
    assert status == 0 and ActivationStore(tmp_path / "one").sites == ["mlp"]


def test_both_methods_leave_the_texts_alone(run, retain, tmp_path):
    collect = ["collect", MODEL, DEMONSTRATIONS, "--limit", 60]
    assert run(*collect, tmp_path / "store")[0] == 0
    fit = ["fit-sea", MODEL, tmp_path / "store", tmp_path / "sea", "--centered", "--rescale", "none"]
    status, out, _ = run(*fit, "--retain", retain, "--retain-energy", "0.9")
    assert status == 0 and "change" in out.splitlines()[0]
    found = json.loads((tmp_path / "sea" / "adapter_config.json").read_text())
    assert found["fitted_on"]["retain"]["texts"] == 40 and found["retain_energy"] == 0.9
    assert all(0 <= statistics["change"] < 1 for statistics in found["fit_statistics"].values())

    assert run(*collect, tmp_path / "pairs", "--site", "block", "--tokens", "answer")[0] == 0
    train = [
        "train-hpr",
        MODEL,
        tmp_path / "pairs",
        tmp_path / "hpr",
        "--epochs",
        1,
        "--batch-size",
        2,
        "--retain",
        retain,
    ]
    status, out, _ = run(*train, "--retain-weight", "2")
    assert status == 0 and "Share of the retained tokens that are rotated: 0." in out
    found = json.loads((tmp_path / "hpr" / "adapter_config.json").read_text())
    assert found["fitted_on"]["retain"]["weight"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["out"], "out is missing: pass the folder of the store after the contrast set"),
        (["data", "out", "--texts", "t.txt"], "--texts takes the place of the contrast set 'data'"),
        (["out", "--texts", "nothing.txt"], "there is no file nothing.txt with texts"),
        (["out", "--texts", "t.txt", "--split", "train"], "--split train has no meaning with --texts: leave it out"),
        (["out", "--texts", "t.txt", "--tokens", "mean"], "--tokens mean has no meaning with --texts: leave it out"),
        (["out", "--texts", "t.txt", "--neutral", "prompt"], "which have no --neutral: leave it out"),
        (["out", "--texts", "t.txt", "--prompt-format", "chat"], "which have no --prompt-format: leave it out"),
        (["out", "--texts", "t.txt", "--skip", "2"], "--skip 2 leaves none of the 2 rows of t.txt: lower it"),
    ],
)
def test_texts_that_cannot_be_collected(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert message in refused(run, "collect", MODEL, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_an_energy_needs_texts(run, tmp_path):
    line = refused(run, "fit-sea", MODEL, tmp_path / "store", tmp_path / "sea", "--retain-energy", "0.5")
    assert "--retain-energy needs --retain: pass a store of texts too" in line
    line = refused(run, "train-hpr", MODEL, tmp_path / "store", tmp_path / "hpr", "--retain-weight", "2")
    assert "--retain-weight needs --retain: pass a store of texts too" in line


def test_rows_are_mixed_before_some_are_taken(run, tmp_path):
    """The same seed gives disjoint parts of one order, which is none of the file's."""
    parts = {}
    for name, options in {"first": ["--limit", 6], "rest": ["--skip", 6], "plain": ["--limit", 6]}.items():
        mixed = [] if name == "plain" else ["--shuffle", 3]
        questions = [MODEL, ASSETS / "validation.jsonl"]
        status, *_ = run("evaluate", *questions, *mixed, *options, "--batch-size", 256, "--json", tmp_path / name)
        assert status == 0
        parts[name] = [row["id"] for row in json.loads((tmp_path / name).read_text())["questions"]]
    assert len(parts["first"]) == 6 and len(parts["rest"]) == 54 and not set(parts["first"]) & set(parts["rest"])
    assert set(parts["first"]) != set(parts["plain"])
    assert "--shuffle must be an integer of at least 0" in refused(run, "evaluate", *questions, "--shuffle", -1)
