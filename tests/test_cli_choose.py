"""Sweeps and calibrations on the command line."""

import json

import pytest
from conftest import ASSETS
from peft import PeftConfig
from test_cli import MODEL, refused
from test_cli import fitted as fitted  # a fixture
from test_cli import run as run  # a fixture


VALIDATION = ASSETS / "validation.jsonl"


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join((ASSETS / "unrelated.txt").read_text().splitlines(keepends=True)[:8]))
    return file


def test_a_grid_may_stand_in_a_file_and_the_adapter_can_be_calibrated(fitted, run, texts, tmp_path):
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"store: {fitted / 'store'}\ntexts: {texts}\nlimit: 8\nbatch-size: 64\nbudget: {{kl_p95: 0.5}}\n"
        "grid:\n- layers: [last 1, 0-1]\n  energy: 0.9\n  centered: true\n"
        "- {layers: [last 1, 0-1], energy: 0.99, centered: true}\n"
    )
    sweep = ["sweep", MODEL, VALIDATION, tmp_path / "out", "--config", config]
    status, out, _ = run(*sweep, "--json", tmp_path / "sweep.json")
    assert status == 0 and '4 settings, 4 within the budget of {"kl_p95": 0.5}, 0 stopped early' in out
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["command"] == "sweep" and found["options"]["grid"][0]["layers"] == ["last 1", "0-1"]
    assert len(found["settings"]) == 4 and found["chosen"] in found["settings"]
    saved = PeftConfig.from_pretrained(tmp_path / "out")
    assert saved.positive_energy == found["chosen"]["setting"]["positive_energy"] and saved.centered
    assert run(*sweep)[1] == out  # nothing is left to run

    worst = max(row["side_effects"]["kl_p95"] for row in found["settings"])
    calibrate = ["calibrate", MODEL, tmp_path / "out", tmp_path / "mild", "--texts", texts]
    status, out, _ = run(*calibrate, "--kl-p95", worst / 1e3, "--tolerance", 0.2)
    assert status == 0 and "strength: 1 -> 0." in out and "logits were computed once" in out
    mild = PeftConfig.from_pretrained(tmp_path / "mild")
    assert mild.strength == mild.calibration["value"] < 1
    assert json.loads((tmp_path / "mild" / "calibration.json").read_text())["value"] == mild.strength
    status, out, _ = run(*calibrate, "--kl-p95", 100, "--memory", 0)
    assert status == 0 and "The largest strength that was to be tried, 1, is within the budget" in out
    assert "logits were computed again for each value" in out


def test_bad_input_is_refused(fitted, run, texts, tmp_path):
    sweep = ["sweep", MODEL, VALIDATION, tmp_path / "out", "--store", fitted / "store", "--limit", 8]
    assert "Missing option '--texts'" in refused(run, *sweep)
    sweep += ["--texts", texts]
    assert "--grid is missing" in refused(run, *sweep)
    assert "--grid has an axis 'energie'" in refused(run, *sweep, "--grid", '{"energie": 1}')
    assert "--grid must be a dict" in refused(run, *sweep, "--grid", "3")
    assert "retain_energy needs --retain" in refused(run, *sweep, "--grid", '{"retain_energy": 0.9}')
    assert "--budget must limit kl_p95" in refused(run, *sweep, "--grid", "{}", "--budget", '{"kl_p95": 0}')
    assert "no setting meets the budget" in refused(run, *sweep, "--grid", "{}", "--budget", '{"kl_p95": 1e-9}')
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    calibrate = ["calibrate", MODEL, fitted / "sea", tmp_path / "mild", "--texts", texts]
    assert "--kl-p95 must be a number above 0" in refused(run, *calibrate, "--kl-p95", 0)
    assert "--dial 'gate' is none of SEA" in refused(run, *calibrate, "--dial", "gate")
    assert not (tmp_path / "mild").exists()
