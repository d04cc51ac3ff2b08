"""Saving SEA adapters and every way that PEFT and Transformers load them; damaged files."""

import copy
import functools
import json
import logging
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model, token_ids
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from peft_edit import SEAConfig
from peft_edit.tuners.sea import SEALayer


SITES = ("mlp", "block")
HIDDEN = 32
every_family = pytest.mark.parametrize("family", FAMILIES)
every_site = pytest.mark.parametrize("site", SITES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def logits(model):
    return model(input_ids=token_ids()).logits


def write_edit(model, ranks=((3, 5), (0, 4), (2, 0)), adapter="default"):
    """Random factors at the sites of an adapter, of other ranks at each, as a fit would write them."""
    generator = torch.Generator().manual_seed(0)
    config = model.peft_config[adapter]
    layers = [layer for layer in model.modules() if isinstance(layer, SEALayer) and layer.has_adapter(adapter)]
    for layer, pair in zip(layers, ranks, strict=False):
        factors = [torch.linalg.qr(torch.randn(HIDDEN, k, generator=generator))[0].T.contiguous() for k in pair]
        layer.set_factors(adapter, *factors)
        config.rank_pattern[layer.site] = list(pair)
        config.fit_statistics[layer.site] = {"rms": 0.5, "mean_rescale": 1.1, "relative_error": 0.1, "strength": 1.0}
    return model


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes, once, the folder of a base model and of an adapter of it, whose logits it returns too."""

    @functools.cache
    def folder(family="llama", site="mlp", kind="fitted", dtype=torch.float32):
        path = tmp_path_factory.mktemp(f"{family}-{site}-{kind}")
        tiny_model(family, initializer_range=0.2, init_std=0.2).to(dtype).save_pretrained(path / "base")
        base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=dtype)
        fields = {"layers_to_transform": [0, 2]} if kind == "two layers" else {}
        model = get_peft_model(base, SEAConfig(site=site, **fields)).eval()
        if kind != "unfitted":
            ranks = {"rank 0": ((0, 0),) * 3, "one layer fitted": ((3, 5),)}
            write_edit(model, **({"ranks": ranks[kind]} if kind in ranks else {}))
        model.save_pretrained(path / "adapter")
        return path, logits(model)

    return folder


@functools.cache
def loaded(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def base_of(path, **kwargs):
    return copy.deepcopy(loaded((path / "base").resolve(), **kwargs))


def bare_keys(path):
    """The saved tensors by the names that they have without a `PeftModel`."""
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def with_load_adapter(path, **kwargs):
    model = base_of(path, **kwargs)
    model.load_adapter(path / "adapter")
    return model


def with_tensors_in_memory(path, **kwargs):
    model = base_of(path, **kwargs)
    config = PeftConfig.from_pretrained(path / "adapter")
    model.load_adapter(peft_config=config, adapter_state_dict=bare_keys(path))
    return model


def as_second_adapter(path, **kwargs):
    config = PeftConfig.from_pretrained(path / "adapter")
    model = get_peft_model(base_of(path, **kwargs), SEAConfig(site=config.site)).eval()
    model.load_adapter(path / "adapter", "second")
    model.set_adapter("second")
    return model


def injected(path, **kwargs):
    model = base_of(path, **kwargs)
    inject_adapter_in_model(PeftConfig.from_pretrained(path / "adapter"), model)
    set_peft_model_state_dict(model, bare_keys(path))
    return model


def injected_by_tensors(path, **kwargs):
    model = base_of(path, **kwargs)
    inject_adapter_in_model(PeftConfig.from_pretrained(path / "adapter"), model, state_dict=bare_keys(path))
    set_peft_model_state_dict(model, bare_keys(path))
    return model


def with_peft(**options):
    def load(path, **kwargs):
        return PeftModel.from_pretrained(base_of(path, **kwargs), path / "adapter", **options)

    return load


PEFT_PATHS = {
    "PeftModel": with_peft(),
    "low_cpu_mem_usage": with_peft(low_cpu_mem_usage=True),
    "no autocast": with_peft(autocast_adapter_dtype=False),
    "trainable": with_peft(is_trainable=True),
    "named": with_peft(adapter_name="sea"),
    "AutoPeftModel": lambda path, **kwargs: AutoPeftModelForCausalLM.from_pretrained(path / "adapter", **kwargs),
    "second adapter": as_second_adapter,
}
NATIVE_PATHS = {
    "load_adapter": with_load_adapter,
    "load_adapter of tensors": with_tensors_in_memory,
    "AutoModel": lambda path, **kwargs: AutoModelForCausalLM.from_pretrained(path / "adapter", **kwargs),
}
INJECTION = {"inject": injected, "inject by tensors": injected_by_tensors}
PATHS = PEFT_PATHS | NATIVE_PATHS | INJECTION
every_path = pytest.mark.parametrize("load", PATHS.values(), ids=PATHS)


@every_family
@every_site
def test_saved_files(folder_of, family, site):
    path, _ = folder_of(family, site)
    names = sorted(file.name for file in (path / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    child = ".sea" if site == "block" else ""
    ranks = config["rank_pattern"]
    assert len(ranks) == 3
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.model.{name}{child}.sea_{sign}.weight": (rank, HIDDEN)
        for name, pair in ranks.items()
        for sign, rank in zip(("positive", "negative"), pair, strict=True)
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert config["peft_type"] == "SEA" and config["base_model_name_or_path"] == str(path / "base")


@every_family
@every_site
@every_path
def test_every_path_gives_the_saved_model(folder_of, family, site, load):
    path, expected = folder_of(family, site)
    model = load(path)
    assert torch.equal(logits(model), expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "sea_" in name)
    layers = [layer for layer in model.modules() if isinstance(layer, SEALayer)]
    assert all(config is model.peft_config[name] for layer in layers for name, config in layer.configs.items())


@every_site
@every_path
@pytest.mark.parametrize("kind", ["unfitted", "rank 0", "one layer fitted", "two layers"])
def test_every_kind_of_adapter(folder_of, site, load, kind):
    path, expected = folder_of("llama", site, kind)
    model = load(path)
    assert torch.equal(logits(model), expected)
    if kind == "two layers":
        adapter = list(model.peft_config)[-1]
        layers = [m for m in model.modules() if isinstance(m, SEALayer) and m.has_adapter(adapter)]
        assert len(layers) == 2
    if kind in ("unfitted", "rank 0"):
        assert torch.equal(expected, logits(base_of(path)))


@every_site
@every_path
def test_bfloat16_base_model(folder_of, site, load):
    path, expected = folder_of("llama", site, dtype=torch.bfloat16)
    model = load(path, dtype=torch.bfloat16)
    actual = logits(model)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    factors = [parameter for name, parameter in model.named_parameters() if "sea_" in name]
    assert factors and all(factor.dtype == torch.float32 for factor in factors)


@every_site
@every_path
def test_factors_are_aligned_wherever_they_lie_in_the_file(folder_of, tmp_path, site, load):
    """Or they would multiply with another rounding than before they were saved, on some processors."""
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, dict)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for padding in ("", 8 * "x"):  # a longer header, which moves the tensors by 8 bytes
        save_file(tensors, file, {"format": "pt", "padding": padding})
        factors = [parameter for name, parameter in load(tmp_path).named_parameters() if "sea_" in name]
        assert factors and all(factor.data_ptr() % 64 == 0 for factor in factors)


@every_site
def test_bfloat16_factors_in_the_file(folder_of, tmp_path, site):
    """Rounded by other tools: loaded as float32 by default, and edited all the same."""
    path, expected = folder_of("llama", site)
    copy_of(path, tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for load in PATHS.values():
        actual = logits(load(tmp_path))
        assert (actual - expected).norm() < 0.02 * expected.norm()


@every_family
@every_site
def test_saving_again_writes_the_same(folder_of, tmp_path, family, site):
    path, expected = folder_of(family, site)
    PATHS["PeftModel"](path).save_pretrained(tmp_path / "adapter")
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (path, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (SEAConfig.from_pretrained(folder / "adapter") for folder in (path, tmp_path))
    assert first == second
    native = with_load_adapter(path)
    native.save_pretrained(tmp_path / "native")  # Transformers writes the adapter
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(path), tmp_path / "native")), expected)


@every_site
def test_only_the_chosen_adapter_is_saved(folder_of, tmp_path, site):
    path, expected = folder_of("llama", site)
    model = as_second_adapter(path)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(path), tmp_path / "second")), expected)
    assert len(get_peft_model_state_dict(model, adapter_name="second")) == 6


@every_site
@pytest.mark.parametrize("name", ["sea", "SEA", "mlp", "0", "a-b", "base_layer"])
def test_any_adapter_name_can_be_saved(folder_of, tmp_path, site, name):
    path, expected = folder_of("llama", site)
    with_peft(adapter_name=name)(path).save_pretrained(tmp_path)
    saved = load_file(tmp_path / name / "adapter_model.safetensors")
    assert saved.keys() == load_file(path / "adapter" / "adapter_model.safetensors").keys()
    native = base_of(path)
    native.load_adapter(tmp_path / name, adapter_name=name)
    assert torch.equal(logits(native), expected)


@every_site
def test_modules_to_save_come_along(folder_of, tmp_path, site):
    path, _ = folder_of("llama", site)
    model = write_edit(get_peft_model(base_of(path), SEAConfig(site=site, modules_to_save=["lm_head"])).eval())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["base_model.model.lm_head.modules_to_save.default.weight"]
    model.get_parameter(trainable[0]).mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(path), tmp_path)), logits(model))


@every_site
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_base_model_offloaded_by_accelerate(folder_of, tmp_path, site, where):
    """Its weights are on meta between two forward passes; the factors must not follow them there."""
    path, expected = folder_of("llama", site)
    device = torch.device("cpu")

    def offload(model):
        if where == "cpu":
            return cpu_offload(model, execution_device=device)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # of its own: accelerate keeps an index there
        return disk_offload(model, folder, execution_device=device)

    loaded_onto = PeftModel.from_pretrained(offload(base_of(path)), path / "adapter")
    assert torch.equal(logits(loaded_onto), expected)
    loaded_before = offload(PeftModel.from_pretrained(base_of(path), path / "adapter"))
    assert torch.equal(logits(loaded_before), expected)
    fresh = write_edit(get_peft_model(offload(base_of(path)), SEAConfig(site=site)).eval())
    fresh.add_adapter("other", SEAConfig(site=site, init_weights=False))
    assert torch.equal(logits(fresh), expected)
    fresh.set_adapter("other")
    assert logits(fresh).isfinite().all()


def test_blocks_on_disk_are_refused(folder_of, tmp_path):
    path, _ = folder_of("llama", "block")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    for native in (False, True):
        model = AutoModelForCausalLM.from_pretrained(path / "base", device_map=device_map, offload_folder=tmp_path)
        with pytest.raises(ValueError, match=r"^model\.layers\.1 is offloaded to disk, .*: use site='mlp', or"):
            if native:
                model.load_adapter(path / "adapter")
            else:
                PeftModel.from_pretrained(model, path / "adapter", offload_folder=tmp_path)


@every_site
def test_loading_is_quiet(folder_of, site):
    path, _ = folder_of("llama", site)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's call
        for name in ("PeftModel", "low_cpu_mem_usage", "second adapter", "inject", "inject by tensors"):
            PATHS[name](path)


# Damaged files


def copy_of(path, target, change, rank_pattern=None):
    """Copy a folder with other tensors in the adapter, or another rank_pattern."""
    (target / "base").symlink_to(path / "base")
    (target / "adapter").mkdir()
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    if rank_pattern is not None:
        config["rank_pattern"] = rank_pattern
    (target / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = change(load_file(path / "adapter" / "adapter_model.safetensors"))
    save_file(tensors, target / "adapter" / "adapter_model.safetensors", {"format": "pt"})


def is_damaged(name):
    """One factor of the first block, the only one of which both have rows."""
    return ".0." in name and "positive" in name


def map_damaged(change):
    return lambda tensors: {name: change(t) if is_damaged(name) else t for name, t in tensors.items()}


def one_nan(tensor):
    tensor = tensor.clone()
    tensor[1, 7] = float("nan")
    return tensor


def without(*parts):
    return lambda tensors: {n: t for n, t in tensors.items() if not all(part in n for part in parts)}


LACKING = (
    "was not loaded: the adapter file lacks it, or load_adapter was given an offloaded model; "
    "load the complete adapter with PeftModel.from_pretrained or fit again"
)
DAMAGED = "the adapter file is damaged; load it again or fit again"
DAMAGES = {
    "one factor missing": (without(".0.", "positive"), LACKING),
    "layer missing": (without(".0."), LACKING),
    "everything missing": (without(), LACKING),
    "renamed": (
        lambda tensors: {n.replace("positive", "plus") if is_damaged(n) else n: t for n, t in tensors.items()},
        LACKING,
    ),
    "one NaN": (map_damaged(one_nan), DAMAGED),
    "infinite": (map_damaged(lambda t: t / 0), DAMAGED),
    "scaled": (map_damaged(lambda t: 1.1 * t), DAMAGED),
    "row twice": (map_damaged(lambda t: t[[0, 0, 1]].contiguous()), DAMAGED),
    "zero": (map_damaged(torch.zeros_like), DAMAGED),
}
# Each of these comes to the tensors in another way.
DISTINCT = ("PeftModel", "low_cpu_mem_usage", "second adapter", "load_adapter", "AutoModel", "inject")
every_distinct_path = pytest.mark.parametrize("path_name", DISTINCT)
site_of = {"mlp": "model.layers.0.mlp.down_proj", "block": "model.layers.0"}


@every_site
@pytest.mark.parametrize("damage", DAMAGES)
@every_distinct_path
def test_damage_is_named(folder_of, tmp_path, site, damage, path_name):
    path, _ = folder_of("llama", site)
    change, remedy = DAMAGES[damage]
    copy_of(path, tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of missing keys
        with pytest.raises((ValueError, RuntimeError)) as error:
            logits(PATHS[path_name](tmp_path))
    line = str(error.value).splitlines()[-1].strip()  # PyTorch puts a headline above
    assert "positive factor of SEA adapter '" in line and f" at {site_of[site]} " in line and line.endswith(remedy)


SHAPES = {
    "fewer rows": map_damaged(lambda t: t[:2].contiguous()),
    "more rows": map_damaged(lambda t: torch.eye(HIDDEN)[:4].contiguous()),
    "narrower": map_damaged(lambda t: torch.eye(20)[:3].contiguous()),
    "transposed": map_damaged(lambda t: t.T.contiguous()),
}


@every_site
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path_name", ["PeftModel", "low_cpu_mem_usage", "AutoPeftModel", "inject"])
def test_wrong_shape_is_named(folder_of, tmp_path, site, shape, path_name):
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, SHAPES[shape])
    with pytest.raises(RuntimeError) as error:
        PATHS[path_name](tmp_path)
    line = str(error.value).splitlines()[-1].strip()
    assert line.startswith("size mismatch for the positive factor of SEA adapter '")
    assert f" at {site_of[site]}: " in line and "(3, 32) by rank_pattern" in line and line.endswith("or fit again")


@every_site
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("load", NATIVE_PATHS.values(), ids=NATIVE_PATHS)
def test_wrong_shape_is_reported_by_transformers(folder_of, tmp_path, site, shape, load, caplog):
    """Transformers' own loading raises before our module is asked, and names the tensor in its report."""
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, SHAPES[shape])
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(tmp_path)
    finally:
        transformers_logging.disable_propagation()
    assert "layers.0" in caplog.text and "sea_positive" in caplog.text and "MISMATCH" in caplog.text


