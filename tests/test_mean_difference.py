"""Mean-difference steering: what is special to it. What every method must do is in test_methods.py."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from stores import write_pair_store
from test_prompts import byte_tokenizer
from tiny import logits, tiny_model, token_ids, vivid_model

import peft_edit.processes
from peft_edit import ActivationStore, MeanDifferenceConfig, edit_strength, fit_mean_difference, merge_checkpoint
from peft_edit.adapters.card import model_card
from peft_edit.demo import ASSETS
from peft_edit.processes import Processes
from peft_edit.tuners.mean_difference import MeanDifferenceLayer
from peft_edit.tuners.mean_difference import fit as module


HIDDEN, LAYERS = 32, 3


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def planted(length=3.0, n=400, seed=0):
    """Activations of three layers, and the directions along which the positive ones lie further."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(LAYERS, HIDDEN, generator=generator), dim=1)
    common = torch.randn(LAYERS, n, HIDDEN, generator=generator) + 2
    noise = torch.randn(2, LAYERS, n, HIDDEN, generator=generator)
    positive, negative = common + 0.1 * noise[0] + length * directions[:, None], common + 0.1 * noise[1]
    return dict(enumerate(positive)), dict(enumerate(negative)), dict(enumerate(common)), directions


def store_of(path, site="block", **options):
    positive, negative, neutral, directions = planted(**options)
    store = ActivationStore.from_tensors(path, positive=positive, negative=negative, neutral=neutral, site=site)
    return store, directions


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MeanDifferenceLayer)]


def fitted(path, family="llama", **fields):
    model = get_peft_model(vivid_model(family), MeanDifferenceConfig(**fields))
    fit_mean_difference(model, store_of(path, fields.get("site", "block"))[0])
    return model


def test_a_planted_direction_is_found(tmp_path):
    store, directions = store_of(tmp_path)
    model = get_peft_model(vivid_model(), MeanDifferenceConfig())
    fit = fit_mean_difference(model, store)
    for layer, direction, site in zip(layers_of(model), directions, fit.layers, strict=True):
        vector = layer.mean_difference_vector["default"].weight
        assert torch.cosine_similarity(vector, direction, dim=0) > 0.99
        assert abs(site.norm - 3) < 0.1 and site.norm == pytest.approx(float(vector.norm()), rel=1e-6)
    config = model.peft_config["default"]
    assert set(config.fit_statistics) == {f"model.layers.{i}" for i in range(LAYERS)}
    assert config.fitted_on == {"tokens": "last", "questions": 400, "demonstrations": 400} and fit.demonstrations == 400


def test_the_vector_is_the_difference_of_the_means(tmp_path):
    store, _ = store_of(tmp_path, n=7)
    model = get_peft_model(vivid_model(), MeanDifferenceConfig(layers_to_transform=1))
    (site,) = fit_mean_difference(model, store).layers
    (layer,) = layers_of(model)
    rows = store.positive(1).double(), store.negative(1).double()
    expected = rows[0].mean(dim=0) - rows[1].mean(dim=0)
    torch.testing.assert_close(layer.mean_difference_vector["default"].weight, expected.float())
    assert site.rms == pytest.approx(float(torch.cat(rows).square().mean().sqrt()))
    h = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(layer.edit(h, "default"), h + expected.float())


def test_every_answer_token(tmp_path, monkeypatch):
    """The means are over the token pairs, whatever is in memory at once."""
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(12, HIDDEN, generator=generator) for layer in range(LAYERS)}
    pairs = torch.randint(12, (9, 2), generator=generator)
    store = write_pair_store(tmp_path, rows, pairs, modules=dict.fromkeys("012"))
    layer = 1
    expected = (rows[layer][pairs[:, 1]].double() - rows[layer][pairs[:, 0]].double()).mean(dim=0)
    for chunk in (2, 16_384):
        monkeypatch.setattr(module, "CHUNK_PAIRS", chunk)
        vector, _ = module.mean_difference(store, layer)
        torch.testing.assert_close(vector, expected)
    assert fit_mean_difference(get_peft_model(vivid_model(), MeanDifferenceConfig()), store).demonstrations == 9


def test_scaled_to_the_rms_of_the_site(tmp_path):
    """The recorded norm is that of the difference of the means, which scaling would hide."""
    model, plain = fitted(tmp_path / "scaled", scale_to_rms=True), fitted(tmp_path / "plain")
    statistics = [m.peft_config["default"].fit_statistics for m in (model, plain)]
    assert statistics[0] == statistics[1]
    for layer in layers_of(model):
        vector = layer.mean_difference_vector["default"].weight
        rms = model.peft_config["default"].fit_statistics[layer.site]["rms"]
        assert float(vector.square().mean().sqrt()) == pytest.approx(rms, rel=1e-6)


