"""What PEFT offers for any adapter, for every method, where the tests of the tuners and of loading do not have it."""

import contextlib

import pytest
import torch
import transformers
from edits import EDITS, METHOD_OF, edited_model, layers_of, own_parameters, trains, two_adapters
from packaging.version import Version
from peft import PeftConfig, PeftMixedModel, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny import FAMILIES, agree, base_logits, logits, token_ids, vivid_model
from transformers import Trainer, TrainingArguments

from peft_edit import edit_strength


HEAD = {"modules_to_save": ["lm_head"]}
# What the `load_adapter` of Transformers' models knows, see examples/peft.md.
NATIVE_FOLDERS_AND_MODULES = Version(transformers.__version__) >= Version("5.23")
every_edit = pytest.mark.parametrize("edit", EDITS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def results_of(model, **kwargs):
    """Logits of each adapter alone."""
    results = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        results[name] = logits(model, **kwargs)
    return results


# Saving and loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with "default" and, in a folder of its own within, "other", and the logits of each."""
    folders = {}
    with torch.no_grad():
        for edit in EDITS:
            model = two_adapters(edit)
            path = tmp_path_factory.mktemp("saved")
            model.save_pretrained(path / "adapters" / "first")
            folders[edit] = path, results_of(model)
    return folders


@every_edit
@pytest.mark.parametrize("name, subfolder", [("default", "adapters/first"), ("other", "adapters/first/other")])
def test_subfolders(saved, edit, name, subfolder):
    path, results = saved[edit]
    assert type(PeftConfig.from_pretrained(path, subfolder=subfolder)) is type(EDITS[edit]())
    loaded = PeftModel.from_pretrained(vivid_model(), path, subfolder=subfolder)
    assert torch.equal(logits(loaded), results[name])
    if NATIVE_FOLDERS_AND_MODULES:
        native = vivid_model()
        native.load_adapter(path, adapter_kwargs={"subfolder": subfolder})
        agree(logits(native), results[name])


@every_edit
def test_loading_renames(saved, edit):
    path, results = saved[edit]
    model = PeftModel.from_pretrained(vivid_model(), path, subfolder="adapters/first", adapter_name="one")
    model.load_adapter(path, "two", subfolder="adapters/first")
    model.load_adapter(path, "default", subfolder="adapters/first/other")
    for name, expected in (("two", "default"), ("default", "other"), ("one", "default")):
        model.set_adapter(name)
        assert torch.equal(logits(model), results[expected])
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one", "default"] and torch.equal(logits(model), results["default"])


@every_edit
def test_loading_over_an_adapter_replaces_it(saved, edit):
    path, results = saved[edit]
    model = PeftModel.from_pretrained(vivid_model(), path, subfolder="adapters/first")
    model.load_adapter(path, "default", subfolder="adapters/first/other")
    assert torch.equal(logits(model), results["other"])


@every_edit
def test_given_configuration_and_pickled_weights(saved, edit, tmp_path):
    path, results = saved[edit]
    config = PeftConfig.from_pretrained(path, subfolder="adapters/first")
    model = PeftModel.from_pretrained(vivid_model(), path, subfolder="adapters/first", config=config)
    assert torch.equal(logits(model), results["default"])
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(vivid_model(), tmp_path)), results["default"])


# Modules to save


def with_heads(edit, first, second):
    """Two adapters, the heads of those that have one of their own multiplied by 2 and -1."""
    model = two_adapters(edit, first=first, second=second)
    for name, factor in (("default", 2), ("other", -1)):
        with contextlib.suppress(KeyError):
            model.get_base_model().lm_head.modules_to_save[name].weight.mul_(factor)
    return model


@every_edit
def test_modules_to_save(edit, tmp_path):
    model = with_heads(edit, HEAD, HEAD)
    results = results_of(model)
    bare = results_of(two_adapters(edit))
    torch.testing.assert_close(results, {"default": 2 * bare["default"], "other": -bare["other"]})
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert all(torch.equal(actual, results[name]) for name, actual in results_of(loaded).items())
    if NATIVE_FOLDERS_AND_MODULES:
        native = vivid_model()
        native.load_adapter(tmp_path)
        agree(logits(native), results["default"])
    assert torch.equal(logits(loaded.unload()), 2 * base_logits())  # the trained head stays, as in PEFT