@every_site
@pytest.mark.parametrize("path_name", ["PeftModel", "low_cpu_mem_usage"])
def test_lost_rank_pattern_is_a_wrong_shape(folder_of, tmp_path, site, path_name):
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, dict, rank_pattern={})
    with pytest.raises(RuntimeError, match=r"size mismatch for the positive factor .*\(0, 32\) by rank_pattern"):
        PATHS[path_name](tmp_path)


@every_site
def test_ignored_shapes_are_still_named(folder_of, tmp_path, site):
    """`ignore_mismatched_sizes` leaves the factor unloaded, which its first use tells."""
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, SHAPES["fewer rows"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = with_peft(ignore_mismatched_sizes=True)(tmp_path)
    with pytest.raises(ValueError, match=f"at {site_of[site]} was not loaded"):
        logits(model)


@every_site
def test_injection_by_tensors_warns_of_a_missing_layer(folder_of, tmp_path, site):
    """There the tensors say which layers exist: PEFT makes no other, and warns."""
    path, _ = folder_of("llama", site)
    copy_of(path, tmp_path, without(".0."))
    with pytest.warns(RuntimeWarning) as caught:
        injected_by_tensors(tmp_path)
    messages = [str(warning.message) for warning in caught]
    assert any("additional target modules" in m and site_of[site] in m for m in messages)
    assert any("rank_pattern keys did not match" in m and site_of[site] in m for m in messages)


@every_site
def test_damaged_factors_in_memory_are_named(folder_of, site):
    path, expected = folder_of("llama", site)
    model = PATHS["PeftModel"](path)
    layer = next(layer for layer in model.modules() if isinstance(layer, SEALayer))
    good = layer.sea_positive["default"].weight
    layer.set_factors("default", 2 * good, layer.sea_negative["default"].weight)
    with pytest.raises(ValueError, match=r"positive factor .* must be orthonormal, got products off by 3"):
        logits(model)
    layer.set_factors("default", good, layer.sea_negative["default"].weight)
    assert torch.equal(logits(model), expected)