def test_strength_is_linear_in_a_layer(tmp_path):
    model = fitted(tmp_path, strength=0.5)
    layer, h = layers_of(model)[0], torch.randn(4, HIDDEN)
    vector = layer.mean_difference_vector["default"].weight
    torch.testing.assert_close(layer.edit(h, "default"), h + 0.5 * vector)
    with edit_strength(model, 3):
        torch.testing.assert_close(layer.edit(h, "default"), h + 1.5 * vector)
    with edit_strength(model, 0):
        assert layer.edit(h, "default") is h


def test_a_negative_strength_steers_the_other_way(tmp_path):
    layers = [layers_of(fitted(tmp_path / str(sign), strength=sign))[0] for sign in (-1.0, 1)]
    h = torch.randn(4, HIDDEN)
    steps = [layer.edit(h, "default") - h for layer in layers]
    torch.testing.assert_close(steps[0], -steps[1])
    for strength in (float("inf"), float("-inf"), float("nan"), "1", True):
        with pytest.raises(ValueError, match=f"^strength must be a number that is finite, got {strength!r}$"):
            MeanDifferenceConfig(strength=strength)


def test_last_token_only(tmp_path):
    """In the last block, where no later token can carry the edit back."""
    model = fitted(tmp_path, layers_to_transform=2, token_scope="last")
    with model.disable_adapter():
        base = logits(model)
    edited = logits(model)
    assert torch.equal(edited[:, :-1], base[:, :-1]) and not torch.equal(edited[:, -1], base[:, -1])


@pytest.mark.parametrize("family, strength", [("gpt2", 1.5), ("opt", 1.5), ("gpt2", -1.0)])
def test_it_merges_into_the_bias(tmp_path, family, strength):
    model = fitted(tmp_path / "store", family, site="mlp", strength=strength)
    expected = logits(model)
    weights = {name: value.clone() for name, value in model.get_base_model().state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.get_base_model().state_dict().items())

    base = vivid_model(family)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", allow_fingerprint_mismatch=True)
    from_disk = type(base).from_pretrained(tmp_path / "merged").state_dict()
    merged = model.merge_and_unload(safe_merge=True).state_dict()
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, merged[name])}
    assert len(changed) == LAYERS and all(name.endswith("bias") for name in changed)
    assert all(torch.equal(from_disk[name], value) for name, value in merged.items() if name in from_disk)


@pytest.mark.parametrize(
    "family, fields, reason",
    [
        ("llama", {"site": "mlp"}, r"model\.layers\.0\.mlp\.down_proj, which has no bias to hold it"),
        ("llama", {}, r"model\.layers\.0, which is no linear layer with a bias"),
        ("gpt2", {"site": "mlp", "token_scope": "last"}, "it edits the last token of a forward pass only"),
    ],
)
def test_where_it_does_not_merge_the_reason_is_said(tmp_path, family, fields, reason):
    model = fitted(tmp_path / "store", family, **fields)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"^adapter 'default' cannot be merged: .*{reason}") as error:
            merge()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    vivid_model(family).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=reason):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_fingerprint_mismatch=True)
    assert not (tmp_path / "out").exists()


