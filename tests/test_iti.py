"""ITI: what is special to it. What every method must do is in test_methods.py."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from stores import write_text_store
from tiny import logits, tiny_model, vivid_model

from peft_edit import ActivationStore, ITIConfig, collect_activations, edit_strength, fit_iti, merge_checkpoint
from peft_edit.adapters.card import model_card
from peft_edit.demo import ASSETS
from peft_edit.tuners.iti import ITILayer
from peft_edit.tuners.iti.fit import most_accurate
from peft_edit.tuners.iti.maths import accuracy, fit_probes, mass_mean_shift


LAYERS, HEADS, D = 3, 4, 8
WIDTH = HEADS * D
# Heads at which positive and negative answers differ, as (layer, head).
PLANTED = {(0, 2), (2, 0), (2, 3)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def planted(n=120, seed=0, length=3.0):
    """Activations of three layers of four heads that differ along a direction of the planted heads alone."""
    generator = torch.Generator().manual_seed(seed)
    sets = [{i: torch.randn(n, WIDTH, generator=generator) for i in range(LAYERS)} for _ in range(2)]
    directions = torch.nn.functional.normalize(torch.randn(LAYERS, HEADS, D, generator=generator), dim=-1)
    for layer, head in PLANTED:
        sets[0][layer].view(n, HEADS, D)[:, head] += length * directions[layer, head]
    return *sets, directions


def store_of(path, **options):
    positive, negative, directions = planted(**options)
    neutral = {i: torch.zeros_like(rows) for i, rows in positive.items()}
    store = ActivationStore.from_tensors(path, positive=positive, negative=negative, neutral=neutral, site="attention")
    return store, directions


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ITILayer)]


def fitted(path, family="llama", model=None, **fields):
    model = get_peft_model(vivid_model(family) if model is None else model, ITIConfig(**{"num_heads": 3, **fields}))
    return model, fit_iti(model, store_of(path)[0])


# Probes


def random_rows(heads=3, n=40, d=5, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(heads, n, d, generator=generator, dtype=torch.float64)
    y = (torch.arange(n) % 3 == 0).long()
    return x + 0.5 * scale * y[:, None], y


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-2, 100), st.floats(1e-2, 1e2))
def test_probes_are_where_the_gradient_of_the_penalised_likelihood_is_zero(seed, l2, scale):
    x, y = random_rows(seed=seed, scale=scale)
    weight, bias = fit_probes(x, y, l2)
    with torch.enable_grad():
        for rows, w, b in zip(x, weight, bias, strict=True):
            w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ w + b, y.double(), reduction="sum")
            gradients = torch.autograd.grad(loss + l2 / 2 * w.square().sum(), (w, b))
            assert all(float(g.abs().max()) < 1e-6 * float(rows.abs().sum()) for g in gradients)


def test_probes_equal_a_plain_fit_of_each_head():
    x, y = random_rows()
    weight, bias = fit_probes(x, y, l2=0.7)
    for rows, w, b in zip(x, weight, bias, strict=True):
        parameters = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def closure(rows=rows, parameters=parameters, optimizer=optimizer):
            with torch.enable_grad():
                optimizer.zero_grad()
                z = rows @ parameters[:-1] + parameters[-1]
                loss = torch.nn.functional.softplus(-(2 * y - 1) * z).sum() + 0.35 * parameters[:-1].square().sum()
                loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(torch.cat((w, b[None])), parameters.detach(), rtol=1e-5, atol=1e-6)
        right = ((rows @ w + b > 0).long() == y).double().mean()
        assert accuracy(rows[None], y, w[None], b[None]).item() == pytest.approx(right.item())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_probes_of_separable_rows_are_found(scale):
    y = torch.arange(30) % 2
    x = scale * (2 * y - 1)[None, :, None] * torch.ones(2, 30, 4)
    weight, bias = fit_probes(x, y)
    assert weight.isfinite().all() and accuracy(x, y, weight, bias).tolist() == [1, 1]


def test_mass_mean_shift_of_a_case_by_hand():
    x = torch.tensor([[[4.0, 1.0], [2.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]])
    theta, sigma = mass_mean_shift(x, torch.tensor([1, 1, 0, 0]))
    torch.testing.assert_close(theta, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    # 4, 2, 1 and -1 have the mean 1.5: (6.25 + 0.25 + 0.25 + 6.25) / 4
    assert sigma.item() == pytest.approx(3.25**0.5)


def test_the_most_accurate_heads_of_all_layers():
    scores = {1: torch.tensor([0.5, 0.9, 0.7]), 4: torch.tensor([0.9, 0.7, 0.6])}
    assert most_accurate(scores, 3) == {1: [1, 2], 4: [0]}
    assert most_accurate(scores, 4) == {1: [1, 2], 4: [0, 1]}
    assert most_accurate(scores, 6) == {1: [0, 1, 2], 4: [0, 1, 2]}


# The fit


def test_planted_heads_are_found(tmp_path):
    store, directions = store_of(tmp_path)
    model = get_peft_model(vivid_model(), ITIConfig(num_heads=3))
    fit = fit_iti(model, store)
    assert {(site.layer, head) for site in fit.layers for head in site.heads} == PLANTED
    assert all((site.change > 0) == bool(site.heads) for site in fit.layers)
    for site, layer in zip(fit.layers, layers_of(model), strict=True):
        assert all(len(site.accuracy) == HEADS for site in fit.layers)
        vector = layer.iti_vector["default"].weight.view(HEADS, D)
        for head in range(HEADS):
            if head in site.heads:
                assert site.accuracy[head] > 0.8
                assert torch.cosine_similarity(vector[head], directions[site.layer, head], dim=0) > 0.9
            else:
                assert site.accuracy[head] < 0.75 and not vector[head].any()
    assert fit.held_out_questions == 24 and fit.answers == 240 and fit.demonstrations == 120


def test_direction_and_sigma_equal_a_plain_computation(tmp_path):
    model, fit = fitted(tmp_path / "store", num_heads=LAYERS * HEADS)
    positive, negative, _ = planted()
    for site, layer in zip(fit.layers, layers_of(model), strict=True):
        for head in range(HEADS):
            rows = [of[site.layer].double()[:, head * D : (head + 1) * D] for of in (positive, negative)]
            shift = rows[0].mean(dim=0) - rows[1].mean(dim=0)
            theta = shift / shift.norm()
            sigma = (torch.cat(rows) @ theta).std(correction=0)
            found = layer.iti_vector["default"].weight[head * D : (head + 1) * D]
            torch.testing.assert_close(found, (sigma * theta).float(), rtol=1e-5, atol=1e-6)
            assert site.sigma[head] == pytest.approx(sigma.item())


def test_accuracy_is_that_of_held_out_questions(tmp_path):
    """By a plain probe of one head, fitted on the questions that are not held out."""
    store, _ = store_of(tmp_path)
    model = get_peft_model(vivid_model(), ITIConfig(num_heads=1))
    fit = fit_iti(model, store, held_out=0.25, seed=3, l2=2.0)
    held_out = torch.isin(torch.arange(120), torch.randperm(120, generator=torch.Generator().manual_seed(3))[:30])
    rows, y = torch.cat((store.negative(1), store.positive(1))), torch.arange(240) >= 120
    mask = held_out.repeat(2)
    x = rows[None, :, D : 2 * D]
    weight, bias = fit_probes(x[:, ~mask], y[~mask], 2.0)
    assert fit.layers[1].accuracy[1] == pytest.approx(accuracy(x[:, mask], y[mask], weight, bias).item())
    again = fit_iti(model, store, held_out=0.25, seed=3, l2=2.0)
    other = fit_iti(model, store, held_out=0.25, seed=4, l2=2.0)
    assert again == fit and other != fit


def test_an_answer_in_several_demonstrations_counts_once(tmp_path):
    """As the answers of a question, every positive with every negative, come from a collection."""
    from test_collect import TOKENIZER, contrast

    model = tiny_model()
    options = {"site": "attention", "neutral": None, "prompt_format": "plain"}
    every = collect_activations(model, TOKENIZER, contrast(), tmp_path, answers="all", **options)
    adapted = get_peft_model(model, ITIConfig(num_heads=2))
    fit = fit_iti(adapted, every, held_out=0.4)
    assert fit.answers == 15 and fit.demonstrations == len(every) == 12
    assert adapted.peft_config["default"].fitted_on["demonstrations"] == 12


# The edit


def test_the_edit_equals_a_hook_written_by_hand(tmp_path):
    for family in ("llama", "gpt2", "opt"):
        model, fit = fitted(tmp_path / family, family, alpha=1.5)
        actual = logits(model)
        with model.disable_adapter():
            base = logits(model)
        vectors = [layer.iti_vector["default"].weight.clone() for layer in layers_of(model)]
        bare = vivid_model(family)
        for site, vector in zip(fit.layers, vectors, strict=True):
            bare.get_submodule(site.site).register_forward_pre_hook(
                lambda module, args, vector=vector: (args[0] + 1.5 * vector,)
            )
        torch.testing.assert_close(actual, logits(bare))
        assert not torch.allclose(actual, base, atol=1e-2)


def test_alpha_and_strength_scale_the_vector(tmp_path):
    model, _ = fitted(tmp_path, alpha=2.0)
    layer, h = layers_of(model)[2], torch.randn(2, 5, WIDTH)
    vector = layer.iti_vector["default"].weight
    torch.testing.assert_close(layer.edit(h, "default"), h + 2 * vector)
    with edit_strength(model, 0.5):
        torch.testing.assert_close(layer.edit(h, "default"), h + vector)
    model.peft_config["default"].alpha = -1.0
    torch.testing.assert_close(layer.edit(h, "default"), h - vector)
    model.peft_config["default"].alpha = 0.0
    assert layer.edit(h, "default") is h


def test_a_layer_without_chosen_heads_does_not_edit(tmp_path):
    model, fit = fitted(tmp_path)
    assert fit.layers[1].heads == [] and not layers_of(model)[1].is_fitted("default")
    h = torch.randn(2, 5, WIDTH)
    assert layers_of(model)[1].edit(h, "default") is h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_model_rounds_the_result_only(tmp_path, dtype):
    model, _ = fitted(tmp_path, model=vivid_model(dtype=dtype), alpha=1.0)
    layer, h = layers_of(model)[2], torch.randn(3, WIDTH).to(dtype)
    vector = layer.iti_vector["default"].weight
    assert vector.dtype == torch.float32
    assert torch.equal(layer.edit(h, "default"), (h.float() + vector).to(dtype))
    assert logits(model).dtype == dtype


def test_heads_that_are_wider_than_the_models_width_over_their_number(tmp_path):
    """The width is the configuration's."""
    base = tiny_model("llama", head_dim=16, initializer_range=0.2)
    generator = torch.Generator().manual_seed(0)
    sets = {sign: {i: torch.randn(40, 64, generator=generator) for i in range(3)} for sign in ("positive", "negative")}
    store = ActivationStore.from_tensors(tmp_path / "store", **sets, neutral=sets["positive"], site="attention")
    before = logits(base)
    model = get_peft_model(base, ITIConfig(num_heads=2))
    fit = fit_iti(model, store)
    assert all(len(site.accuracy) == 4 for site in fit.layers)
    for site, layer in zip(fit.layers, layers_of(model), strict=True):
        used = layer.iti_vector["default"].weight.view(4, 16).any(dim=1).nonzero().flatten().tolist()
        assert layer.features == 64 and used == site.heads
    assert not torch.allclose(logits(model), before, atol=1e-2)


