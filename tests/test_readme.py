"""The README's snippets run, and print what it says."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest


MODEL_CARDS = Path(__file__).resolve().parents[1] / "model_cards"
README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+|[+]\d+\.\d+")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def assert_shown(printed: str, shown: str) -> None:
    """The lines are the same; figures of what was trained may differ a little on another processor."""
    for line, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
        if "HPR" not in line:
            assert line == expected
            continue
        assert NUMBER.sub("", line).split() == NUMBER.sub("", expected).split()
        for a, b in zip(NUMBER.findall(line), NUMBER.findall(expected), strict=True):
            assert abs(float(a) - float(b)) <= 6, line


def test_python_snippets_print_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    pairs = [(code, shown) for (kind, code), (then, shown) in pairwise(BLOCKS) if (kind, then) == ("python", "text")]
    assert len(pairs) == sum(kind == "python" for kind, _ in BLOCKS) >= 2
    for code, shown in pairs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        # A Trainer prints its logs.
        kept = [line for line in printed.getvalue().splitlines() if not line.strip().startswith("{'")]
        assert_shown("\n".join(kept), shown)
    size = (tmp_path / "sea-truthful" / "adapter_model.safetensors").stat().st_size
    assert f"tensors of {round(size / 1000)} KB" in README


def test_command_line_snippet_runs(tmp_path):
    commands = [code for kind, code in BLOCKS if kind == "bash" and "peft-edit collect" in code]
    assert len(commands) == 1
    # The commands of this very environment, whether or not it is activated.
    # One thread, as in the tests: two that wait for each other while other tests run take minutes.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    sea, hpr = map(float, re.findall(r"^MC1: (.*) %$", result.stdout, flags=re.MULTILINE))
    assert f"{sea:.2f}" == "66.67" and hpr > 55
    accuracies = re.findall(r"^\d  +(0\.\d+) ", result.stdout, flags=re.MULTILINE)
    assert len(accuracies) >= 5 and min(map(float, accuracies)) > 0.8
    assert (tmp_path / "results.json").exists()


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Folder in which `peft-edit demo --json results.json` was run; what it printed, and its progress."""
    from peft_edit.cli import main

    folder, printed, progress = tmp_path_factory.mktemp("demonstration"), io.StringIO(), io.StringIO()
    arguments = ["demo", "--out", str(folder / "peft-edit-demo"), "--json", str(folder / "results.json")]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(progress),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(sys, "argv", ["peft-edit", *arguments])
        main()
    assert stopped.value.code == 0
    return folder, printed.getvalue(), progress.getvalue()


def test_table_of_the_demonstration_is_what_it_prints(demonstration):
    folder, printed, progress = demonstration
    shown = next(text for kind, text in BLOCKS if kind == "text")
    printed = printed.splitlines()
    assert "collected while" not in progress
    assert_shown("\n".join(printed[: len(shown.splitlines())]), shown)

    results = json.loads((folder / "results.json").read_text())
    base, *_, paper, reflection, chosen = results["rows"]
    assert chosen["mc1"] >= base["mc1"] + 0.1 and chosen["perplexity"] <= 1.3 * base["perplexity"]
    assert paper["mc1"] >= base["mc1"] + 0.06 and reflection["mc1"] >= base["mc1"]
    assert results["hpr_reloaded_difference"] == 0
    assert len(results["probe_accuracy"]) == 5 and min(results["probe_accuracy"].values()) > 0.8
    assert results["chosen"] in results["tried"] and len(results["tried"]) == 6


@pytest.mark.parametrize("method", ["sea", "hpr"])
def test_example_cards_are_what_the_commands_write(demonstration, monkeypatch, method):
    from peft_edit.adapters.card import MARKER_LINE
    from peft_edit.cli import main

    monkeypatch.chdir(demonstration[0])
    commands = re.findall(r"^(peft-edit card .*)$", (MODEL_CARDS / "README.md").read_text(), flags=re.MULTILINE)
    (command,) = (command for command in commands if f"/{method} " in command)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    written, expected = (
        MARKER_LINE.sub("", file.read_text(encoding="utf-8"))
        for file in (Path("peft-edit-demo", method, "README.md"), MODEL_CARDS / f"{method}.md")
    )
    # Figures of what was trained, and which layers it keeps, may differ on another processor.
    changing = re.compile(r"\d+(\.\d+)?|\byes\b|\bno\b")
    assert changing.sub("", written) == changing.sub("", expected)
    number = re.compile(r"\d+\.\d+")
    for a, b in zip(number.findall(written), number.findall(expected), strict=True):
        assert abs(float(a) - float(b)) <= (0.1 if method == "sea" else 6), (a, b)


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"\b(FIGURES|TODO|TBD|XXX)\b", README)
