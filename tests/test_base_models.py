"""Base models as people have them: with code of their own, as GGUF files, damaged or elsewhere; and one line for it."""

import builtins
import json
import shutil
import sys

import pytest
import torch
from conftest import ASSETS
from gguf_files import gguf_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import refused
from test_cli import run as run  # a fixture
from test_conversion import HPR, SEA, base
from tiny import logits
from transformers import AutoModelForCausalLM
from transformers.utils import import_utils as availability

from peft_edit import SEAConfig, cli, fingerprint, merge_checkpoint
from peft_edit.models.load import BaseModel, load_model, load_structure, load_tokenizer


PREFERENCES = [
    {"prompt": f"the {word}", "chosen": f"yes {word}", "rejected": f"no {word[::-1]}"} for word in ("hen", "she", "toe")
]


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PREFERENCES))
    return path


def done(run, *arguments):
    status, out, err = run(*arguments)
    assert status == 0, err
    return out


# Code of their own


CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

(pathlib.Path(r"{witness}")).touch()

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path):
    """A folder with the demonstration model as one of custom code, which leaves a witness when it runs."""
    return with_own_code(shutil.copytree(ASSETS / "model", tmp_path / "own"), tmp_path / "witness")


def with_own_code(folder, witness):
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.format(witness=witness))
    return folder


def test_own_code_runs_when_it_is_trusted_and_never_else(own_code, run, tmp_path, preferences):
    """Every command that loads a model, its structure or its tokenizer has the option, and records it nowhere."""
    store, adapter, out = tmp_path / "store", tmp_path / "adapter", tmp_path / "out"
    train, hpr, selected = tmp_path / "train", tmp_path / "hpr", tmp_path / "selected"
    tokens = ("--site", "block", "--tokens", "answer")
    commands = [
        ("collect", own_code, preferences, store, "--neutral", "prompt", "--layers", "0,1"),
        ("fit-sea", own_code, store, adapter, "--rescale", "none"),
        ("fit-mean-difference", own_code, store, tmp_path / "difference"),
        ("evaluate", own_code, preferences, "--adapter", adapter),
        ("export-lora", own_code, adapter, out),
        ("merge", own_code, adapter, tmp_path / "merged"),
        ("collect", own_code, preferences, train, *tokens),
        ("train-hpr", own_code, train, hpr, "--epochs", 1),
        ("select", own_code, hpr, train, selected, "--top-k", 1),
    ]
    for i, command in enumerate(commands):
        results = () if command[0] in ("merge",) else ("--json", tmp_path / f"{i}.json")
        (tmp_path / "witness").unlink(missing_ok=True)
        line = refused(run, *command, *results)
        assert f"{own_code} has code of its own" in line and "--trust-remote-code" in line
        assert not (tmp_path / "witness").exists()
        done(run, *command, *results, "--trust-remote-code")
        if results:
            assert "trust" not in results[1].read_text()
    for folder in (store, adapter, hpr, selected):
        assert not any("trust" in file.read_text() for file in folder.rglob("*.json"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ASSETS / "model"), adapter)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-2, atol=1e-2)


def test_every_command_with_a_model_can_trust_it_and_read_gguf():
    for name, command in cli.application().commands.items():
        options = {opt for parameter in command.loaded.params for opt in (parameter.name, *parameter.opts)}
        loads = {"model", "base"} & options
        assert bool(loads) == ("--trust-remote-code" in options) == ("--gguf-file" in options), name


