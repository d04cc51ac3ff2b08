"""Base models whose weights accelerate keeps on the CPU or on disk. More of SEA: see test_sea_loading.py."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from edits import EDITS, at, edited_model, merges
from peft import PeftModel, get_peft_model
from tiny import agree, base_logits, logits, relative, vivid_model
from transformers import AutoModelForCausalLM


every_edit = pytest.mark.parametrize("edit", EDITS)
every_place = pytest.mark.parametrize("place", ["cpu", "disk"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    vivid_model().save_pretrained(path)
    return path


def edited(base, edit):
    torch.manual_seed(0)
    return get_peft_model(base, EDITS[edit]()).eval()


def offload(model, place, folder):
    device = torch.device("cpu")
    return cpu_offload(model, device) if place == "cpu" else disk_offload(model, folder / "weights", device)


def offloaded(place, folder):
    return offload(vivid_model(), place, folder)


@every_edit
@every_place
def test_an_offloaded_model(tmp_path, edit, place):
    """Its weights are on meta between two forward passes; those of the adapter must not follow them there."""
    whole = edited_model(edit)
    whole.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(offloaded(place, tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(whole))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base_logits())
    before = PeftModel.from_pretrained(vivid_model(), tmp_path / "adapter")
    # Weights that come and go are used by calling their modules, in other operators.
    agree(logits(offload(before, place, tmp_path / "before")), logits(whole))
    fresh = edited(offloaded(place, tmp_path / "fresh"), edit)
    assert torch.equal(logits(fresh), logits(whole))
    torch.manual_seed(1)
    fresh.add_adapter("other", EDITS[edit]())
    fresh.set_adapter("other")
    assert relative(logits(fresh), logits(whole)) > 1e-3


@pytest.mark.parametrize("edit", [edit for edit in EDITS if merges(edit)])
@every_place
def test_merging_into_offloaded_weights(tmp_path, edit, place):
    expected = logits(edited_model(edit))
    model = edited(offloaded(place, tmp_path), edit)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@every_edit
def test_native_loading_onto_an_offloaded_model_is_refused_at_the_first_use(tmp_path, edit):
    """Transformers leaves the adapter's weights where the model's are, on the meta device."""
    edited_model(edit).save_pretrained(tmp_path)
    model = offloaded("cpu", tmp_path)
    model.load_adapter(tmp_path)
    match = r"at model\.layers\.0.* was not loaded: .* load_adapter was given an offloaded model; load .* PeftModel"
    with pytest.raises(ValueError, match=match) as error:
        logits(model)
    assert "\n" not in str(error.value)


LAYERS = [f"model.layers.{i}" for i in range(3)]
ON_CPU = dict.fromkeys(["model.embed_tokens", *LAYERS, "model.norm", "model.rotary_emb", "lm_head"], "cpu")


@every_edit
def test_device_map(base_folder, tmp_path, edit):
    whole = edited_model(edit)
    whole.save_pretrained(tmp_path / "adapter")
    maps = {"PeftModel": [{"": "cpu"}, ON_CPU], "native": [{"": "cpu"}, {**ON_CPU, "lm_head": "disk"}]}
    for how, device_maps in maps.items():
        for device_map in device_maps:
            options = {"device_map": device_map, "offload_folder": tmp_path / "weights"}
            base = AutoModelForCausalLM.from_pretrained(base_folder, **options)
            if how == "PeftModel":
                base = PeftModel.from_pretrained(base, tmp_path / "adapter")
            else:
                base.load_adapter(tmp_path / "adapter")
            agree(logits(base), logits(whole))


@pytest.mark.parametrize("edit", [edit for edit in EDITS if at(edit) == "block"])
@pytest.mark.parametrize("native", [False, True])
def test_the_edit_of_a_block_on_disk_is_refused(base_folder, tmp_path, edit, native):
    device_map = {**ON_CPU, "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(base_folder, device_map=device_map, offload_folder=tmp_path)
    add = base.add_adapter if native else lambda config: get_peft_model(base, config)
    edited_model(edit).save_pretrained(tmp_path / "adapter")
    load = base.load_adapter if native else lambda path: PeftModel.from_pretrained(base, path, offload_folder=tmp_path)
    for call in (lambda: load(tmp_path / "adapter"), lambda: add(EDITS[edit]())):
        with pytest.raises(ValueError, match=r"^model\.layers\.1 is offloaded to disk, .* a device_map without"):
            call()
