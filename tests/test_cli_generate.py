"""`peft-edit generate`, in this process: the file of answers, the table, and bad input."""

import json

import pytest
from test_cli import MODEL, TEST, refused
from test_cli import run as run  # a fixture
from test_cli_explain import adapter as adapter  # a fixture


SMALL = ["--limit", 3, "--max-new-tokens", 4]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_of_a_contrast_set(adapter, run, tmp_path):
    out, results = tmp_path / "answers.jsonl", tmp_path / "means.json"
    generate = ["generate", MODEL, TEST, out, "--adapter", adapter, *SMALL]
    status, shown, _ = run(*generate, "--json", results)
    rows, means = rows_of(out), json.loads(results.read_text())
    assert status == 0 and [row["model"] for row in rows] == ["base", "edited"] * 3
    assert shown.splitlines()[0].split() == ["model", "answers", "tokens", "finished", "log-likelihood"]
    assert shown.splitlines()[-1] == f"Answers: {out}"
    edited = [row["log_likelihood"] for row in rows[1::2]]
    assert means["models"]["edited"]["log_likelihood"] == pytest.approx(sum(edited) / 3)
    assert shown.splitlines()[2].split()[-1] == f"{sum(edited) / 3:.3f}"
    assert means["command"] == "generate" and means["run"] == rows[0]["run"]
    before = out.read_bytes()
    assert run(*generate)[1] == shown and out.read_bytes() == before
    status, _, _ = run(*generate[:3], tmp_path / "weaker.jsonl", *generate[4:], "--strength", 0, "--models", "edited")
    assert status == 0 and [r["answer"] for r in rows_of(tmp_path / "weaker.jsonl")] == [
        row["answer"] for row in rows[::2]
    ]


def test_the_best_of_several_by_a_function_of_this_folder(adapter, run, tmp_path, monkeypatch):
    (tmp_path / "liking.py").write_text("def short(row, answers):\n    return [-len(answer) for answer in answers]\n")
    (tmp_path / "prompts.txt").write_text("colour of sidi ?\nfood of koge ?\nplace of sidi ?\n")
    monkeypatch.chdir(tmp_path)
    options = ["--do-sample", "--temperature", 1.5, "--best-of", 3, "--score", "liking:short"]
    status, shown, err = run("generate", MODEL, "prompts.txt", "best.jsonl", "--skip", 1, *options, *SMALL)
    rows = rows_of(tmp_path / "best.jsonl")
    assert status == 0, err
    assert [row["id"] for row in rows] == [1, 2] and {row["model"] for row in rows} == {"base"}
    for row in rows:
        assert row["score"] == max(-len(candidate["answer"]) for candidate in row["candidates"]) == -len(row["answer"])
    assert shown.splitlines()[0].split()[-5:] == ["score", "of", "the", "first", "score"]


def test_bad_input_is_refused(adapter, run, tmp_path):
    out = tmp_path / "a.jsonl"
    start = ["generate", MODEL, TEST, out, *SMALL]
    assert "--strength needs --adapter" in refused(run, *start, "--strength", 2)
    assert "--best-of 2 needs answers that differ: pass --do-sample" in refused(run, *start, "--best-of", 2)
    assert "--top-k 3 is of a draw: pass --do-sample" in refused(run, *start, "--top-k", 3)
    assert "has no active adapter" in refused(run, *start, "--models", "both")
    assert "--score nothing:f: the module nothing cannot be imported" in refused(run, *start, "--score", "nothing:f")
    assert "there is no file nothing.txt of prompts" in refused(run, "generate", MODEL, "nothing.txt", out)
    (tmp_path / "prompts.txt").write_text("food of koge ?\n")
    line = refused(run, "generate", MODEL, tmp_path / "prompts.txt", out, "--split", "test")
    assert "--split test has no meaning for the file of prompts" in line
    assert "out" in (line := refused(run, "generate", MODEL, TEST, tmp_path)) and "is a folder" in line
    assert not out.exists()
    assert run(*start)[0] == 0
    line = refused(run, *start[:-1], 3)
    assert "choose another file, or pass --no-resume to replace it" in line
    assert run(*start[:-1], 3, "--no-resume")[0] == 0