def test_merge_checkpoint_trusts_as_it_is_told(own_code, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    model = get_peft_model(base, SEAConfig(init_weights=False, rescale="none"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has code of its own, .* pass trust_remote_code=True"):
        merge_checkpoint(own_code, tmp_path / "adapter", tmp_path / "merged")
    merge_checkpoint(own_code, tmp_path / "adapter", tmp_path / "merged", trust_remote_code=True)
    assert (tmp_path / "merged" / "modeling_own.py").exists()


@pytest.mark.parametrize("published, layers", [(SEA, 3), (HPR, 4)], ids=["SEA", "HPR"])
def test_converting_trusts_and_reads_gguf_as_it_is_told(published, layers, run, tmp_path):
    own = with_own_code(base(tmp_path / "own", layers), tmp_path / "witness")
    assert "--trust-remote-code" in refused(run, "convert", own, published, tmp_path / "out")
    assert not (tmp_path / "witness").exists() and not (tmp_path / "out").exists()
    done(run, "convert", own, published, tmp_path / "out", "--trust-remote-code")
    gguf_folder(tmp_path / "gguf", hidden_size=64, num_hidden_layers=layers, head_dim=16)
    gguf = ("--gguf-file", "tiny.gguf")
    done(run, "convert", tmp_path / "gguf", published, tmp_path / "of-gguf", *gguf)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "of-gguf")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


# GGUF files


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    return folder, gguf_folder(folder)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_gives_plain_weights(quantised, tmp_path):
    """They are saved, merged into and told apart as those of any other model."""
    model = gguf_folder(tmp_path, quantised)
    base = BaseModel(str(tmp_path), gguf_file="tiny.gguf")
    loaded = load_model(base)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0.05 if quantised else 1e-5, rtol=0)
    assert (fingerprint(loaded) == fingerprint(model)) is not quantised
    loaded.save_pretrained(tmp_path / "saved")
    load_tokenizer(base).save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(loaded), rtol=0, atol=0)
    assert fingerprint(again) == fingerprint(loaded)
    edited = get_peft_model(loaded, SEAConfig(init_weights=False, rescale="none")).eval()
    expected = logits(edited)
    torch.testing.assert_close(logits(edited.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_the_structure_of_a_gguf_file_has_its_fingerprint_and_not_that_of_files_beside_it(gguf_model, tmp_path):
    folder, model = gguf_model
    shutil.copytree(folder, tmp_path / "both")
    torch.nn.init.normal_(model.get_input_embeddings().weight.data.clone())
    other = AutoModelForCausalLM.from_config(model.config)
    other.save_pretrained(tmp_path / "both")
    base = BaseModel(str(tmp_path / "both"), gguf_file="tiny.gguf")
    assert fingerprint(load_structure(base)) == fingerprint(model) != fingerprint(other)


def test_commands_take_a_gguf_file(gguf_model, run, tmp_path, preferences):
    folder, model = gguf_model
    gguf = ("--gguf-file", "tiny.gguf")
    store, adapter, hpr = tmp_path / "store", tmp_path / "adapter", tmp_path / "hpr"
    done(run, "collect", folder, preferences, store, *gguf, "--max-new-tokens", 4)
    assert json.loads((store / "meta.json").read_text())["fingerprint"] == fingerprint(model)
    done(run, "fit-sea", folder, store, adapter, *gguf, "--rescale", "none", "--positive-energy", 0.5)
    done(run, "evaluate", folder, preferences, *gguf, "--adapter", adapter, "--json", tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["options"]["gguf_file"] == "tiny.gguf"
    done(run, "export-lora", folder, adapter, tmp_path / "lora", *gguf)
    tokens = ("--site", "block", "--tokens", "answer")
    done(run, "collect", folder, preferences, tmp_path / "train", *tokens, *gguf)
    done(run, "train-hpr", folder, tmp_path / "train", hpr, *gguf, "--epochs", 1)
    done(run, "select", folder, hpr, tmp_path / "train", tmp_path / "selected", "--top-k", 1, *gguf)

    line = refused(run, "merge", folder, adapter, tmp_path / "merged", *gguf)
    assert "is a GGUF file, and merging is into safetensors: save the model as safetensors once" in line
    assert refused(run, "merge", folder, adapter, tmp_path / "merged") == line
    # The way round.
    base = BaseModel(str(folder), gguf_file="tiny.gguf")
    load_model(base).save_pretrained(tmp_path / "saved")
    load_tokenizer(base).save_pretrained(tmp_path / "saved")
    done(run, "merge", tmp_path / "saved", adapter, tmp_path / "merged")
    edited = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(edited), rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_a_gguf_file(gguf_model, run, tmp_path, preferences, monkeypatch):
    folder, _ = gguf_model
    for model, options, message in (
        (folder, (), f"{folder} has no config.json, but tiny.gguf: pass --gguf-file tiny.gguf"),
        (folder / "tiny.gguf", (), f"is a GGUF file: pass its folder, {folder}, and --gguf-file tiny.gguf"),
        (folder, ("--gguf-file", "other.gguf"), "has no other.gguf, but tiny.gguf: pass --gguf-file tiny.gguf"),
        (tmp_path, ("--gguf-file", "other.gguf"), f"{tmp_path} has no other.gguf: pass the folder that was saved"),
    ):
        assert message in refused(run, "evaluate", model, preferences, *options)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    line = refused(run, "evaluate", tmp_path, preferences, "--gguf-file", "broken.gguf")
    assert f"{tmp_path} cannot be loaded: " in line


def test_without_the_package_gguf_one_line_says_what_to_install(gguf_model, run, preferences, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf" or name.startswith("gguf."):
            raise ImportError("No module named 'gguf'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    if hasattr(availability.is_gguf_available, "cache_clear"):
        availability.is_gguf_available.cache_clear()
    line = refused(run, "evaluate", gguf_model[0], preferences, "--gguf-file", "tiny.gguf")
    assert line.endswith("--gguf-file needs the package gguf, which is not installed: pip install 'peft-edit[gguf]'")


# What cannot be loaded


def config_of(**changes):
    return json.dumps(json.loads((ASSETS / "model" / "config.json").read_text()) | changes)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": "{"}, "config.json' is not a valid JSON file: save or download it again, or pass another"),
        ({"config.json": "{}"}, "Unrecognized model"),
        ({"config.json": config_of(model_type="foo")}, "has model type `foo` but Transformers does not recognize"),
        ({"config.json": config_of(hidden_size="x")}, "Field 'hidden_size' expected int, got str (value: 'x')"),
        ({"model.safetensors": None}, "Error no file named model.safetensors"),
        ({"model.safetensors": "x"}, "are damaged"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "the tokenizer of"),
        ({"config.json": config_of(quantization_config={"quant_method": "gptq", "bits": 4})}, "requires"),
    ],
)
def test_a_base_model_that_cannot_be_loaded_is_told_in_one_line(files, message, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "model", folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    line = refused(run, "evaluate", folder, ASSETS / "test.jsonl")
    assert message in line and str(folder) in line and len(line) < 500


def test_a_checkpoint_without_some_tensors_is_refused(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(run, "evaluate", folder, ASSETS / "test.jsonl")
    assert f"{folder} has 1 tensors too few, the first is model.norm.weight, which would be random" in line


def test_a_name_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which may have been read before it was set
    line = refused(run, "evaluate", "user/missing", ASSETS / "test.jsonl")
    assert "user/missing cannot be loaded: " in line and line.endswith("the token (hf auth login)")


@pytest.mark.parametrize("name", ["./missing", "../missing", "a/b/c", "/missing", "~/missing", "missing/"])
def test_paths_that_are_not_there_are_never_looked_for_on_the_hub(name, run, tmp_path):
    """Neither models nor adapters nor data."""
    assert f"there is no folder {name}" in refused(run, "evaluate", name, ASSETS / "test.jsonl")
    adapter = ("--adapter", name)
    assert f"there is no folder {name}" in refused(run, "evaluate", ASSETS / "model", ASSETS / "test.jsonl", *adapter)
    out = tmp_path / "out"
    assert f"there is no folder {name}" in refused(run, "merge", ASSETS / "model", name, out)
    assert f"there is no folder {name}" in refused(run, "export-lora", ASSETS / "model", name, out)


@pytest.mark.parametrize("strange", ["two\nlines", "a\rb", "tab\there", "bell\a", "line\u2028separator"])
def test_names_are_printed_in_one_line_as_python_writes_them(strange, run, tmp_path):
    shown = repr(strange)[1:-1]
    for arguments in (
        ("evaluate", ASSETS / "model", tmp_path / f"{strange}.jsonl"),
        ("evaluate", tmp_path / strange, ASSETS / "test.jsonl"),
        ("inspect", tmp_path / strange),
        ("push", tmp_path / strange, "user/name"),
    ):
        assert shown in refused(run, *arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": ["nowhere"]}, "does not fit the model: Target modules {'nowhere'} not found"),
        ({"r": 5}, "does not fit the model: size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_"),
        ({"peft_type": "FOO"}, "is none that PEFT or peft_edit reads"),
        ({"r": -1}, "does not fit the model: "),
    ],
)
def test_an_adapter_that_peft_refuses_is_told_in_one_line(changes, message, run, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    line = refused(run, "evaluate", ASSETS / "model", ASSETS / "test.jsonl", "--adapter", tmp_path / "lora")
    assert message in line and str(tmp_path / "lora") in line and "\\n" not in line
