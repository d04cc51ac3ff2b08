"""The snippets of the README and of the pages in examples/ run, and print what is shown."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_CARDS, EXAMPLES = REPOSITORY / "model_cards", REPOSITORY / "examples"
NUMBER = re.compile(r"-?\d+\.\d+|[+]\d+\.\d+")


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
PAGES = {path.relative_to(EXAMPLES).as_posix(): path.read_text("utf-8") for path in sorted(EXAMPLES.rglob("*.md"))}


def assert_shown(printed: str, shown: str) -> None:
    """The lines are the same; figures of what was trained may differ a little on another processor."""
    for line, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
        if "HPR" not in line:
            assert line == expected
            continue
        assert NUMBER.sub("", line).split() == NUMBER.sub("", expected).split()
        for a, b in zip(NUMBER.findall(line), NUMBER.findall(expected), strict=True):
            assert abs(float(a) - float(b)) <= 6, line


def run_snippets(blocks: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Run the Python blocks in one namespace. Returns what each printed, and what the block behind it shows."""
    namespace, outputs = {}, []
    for (kind, code), (then, shown) in pairwise([*blocks, ("", "")]):
        if kind != "python":
            continue
        assert then == "text", f"no output is shown of {code}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        # A Trainer prints its logs.
        kept = [line for line in printed.getvalue().splitlines() if not line.strip().startswith("{'")]
        outputs.append(("\n".join(kept), shown))
    return outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder in which the README's snippets were run, and their outputs, as of `run_snippets`."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        outputs = run_snippets(BLOCKS)
    return folder, outputs


def test_python_snippets_print_what_the_readme_shows(made):
    folder, outputs = made
    assert len(outputs) >= 2
    for printed, shown in outputs:
        assert_shown(printed, shown)
    size = (folder / "sea-truthful" / "adapter_model.safetensors").stat().st_size
    assert f"tensors of {round(size / 1000)} KB" in README


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "```python" in text])
def test_python_snippets_print_what_a_page_shows(made, name, monkeypatch):
    """Each page by itself, where the README's snippets ran."""
    monkeypatch.chdir(made[0])
    for printed, shown in run_snippets(blocks_of(PAGES[name])):
        assert_shown(printed, shown)


def run_commands(snippet, folder, monkeypatch, capsys) -> str:
    """Bash reads the commands; they run in this process, for the imports of a new one take longer than most of them.
    Returns what they print."""
    (script,) = entry_points(group="console_scripts", name="peft-edit")
    main = script.load()
    exec(re.search(r'python -c "(.*)"', snippet)[1])
    printing = f"""python() {{ echo {shlex.quote(capsys.readouterr().out)}; }}
    peft-edit() {{ printf '%q ' "$@"; echo; }}
    """
    lines = subprocess.check_output(["bash", "-euo", "pipefail", "-c", printing + snippet], text=True)
    monkeypatch.chdir(folder)
    for line in lines.splitlines():
        monkeypatch.setattr(sys, "argv", ["peft-edit", *shlex.split(line)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, line
    return capsys.readouterr().out


def test_command_line_snippet_runs(tmp_path, monkeypatch, capsys):
    (snippet,) = (code for kind, code in BLOCKS if kind == "bash" and "peft-edit collect" in code)
    printed = run_commands(snippet, tmp_path, monkeypatch, capsys)
    sea, hpr = map(float, re.findall(r"^MC1 +([\d.]+) ", printed, flags=re.MULTILINE))
    assert f"{sea:.2f}" == "66.67" and hpr > 55
    accuracies = re.findall(r"^\d  +(0\.\d+) ", printed, flags=re.MULTILINE)
    assert len(accuracies) >= 5 and min(map(float, accuracies)) > 0.8
    assert (tmp_path / "results.json").exists()


def test_the_page_about_choosing_shows_what_its_commands_print(tmp_path, monkeypatch, capsys):
    (_, snippet), (_, shown), *_ = blocks_of(PAGES["choosing.md"])
    printed = run_commands(snippet, tmp_path, monkeypatch, capsys)
    table = [line.rstrip() for line in printed.splitlines()]
    start = next(place for place, line in enumerate(table) if line.startswith("layers"))
    shown = shown.splitlines()
    assert table[start : start + len(shown)] == shown
    assert (tmp_path / "sea-mild" / "adapter_config.json").exists()


def test_the_page_about_the_chat_shows_what_it_prints(made, monkeypatch, capsys):
    from peft_edit.cli import main
    from peft_edit.demo import ASSETS

    shown = next(text for kind, text in blocks_of(PAGES["chat.md"]) if kind == "text")
    typed = [line.removeprefix("> ") for line in shown.splitlines() if line.startswith("> ")]
    monkeypatch.chdir(made[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    monkeypatch.setattr(sys, "argv", ["peft-edit", "chat", str(ASSETS / "model"), "--adapter", "sea-truthful"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and capsys.readouterr().out == shown


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
    base, *_, retaining, paper, reflection, kept = results["rows"]
    assert kept["mc1"] >= base["mc1"] + 0.1 and kept["perplexity_ratio"] <= 1.03
    assert paper["mc1"] >= base["mc1"] + 0.06 and reflection["mc1"] >= base["mc1"]
    assert retaining["mc1"] >= base["mc1"] + 0.1 and retaining["perplexity_ratio"] <= 1.03
    assert results["hpr_reloaded_difference"] == 0
    assert len(results["probe_accuracy"]) == 5 and min(results["probe_accuracy"].values()) > 0.8


def form(card: str) -> tuple[list[str], set[str], str]:
    """Headings and heads of tables of a card, and from how to load the adapter on all but whether it merges."""
    base = re.search(r"^base_model: (.*)$", card, flags=re.MULTILINE)[1]
    headings = re.findall(r"^## .*$", card, flags=re.MULTILINE)
    heads = set(re.findall(r"^(\|.*\|)\n\|[-:|]+\|$", card, flags=re.MULTILINE))
    closing = re.sub(r"(?im)^- .*merged.*\n", "", card[card.index("## How to load") :])
    return headings, heads, closing.replace(base, "the-base-model")


@pytest.mark.parametrize("method", ["sea", "hpr"])
def test_example_cards_have_the_form_that_the_command_gives(demonstration, monkeypatch, method):
    """They are of a model that the tests do not have; the demonstration's have the same sections and tables."""
    from peft_edit.cli import main

    monkeypatch.chdir(demonstration[0])
    folder = Path("peft-edit-demo")
    results = [part for name in ("base", method) for part in ("--results", str(folder / f"{name}.json"))]
    command = ["peft-edit", "card", str(folder / method), "--base-model", "your-name/peft-edit-demo", *results]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    written = (folder / method / "README.md").read_text(encoding="utf-8")
    shown = (MODEL_CARDS / f"{method}.md").read_text(encoding="utf-8")
    assert form(written) == form(shown)
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in shown
    assert not re.search(r"/(home|root|tmp|work)\b", shown)