# Merging, saving


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_it_merges_exactly_into_the_bias(tmp_path, family):
    model, _ = fitted(tmp_path / "store", family, alpha=1.5)
    expected = logits(model)
    base = vivid_model(family)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")  # weight and bias in different files
    model.save_pretrained(tmp_path / "adapter")
    folders = (tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    result = merge_checkpoint(*folders, allow_fingerprint_mismatch=True, device="cpu")
    assert len(result.edited) == 2 and result.relative_error == 0
    vectors = {layer.site: layer.iti_vector["default"].weight.clone() for layer in layers_of(model)}
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    before, after = base.state_dict(), merged.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert len(changed) == 2 and all(name.endswith("bias") for name in changed)
    for name in changed:
        site = name.removesuffix(".bias")
        weight = before[f"{site}.weight"]
        step = (weight.T if family == "gpt2" else weight) @ (1.5 * vectors[site])
        torch.testing.assert_close(after[name], before[name] + step, rtol=1e-5, atol=1e-5)
    from_disk = type(base).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(from_disk[name], value) for name, value in after.items() if name in from_disk)


def test_without_a_bias_it_does_not_merge(tmp_path):
    """As with mean difference: a bias that the architecture lacks would be lost when the checkpoint is loaded."""
    model, _ = fitted(tmp_path / "store")
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    vivid_model().save_pretrained(tmp_path / "base")
    match = r"^adapter 'default' cannot be merged: it adds a vector to the input of .*o_proj, which has no bias to hold"
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: merge_checkpoint(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_fingerprint_mismatch=True
        ),
    ):
        with pytest.raises(ValueError, match=match) as error:
            merge()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before) and not (tmp_path / "out").exists()


