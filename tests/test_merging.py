"""Merging a SEA adapter into a checkpoint on disk."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ASSETS
from damage import damages, one_line, write
from filelock import FileLock
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import MIXTURES, tiny_mixture
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sea_mixtures import write_edit
from test_sites import llava
from tiny import FAMILIES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionConfig
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

from peft_edit import HPRConfig, SEAConfig, cli, fingerprint, merge_checkpoint, merging
from peft_edit.models.checkpoint import Checkpoint, Source, axis_in_source
from peft_edit.models.load import load_structure


INDEX = "model.safetensors.index.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # that a merge chooses
Free = namedtuple("Free", "total used free")


def model_of(family, dtype=torch.float32):
    return (tiny_mixture(family) if family in MIXTURES else tiny_model(family)).to(dtype)


def make(folder: Path, family="llama", dtype=torch.float32, size="20KB", **fields) -> tuple[Path, Path]:
    """A base checkpoint in several files and an adapter of it."""
    base, adapter = folder / "base", folder / "adapter"
    model = model_of(family, dtype)
    model.save_pretrained(base, max_shard_size=size)
    (base / "tokenizer.json").write_text("a tokenizer")
    adapted = write_edit(get_peft_model(model, SEAConfig(**{"rescale": "none"} | fields)))
    adapted.peft_config["default"].base_model_fingerprint = fingerprint(adapted)
    adapted.save_pretrained(adapter)
    return base, adapter


@pytest.fixture
def pair(tmp_path):
    return make(tmp_path)


def in_memory(base, adapter, device=DEVICE) -> dict[str, torch.Tensor]:
    """What `merge_and_unload` makes of them on a device, by default the one that a merge chooses."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).to(device)
    return model.merge_and_unload().cpu().state_dict()


def unfinished(folder: Path) -> list[Path]:
    """What an interrupted merge leaves; a lock is no part of it."""
    return [file for file in folder.iterdir() if ".partial" in file.name and file.suffix != ".lock"]


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def refused(match, *arguments, **options) -> None:
    """Whether a merge fails in one line and leaves the folder above the output as it was."""
    above = Path(arguments[2]).parent
    before = files(above)
    with pytest.raises(ValueError, match=match) as error:
        merge_checkpoint(*arguments, **options)
    assert "\n" not in str(error.value)
    assert files(above) == before and not unfinished(above)


