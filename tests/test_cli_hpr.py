"""The commands of HPR: what they print and write, how an interrupted training ends, and one line for bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import test_cli
import test_training
import torch
from conftest import ASSETS
from launching import LONGEST, launch
from safetensors.torch import load_file
from test_cli import MODEL, REAL, damaged, refused, rewrite
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from peft_edit import ActivationStore, HPRTrainer, cli


run = test_cli.run

DEMONSTRATIONS, VALIDATION = ASSETS / "demonstrations.jsonl", ASSETS / "validation.jsonl"
FOR_HPR = ["--site", "block", "--tokens", "answer"]
REAL_QUESTIONS = ["truthful_qa", "--data-files", REAL]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TRAINED = ADAPTER | {"train_hpr.json"}
EDIT = {"gate": 0.5, "alpha": 1.0, "rotation": "angle", "token_scope": "all"}


def close_bars() -> None:
    for bar in list(tqdm._instances):
        bar.close()


@pytest.fixture(autouse=True)
def no_open_bars():
    """A bar that an error left open would move what the next test draws to other lines."""
    yield
    close_bars()


def command(*arguments) -> tuple[str, str]:
    """Standard output and standard error of a command that must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(sys, "argv", ["peft-edit", *map(str, arguments)])
        cli.main()
    assert not stopped.value.code, err.getvalue()
    return out.getvalue(), err.getvalue()