def test_a_llama_with_biases_merges(tmp_path):
    base = tiny_model("llama", attention_bias=True, initializer_range=0.2)
    model, _ = fitted(tmp_path, model=base, alpha=1.0)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, fit = fitted(tmp_path / "store", alpha=3.0)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    statistics = loaded.peft_config["default"].fit_statistics
    assert statistics == {
        site.site: {"accuracy": site.accuracy, "heads": site.heads, "sigma": site.sigma} for site in fit.layers
    }
    assert loaded.peft_config["default"].alpha == 3 and loaded.peft_config["default"].num_heads == 3


# Errors


def test_bad_stores(tmp_path):
    model = get_peft_model(vivid_model(), ITIConfig(num_heads=3))
    positive, negative, _ = planted(n=12)

    def store(name, positive=positive, negative=negative, site="attention"):
        return ActivationStore.from_tensors(
            tmp_path / name, positive=positive, negative=negative, neutral=positive, site=site
        )

    first = {i: rows[:1] for i, rows in positive.items()}
    cases = {
        "layer 0: the activations of .* are not finite": store("nan", {i: rows / 0 for i, rows in positive.items()}),
        "layer 0, head 0: positive and negative activations have the same mean": store("same", negative=positive),
        "holds the output of 'mlp', the adapter edits 'attention': collect that site": store("mlp", site="mlp"),
        "holds demonstrations of 1 questions, and probes are scored on others": store("one", first, first),
        "holds plain texts: collect with tokens='last' for ITI": write_text_store(
            tmp_path / "texts", positive, modules=dict.fromkeys("012"), site="attention"
        ),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            fit_iti(model, bad)
        assert "\n" not in str(error.value)
    assert model.peft_config["default"].fit_statistics == {}
    assert torch.equal(logits(model), logits(vivid_model()))


def test_more_heads_than_there_are(tmp_path):
    store, _ = store_of(tmp_path)
    with pytest.raises(ValueError, match=r"^num_heads=48 and the adapter's 3 layers have 12 heads: lower num_heads$"):
        fit_iti(get_peft_model(vivid_model(), ITIConfig()), store)
    model = get_peft_model(vivid_model(), ITIConfig(num_heads=5, layers_to_transform=[1]))
    with pytest.raises(ValueError, match=r"^num_heads=5 and the adapter's 1 layers have 4 heads: lower num_heads$"):
        fit_iti(model, store)


@pytest.mark.parametrize("options", [{"held_out": 0}, {"held_out": 1}, {"held_out": "a"}, {"l2": 0}, {"seed": 1.5}])
def test_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        fit_iti(get_peft_model(vivid_model(), ITIConfig(num_heads=1)), "nowhere", **options)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="did you mean 'held_out'"):
        fit_iti(vivid_model(), "nowhere", heldout=0.1)