# The result


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_equals_merge_and_unload_bit_for_bit(family, tmp_path):
    base, adapter = make(tmp_path, family)
    result = merge_checkpoint(base, adapter, tmp_path / "out", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = in_memory(base, adapter, "cpu")
    assert merged.keys() == expected.keys()
    assert [name for name in merged if not torch.equal(merged[name], expected[name])] == []

    before, after = files(base), files(tmp_path / "out")
    assert before.keys() == after.keys() and result.files == sum(name.endswith(".safetensors") for name in after) > 2
    tensors = 0
    for name in before:
        if not name.endswith(".safetensors"):
            assert after[name] == before[name]
            continue
        header = 8 + int.from_bytes(before[name][:8], "little")
        assert after[name][:header] == before[name][:header] and len(after[name]) == len(before[name])
        first, second = load_file(base / name), load_file(tmp_path / "out" / name)
        changed = {key for key in first if first[key].numpy().tobytes() != second[key].numpy().tobytes()}
        assert changed == set(result.edited) & set(first)
        tensors += len(first)
    assert result.tensors == tensors and result.path == tmp_path / "out" and result.resumed == 0
    assert sorted(name for name in os.listdir(tmp_path) if not name.endswith(".lock")) == ["adapter", "base", "out"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_keeps_half_precision(family, tmp_path):
    base, adapter = make(tmp_path, family, torch.bfloat16)
    merge_checkpoint(base, adapter, tmp_path / "out", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = in_memory(base, adapter, "cpu")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "fields", [{"rescale": "mean", "strength": 0.5}, {"rescale": "average"}, {"projections": "negative"}]
)
def test_every_kind_of_linear_edit(fields, tmp_path):
    base, adapter = make(tmp_path, **fields)
    merge_checkpoint(base, adapter, tmp_path / "out")
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), in_memory(base, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_token_is_folded_with_the_recorded_error(tmp_path):
    base, adapter = make(tmp_path, rescale="token")
    with pytest.warns(UserWarning, match=r"relative error 0\.250 on average, 0\.250 at model\.layers") as caught:
        result = merge_checkpoint(base, adapter, tmp_path / "out")
    assert result.relative_error == 0.25
    assert any(warning.filename == __file__ for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = in_memory(base, adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_one_file_without_an_index_keeps_its_metadata(tmp_path):
    base, adapter = make(tmp_path, size="1GB")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "origin": "elsewhere"})
    assert merge_checkpoint(base, adapter, tmp_path / "out").files == 1
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as merged:
        assert merged.metadata() == {"format": "pt", "origin": "elsewhere"}
    assert not (tmp_path / "out" / INDEX).exists()


def test_keys_without_the_models_prefix(tmp_path):
    """As the Hub has GPT-2."""
    base, adapter = make(tmp_path, "gpt2", size="1GB")
    tensors = {
        key.removeprefix("transformer."): tensor for key, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "h.0.mlp.c_proj.bias" in result.edited and len(result.edited) == 6
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), in_memory(base, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_other_files_are_kept_and_other_weights_are_not(pair, tmp_path):
    base, adapter = pair
    kept = ["special_tokens_map.json", "modeling_x.py", "README.md", "additional_chat_templates/a.jinja"]
    left = ["pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "model.gguf", ".hidden", "sub/x.json"]
    for name in (*kept, *left):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    merge_checkpoint(base, adapter, tmp_path / "out")
    found = files(tmp_path / "out")
    assert all(found[name] == name.encode() for name in kept) and not set(left) & set(found)


def test_tensors_that_the_index_leaves_out_are_merged_too(pair, tmp_path):
    """Transformers loads them."""
    base, adapter = pair
    index = json.loads((base / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    (base / INDEX).write_text(json.dumps(index))
    merge_checkpoint(base, adapter, tmp_path / "out", allow_fingerprint_mismatch=True)
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), in_memory(base, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_sites_without_a_fit_are_copied(tmp_path):
    base, adapter = make(tmp_path, layers_to_transform=[1])
    assert merge_checkpoint(base, adapter, tmp_path / "out").edited == ("model.layers.1.mlp.down_proj.weight",)


class Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta and func is not torch.ops.aten.detach.default:
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_memory_holds_an_edited_tensor_or_that_of_one_expert(family, tmp_path, monkeypatch):
    base, adapter = make(tmp_path, family, size="1GB")
    edits, sizes = [], []
    merged = merging._merged

    def measured(folder, file, edit, device):
        with Sizes() as seen:
            result = merged(folder, file, edit, device)
        edits.append(edit)
        sizes.append(seen.largest)
        return result

    monkeypatch.setattr(merging, "_merged", measured)
    merge_checkpoint(base, adapter, tmp_path / "out", device="cpu")
    assert max(sizes) == max(edit.end - edit.start for edit in edits) == 4 * 32 * 48
    assert len(edits) == {"llama": 3, "mixtral": 3 * 4, "gpt_oss": 3 * 4 * 2}[family]


def test_results_are_made_one_ahead():
    made, used = [], []
    with ThreadPoolExecutor(1) as pool:
        for result in merging._one_ahead(pool, (partial(lambda i: made.append(i) or i, i) for i in range(5))):
            used.append(result)
            pool.submit(int).result()  # all that was asked for is made
            assert len(made) == min(len(used) + 1, 5)
    assert used == made == list(range(5))


@pytest.mark.parametrize("fitted_on", ["resized", "base"])
def test_a_base_whose_embeddings_were_resized(pair, tmp_path, fitted_on):
    """As the refusal of an adapter that carries its embeddings advises."""
    base, adapter = pair
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(80, mean_resizing=False)
    adapted = write_edit(get_peft_model(model, SEAConfig(rescale="none")))
    adapted.peft_config["default"].base_model_fingerprint = fingerprint(adapted)
    if fitted_on == "resized":
        with pytest.warns(UserWarning, match="the embedding layer has been resized"):
            adapted.save_pretrained(tmp_path / "whole")
        refused(r"save it again with save_embedding_layers=False", base, tmp_path / "whole", tmp_path / "out")
        adapter = tmp_path / "edit"
        adapted.save_pretrained(adapter, save_embedding_layers=False)
    adapted.unload().save_pretrained(tmp_path / "resized")
    merge_checkpoint(tmp_path / "resized", adapter, tmp_path / "out", allow_fingerprint_mismatch=fitted_on == "base")
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), in_memory(tmp_path / "resized", adapter)
    assert merged.get_input_embeddings().num_embeddings == 80
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


# Interrupted


class Stopped(BaseException):
    """As if the process had been killed: nothing is to catch it."""


def stop_at(monkeypatch, name: str, count: int) -> None:
    """Let the function of `merging` end the run at its `count`-th call."""
    function, calls = getattr(merging, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            raise Stopped
        return function(*arguments, **options)

    monkeypatch.setattr(merging, name, counted)


@pytest.mark.parametrize(
    ("where", "count"), [("_merged", 1), ("_merged", 3), ("_copy", 4), ("publish", 2), ("sync", 3)]
)
def test_goes_on_after_an_interruption(pair, tmp_path, monkeypatch, where, count):
    base, adapter = pair
    merge_checkpoint(base, adapter, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, where, count)
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.partial"
    finished = {file.name: file.stat().st_ino for file in work.glob("*.safetensors")}
    result = merge_checkpoint(base, adapter, tmp_path / "out")
    assert result.resumed == len(finished)
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in finished.items())
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not unfinished(tmp_path)


def test_a_process_that_is_killed_leaves_no_output(pair, tmp_path):
    base, adapter = pair
    merge_checkpoint(base, adapter, tmp_path / "whole", device="cpu")
    publish = merging.publish
    if not (child := os.fork()):
        merging.publish = lambda part, file: os._exit(9) if "00003" in file.name else publish(part, file)
        try:
            merge_checkpoint(base, adapter, tmp_path / "out", device="cpu")  # a fork has no GPU
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not (tmp_path / "out").exists()
    assert merge_checkpoint(base, adapter, tmp_path / "out", device="cpu").resumed == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["base", "adapter", "device"])
def test_finished_files_of_another_merge_are_not_taken(pair, tmp_path, monkeypatch, changed):
    base, adapter = pair
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "publish", 4)
        if changed == "device":
            patch.setattr(merging, "_identity", lambda *arguments: {"device": "another"})
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 3
    if changed == "base":
        os.utime(base / "model-00001-of-00007.safetensors", ns=(1, 1))
    elif changed == "adapter":
        make(tmp_path, strength=0.5)
    assert merge_checkpoint(base, adapter, tmp_path / "out").resumed == 0
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), in_memory(base, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_two_runs_do_not_write_to_one_folder(pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "publish", 2)
        merge_checkpoint(*pair, tmp_path / "out")
    with FileLock(tmp_path / ".out.partial.lock"):
        before = files(tmp_path)
        with pytest.raises(ValueError, match=r"^another run is writing"):
            merge_checkpoint(*pair, tmp_path / "out")
        assert files(tmp_path) == before
    assert merge_checkpoint(*pair, tmp_path / "out").resumed == 1


# Refused before anything is written


def test_a_disk_that_is_too_small_is_found_first(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(10**9, 10**9, 1000))
    match = r"^the merged checkpoint needs 0\.[0-9] MB more and .* has 0\.0 MB left: make room"
    refused(match, *pair, tmp_path / "out")


def test_output_folders_in_use(pair, tmp_path):
    base, adapter = pair
    (tmp_path / "file").write_text("mine")
    for out, expected in (
        (base, "is the base model's folder"),
        (base / "merged", "is the base model's folder or lies in it"),
        (base / ".." / "base", "is the base model's folder"),
        (adapter, "is not empty"),
        (tmp_path / "file", "is a file"),
    ):
        refused(expected, base, adapter, out)
    (tmp_path / "link").symlink_to(base)
    refused("is the base model's folder", base, adapter, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    merge_checkpoint(base, adapter, tmp_path / "empty")
    refused("is not empty", base, adapter, tmp_path / "empty")


def damage(base: Path, how: str) -> None:
    shards = sorted(base.glob("*.safetensors"))
    index = json.loads((base / INDEX).read_text())
    if how == "missing":
        shards[2].unlink()
    elif how == "truncated":
        shards[2].write_bytes(shards[2].read_bytes()[:-10])
    elif how == "ghost":
        index["weight_map"]["model.ghost.weight"] = shards[1].name
    elif how == "twice":
        save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[1])
    elif how == "elsewhere":
        index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    elif how == "pickled shard":
        index["weight_map"]["model.norm.weight"] = "a.bin"
    elif how == "no index":
        index = []
    elif how == "no metadata":
        del index["metadata"]
    elif how == "metadata":
        index["metadata"] = "x"
    elif how == "vocabulary":
        change_json(base / "config.json", vocab_size=5)
    elif how == "pickled":
        for shard in shards:
            shard.unlink()
        (base / INDEX).unlink()
        torch.save({}, base / "pytorch_model.bin")
        return
    elif how in ("integers", "another shape", "lacking"):
        key = "model.layers.1.mlp.down_proj.weight"
        shard = base / index["weight_map"][key]
        tensors = load_file(shard)
        if how == "lacking":
            del tensors[key], index["weight_map"][key]
        else:
            tensors[key] = tensors[key].to(torch.int8) if how == "integers" else tensors[key][:, 1:].contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})
    else:
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (base / "config.json").write_text(json.dumps(config))
    (base / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "lacks 1 of the 7 files that its model.safetensors.index.json names, the first is model-00003"),
        ("truncated", r"model-00003-of-00007\.safetensors is damaged"),
        ("ghost", r"says that model\.ghost\.weight is in one file, and the files disagree"),
        ("twice", "is in one file, and the files disagree"),
        ("elsewhere", r"names the file '\.\./model\.safetensors', which is none below its folder"),
        ("pickled shard", "names the weights 'a.bin', which must end with .safetensors"),
        ("no index", "is no index of a checkpoint"),
        ("no metadata", r"is no index of a checkpoint \(no metadata\): download or save"),
        ("metadata", r"is no index of a checkpoint \(metadata must be an object, got 'x'\): download or save"),
        ("vocabulary", r"has shape \(64, 32\), (lm_head|model\.embed_tokens)\.weight of the model \(5, 32\): it is of"),
        ("pickled", "its weights are pickled: pass a safetensors checkpoint"),
        ("integers", r"is quantised \(I8\)"),
        ("another shape", r"has shape \(32, 47\), model\.layers\.1\.mlp\.down_proj\.weight of the model \(32, 48\)"),
        ("lacking", r"has 0 tensors for model\.layers\.1\.mlp\.down_proj\.weight, 1 expected"),
        ("quantised", "is quantised: merge into the checkpoint that it was made from"),
    ],
)
def test_damaged_checkpoints(pair, tmp_path, how, expected):
    damage(pair[0], how)
    refused(expected, *pair, tmp_path / "out", allow_fingerprint_mismatch=True)