@every_edit
@pytest.mark.parametrize("fields", [(HEAD, HEAD), ({}, HEAD), (HEAD, {})], ids=["both", "second", "first"])
@pytest.mark.parametrize("active", ["default", "other"])
def test_mixed_batch_with_modules_to_save(edit, fields, active):
    model = with_heads(edit, *fields)
    names = ["default", "other", "__base__", "other"]
    results = results_of(model, ids=token_ids(4)) | {"__base__": logits(vivid_model(), token_ids(4))}
    model.set_adapter(active)
    actual = logits(model, token_ids(4), adapter_names=names)
    expected = torch.stack([results[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(model, token_ids(4)), results[active])  # nothing is left behind


@every_edit
def test_mixed_beam_search_with_modules_to_save(edit):
    model = with_heads(edit, HEAD, HEAD)
    ids, names = token_ids(3, 5), ["default", "__base__", "other"]
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row, None], "attention_mask": torch.ones_like(ids[:1]), **options}
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            assert torch.equal(model.generate(**one)[0], mixed[row])


# Counting and freezing


@every_edit
def test_trainable_parameters(edit, capsys):
    head = 64 * 32
    for fields, more in (({}, 0), (HEAD, head)):
        model = edited_model(edit, **fields)
        own = sum(p.numel() for p in own_parameters(model).values()) if trains(edit) else 0
        trainable, everything = model.get_nb_trainable_parameters()
        assert trainable == own + more == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert everything == sum(p.numel() for p in model.parameters())
        model.print_trainable_parameters()
        assert f"trainable params: {trainable:,} || all params: {everything:,} ||" in capsys.readouterr().out
        model.set_adapter("default", inference_mode=True)
        assert model.get_nb_trainable_parameters()[0] == 0


# The Trainer of Transformers


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = token_ids(8, 6)[i]
        return {"input_ids": ids, "labels": ids}


def trained(model, folder, resume=None):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    with torch.enable_grad():
        trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@every_edit
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_the_trainer(edit, tmp_path):
    """A method that is trained learns from the language model's own loss too; else the head beside it does."""
    model = edited_model(edit, **HEAD)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = trained(model, tmp_path)
    assert weights and all(not torch.equal(p, before[name]) for name, p in weights.items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in weights)
    checkpoint = tmp_path / "checkpoint-2"
    files = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= files
    assert "model.safetensors" not in files and len(load_file(checkpoint / "adapter_model.safetensors")) < len(before)
    resumed = trained(edited_model(edit, **HEAD), tmp_path, resume=str(checkpoint))
    torch.testing.assert_close(resumed, weights)
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("edit", [edit for edit in EDITS if not trains(edit)])
def test_nothing_to_train_in_frozen_weights_alone(edit, tmp_path):
    with pytest.raises(RuntimeError, match="does not require grad"):
        trained(edited_model(edit), tmp_path)


# What PEFT cannot do with methods from outside