def test_a_vector_that_the_file_lacks_does_not_pass_for_none(tmp_path):
    from safetensors.torch import load_file, save_file

    fitted(tmp_path / "store").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(vivid_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^the vector of mean-difference adapter 'default' at .* was not loaded"):
        logits(model)


def bad_store(path, **changes):
    sets = dict(zip(("positive", "negative", "neutral"), planted(n=5)[:3], strict=True))
    for name, change in changes.items():
        sets[name] = {layer: change(rows) for layer, rows in sets[name].items()}
    return ActivationStore.from_tensors(path, **sets, site="block")


def test_bad_stores(tmp_path):
    model = get_peft_model(vivid_model(), MeanDifferenceConfig())
    positive = planted(n=5)[0]
    cases = {
        "layer 0: the activations of .* are not finite": bad_store(tmp_path / "nan", positive=lambda h: h / 0),
        "layer 0: positive and negative activations have the same mean": ActivationStore.from_tensors(
            tmp_path / "same", positive=positive, negative=positive, neutral=positive, site="block"
        ),
        "holds the output of 'mlp', the adapter edits 'block'": store_of(tmp_path / "mlp", "mlp", n=3)[0],
    }
    for message, store in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            fit_mean_difference(model, store)
        assert "\n" not in str(error.value)
    assert model.peft_config["default"].fit_statistics == {}
    assert torch.equal(logits(model), logits(vivid_model()))
    with pytest.raises(ValueError, match="no mean-difference adapter of this model"):
        fit_mean_difference(tiny_model(), cases.popitem()[1], adapter_name="other")


def test_the_card_says_where_it_merges(tmp_path):
    blocks = str(model_card(fitted(tmp_path / "a").peft_config["default"]))
    assert "# Mean-difference adapter" in blocks and "Fitted to 400 demonstrations from 400 questions." in blocks
    assert "| 0 | `model.layers.0` | 3" in blocks and "the output of a whole decoder block has no bias" in blocks
    mlp = str(model_card(fitted(tmp_path / "b", site="mlp", scale_to_rms=True).peft_config["default"]))
    assert "where the edited linear layer has a bias" in mlp and "| `scale_to_rms` | `true` |" in mlp
    before = "The norm is that before each vector is scaled to the RMS."
    assert "| 2 | `model.layers.2.mlp.down_proj` | 3" in mlp and f" |\n\n{before}\n" in mlp and before not in blocks
    assert "**It has not been fitted: it edits nothing.**" in str(model_card(MeanDifferenceConfig()))


def test_one_of_several_processes_saves_the_adapter(tmp_path, run_command, monkeypatch):
    vivid_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    store_of(tmp_path / "store")
    fit = ("fit-mean-difference", tmp_path / "model", tmp_path / "store", tmp_path / "adapter")
    for index, saves in ((1, False), (0, True)):
        monkeypatch.setattr(peft_edit.processes, "processes", lambda index=index: Processes(index))
        status, printed = run_command(*fit)
        assert status == 0 and (tmp_path / "adapter").exists() == bool(printed.out) == saves, printed.err


@pytest.mark.parametrize("command", ["fit-sea", "fit-mean-difference"])
def test_fits_take_the_first_site_of_a_store(tmp_path, run_command, command):
    model, data = ASSETS / "model", ASSETS / "demonstrations.jsonl"
    status, printed = run_command("collect", model, data, tmp_path / "store", "--site", "block,mlp", "--limit", 10)
    assert status == 0, printed.err
    status, printed = run_command(command, model, tmp_path / "store", tmp_path / "adapter")
    assert status == 0 and json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["site"] == "block"
    assert "Default: its first." in " ".join(run_command(command, "--help")[1].out.split())


def test_commands_make_an_adapter(tmp_path, run_command):
    model, data = ASSETS / "model", ASSETS / "demonstrations.jsonl"
    status, printed = run_command("collect", model, data, tmp_path / "store", "--site", "block", "--limit", 40)
    assert status == 0, printed.err
    out = tmp_path / "adapter"
    status, printed = run_command(
        *("fit-mean-difference", model, tmp_path / "store", out, "--layers", "1-2", "--scale-to-rms"),
        *("--strength", -0.5, "--json", tmp_path / "fit.json"),
    )
    assert status == 0 and "fitted to 40 demonstrations" in printed.out, printed.err
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["peft_type"] == "MEAN_DIFFERENCE" and saved["strength"] == -0.5 and saved["scale_to_rms"]
    assert [layer["layer"] for layer in json.loads((tmp_path / "fit.json").read_text())["layers"]] == [1, 2]
    test = ASSETS / "test.jsonl"
    status, printed = run_command("evaluate", model, test, "--adapter", out, "--limit", 5, "--batch-size", 64)
    assert status == 0 and "MC1 " in printed.out, printed.err
    status, printed = run_command("export-lora", model, out, tmp_path / "lora")
    assert status == 2 and "it adds a vector, which is a bias" in printed.err and printed.err.count("\n") == 1
    status, printed = run_command("merge", model, out, tmp_path / "merged")
    assert status == 2 and "no linear layer with a bias" in printed.err and not (tmp_path / "merged").exists()


def test_tokens_are_those_of_the_model(tmp_path):
    """The edit is the same for every token and position."""
    model = fitted(tmp_path, layers_to_transform=0)
    (layer,) = layers_of(model)
    with model.disable_adapter():
        states = model(token_ids(), output_hidden_states=True).hidden_states[1]
    edited = model(token_ids(), output_hidden_states=True).hidden_states[1]
    vector = layer.mean_difference_vector["default"].weight
    torch.testing.assert_close(edited - states, vector.expand_as(states), rtol=1e-4, atol=1e-4)