def change_json(path: Path, **changes) -> None:
    write(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../x.safetensors", "names the file '../x.safetensors', which is none below its folder"),
        ("/etc/x.safetensors", "which is none below its folder"),
        ("{existing}", "which is none below its folder"),
        ("", "which is none below its folder"),
        ("config.json", "names the weights 'config.json', which must end with .safetensors or .safetensors.index.json"),
        ("adapter_model.bin", "which must end with .safetensors"),
        ("none.safetensors", "lacks 1 of the 1 files that its config.json names, the first is none.safetensors"),
        ("none.safetensors.index.json", "names none.safetensors.index.json, which is not there"),
        (5, r"is no configuration of a model \(transformers_weights must be text or null, got 5\)"),
        (["x"], "is no configuration of a model"),
    ],
)
def test_weights_that_the_configuration_names_wrongly(tmp_path, name, expected):
    base, adapter = make(tmp_path, size="1GB")
    shutil.copy(base / "model.safetensors", tmp_path / "x.safetensors")  # what is outside the folder exists
    name = name.format(existing=tmp_path / "x.safetensors") if isinstance(name, str) else name
    change_json(base / "config.json", transformers_weights=name)
    refused(expected, base, adapter, tmp_path / "out")


@pytest.mark.parametrize("size", ["1GB", "20KB"])
@pytest.mark.parametrize("folder", ["sub", "a/b"])
def test_weights_in_a_folder_of_the_checkpoint(tmp_path, size, folder):
    """Transformers loads them; the files that an index names are below the checkpoint's folder, not the index's."""
    base, adapter = make(tmp_path, size=size)
    (base / folder).mkdir(parents=True)
    name = "model.safetensors" if size == "1GB" else INDEX
    for file in base.glob("*.safetensors"):
        file.rename(base / folder / file.name)
    if size != "1GB":
        index = json.loads((base / INDEX).read_text())
        index["weight_map"] = {key: f"{folder}/./{file}" for key, file in index["weight_map"].items()}
        write(base / folder / INDEX, index)
        (base / INDEX).unlink()
    change_json(base / "config.json", transformers_weights=f"{folder}/{name}")
    assert fingerprint(load_structure(str(base))) == fingerprint(AutoModelForCausalLM.from_pretrained(base))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert files(tmp_path / "out").keys() == files(base).keys()
    merged, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), in_memory(base, adapter)
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with an index, for damages of its files."""
    return make(tmp_path_factory.mktemp("small"), size="40KB")


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@given(data=st.data())
@settings(max_examples=40)
def test_one_field_of_the_checkpoints_files_that_lies(small, tmp_path_factory, file, data):
    """The checkpoint reads as before, or one line says why it does not."""
    base = tmp_path_factory.mktemp("damaged") / "base"
    shutil.copytree(small[0], base, copy_function=os.link)
    before = json.loads((base / file).read_text())
    fields = ("model_type", "num_attention_heads", "hidden_size", "dtype", "pad_token_id", "rope_parameters")
    if file == "config.json":
        before["transformers_weights"] = INDEX
    damaged = data.draw(damages(before, None if file == INDEX else {"transformers_weights", *fields}))
    (base / file).unlink()
    write(base / file, damaged)
    try:
        found = Checkpoint(base)
        load_structure(str(base))
    except ValueError as error:
        assert one_line(error)
    else:
        assert found.tensors == Checkpoint(small[0]).tensors
    shutil.rmtree(base)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_configuration(pair, tmp_path, text):
    (pair[0] / "config.json").write_text(text)
    refused("config.json is no configuration of a model", *pair, tmp_path / "out")


def test_statistics_that_are_no_numbers(pair, tmp_path):
    path = pair[1] / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rescale"] = "token"
    config["fit_statistics"] = {site: {"strength": 1.0, "mean_rescale": "x"} for site in config["rank_pattern"]}
    path.write_text(json.dumps(config))
    refused(
        r"fit_statistics\['model.*'\]\['mean_rescale'\] must be a number, got 'x'; .*: make it again",
        *pair,
        tmp_path / "out",
    )


def test_adapters_of_other_models(pair, tmp_path):
    base, _ = pair
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", "gpt2")[1]
    refused("was fitted on another model", base, other, tmp_path / "out")
    refused(
        "no module of LlamaForCausalLM matches target_modules=",
        base,
        other,
        tmp_path / "out",
        allow_fingerprint_mismatch=True,
    )
    wide = tiny_model("llama", hidden_size=64)
    adapted = get_peft_model(wide, SEAConfig(rescale="none", init_weights=False))
    adapted.save_pretrained(tmp_path / "wide")
    refused("does not fit the model: .*size mismatch", base, tmp_path / "wide", tmp_path / "out")
    (tmp_path / "weights").mkdir()
    model = tiny_model("llama", seed=1)
    model.save_pretrained(tmp_path / "weights")
    refused("was fitted on another model", tmp_path / "weights", pair[1], tmp_path / "out")
    merge_checkpoint(tmp_path / "weights", pair[1], tmp_path / "out", allow_fingerprint_mismatch=True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            lambda: HPRConfig(),
            r"is an adapter of another method \(HPR\): only SEA, .* or .* merges .*; it rotates",
        ),
        (lambda: SEAConfig(init_weights=False, feature_map="tanh"), "its feature map 'tanh' is not linear"),
        (lambda: SEAConfig(init_weights=False, site="block"), "which is no linear layer"),
        (lambda: SEAConfig(init_weights=False, modules_to_save=["lm_head"]), r"trained modules \(lm_head\)"),
        (lambda: SEAConfig(), "edits nothing: fit it first"),
    ],
    ids=["hpr", "feature map", "block", "modules_to_save", "unfitted"],
)
def test_adapters_that_do_not_merge(pair, tmp_path, config, expected):
    get_peft_model(tiny_model(), config()).save_pretrained(tmp_path / "other")
    refused(expected, pair[0], tmp_path / "other", tmp_path / "out")


def test_devices(pair, tmp_path):
    refused(r"this machine has (no|\d) CUDA devices?: pass auto or cpu", *pair, tmp_path / "out", device="cuda:7")
    for device in ("gpu", "meta", "mps"):
        refused("device must be auto, cpu, cuda", *pair, tmp_path / "out", device=device)


@pytest.mark.parametrize("family", [*MIXTURES, "gpt2"])
def test_fingerprint_of_the_files_is_that_of_the_model(family, tmp_path):
    """Also where experts are tensors of their own on disk, and one in memory."""
    base, adapter = make(tmp_path, family)
    expected = fingerprint(AutoModelForCausalLM.from_pretrained(base))
    structure = load_structure(str(base))
    assert expected is not None and fingerprint(structure) == expected
    assert fingerprint(PeftModel.from_pretrained(structure, adapter)) == expected


@pytest.mark.parametrize(
    ("operations", "stored", "axis", "expected"),
    [
        ([], (4, 32, 48), 1, 1),
        ([], (4, 32, 47), 1, None),
        ([MergeModulelist(0)], (32, 48), 1, 0),
        ([MergeModulelist(0)], (32, 48), 2, 1),
        ([MergeModulelist(0)], (48, 32), 1, None),
        ([Transpose(1, 2)], (4, 48, 32), 1, 2),
        ([Transpose(1, 2)], (4, 32, 48), 1, None),
        ([Transpose(1, 2, check_dims=True)], (4, 48, 32), 1, 2),
        ([Transpose(1, 2, check_dims=True)], (4, 32, 48), 1, 1),
        ([Transpose(0, 1), MergeModulelist(0)], (48, 32), 1, 1),
        ([Concatenate(1)], (4, 32, 48), 1, None),
    ],
)
def test_axis_of_the_output_in_the_file(operations, stored, axis, expected):
    """The operations turn a tensor of that shape into the parameter, with its axis where it is found."""
    assert axis_in_source(Source("key", tuple(operations)), stored, (4, 32, 48), axis) == expected


# The command, and the Hub


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-edit", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_command(tmp_path, run):
    base, adapter = make(tmp_path, rescale="token")
    status, out, err = run(base, adapter, tmp_path / "out", "--json", tmp_path / "merge.json")
    results = json.loads((tmp_path / "merge.json").read_text())
    assert status == 0 and out == f"Merged into 3 of 30 tensors; 7 files, 0.00 GB: {tmp_path / 'out'}\n"
    assert "Warning: Merging adapter 'default' replaces its rescale='token'" in err and ".py" not in err
    assert results["relative_error"] == 0.25 and len(results["edited"]) == 3 and results["files"] == 7
    for arguments, expected in (
        ([base, adapter, tmp_path / "out"], "is not empty"),
        ([base, adapter, tmp_path / "new", "--private"], "--private needs --push"),
        ([base, tmp_path / "nowhere", tmp_path / "new"], "there is no folder"),
        ([ASSETS / "model", adapter, tmp_path / "new"], "--allow-fingerprint-mismatch"),
        ([base, base, tmp_path / "new"], "has no adapter_config.json"),
    ):
        status, out, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("peft-edit: ")]
        assert status == 2 and not out and len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "new").exists()


def test_from_the_hub(pair, tmp_path):
    base, adapter = pair
    repositories = {
        "models/user/base": {**files(base), "pytorch_model.bin": b"not wanted"},
        "models/user/adapter": files(adapter),
    }
    with HubServer(repositories) as hub:
        command = [sys.executable, "-m", "peft_edit.cli", "merge", "user/base", "user/adapter", tmp_path / "out"]
        environment = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1")  # as many threads as here
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not any("pytorch_model.bin" in request for request in hub.requests)
    merge_checkpoint(base, adapter, tmp_path / "local")
    assert files(tmp_path / "out") == files(tmp_path / "local")


def test_the_text_tower_of_a_vision_language_model(tmp_path):
    base = llava()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, SEAConfig(init_weights=False, rescale="none"))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert set(merged) == set(expected) and all(torch.equal(merged[name], expected[name]) for name in merged)
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(changed) == 3 and all("language_model" in name for name in changed)


def test_a_base_that_is_no_language_model(tmp_path):
    CLIPVisionConfig(hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base is a clip_vision_model model, which is no language model"):
        load_structure(str(tmp_path / "base"))