@every_edit
def test_peft_says_what_it_cannot_do(saved, edit):
    path, _ = saved[edit]
    folder = path / "adapters" / "first"
    method = METHOD_OF[edit].name
    with pytest.raises(ValueError, match=f"'{method}' is not compatible with the `PeftMixedModel`"):
        get_peft_model(vivid_model(), EDITS[edit](), mixed=True)
    with pytest.raises(ValueError, match=f"Adapter of type PeftType.{method} is not supported for mixed models"):
        PeftMixedModel.from_pretrained(vivid_model(), folder)
    model = PeftModel.from_pretrained(vivid_model(), folder)
    with pytest.raises(ValueError, match=f"Hotswapping only supports .* but {method} was passed"):
        hotswap_adapter(model, str(folder / "other"), adapter_name="default")
    native = vivid_model()
    native.load_adapter(folder)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        native.load_adapter(folder / "other", adapter_name="default", hotswap=True)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_scales_and_adds_weights_is_refused_with_what_to_do(edit, wrapped, tmp_path):
    model = two_adapters(edit)
    before = logits(model)
    layers = layers_of(model)
    combine = {"SEA": "peft_edit.combine_sea"}.get(METHOD_OF[edit].name, "activate several at once, or learn one")
    tuner = model if wrapped else model.base_model
    refused = [
        (combine, lambda: tuner.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")),
        ("save it without path_initial", lambda: tuner.subtract_mutated_init({}, "default")),
        ("save it without path_initial", lambda: save_as_converted(model, tmp_path)),
        ("peft_edit.edit_strength", lambda: layers[0].set_scale("default", 2)),
        ("peft_edit.edit_strength", lambda: layers[0].scale_layer(2)),
        ("peft_edit.edit_strength", lambda: layers[0].unscale_layer()),
    ]
    for remedy, call in refused:
        with pytest.raises(TypeError, match="does not support") as caught:
            call()
        assert remedy in str(caught.value) and "\n" not in str(caught.value)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 1),
    ):
        pass
    assert list(model.peft_config) == ["default", "other"] and list(tmp_path.iterdir()) == []
    agree(logits(model), before)


def save_as_converted(model, folder):
    model.save_pretrained(folder / "out", path_initial_model_for_weight_conversion=str(folder / "initial"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", EDITS)
def test_peft_converts_to_lora_what_is_a_change_of_weights(edit, family):
    model = edited_model(edit, family)
    expected = logits(model)
    # GPT-2 and OPT have biases at the MLP's output, which PEFT's conversion leaves out.
    can = edit == "SEA at the MLP" and family not in ("gpt2", "opt")
    assert model.supports_lora_conversion() is can
    assert model.supports_lora_conversion("default") is can
    if not can:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=4)
        with pytest.raises(ValueError, match=r"adds no weights to .* that PEFT could convert: merge"):
            layers_of(model)[0].get_delta_weight("default")
        return
    config, tensors = convert_to_lora(model, rank=4)  # two directions at each site
    lora = get_peft_model(vivid_model(family), config)
    set_peft_model_state_dict(lora, tensors)
    assert (expected - base_logits(family)).abs().max() > 0.01
    torch.testing.assert_close(logits(lora.eval()), expected, rtol=1e-4, atol=1e-4)


CONVERTED = {
    "token": ({"rescale": "token"}, False),
    "mean": ({"rescale": "mean"}, True),
    "average": ({"rescale": "average"}, True),
    "positive": ({"projections": "positive"}, True),
    "feature map": ({"feature_map": "tanh"}, False),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_conversion_to_lora_is_answered_truthfully(kind):
    fields, can = CONVERTED[kind]
    model = edited_model("SEA at the MLP", **fields)
    assert model.supports_lora_conversion() is can
    if not can:
        return
    delta = {layer.site: layer.get_delta_weight("default") for layer in layers_of(model)}
    merged = model.merge_and_unload()
    for site, change in delta.items():
        before, after = (m.get_submodule(site).weight for m in (vivid_model(), merged))
        torch.testing.assert_close(before + change, after.detach(), rtol=1e-5, atol=1e-5)


def test_conversion_to_lora_of_other_adapters_and_states():
    model = edited_model("SEA at the MLP", init_weights=True)
    assert model.supports_lora_conversion()
    assert all(layer.get_delta_weight("default").count_nonzero() == 0 for layer in layers_of(model))
    model.add_adapter("other", EDITS["SEA at the MLP"](rescale="token"))
    assert model.base_model.supports_lora_conversion("default")
    assert not model.base_model.supports_lora_conversion("other")
    assert model.supports_lora_conversion()
    model.set_adapter("other")
    assert not model.supports_lora_conversion()
    model = edited_model("SEA at the MLP")
    with edit_strength(model, 0.5):
        assert not model.supports_lora_conversion()
    model.merge_adapter()
    assert not model.supports_lora_conversion()  # the weights hold the edit already
