"""lm-evaluation-harness by `peft-edit lm-eval`: its own command line, and the log-likelihoods of our evaluator."""

import json
import logging
import sys
from functools import partialmethod
from pathlib import Path

import lm_eval.utils
import pytest
import test_cli
import yaml
from conftest import ASSETS
from lm_eval.tasks import TaskManager
from peft import PeftModel, get_peft_model
from test_cli import MODEL, refused
from transformers import AutoModelForCausalLM

from peft_edit import HPRConfig, MeanDifferenceConfig, SEAConfig, evaluate_multiple_choice, load_contrast_set


run = test_cli.run
ROWS = 12
PAGE = Path(__file__).resolve().parents[1] / "examples" / "lm_eval.md"
# The task that the page shows.
TASK = yaml.safe_load(PAGE.read_text("utf-8").split("```yaml\n")[1].split("```")[0])
CONFIGS = {
    "none": None,
    "SEA": SEAConfig(init_weights=False),
    "HPR": HPRConfig(init_weights=False, gate=0.6),
    "mean difference": MeanDifferenceConfig(init_weights=False),
    "last token": HPRConfig(init_weights=False, token_scope="last"),
}


@pytest.fixture(autouse=True)
def own_logging(monkeypatch):
    """The harness logs to what standard error is when it first runs, which pytest has closed by the next test."""
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Arguments for the harness, of a task of our own, and its questions. The space between prompt and answer is the
    prompt's in every second row, and the answers' in the others."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # without the files of the harness' own tasks, which it takes half a minute to look through
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    lines = (ASSETS / "test.jsonl").read_text().splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    for place, row in enumerate(rows):
        if place % 2:
            row["prompt"] += " "
        else:
            row.update({name: [f" {answer}" for answer in row[name]] for name in ("positives", "negatives")})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    of_data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    (tasks / "myths.yaml").write_text(yaml.safe_dump({**TASK, **of_data, "target_delimiter": ""}))
    arguments = ["--tasks", "myths", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "5"]
    samples = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    return [*arguments, *samples], load_contrast_set(tmp_path / "questions.jsonl")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Name to the folder of a random adapter, or None."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = config and tmp_path_factory.mktemp("adapters") / "adapter"
        if config:
            get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config).save_pretrained(folders[name])
    return folders


def model_arguments(adapter):
    peft = f",peft={adapter}" if adapter else ""
    return ["--model", "hf", "--model_args", f"pretrained={MODEL}{peft}"]


@pytest.mark.parametrize("name", ["none", "SEA", "HPR", "mean difference"])
def test_the_harness_finds_our_log_likelihoods(name, adapters, task, run, tmp_path, demo_model, demo_tokenizer):
    arguments, questions = task
    status, out, _ = run("lm-eval", *model_arguments(adapters[name]), *arguments)
    assert status == 0 and "|myths|" in out.replace(" ", "")
    (file,) = (tmp_path / "out").rglob("samples_myths_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    model = PeftModel.from_pretrained(demo_model, adapters[name]) if adapters[name] else demo_model
    ours = evaluate_multiple_choice(model, demo_tokenizer, questions).questions
    assert len(samples) == len(ours) == ROWS
    for sample, question in zip(samples, ours, strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        answers = sample["doc"]["positives"] + sample["doc"]["negatives"]
        expected = [question.log_likelihoods[answer] for answer in answers]
        assert theirs == pytest.approx(expected, abs=1e-4)


def test_edits_change_what_the_harness_finds(adapters, demo_model, demo_tokenizer, task):
    _, questions = task
    found = [evaluate_multiple_choice(demo_model, demo_tokenizer, questions).questions[0].log_likelihoods]
    for name in ("SEA", "HPR", "mean difference"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), adapters[name])
        found.append(evaluate_multiple_choice(model, demo_tokenizer, questions).questions[0].log_likelihoods)
    first = [next(iter(scores.values())) for scores in found]
    assert all(abs(a - b) > 0.01 for i, a in enumerate(first) for b in first[:i])


def test_an_edit_of_the_last_token_is_refused(adapters, task, run):
    line = refused(run, "lm-eval", *model_arguments(adapters["last token"]), *task[0])
    assert "edits the last token of a forward pass only" in line and "token_scope='all'" in line


def test_arguments_are_the_harness_own(run):
    status, out, _ = run("lm-eval", "--help")
    assert status == 0 and "usage: lm-eval" in out and "COMMAND" in out
    before = list(sys.argv)
    status, out, _ = run("lm-eval", "run", "--help")
    assert status == 0 and "--model_args" in out and sys.argv[1:] == ["lm-eval", "run", "--help"] != before
    status, _, err = run("lm-eval", "run", "--no_such_option", "--", "1")
    assert status == 2 and "lm-eval: error: unrecognized arguments: --no_such_option" in err


def test_without_the_extra_one_line_says_what_to_install(run, monkeypatch):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(run, "lm-eval", "--help") == (
        "peft-edit: lm-eval needs the package lm_eval, which is not installed: pip install 'peft-edit[eval]'"
    )
