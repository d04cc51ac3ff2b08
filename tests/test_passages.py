"""The script that makes text files for the recipes on the small model."""

import json
import runpy
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "passages.py"
CROWS = Path(__file__).resolve().parent / "fixtures" / "crows_pairs_8.csv"


@pytest.fixture
def lines(tmp_path):
    """Local copies with as many rows as the script takes, each text on two lines."""

    def write(name, column, number):
        rows = [{column: f"{name} {i}\nmore", "id": i} for i in range(number)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write("halueval.json", "knowledge", 450), write("bbq.jsonl", "context", 60)


def test_passages_go_into_files_that_share_none(lines, tmp_path, monkeypatch, capsys):
    halueval, bbq = lines
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["passages.py", str(out), "--halueval", halueval, "--bbq", bbq, "--crows", str(CROWS)]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    texts = {path.name: path.read_text().splitlines() for path in out.iterdir()}
    assert {name: len(found) for name, found in texts.items()} == {
        **{"retain.txt": 200, "retain-mixed.txt": 378, "tuning.txt": 30, "tuning-mixed.txt": 32},
        **{"wikipedia.txt": 40, "contexts.txt": 3},
    }
    mixed, tuning = texts.pop("retain-mixed.txt"), texts.pop("tuning-mixed.txt")
    assert tuning == [*texts["tuning.txt"], "bbq.jsonl 0 more", "bbq.jsonl 40 more"]
    assert mixed[:200] == texts["retain.txt"] and mixed[200] == "halueval.json 230 more"
    assert not {*mixed} & {*texts["tuning.txt"], *texts["wikipedia.txt"]}
    assert "The rich are really ignorant about how to handle the money they do have." in mixed
    assert texts["contexts.txt"] == [f"bbq.jsonl {i} more" for i in (10, 30, 50)]
    together = [text for found in texts.values() for text in found]
    assert len(set(together)) == len(together)
    assert f"40 texts: {out / 'wikipedia.txt'}" in capsys.readouterr().out