# Card and commands


def test_the_card_shows_heads_and_accuracies(tmp_path):
    card = str(model_card(fitted(tmp_path)[0].peft_config["default"]))
    assert "# ITI adapter" in card and "Fitted to 120 demonstrations from 120 questions." in card
    assert "| 2 | 0." in card and "| 0, 3 |" in card and "| none |" in card
    assert "cannot be told what to leave alone" in card
    assert "**It has not been fitted: it edits nothing.**" in str(model_card(ITIConfig()))


def test_commands_make_an_adapter(tmp_path, run_command):
    model, data = ASSETS / "model", ASSETS / "demonstrations.jsonl"
    collect = ("collect", model, data, tmp_path / "store", "--site", "attention", "--neutral", "none", "--limit", 30)
    status, printed = run_command(*collect)
    assert status == 0, printed.err
    out = tmp_path / "adapter"
    options = ("--num-heads", 4, "--alpha", 5, "--layers", "1-3", "--held-out", 0.3, "--json", tmp_path / "fit.json")
    status, printed = run_command("fit-iti", model, tmp_path / "store", out, *options)
    assert status == 0 and "best probe accuracy" in printed.out, printed.err
    config, fit = (json.loads(path.read_text()) for path in (out / "adapter_config.json", tmp_path / "fit.json"))
    assert (config["peft_type"], config["num_heads"], config["alpha"]) == ("ITI", 4, 5)
    assert [layer["layer"] for layer in fit["layers"]] == [1, 2, 3] and fit["held_out_questions"] == 9
    assert sum(len(layer["heads"]) for layer in fit["layers"]) == 4
    assert json.loads((out / "iti_fit.json").read_text())["layers"] == fit["layers"]
    test = ASSETS / "test.jsonl"
    status, printed = run_command("evaluate", model, test, "--adapter", out, "--limit", 5, "--batch-size", 64)
    assert status == 0 and "MC1 " in printed.out, printed.err
    status, printed = run_command("export-lora", model, out, tmp_path / "lora")
    assert status == 2 and "it adds a vector, which is a bias" in printed.err and printed.err.count("\n") == 1
    status, printed = run_command("merge", model, out, tmp_path / "merged")
    assert status == 2 and "has no bias to hold it" in printed.err and not (tmp_path / "merged").exists()
    status, printed = run_command("fit-iti", model, tmp_path / "store", tmp_path / "none", "--num-heads", 1000)
    assert status == 2 and "--num-heads 1000 and the adapter's" in printed.err and not (tmp_path / "none").exists()