def names(folder: Path) -> set[str]:
    """Of what is in a folder, but for the lock that keeps other runs out."""
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def blocks(folder: Path) -> set[int]:
    return {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in weights(folder)}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def rows(table: str) -> dict[int, list[str]]:
    return {int(index): rest.split() for index, rest in re.findall(r"^(\d+) +(\S.*)$", table, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Folder with stores of demonstrations: all but the last 40, those, the first 16, and some that do not suit."""
    folder = tmp_path_factory.mktemp("stores")
    lines = DEMONSTRATIONS.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "held_out.jsonl").write_text("".join(lines[360:]), encoding="utf-8")
    command("collect", MODEL, DEMONSTRATIONS, folder / "train", *FOR_HPR, "--limit", 360)
    command("collect", MODEL, folder / "held_out.jsonl", folder / "eval", *FOR_HPR)
    command("collect", MODEL, DEMONSTRATIONS, folder / "small", *FOR_HPR, "--limit", 16)
    command("collect", MODEL, DEMONSTRATIONS, folder / "layers_1_3", *FOR_HPR, "--limit", 4, "--layers", "1,3")
    command("collect", MODEL, DEMONSTRATIONS, folder / "last", "--site", "block", "--limit", 4)
    command("collect", MODEL, DEMONSTRATIONS, folder / "mlp", "--tokens", "answer", "--limit", 4)
    test_training.write_store(folder / "hidden_size_32")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "small", folder / "nan")
    rewrite(
        folder / "nan" / "shard-00000.safetensors", "block.2", lambda t: t.index_fill(0, torch.tensor(3), torch.nan)
    )
    return folder


@pytest.fixture(scope="module")
def pipeline(stores, tmp_path_factory):
    """Folder with an adapter trained on 360 demonstrations, one of its two best layers, and what was printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    training = ["train-hpr", MODEL, stores / "train", folder / "all", "--eval-store", stores / "eval", "--cpu"]
    selecting = ["select", MODEL, folder / "all", stores / "eval", folder / "two", "--top-k", 2]
    printed = {
        "train-hpr": command(*training, "--learning-rate", 2e-3, "--json", folder / "train.json"),
        "select": command(*selecting, "--json", folder / "select.json"),
    }
    return folder, printed


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sea")
    command("collect", MODEL, DEMONSTRATIONS, folder / "store", "--limit", 20)
    command("fit-sea", MODEL, folder / "store", folder / "adapter")
    return folder / "adapter"


def test_an_adapter_of_all_layers_is_trained(stores, pipeline):
    folder, printed = pipeline
    results, config = read(folder / "train.json"), read(folder / "all" / "adapter_config.json")
    assert names(folder / "all") == TRAINED
    assert config["base_model_fingerprint"] == ActivationStore(stores / "train").metadata["fingerprint"]
    assert config["selected_layers"] is None and blocks(folder / "all") == {0, 1, 2, 3, 4}
    assert results == read(folder / "all" / "train_hpr.json")
    assert results["steps"] == 5 * 113 and results["learning_rate"] == 2e-3
    assert len([entry for entry in results["history"] if "loss" in entry]) == 565 // 100
    expected = {
        i: [f"{results[f'eval_probe_accuracy_layer_{i}']:.4f}", f"{results['change'][str(i)]:.3f}"] for i in range(5)
    }
    assert rows(printed["train-hpr"][0]) == expected
    assert f"{results['eval_angle_error']:.4f} radians" in printed["train-hpr"][0]


def test_only_the_best_layers_are_selected(pipeline):
    folder, printed = pipeline
    result, config = read(folder / "select.json"), read(folder / "two" / "adapter_config.json")
    best = sorted(sorted(result["accuracy"], key=result["accuracy"].get)[-2:])
    assert result["selected"] == config["selected_layers"] == [int(index) for index in best]
    assert config["probe_accuracy"] == result["accuracy"]
    assert names(folder / "two") == ADAPTER and blocks(folder / "two") == set(result["selected"])
    trained = weights(folder / "all")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(folder / "two").items())
    before = read(folder / "all" / "adapter_config.json")
    same_as_before = set(config) - {"selected_layers", "probe_accuracy"}
    assert {name: config[name] for name in same_as_before} == {name: before[name] for name in same_as_before}
    table = {i: [f"{result['accuracy'][str(i)]:.4f}", *["yes"] * (str(i) in best)] for i in range(5)}
    assert rows(printed["select"][0]) == table


def test_training_and_selection_agree_on_the_accuracy(pipeline):
    folder, _ = pipeline
    results, accuracy = read(folder / "train.json"), read(folder / "select.json")["accuracy"]
    assert accuracy == pytest.approx({str(i): results[f"eval_probe_accuracy_layer_{i}"] for i in range(5)}, abs=1e-6)


@pytest.mark.parametrize("name", ["train-hpr", "select"])
def test_results_are_printed_apart_from_progress(pipeline, name):
    out, err = pipeline[1][name]
    assert not re.search(r"[{}\r\x1b]|it/s|%\|", out)
    assert "100%|" in err and "Adapter" not in err and "{" not in err


def test_the_edit_improves_the_answers(pipeline, run, tmp_path):
    evaluate = ["evaluate", MODEL, VALIDATION, "--batch-size", 256]
    _, base, _ = run(*evaluate, "--json", tmp_path / "base.json")
    status, out, _ = run(*evaluate, "--adapter", pipeline[0] / "two", "--json", tmp_path / "edited.json")
    before, after = (read(tmp_path / name)["measures"]["mc1"] for name in ("base.json", "edited.json"))
    assert status == 0 and after["value"] >= before["value"] + 0.06 and after["base"] == before["value"]
    assert f"{100 * after['value']:.2f}" in out and f"{100 * before['value']:.2f}" in base


@pytest.mark.parametrize(
    "changes",
    [{"gate": 0.1}, {"alpha": 0.7}, {"rotation": "reflection"}, {"token_scope": "last"}, {"gate": 0, "alpha": 2}],
    ids=str,
)
def test_selection_sets_how_the_layers_edit(stores, pipeline, run, tmp_path, changes):
    options = [part for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", value)]
    status, *_ = run("select", MODEL, pipeline[0] / "two", stores / "eval", tmp_path / "out", "--top-k", 2, *options)
    config = read(tmp_path / "out" / "adapter_config.json")
    assert status == 0 and {name: config[name] for name in EDIT} == {**EDIT, **changes}
    run("select", MODEL, tmp_path / "out", stores / "eval", tmp_path / "again", "--top-k", 1)
    config = read(tmp_path / "again" / "adapter_config.json")
    assert {name: config[name] for name in EDIT} == {**EDIT, **changes}


def test_a_gate_of_zero_is_the_base_model(stores, pipeline, run, tmp_path):
    run("select", MODEL, pipeline[0] / "all", stores / "eval", tmp_path / "out", "--top-k", 5, "--gate", 0)
    evaluate = ["evaluate", MODEL, VALIDATION, "--limit", 10, "--no-base"]
    (_, base, _), (_, closed, _), (_, edited, _) = (
        run(*evaluate, *options)
        for options in ([], ["--adapter", tmp_path / "out"], ["--adapter", pipeline[0] / "all"])
    )
    closed, edited = (found.partition("\n\nDamage: not measured.")[0] + "\n" for found in (closed, edited))
    assert base == closed != edited


def test_a_threshold_keeps_the_layers_that_reach_it(stores, pipeline, run, tmp_path):
    accuracy = read(pipeline[0] / "select.json")["accuracy"]
    threshold = sorted(accuracy.values())[2]
    run("select", MODEL, pipeline[0] / "all", stores / "eval", tmp_path / "out", "--threshold", threshold)
    assert blocks(tmp_path / "out") == {int(index) for index, value in accuracy.items() if value >= threshold}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--layers", "1,3"], {"layers_to_transform": [1, 3]}),
        (["--num-angle-layers", 2, "--angle-hidden-size", 8], {"num_angle_layers": 2, "angle_hidden_size": 8}),
        (["--bf16"], {"layers_to_transform": [0, 1, 2, 3, 4]}),
        (["--optimizer", "sgd", "--scheduler", "constant", "--warmup", 0], {"num_angle_layers": 4}),
    ],
    ids=str,
)
def test_options_of_the_training(stores, run, tmp_path, options, expected):
    status, out, _ = run("train-hpr", MODEL, stores / "small", tmp_path / "out", "--max-steps", 2, "--cpu", *options)
    config = read(tmp_path / "out" / "adapter_config.json")
    assert status == 0 and "2 steps on 80 token pairs" in out
    assert {name: config[name] for name in expected} == expected
    assert blocks(tmp_path / "out") == set(config["layers_to_transform"])
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


