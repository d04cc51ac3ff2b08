"""Saving SEA adapters of any ranks and loading them; damaged files. Other adapters: see test_methods.py."""

import functools
import json
import logging
import warnings

import pytest
import torch
from loading import NATIVE_PATHS, PATHS, base_of, injected_by_tensors, link_base, saved_tensors, with_peft
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, agree, logits
from transformers.utils import logging as transformers_logging

from peft_edit import SEAConfig
from peft_edit.tuners.sea import SEALayer


SITES = ("mlp", "block")
HIDDEN = 32
every_site = pytest.mark.parametrize("site", SITES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


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
    def folder(family="llama", site="mlp", kind="fitted"):
        path = tmp_path_factory.mktemp(f"{family}-{site}-{kind}")
        link_base(path, family)
        base = base_of(path)
        fields = {"layers_to_transform": [0, 2]} if kind == "two layers" else {}
        model = get_peft_model(base, SEAConfig(site=site, **fields)).eval()
        if kind != "unfitted":
            ranks = {"rank 0": ((0, 0),) * 3, "one layer fitted": ((3, 5),)}
            write_edit(model, **({"ranks": ranks[kind]} if kind in ranks else {}))
        model.save_pretrained(path / "adapter")
        return path, logits(model)

    return folder


every_path = pytest.mark.parametrize("load", PATHS.values(), ids=PATHS)


@pytest.mark.parametrize("family", FAMILIES)
@every_site
def test_saved_files(folder_of, family, site):
    path, expected = folder_of(family, site)
    child = ".sea" if site == "block" else ""
    ranks = json.loads((path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert len(ranks) == 3
    assert {name: tuple(tensor.shape) for name, tensor in saved_tensors(path).items()} == {
        f"base_model.model.{name}{child}.sea_{sign}.weight": (rank, HIDDEN)
        for name, pair in ranks.items()
        for sign, rank in zip(("positive", "negative"), pair, strict=True)
    }
    agree(logits(PATHS["PeftModel"](path)), expected)


@every_site
@every_path
@pytest.mark.parametrize("kind", ["fitted", "unfitted", "rank 0", "one layer fitted", "two layers"])
def test_every_kind_of_adapter(folder_of, site, load, kind):
    path, expected = folder_of("llama", site, kind)
    model = load(path)
    agree(logits(model), expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "sea_" in name)
    if kind == "two layers":
        adapter = list(model.peft_config)[-1]
        layers = [m for m in model.modules() if isinstance(m, SEALayer) and m.has_adapter(adapter)]
        assert len(layers) == 2
    if kind in ("unfitted", "rank 0"):
        agree(expected, logits(base_of(path)))


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


# Damaged files


def copy_of(path, target, change, rank_pattern=None):
    """Copy a folder with other tensors in the adapter, or another rank_pattern."""
    (target / "base").symlink_to(path / "base")
    (target / "adapter").mkdir()
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    if rank_pattern is not None:
        config["rank_pattern"] = rank_pattern
    (target / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = change(saved_tensors(path))
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
