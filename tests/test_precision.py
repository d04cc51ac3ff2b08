"""Edits keep their numbers under autocast, and nothing is computed in float8."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from edits import EDITS, at, edited_model, layers_of, merges
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stores import write_pair_store
from tiny import logits, vivid_model

from peft_edit import ActivationStore, HPRConfig, SEAConfig, merge_checkpoint, sea_to_lora, select_layers
from peft_edit.activations.recorder import Recorder
from peft_edit.adapters.read import load_adapter
from peft_edit.arguments import choices_of, hints_of
from peft_edit.tuners.sea.layer import SEALayer


HALVES = (torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
every_edit = pytest.mark.parametrize("edit", EDITS)
every_half = pytest.mark.parametrize("half", HALVES, ids=str)
every_float8 = pytest.mark.parametrize("dtype", FLOAT8, ids=str)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def settings_of(config):
    """A configuration with each combination of the choices that its method offers."""
    hints = hints_of(type(config))
    choices = {f.name: choices_of(hints[f.name]) for f in fields(config) if f.name != "site" and f.name in hints}
    choices = {name: values for name, values in choices.items() if values and hasattr(type(config), name)}
    for values in itertools.product(*choices.values()):
        changes = dict(zip(choices, values, strict=True))
        if changes.get("rescale") == "average" and changes["projections"] in ("positive", "negative"):
            continue
        yield replace(config, **changes)


@every_edit
@every_half
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_edit(edit, half, dtype):
    model = edited_model(edit)
    layer, config = layers_of(model)[0], model.peft_config["default"]
    h = torch.randn(2, 20, layer.features, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = []
    for layer.configs["default"] in settings_of(config):
        expected = layer.edit_output(h)
        with torch.autocast("cpu", half):
            actual = layer.edit_output(h)
        assert actual.dtype == dtype and actual.isfinite().all() and torch.equal(actual, expected)
        seen.append(expected)
    assert any(not torch.equal(out, h) for out in seen)
    if "SEA" in edit:  # 4 feature maps, 2 spaces, 4 rescale modes and 4 projections, two modes of which go with 2 only
        assert len(seen) == 4 * 2 * (3 * 4 + 2)


@every_half
@pytest.mark.parametrize("feature_map", ["tanh", "squared_exponential", "elu"])
def test_feature_maps_give_logits_under_autocast(half, feature_map):
    model = edited_model("SEA at the MLP", feature_map=feature_map, rescale="token")
    with torch.autocast("cpu", half):
        assert logits(model).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 8),
    size=st.floats(1e-3, 1e3),
    half=st.sampled_from(HALVES),
    projections=st.sampled_from(["both", "negative"]),
)
def test_a_token_in_the_removed_span_becomes_zero(seed, rank, size, half, projections):
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(vivid_model(), SEAConfig(init_weights=False, projections=projections))
    layer = next(m for m in model.modules() if isinstance(m, SEALayer))
    basis = torch.linalg.qr(torch.randn(layer.features, 2 * rank, generator=generator, dtype=torch.float64))[
        0
    ].T.float()
    layer.set_factors("default", basis[:rank], basis[rank:])
    h = size * torch.randn(5, rank, generator=generator) @ basis[rank:]
    with torch.no_grad(), torch.autocast("cpu", half):
        assert not layer.edit_output(h).any()


@every_half
def test_autocast_changes_no_merge_export_or_selection(tmp_path, half):
    models = [edited_model("SEA at the MLP", "gpt2") for _ in range(2)]
    exported, merged = [], []
    for i, model in enumerate(models):
        with torch.autocast("cpu", half, enabled=bool(i)):
            sea_to_lora(model, tmp_path / str(i))
            model.merge_adapter()
        exported.append(load_file(tmp_path / str(i) / "adapter_model.safetensors"))
        merged.append({name: p.clone() for name, p in model.named_parameters()})
    for one, two in (exported, merged):
        assert all(torch.equal(one[name], two[name]) for name in one)

    rows = {i: torch.randn(200, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    modules = {str(i): f"model.layers.{i}" for i in range(3)}
    store = write_pair_store(tmp_path / "pairs", rows, torch.arange(200).view(2, 100).T, modules=modules)
    model = get_peft_model(vivid_model(), HPRConfig(init_weights=False))
    layer, tokens = layers_of(model)[0], store.answer_tokens(0)
    expected = layer.probe_logits(tokens, "default"), layer.angles(tokens, "default")
    accuracy = select_layers(model, store, top_k=1).accuracy
    with torch.autocast("cpu", half):
        actual = layer.probe_logits(tokens, "default"), layer.angles(tokens, "default")
        assert select_layers(model, store, top_k=1).accuracy == accuracy
    assert all(map(torch.equal, actual, expected))


@every_half
def test_autocast_rounds_no_mean(half):
    model = torch.nn.Sequential(torch.nn.Identity())
    h, kept = torch.randn(3, 7, 32), torch.rand(3, 7) > 0.3
    kept[:, 0] = True
    with Recorder(model, {"mlp.0": "0"}, mean=True) as recorder, recorder.keeping(kept) as rows:
        with torch.autocast("cpu", half):
            model(h)
        means = torch.stack([row[keep].mean(dim=0) for row, keep in zip(h, kept, strict=True)])
        torch.testing.assert_close(rows["mlp.0"], means)


# float8, which PyTorch counts as floating point


def float8_sites(model, edit, dtype):
    for layer in layers_of(model):
        for output in layer.output_tensors().values():
            output.parameter.data = output.parameter.data.to(dtype)


@pytest.mark.parametrize("edit", [edit for edit in EDITS if merges(edit, "gpt2")])
@every_float8
def test_float8_weights_are_not_merged_into(edit, dtype, tmp_path):
    model = edited_model(edit, "gpt2")
    float8_sites(model, edit, dtype)
    calls = [model.merge_adapter, lambda: model.merge_adapter(safe_merge=True), model.merge_and_unload]
    if "SEA" in edit:
        calls.append(lambda: sea_to_lora(model, tmp_path / "lora"))
    for call in calls:
        with pytest.raises(ValueError, match=f"quantised or sharded \\({str(dtype)[6:]}\\)") as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "lora").exists()


@every_float8
def test_float8_checkpoints_are_not_merged_into(tmp_path, dtype):
    edited_model("SEA at the MLP").save_pretrained(tmp_path / "adapter")
    vivid_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: t.to(dtype) if "down_proj" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is quantised \(F8_E[45]M[32]\)") as error:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_fingerprint_mismatch=True)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@every_edit
@every_float8
def test_adapters_in_float8_are_refused(tmp_path, edit, dtype):
    edited_model(edit).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is of {str(dtype)[6:]}, in which nothing can be computed: save") as error:
        load_adapter(vivid_model(), str(tmp_path))
    assert "\n" not in str(error.value)
    if at(edit) == "mlp":
        with pytest.raises(RuntimeError, match=f"is of {str(dtype)[6:]}, in which nothing can be computed"):
            PeftModel.from_pretrained(vivid_model(), tmp_path)


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8, torch.int64], ids=str)
def test_stores_hold_numbers_to_compute_with(tmp_path, dtype):
    sets = {sign: {0: torch.ones(3, 4).to(dtype)} for sign in ("positive", "negative", "neutral")}
    with pytest.raises(ValueError, match=f"one of float64, .*, got positive.0. of {str(dtype)[6:]}") as error:
        ActivationStore.from_tensors(tmp_path / "store", **sets)
    assert "\n" not in str(error.value) and not (tmp_path / "store").exists()