@pytest.fixture
def structure(tmp_path, monkeypatch):
    """A copy of the demonstration model's folder without its weights, which nobody may load."""

    def load(*args, **kwargs):
        pytest.fail("the base model was loaded")

    folder = tmp_path / "structure"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return folder


@pytest.mark.parametrize("at_hand", [True, False])
def test_base_weights_are_not_loaded(stores, structure, run, tmp_path, caplog, at_hand):
    model, all_layers = MODEL if at_hand else structure, tmp_path / "all"
    training = ["train-hpr", model, stores / "small", all_layers, "--eval-store", stores / "eval"]
    assert run(*training, "--max-steps", 2)[0] == 0
    of_training = caplog.text
    caplog.clear()
    assert run("select", model, all_layers, stores / "eval", tmp_path / "one", "--top-k", 1)[0] == 0
    warned = [str(stores / name) in text for name, text in (("small", of_training), ("eval", caplog.text))]
    assert warned == [not at_hand] * 2
    assert of_training.count("cannot be compared with the weights of the model") == (0 if at_hand else 2)


def test_weights_of_another_model_are_noticed(stores, pipeline, run, tmp_path, demo_model, demo_tokenizer, monkeypatch):
    demo_model.get_input_embeddings().weight.data.mul_(1.5)
    demo_model.save_pretrained(tmp_path / "other")
    demo_tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    training = ["train-hpr", tmp_path / "other", stores / "small", tmp_path / "out", "--max-steps", 1]
    line = refused(run, *training)
    assert "was collected from another model" in line and "--allow-fingerprint-mismatch" in line
    assert run(*training, "--allow-fingerprint-mismatch")[0] == 0
    selecting = ["select", tmp_path / "other", pipeline[0] / "all", stores / "eval", tmp_path / "one", "--top-k", 1]
    assert "--allow-fingerprint-mismatch" in refused(run, *selecting) and not (tmp_path / "one").exists()
    assert run(*selecting, "--allow-fingerprint-mismatch")[0] == 0


class Killed(BaseException):
    """What ends a training in this process where a signal would end a process."""


@pytest.fixture
def interrupt(run, monkeypatch):
    """Runs a command until a training has saved so many checkpoints."""

    def interrupt(saves: int, *arguments) -> None:
        save, saved = HPRTrainer._save_checkpoint, []

        def save_or_stop(self, *args, **kwargs):
            save(self, *args, **kwargs)
            saved.append(self.state.global_step)
            if len(saved) == saves:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(HPRTrainer, "_save_checkpoint", save_or_stop)
            run(*arguments)

    return interrupt


EPOCHS = 12


def training(stores: Path, out: Path, *options, epochs: int = 4) -> list:
    fixed = ["--eval-store", stores / "eval", "--learning-rate", 5e-3, "--cpu", "--epochs", epochs]
    return ["train-hpr", MODEL, stores / "small", out, *fixed, *options]


