"""The command line, in this process: results, files, and one line for bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ASSETS
from safetensors.torch import load_file, save_file

from peft_edit import ActivationStore, cli


MODEL, TEST = str(ASSETS / "model"), str(ASSETS / "test.jsonl")
BBQ = str(Path(__file__).parent / "fixtures" / "bbq_30.jsonl")
REAL = str(Path(__file__).parent / "fixtures" / "truthfulqa_40.csv")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `peft-edit` with arguments; returns its exit status, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-edit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Folder with the store and the adapter that the commands make of the demonstrations."""
    folder = tmp_path_factory.mktemp("cli")
    for arguments in (
        ["collect", MODEL, str(ASSETS / "demonstrations.jsonl"), str(folder / "store")],
        [
            "fit-sea",
            MODEL,
            str(folder / "store"),
            str(folder / "sea"),
            "--centered",
            "--json",
            str(folder / "fit.json"),
        ],
    ):
        with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["peft-edit", *arguments])
            cli.main()
        assert not stopped.value.code
    return folder


def refused(run, *arguments) -> str:
    """The one line of a command that must fail; without the bars that were drawn before."""
    status, out, err = run(*arguments)
    assert status == 2 and not out
    (line,) = [line for line in err.splitlines() if line.startswith("peft-edit: ")]
    assert "Traceback" not in err
    return line


def test_commands_make_store_adapter_and_results(fitted, run, tmp_path):
    assert len(ActivationStore(fitted / "store")) == 400
    assert {"adapter_config.json", "adapter_model.safetensors", "sea_fit.json"} <= {
        file.name for file in (fitted / "sea").iterdir()
    }
    assert json.loads((fitted / "fit.json").read_text()) == json.loads((fitted / "sea" / "sea_fit.json").read_text())
    texts = str(ASSETS / "unrelated.txt")
    result = tmp_path / "results" / "sea.json"
    status, out, _ = run(
        "evaluate",
        MODEL,
        TEST,
        "--adapter",
        fitted / "sea",
        "--batch-size",
        256,
        "--texts",
        texts,
        "--json",
        result,
    )
    results = json.loads(result.read_text())
    assert status == 0
    mc1, (effects,) = results["measures"]["mc1"], results["side_effects"]
    shown = [f"{100 * mc1[name]:{sign}.2f}" for name, sign in (("value", ""), ("base", ""), ("difference", "+"))]
    (line,) = [line.split() for line in out.splitlines() if line.startswith("MC1 ")]
    assert [line[1], line[5], line[6]] == shown and mc1["p_value"] < 0.05 and mc1["difference_low"] > 0.1
    (line,) = [line.split() for line in out.splitlines() if line.startswith("unrelated.txt ")]
    assert line[1:3] == [f"{effects['perplexity']:.3f}", f"{effects['perplexity_ratio']:.3f}"]
    assert effects["kl_p95"] > effects["kl_mean"] > 0 and effects["touched"] > 0.99
    assert len(results["questions"]) == 180 and results["adapters"][0]["name"] == str(fitted / "sea")
    # At strength 0 an adapter is the base model.
    status, base, _ = run("evaluate", MODEL, TEST, "--batch-size", 256)
    options = ["--batch-size", 256, "--no-base", "--adapter", fitted / "sea"]
    zero, whole = (run("evaluate", MODEL, TEST, *options, "--strength", strength)[1] for strength in (0, 1))
    told = "Damage: not measured. Pass --texts FILE with text that the edit is not meant for."
    assert status == 0 and zero == f"{base}\n{told}\n" != whole and "Damage" not in out


