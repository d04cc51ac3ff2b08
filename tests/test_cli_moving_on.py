"""export-lora and convert on the command line."""

import json
from pathlib import Path

import pytest
import test_cli
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from test_cli import MODEL, refused
from tiny import CONFIGS, logits, vivid_model
from transformers import AutoModelForCausalLM

from peft_edit import HPRConfig, SEAConfig
from peft_edit.adapters.hub import _operations
from peft_edit.adapters.read import read_config
from peft_edit.cli import common


FIXTURES = Path(__file__).parent / "fixtures"
run = test_cli.run


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter of the demonstration model, fitted to nothing."""

    def write(name, config):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def test_export_lora(run, adapter, tmp_path):
    sea = adapter("sea", SEAConfig(init_weights=False, rescale="none"))
    status, out, err = run("export-lora", MODEL, sea, tmp_path / "lora", "--json", tmp_path / "results.json")
    assert status == 0 and "Warning" not in err
    assert "model.layers.4.mlp.down_proj           2           2     2                 0" in out
    assert out.splitlines()[-1] == f"LoRA adapter of rank 2, exact, 0.02 MB: {tmp_path / 'lora'}"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("command") == "export-lora" and results.pop("options")["adapter"] == str(sea)
    assert results == json.loads((tmp_path / "lora" / "sea_to_lora.json").read_text())
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder)
        for folder in (sea, tmp_path / "lora")
    ]
    with torch.no_grad():
        torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=0, atol=1e-5)


def test_export_lora_tells_what_it_leaves_out(run, adapter, tmp_path):
    sea = adapter("sea", SEAConfig(init_weights=False))
    status, out, err = run("export-lora", MODEL, sea, tmp_path / "lora", "--rank", 1)
    assert status == 0 and "Warning" not in err
    assert "Note: the export leaves out the edit's rescale='token': relative error " in out
    assert "; an adapter fitted with --rescale none exports exactly.\n" in out  # an option of fit-sea
    assert "Note: updates of rank up to 2 are truncated to rank 1: relative error of the updates " in out
    assert "LoRA adapter of rank 1, 0.01 MB" in out


def test_what_export_lora_refuses_before_it_loads_the_model(run, adapter, tmp_path, monkeypatch):
    hpr = adapter("hpr", HPRConfig())
    sea = adapter("sea", SEAConfig(init_weights=False, rescale="average"))
    monkeypatch.setattr(common, "load_model", None)
    out = tmp_path / "lora"
    assert "got one of HPR: it rotates each token" in refused(run, "export-lora", MODEL, hpr, out)
    assert "rescale='average' halves activations" in refused(run, "export-lora", MODEL, sea, out)
    assert "adapter of another method (HPR, not LORA)" in refused(run, "export-lora", MODEL, sea, hpr)
    assert refused(run, "export-lora", MODEL, tmp_path / "x", out) == f"peft-edit: there is no folder {tmp_path / 'x'}"
    assert "has no adapter_config.json" in refused(run, "export-lora", MODEL, tmp_path, out)
    assert "is a folder" in refused(run, "export-lora", MODEL, sea, out, "--json", tmp_path)
    for text in ('{"peft_type": "XYZ"}', "[]", "{"):
        (sea / "adapter_config.json").write_text(text)
        assert "is none that PEFT or peft_edit reads" in refused(run, "export-lora", MODEL, sea, out)
    assert not out.exists()


def test_export_lora_refuses_an_adapter_of_another_model(run, tmp_path):
    model = get_peft_model(vivid_model(), SEAConfig(init_weights=False, rescale="none"))
    model.save_pretrained(tmp_path / "sea")
    line = refused(run, "export-lora", MODEL, tmp_path / "sea", tmp_path / "lora")
    assert f"{tmp_path / 'sea'} does not fit the model: " in line
    assert not (tmp_path / "lora").exists()


@pytest.fixture
def bases(tmp_path):
    """Folders of configurations without weights, by the number of layers."""
    folders = {}
    for layers in (3, 4):
        config = CONFIGS["llama"]()
        config.update({"hidden_size": 64, "num_hidden_layers": layers})
        config.save_pretrained(tmp_path / f"base{layers}")
        folders[layers] = tmp_path / f"base{layers}"
    return folders


def test_convert_sea(run, bases, tmp_path):
    arguments = ("convert", bases[3], FIXTURES / "sea_ref_artifact", tmp_path / "sea")
    status, out, _ = run(*arguments, "--layers", "1-2", "--rescale", "none", "--json", tmp_path / "x.json")
    assert status == 0
    assert out.splitlines()[:3] == ["layer  rank +  rank -", "1           8       8", "2           9       9"]
    results = json.loads((tmp_path / "x.json").read_text())
    assert [line for line in out.splitlines() if line.startswith("Note: ")] == [
        "Note: " + note.replace("rescale='none'", "--rescale none") + "." for note in results["notes"]
    ]
    assert results["method"] == "SEA" and results["ranks"] == [[8, 8], [9, 9]] and len(results["notes"]) == 2
    config = json.loads((tmp_path / "sea" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases[3]) and config["rescale"] == "none"


def test_convert_hpr(run, bases, tmp_path):
    status, out, _ = run("convert", bases[4], FIXTURES / "hpr_ref_artifact", tmp_path / "hpr")
    assert status == 0 and out.startswith("Layers: 0, 1, 2, 3\nNote: the published code rotates by a quotient")
    assert out.splitlines()[-1] == f"HPR adapter, 0.05 MB: {tmp_path / 'hpr'}"


def test_what_convert_refuses(run, bases, tmp_path):
    sea, hpr, out = FIXTURES / "sea_ref_artifact", FIXTURES / "hpr_ref_artifact", tmp_path / "out"
    nothing = tmp_path / "nothing"
    assert "base4 has 4 layers of hidden size 64" in refused(run, "convert", bases[4], sea, out)
    assert "num_hidden_layers 4, " in refused(run, "convert", bases[3], hpr, out)
    assert refused(run, "convert", nothing, sea, out) == f"peft-edit: there is no folder {nothing}"
    assert refused(run, "convert", bases[3], nothing, out) == f"peft-edit: there is no folder {nothing}"
    assert "holds neither uu_positive.pt" in refused(run, "convert", bases[3], bases[3], out)
    assert "--rescale is for SEA" in refused(run, "convert", bases[4], hpr, out, "--rescale", "none")
    assert "got 'mean'" in refused(run, "convert", bases[3], sea, out, "--rescale", "mean")
    assert "--layers must be numbers" in refused(run, "convert", bases[3], sea, out, "--layers", "last")
    assert refused(run, "convert", bases[3], sea, out, "--layers", 7).endswith("got 7: lower --layers")
    assert not out.exists()


def test_the_card_and_the_upload_of_an_export(run, adapter, tmp_path):
    sea, lora = adapter("sea", SEAConfig(init_weights=False, rescale="none")), tmp_path / "lora"
    assert run("export-lora", MODEL, sea, lora)[0] == 0
    files = {name: tmp_path / f"{name}.json" for name in ("base", "edited")}
    for name, options in (("base", ()), ("edited", ("--adapter", lora))):
        assert run("evaluate", MODEL, test_cli.TEST, "--limit", 3, *options, "--json", files[name])[0] == 0
    given = [argument for file in files.values() for argument in ("--results", file)]
    status, out, err = run("card", lora, *given, "--base-model", "user/base")
    assert status == 0 and out == f"Card: {lora / 'README.md'}\n", err
    card = (lora / "README.md").read_text()
    assert "Measured on `test.jsonl`, 3 of 180 questions" in card and "| this adapter | " in card
    assert "is of another adapter" in refused(run, "card", sea, "--results", files["edited"])
    # What goes up names its repository, as the card of an edit does.
    files = _operations(NoReadme(), lora, {"": read_config(lora)}, "user/lora", None)
    readme = next(file.path_or_fileobj for file in files if file.path_in_repo == "README.md").decode()
    assert 'PeftModel.from_pretrained(base, "user/lora")' in readme


class NoReadme:
    """A repository without a README.md."""

    def hf_hub_download(self, *args, **kwargs):
        raise LocalEntryNotFoundError("none")