@pytest.fixture(scope="module")
def whole(stores, tmp_path_factory):
    """The adapter of `training`, in one go."""
    folder = tmp_path_factory.mktemp("whole")
    command(*training(stores, folder / "out"))
    return folder / "out"


def killed_after_a_checkpoint(arguments: list, out: Path) -> int:
    """Exit status of a process that was killed as soon as it had saved a checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    started = [sys.executable, "-m", "peft_edit.cli", *map(str, arguments)]
    with subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            end = time.monotonic() + LONGEST
            while process.poll() is None and time.monotonic() < end:
                if any(out.glob("checkpoint-*/trainer_state.json")):
                    break
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
    return process.returncode


def test_a_killed_training_goes_on(stores, run, tmp_path):
    out, expected = tmp_path / "killed", tmp_path / "whole"
    assert killed_after_a_checkpoint(training(stores, out, epochs=EPOCHS), out) == -signal.SIGKILL
    assert "adapter_model.safetensors" not in names(out) and list(out.glob("checkpoint-*"))
    started = len(list(stores.iterdir()))
    status, resumed, _ = run(*training(stores, out, epochs=EPOCHS))
    _, printed, _ = run(*training(stores, expected, epochs=EPOCHS))
    assert status == 0 and resumed.replace(str(out), "") == printed.replace(str(expected), "")
    assert same(weights(out), weights(expected)) and names(out) == TRAINED
    assert len(list(stores.iterdir())) == started
    accuracies = [
        [entry["eval_probe_accuracy"] for entry in read(folder / "train_hpr.json")["history"] if "eval_loss" in entry]
        for folder in (out, expected)
    ]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == EPOCHS + 1


@pytest.mark.parametrize("saves", [1, 3, 4], ids=["after the first epoch", "later", "after the last epoch"])
def test_an_interrupted_training_ends_like_a_whole_one(stores, whole, run, interrupt, tmp_path, saves):
    interrupt(saves, *training(stores, tmp_path / "out"))
    assert run(*training(stores, tmp_path / "out"))[0] == 0
    assert same(weights(tmp_path / "out"), weights(whole)) and names(tmp_path / "out") == TRAINED


@pytest.mark.parametrize("state", [None, "", '{"best_global'], ids=["missing", "empty", "cut off"])
def test_a_checkpoint_that_was_being_saved_is_ignored(stores, whole, run, interrupt, tmp_path, state):
    interrupt(2, *training(stores, tmp_path / "out"))
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    (last / "trainer_state.json").unlink()
    if state is not None:
        (last / "trainer_state.json").write_text(state)
    status, _, err = run(*training(stores, tmp_path / "out"))
    assert status == 0, err
    assert same(weights(tmp_path / "out"), weights(whole)) and names(tmp_path / "out") == TRAINED


def test_patience_counts_over_an_interruption(stores, run, interrupt, tmp_path):
    options = ["--learning-rate", 0, "--patience", 2]
    for name in ("whole", "interrupted"):
        if name == "interrupted":
            interrupt(2, *training(stores, tmp_path / name, *options))
        assert run(*training(stores, tmp_path / name, *options))[0] == 0
    whole, resumed = (read(tmp_path / name / "train_hpr.json") for name in ("whole", "interrupted"))
    assert whole["steps"] == 3 * 5 == resumed["steps"]


def test_a_training_goes_on_from_another_working_directory(stores, run, interrupt, tmp_path, monkeypatch):
    options = ["--learning-rate", 0.05, "--scheduler", "constant"]
    run(*training(stores, tmp_path / "whole", *options, epochs=5))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    interrupt(5, *training(stores, Path("out"), *options, epochs=5))
    monkeypatch.chdir(tmp_path)
    assert run(*training(stores, Path("here/out"), *options, epochs=5))[0] == 0
    assert same(weights(Path("here/out")), weights(tmp_path / "whole"))


@pytest.fixture(scope="module")
def interrupted(stores, tmp_path_factory):
    """Folder of an interrupted training."""
    out = tmp_path_factory.mktemp("interrupted") / "out"

    def stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise Killed

    save = HPRTrainer._save_checkpoint
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HPRTrainer, "_save_checkpoint", stop)
        command(*training(stores, out))
    close_bars()
    return out


@pytest.mark.parametrize(
    ("option", "value", "before"),
    [
        ("--seed", 1, 42),
        ("--epochs", 9.0, 4.0),
        ("--batch-size", 8, 16),
        ("--learning-rate", 0.001, 0.005),
        ("--layers", "1,3", None),
        ("--optimizer", "sgd", "adamw_torch_fused"),
        ("--patience", 3, None),
    ],
)
def test_other_arguments_do_not_resume(stores, interrupted, run, option, value, before):
    there = contents(interrupted)
    line = refused(run, *training(stores, interrupted, option, value))
    assert re.search(option.strip("-").replace("-", "[-_]"), line) and "--no-resume" in line
    assert str(before) in line and str(value) in line and line.count(" there, ") == 1
    assert contents(interrupted) == there


def test_no_resume_begins_again(stores, interrupted, whole, run, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    options = ["--seed", 1, "--no-resume"]
    run(*training(stores, tmp_path / "fresh", "--seed", 1))
    assert run(*training(stores, tmp_path / "out", *options))[0] == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "fresh")) and names(tmp_path / "out") == TRAINED
    assert not same(weights(tmp_path / "out"), weights(whole))


def test_a_complete_run_replaces_the_adapter(stores, run, tmp_path):
    short = ["train-hpr", MODEL, stores / "small", tmp_path / "out", "--max-steps", 2]
    found = []
    for seed in (1, 2, 1):
        assert run(*short, "--seed", seed)[0] == 0
        found.append(weights(tmp_path / "out"))
        (tmp_path / "out" / "README.md").write_text("mine")
    assert same(found[0], found[2]) and not same(found[0], found[1])
    run("select", MODEL, tmp_path / "out", stores / "eval", tmp_path / "one", "--top-k", 1)
    (tmp_path / "one" / "README.md").write_text("mine")
    run("select", MODEL, tmp_path / "out", stores / "eval", tmp_path / "one", "--top-k", 2)
    assert len(blocks(tmp_path / "one")) == 2
    assert [(tmp_path / name / "README.md").read_text() for name in ("out", "one")] == ["mine", "mine"]
    assert names(tmp_path) == {"out", "one"}


def test_real_questions_run_through_all_commands(run, tmp_path):
    status, out, _ = run("collect", MODEL, *REAL_QUESTIONS, tmp_path / "store", *FOR_HPR)
    assert status == 0 and "of 40 questions, 5 layers" in out
    assert run("collect", MODEL, *REAL_QUESTIONS, tmp_path / "few", *FOR_HPR, "--limit", 5)[0] == 0
    training = ["train-hpr", MODEL, tmp_path / "store", tmp_path / "all", "--eval-store", tmp_path / "few"]
    status, out, _ = run(*training, "--max-steps", 4)
    assert status == 0 and "4 steps" in out
    assert run("select", MODEL, tmp_path / "all", tmp_path / "few", tmp_path / "one", "--top-k", 1)[0] == 0
    status, out, _ = run("evaluate", MODEL, *REAL_QUESTIONS, "--adapter", tmp_path / "one", "--limit", 10)
    assert status == 0 and "Questions: 10" in out


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_splits_of_the_paper(run, tmp_path, split):
    assert "which holds 40 rows" in refused(run, "evaluate", MODEL, *REAL_QUESTIONS, "--split", split)
    header, *questions = Path(REAL).read_text(encoding="utf-8-sig").splitlines(keepends=True)
    (tmp_path / "many.csv").write_text(header + "".join(questions * 21), encoding="utf-8")
    data = ["truthful_qa", "--data-files", tmp_path / "many.csv", "--split", split]
    splits = read(Path(cli.__file__).parents[1] / "data" / "truthfulqa_hpr_splits.json")
    assert run("collect", MODEL, *data, tmp_path / "store", *FOR_HPR, "--limit", 3)[0] == 0
    assert ActivationStore(tmp_path / "store").questions().unique().tolist() == sorted(splits[split][:3])
    run("evaluate", MODEL, *data, "--limit", 3, "--json", tmp_path / "results.json")
    assert [question["id"] for question in read(tmp_path / "results.json")["questions"]] == splits[split][:3]


BAD_STORES = [
    ("last", "tokens"),
    ("mlp", "output of 'mlp'"),
    ("empty", "is no activation store"),
    ("nowhere", "is no activation store"),
]
BAD_TRAININGS = [
    *(([], name, expected) for name, expected in BAD_STORES),
    ([], "hidden_size_32", "hidden size 32"),
    (["--layers", "9"], "small", "layers 0 to 4, got 9"),
    (["--layers", "x"], "small", "--layers must be numbers"),
    (["--layers", "0-2"], "layers_1_3", "[0, 2]"),
    (["--patience", 1], "small", "--patience needs --eval-store"),
    (["--num-angle-layers", 0], "small", "--num-angle-layers must be an integer from 1 to 1,000, got 0"),
    (["--angle-hidden-size", 0], "small", "--angle-hidden-size must be an integer from 1 to 1,000,000, got 0"),
    (["--target-modules", "no_such"], "small", "no_such"),
    (["--scheduler", "nonsense"], "small", "nonsense"),
    (["--scheduler", "reduce_lr_on_plateau"], "small", "reduce_lr_on_plateau"),
    (["--scheduler", "cosine_with_min_lr"], "small", "min_lr"),
    (["--scheduler", "warmup_stable_decay"], "small", "warmup_stable_decay"),
    (["--optimizer", "nonsense"], "small", "nonsense"),
    (["--optimizer", "lomo"], "small", "lomo"),
]


@pytest.mark.parametrize(("options", "store", "expected"), BAD_TRAININGS, ids=str)
def test_bad_input_of_the_training(stores, run, tmp_path, options, store, expected):
    arguments = ["train-hpr", MODEL, stores / store, tmp_path / "out", "--max-steps", 2, "--cpu", *options]
    assert expected in refused(run, *arguments)


@pytest.mark.parametrize("option", ["--max-steps", "--batch-size", "--patience"])
def test_numbers_below_their_range(stores, run, tmp_path, option):
    status, _, err = run("train-hpr", MODEL, stores / "small", tmp_path / "out", "--cpu", option, 0)
    assert (
        status == 2
        and f"peft-edit: {option} must be an integer of at least 1, got 0" in err
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(("store", "expected"), [*BAD_STORES, ("layers_1_3", "[1, 3]")])
@pytest.mark.parametrize("name", ["train-hpr", "select"])
def test_held_out_stores_that_do_not_suit(stores, pipeline, run, tmp_path, name, store, expected):
    arguments = {
        "train-hpr": [stores / "small", tmp_path / "out", "--eval-store", stores / store, "--max-steps", 1],
        "select": [pipeline[0] / "all", stores / store, tmp_path / "out", "--top-k", 1],
    }
    assert expected in refused(run, name, MODEL, *arguments[name])


@pytest.mark.parametrize("options", [["--layers", "9"], ["--num-angle-layers", 0], ["--eval-store", "mlp"]], ids=str)
@pytest.mark.parametrize("there", ["nothing", "adapter", "interrupted"])
def test_a_refused_training_changes_nothing(stores, pipeline, interrupted, run, tmp_path, options, there):
    out = tmp_path / "out"
    if there != "nothing":
        shutil.copytree(pipeline[0] / "all" if there == "adapter" else interrupted, out)
    before = contents(tmp_path)
    options = [stores / part if part == "mlp" else part for part in options]
    refused(run, "train-hpr", MODEL, stores / "small", out, "--no-resume", *options)
    assert contents(tmp_path) == before and out.exists() == (there != "nothing")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "got neither"),
        (["--top-k", 1, "--threshold", 0.5], "got both"),
        (["--top-k", 0], "from 1 to 5"),
        (["--top-k", 99], "from 1 to 5"),
        (["--threshold", 1.5], "threshold must be an accuracy in [0, 1], got 1.5"),
        (["--threshold", 0.9999], "no probe is at least 0.9999 accurate"),
        (["--top-k", 1, "--gate", 2], "gate must be a number in [0, 1], a probability, got 2.0"),
        (["--top-k", 1, "--alpha", -1], "alpha must be a number of 0 or more and finite, got -1.0"),
        (["--top-k", 1, "--rotation", "x"], "rotation must be one of 'angle', 'reflection', got 'x'"),
        (["--top-k", 1, "--token-scope", "x"], "--token-scope must be one of 'all', 'last', got 'x'"),
    ],
    ids=str,
)
def test_bad_options_of_the_selection(stores, pipeline, run, tmp_path, options, expected):
    line = refused(run, "select", MODEL, pipeline[0] / "all", stores / "eval", tmp_path / "out", *options)
    assert expected in line and not (tmp_path / "out").exists()


def test_an_adapter_is_not_selected_into_itself(stores, pipeline, run):
    folder = pipeline[0] / "all"
    before = contents(folder)
    for out in (folder, folder.parent / "two" / ".." / "all"):
        assert "choose another folder" in refused(run, "select", MODEL, folder, stores / "eval", out, "--top-k", 1)
    assert contents(folder) == before


def test_only_hpr_adapters_have_layers_to_select(stores, sea, run, tmp_path):
    selecting = [stores / "eval", tmp_path / "out", "--top-k", 1]
    assert "is no HPR adapter" in refused(run, "select", MODEL, sea, *selecting)
    assert "has no adapter_config.json" in refused(run, "select", MODEL, stores / "empty", *selecting)
    assert str(tmp_path / "nowhere") in refused(run, "select", MODEL, tmp_path / "nowhere", *selecting)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors, name: tensors.pop(name), "1 missing tensors"),
        (lambda tensors, name: tensors.update(extra=torch.zeros(2)), "1 extra tensors, the first is extra"),
        (lambda tensors, name: tensors.update({name: tensors[name][1:].clone()}), "size mismatch"),
        (lambda tensors, name: [t.fill_(torch.nan) for key, t in tensors.items() if "probe" in key], "not finite"),
        (lambda tensors, name: [t.fill_(torch.nan) for key, t in tensors.items() if "angle" in key], "not finite"),
    ],
    ids=["missing", "extra", "misshapen", "probes not finite", "angle networks not finite"],
)
def test_damaged_adapters_are_not_selected_from(stores, pipeline, run, tmp_path, change, expected):
    adapter = damaged(pipeline[0] / "all", tmp_path / "adapter", change)
    assert expected in refused(run, "select", MODEL, adapter, stores / "eval", tmp_path / "out", "--top-k", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "missing"])
def test_files_of_tensors_that_cannot_be_read(stores, pipeline, run, tmp_path, cut):
    adapter = damaged(pipeline[0] / "all", tmp_path / "adapter", lambda tensors, name: None)
    file = adapter / "adapter_model.safetensors"
    if cut:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    line = refused(run, "select", MODEL, adapter, stores / "eval", tmp_path / "out", "--top-k", 1)
    assert str(adapter) in line and ("are damaged" if cut else "adapter_model.safetensors") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train-hpr", "select"])
def test_activations_that_are_not_finite(stores, pipeline, run, tmp_path, name):
    arguments = {
        "train-hpr": [stores / "nan", tmp_path / "out", "--epochs", 1, "--cpu"],
        "select": [pipeline[0] / "all", stores / "nan", tmp_path / "out", "--top-k", 1],
    }
    status, out, err = run(name, MODEL, *arguments[name])
    assert status == 2 and not out and "Warning" not in err
    assert [line for line in err.splitlines() if line.startswith("peft-edit: ") and "layer 2" in line]


@pytest.mark.parametrize("name", ["train-hpr", "select"])
def test_foreign_folders_and_files_are_left_alone(stores, pipeline, run, tmp_path, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    start, end = {
        "train-hpr": ([stores / "small"], ["--max-steps", 1]),
        "select": ([pipeline[0] / "all", stores / "eval"], ["--top-k", 1]),
    }[name]
    for out, options, expected in (
        ("notes", [], "holds something else"),
        ("notes/notes.txt", [], "is a file"),
        ("out", ["--json", tmp_path], "is a folder"),
        ("out", ["--json", tmp_path / "notes" / "notes.txt" / "x.json"], "lies below the file"),
    ):
        assert expected in refused(run, name, MODEL, *start, tmp_path / out, *end, *options)
    assert contents(tmp_path) == before and names(tmp_path) == {"notes"}


@pytest.fixture(scope="module")
def last_token(stores, pipeline):
    """An adapter whose result depends on padding."""
    out = pipeline[0] / "last_token"
    command("select", MODEL, pipeline[0] / "all", stores / "eval", out, "--top-k", 1, "--token-scope", "last")
    return out


def test_an_edit_that_depends_on_padding_is_not_evaluated(stores, last_token, run, tmp_path):
    evaluate = ["evaluate", MODEL, VALIDATION, "--limit", 3, "--adapter"]
    assert "depends on padding" in refused(run, *evaluate, last_token)
    run("select", MODEL, last_token, stores / "eval", tmp_path / "all", "--top-k", 1, "--token-scope", "all")
    assert run(*evaluate, tmp_path / "all")[0] == 0


def test_messages_tell_which_store_to_collect(stores, run, tmp_path):
    line = refused(run, "train-hpr", MODEL, stores / "last", tmp_path / "out")
    assert "collect with --tokens answer" in line and "tokens='answer'" not in line


def test_messages_advise_options_that_the_command_has(stores, pipeline, last_token, run, tmp_path):
    line = refused(run, "evaluate", MODEL, VALIDATION, "--limit", 3, "--adapter", last_token)
    assert "select" in line and "--token-scope all" in line
    adapter = pipeline[0] / "all"
    line = refused(run, "select", MODEL, adapter, stores / "layers_1_3", tmp_path / "out", "--top-k", 1)
    assert "set --layers" not in line


def test_messages_do_not_advise_python(stores, sea, run, tmp_path):
    line = refused(run, "select", MODEL, sea, stores / "eval", tmp_path / "out", "--top-k", 1)
    assert "HPRConfig" not in line


def test_two_processes_train_one_adapter(stores, run, tmp_path):
    one, two = ([*training(stores, tmp_path / n, epochs=2), "--json", tmp_path / f"{n}.json"] for n in ("one", "two"))
    (out, err), (other_out, other_err) = launch(tmp_path / "printed", "peft_edit.cli", 2, *two, "--batch-size", 8)
    assert "Adapter, 10 steps" in out and not other_out and "100%|" in err and "100%|" not in other_err
    assert run(*one, "--batch-size", 16)[0] == 0
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert expected.keys() == found.keys() and names(tmp_path / "two") == TRAINED
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    expected, found = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert found["steps"] == expected["steps"] == 2 * 5
    assert found["eval_probe_accuracy"] == pytest.approx(expected["eval_probe_accuracy"], abs=1e-5)


@pytest.mark.parametrize("content", ["lora", "sea", "foreign checkpoints"])
@pytest.mark.parametrize("name", ["train-hpr", "select"])
def test_what_others_made_is_left_alone(stores, pipeline, run, tmp_path, name, content):
    out = tmp_path / "out"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "precious.bin").write_text("mine")
    if content != "foreign checkpoints":
        (out / "adapter_config.json").write_text(json.dumps({"peft_type": content.upper()}))
    elif name == "train-hpr":
        (out / "adapter_config.json").write_bytes((pipeline[0] / "all" / "adapter_config.json").read_bytes())
    before = contents(out)
    arguments = {
        "train-hpr": [stores / "small", out, "--max-steps", 1, "--cpu"],
        "select": [pipeline[0] / "all", stores / "eval", out, "--top-k", 1],
    }
    assert "choose another folder" in refused(run, name, MODEL, *arguments[name])
    assert contents(out) == before


def test_a_store_that_was_collected_again_is_not_gone_on_with(stores, run, interrupt, tmp_path):
    shutil.copytree(stores / "small", tmp_path / "store")
    training = ["train-hpr", MODEL, tmp_path / "store", tmp_path / "out", "--cpu", "--epochs", 3]
    interrupt(1, *training)
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(json.dumps({**read(meta), "data_fingerprint": "0123456789abcdef"}))
    assert "(data_fingerprint is" in (line := refused(run, *training)) and "'0123456789abcdef' here" in line


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_an_incomplete_checkpoint_is_not_gone_on_from(stores, interrupted, whole, run, tmp_path, file, how):
    shutil.copytree(interrupted, tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    if how == "cut off":
        (checkpoint / file).write_bytes(content[: len(content) // 2])
    assert run(*training(stores, tmp_path / "out"))[0] == 0
    assert same(weights(tmp_path / "out"), weights(whole))


def test_a_failed_training_keeps_the_record_of_the_one_before(stores, pipeline, run, tmp_path):
    shutil.copytree(pipeline[0] / "all", tmp_path / "out")
    before = contents(tmp_path / "out")
    line = refused(run, "train-hpr", MODEL, stores / "nan", tmp_path / "out", "--cpu", "--epochs", 2)
    assert "the training loss of layer 2" in line
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