def test_inspect_shows_and_checks_a_store(fitted, run, tmp_path):
    status, out, _ = run("inspect", fitted / "store", "--json", tmp_path / "inspect.json")
    shown = dict(line.split(":", 1) for line in out.splitlines() if ":" in line)
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert status == 0 and "All files are as they were written." in out
    assert shown["neutral"].strip() == found["neutral"] == "text" and shown["prompt format"].strip() == "plain"
    assert shown["layers"].strip() == "0-4" and shown["demonstrations"].strip() == shown["questions"].strip() == "400"
    assert found["damaged"] == [] and found["bytes"] == sum(f.stat().st_size for f in (fitted / "store").iterdir())

    damaged = tmp_path / "damaged"
    shutil.copytree(fitted / "store", damaged)
    shard = sorted(damaged.glob("shard-*"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run("inspect", damaged, "--no-check")[0] == 0
    status, out, err = run("inspect", damaged)
    assert status == 2 and "demonstrations:" in out
    assert f"the first is {shard.name}: delete those that are there, and collect again" in err
    shard.unlink()
    assert run("inspect", damaged)[0] == 2

    metadata = json.loads((damaged / "meta.json").read_text())
    (damaged / "meta.json").write_text(json.dumps(metadata | {"complete": False, "shards": []}))
    assert "not collected completely" in refused(run, "inspect", damaged)
    assert "is no activation store" in refused(run, "inspect", tmp_path)


def test_what_the_fit_prints_is_explained(fitted, run, tmp_path):
    _, out, _ = run("fit-sea", MODEL, fitted / "store", tmp_path / "sea")
    table, (*explained, _) = out.splitlines()[:6], out.splitlines()[6:]
    assert table[0].split()[-4:] == ["signature", "rescale", "deviation", "change"]
    assert [line.split(":")[0] for line in explained] == ["signature", "deviation", "change"]
    config = json.loads((tmp_path / "sea" / "adapter_config.json").read_text())
    known = {"data": "demonstrations.jsonl", "tokens": "last", "neutral": "text", "prompt_format": "plain"}
    assert config["fitted_on"] == {**known, "questions": 400, "demonstrations": 400}


def test_both_sites_are_collected_in_one_pass(run, tmp_path):
    arguments = [MODEL, ASSETS / "demonstrations.jsonl", tmp_path / "store", "--site", "mlp,block", "--limit", 40]
    assert run("collect", *arguments)[0] == 0
    for site in ("mlp", "block"):
        assert run("fit-sea", MODEL, tmp_path / "store", tmp_path / site, "--site", site, "--centered")[0] == 0
        assert json.loads((tmp_path / site / "adapter_config.json").read_text())["site"] == site
    shown = " ".join(run("inspect", tmp_path / "store")[1].split())
    assert "sites: mlp, block" in shown and "data: demonstrations.jsonl, 40 of 400 rows" in shown


def test_commands_can_be_run_again(fitted, run):
    before = (fitted / "sea" / "adapter_model.safetensors").read_bytes()
    (fitted / "sea" / "README.md").write_text("mine")
    assert run("collect", MODEL, ASSETS / "demonstrations.jsonl", fitted / "store")[0] == 0
    assert run("fit-sea", MODEL, fitted / "store", fitted / "sea", "--centered")[0] == 0
    assert (fitted / "sea" / "adapter_model.safetensors").read_bytes() == before
    assert (fitted / "sea" / "README.md").read_text() == "mine"
    assert [path.name for path in fitted.iterdir() if path.name.startswith(".")] == []


def test_a_part_of_a_known_data_set_in_a_named_format(run, tmp_path):
    data = ["bbq", "--data-files", BBQ, "--subset", "age_ambig"]
    results = []
    for prompt_format in ("plain", "few_shot_qa", "lettered_choices"):
        file = tmp_path / f"{prompt_format}.json"
        status, out, _ = run("evaluate", MODEL, *data, "--prompt-format", prompt_format, "--json", file)
        assert status == 0 and "Questions: 2" in out
        results.append(json.loads(file.read_text())["questions"])
    ids = [[question["id"] for question in questions] for questions in results]
    answers = [[question["log_likelihoods"] for question in questions] for questions in results]
    assert ids[0] == ids[1] == ids[2] and answers[0] != answers[1] != answers[2] != answers[0]
    assert "must be one of 'auto', 'chat', 'plain', 'few" in refused(
        run, "evaluate", MODEL, *data, "--prompt-format", "hpr"
    )
    assert "--data-revision v1 has no meaning for a local copy" in refused(
        run, "evaluate", MODEL, *data, "--data-revision", "v1"
    )


def test_real_questions_run_through_all_commands(run, tmp_path):
    data = ["truthful_qa", "--data-files", REAL]
    status, out, _ = run("collect", MODEL, *data, tmp_path / "store", "--neutral", "prompt", "--layers", "0,2-4")
    assert status == 0 and "40 demonstrations of 40 questions, 4 layers" in out
    assert run("fit-sea", MODEL, tmp_path / "store", tmp_path / "sea", "--rescale", "none")[0] == 0
    status, out, _ = run("evaluate", MODEL, *data, "--adapter", tmp_path / "sea", "--limit", 10)
    assert status == 0 and "Questions: 10" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--positive-energy", "99.8"], "--positive-energy must be in (0, 1], got 99.8: pass 0.998"),
        (["--rescale", "norm"], "rescale must be one of 'token', 'none', 'mean', 'average', got 'norm'"),
        (["--feature-map", "relu"], "--feature-map must be one of"),
        (["--layers", "x"], "--layers must be numbers and rising ranges such as 0-3,7, got 'x'"),
        (["--layers", "9"], "layers 0 to 4, got 9"),
        (["--target-modules", "no_such_proj"], "no_such_proj"),
    ],
)
def test_bad_options_of_the_fit(fitted, run, tmp_path, arguments, expected):
    assert expected in refused(run, "fit-sea", MODEL, fitted / "store", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_missing_things_are_named(run, tmp_path):
    assert "is no activation store" in refused(run, "fit-sea", MODEL, tmp_path, tmp_path / "out")
    assert str(tmp_path / "model") in refused(run, "evaluate", tmp_path / "model", TEST)
    assert "no such file" in refused(run, "evaluate", MODEL, tmp_path / "data.jsonl").lower()
    assert "has no adapter_config.json" in refused(run, "evaluate", MODEL, TEST, "--adapter", tmp_path)
    assert "--strength needs --adapter" in refused(run, "evaluate", MODEL, TEST, "--strength", 2)
    assert run("evaluate")[0] == 2 and run("nonsense")[0] == 2


def damaged(source: Path, folder: Path, change) -> Path:
    """A copy of an adapter whose tensors went through `change`."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors, min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors, name: tensors.pop(name), "1 missing tensors"),
        (lambda tensors, name: tensors.update(extra=torch.zeros(2)), "1 extra tensors, the first is extra"),
        (lambda tensors, name: tensors.update({name: tensors[name][1:].clone()}), "size mismatch"),
        (lambda tensors, name: tensors[name].fill_(float("nan")), "layers.0.mlp.down_proj"),
        (lambda tensors, name: tensors[name].mul_(2), "must be orthonormal"),
    ],
    ids=["missing", "extra", "misshapen", "nan", "not orthonormal"],
)
def test_damaged_adapters_are_refused(fitted, run, tmp_path, change, expected):
    adapter = damaged(fitted / "sea", tmp_path / "adapter", change)
    assert expected in refused(run, "evaluate", MODEL, TEST, "--adapter", adapter)


def test_adapter_of_another_model_is_refused_unless_told_otherwise(fitted, run, tmp_path, demo_model, demo_tokenizer):
    demo_model.get_input_embeddings().weight.data.mul_(1.5)
    demo_model.save_pretrained(tmp_path / "other")
    demo_tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["evaluate", tmp_path / "other", TEST, "--adapter", fitted / "sea", "--limit", 5]
    assert "was fitted on another model" in refused(run, *arguments)
    assert run(*arguments, "--allow-fingerprint-mismatch")[0] == 0
    line = refused(run, "fit-sea", tmp_path / "other", fitted / "store", tmp_path / "out")
    assert "was collected from another model" in line and not (tmp_path / "out").exists()


def test_foreign_folders_are_left_alone(fitted, run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something else" in refused(run, "fit-sea", MODEL, fitted / "store", tmp_path)
    assert "is not empty" in refused(run, "collect", MODEL, TEST, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda store: rewrite(store / "index.safetensors", "positive", lambda t: t + 10**6),
            "positive names rows that are not among the",
        ),
        (lambda store: rewrite(store / "index.safetensors", "negative", None), "no negative"),
        (lambda store: rewrite(store / "shard-00000.safetensors", "mlp.0", lambda t: t[:, :50]), "manifest"),
        (lambda store: edit_json(store / "meta.json", modules=[1]), "modules must be an object, got [1]"),
        (lambda store: edit_json(store / "meta.json", shards=[]), "not among the 0 of the store"),
    ],
)
def test_damaged_stores_are_refused(fitted, run, tmp_path, change, expected):
    shutil.copytree(fitted / "store", tmp_path / "store")
    change(tmp_path / "store")
    assert expected in refused(run, "fit-sea", MODEL, tmp_path / "store", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(file: Path, name: str, change) -> None:
    tensors = load_file(file)
    tensor = tensors.pop(name)
    save_file({**tensors, **({} if change is None else {name: change(tensor).contiguous()})}, file)


@pytest.mark.parametrize("content", ["[]", "{", '{"peft_type": "FOO"}', "{}"])
def test_damaged_configurations_are_refused(fitted, run, tmp_path, content):
    adapter = damaged(fitted / "sea", tmp_path / "adapter", lambda tensors, name: None)
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refused(run, "evaluate", MODEL, TEST, "--adapter", adapter)


def test_truncated_files_are_named(fitted, run, tmp_path):
    adapter = damaged(fitted / "sea", tmp_path / "adapter", lambda tensors, name: None)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"the tensors of {adapter} are damaged" in refused(run, "evaluate", MODEL, TEST, "--adapter", adapter)


def test_results_that_cannot_be_written_are_refused_before_the_work(fitted, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(run, "fit-sea", MODEL, fitted / "store", tmp_path / "out", "--json", tmp_path)
    assert "is a folder" in line and not (tmp_path / "out").exists()
    assert "lies below the file" in refused(run, "evaluate", MODEL, TEST, "--json", tmp_path / "file" / "x.json")
    assert "is a file" in refused(run, "demo", "--out", tmp_path / "file")
    assert "is a file" in refused(run, "fit-sea", MODEL, fitted / "store", tmp_path / "file")
    assert "CUDA device" in refused(run, "evaluate", MODEL, TEST, "--device-map", "cuda:7")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_messages_speak_of_options(fitted, run, tmp_path):
    line = refused(run, "collect", MODEL, ASSETS / "demonstrations.jsonl", fitted / "store", "--seed", 5)
    assert "--no-resume" in line and "resume=False" not in line
    line = refused(run, "fit-sea", MODEL, fitted / "store", tmp_path / "out", "--layers", "9")
    assert "lower --layers" in line
