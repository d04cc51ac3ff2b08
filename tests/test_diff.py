"""Diff: what is special to it. What every method must do is in test_methods.py, its Trainer's common part in
test_training.py."""

import json
import re
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from stores import write_pair_store, write_text_store
from tiny import logits, vivid_model
from torch import nn

import peft_edit.training.pairs
from peft_edit import DiffConfig, DiffTrainer, DiffTrainingArguments, HPRConfig, HPRTrainingArguments, edit_strength
from peft_edit.adapters.card import model_card
from peft_edit.cli import main
from peft_edit.demo import ASSETS
from peft_edit.training.resuming import Interrupted
from peft_edit.tuners.diff import DiffLayer
from peft_edit.tuners.diff.maths import loss, squared_errors
from peft_edit.tuners.diff.stacked import StackedDiff


D, LAYERS, PAIRS = 32, 3, 96
MODULES = {str(i): f"model.layers.{i}" for i in range(LAYERS)}


def planted(n=PAIRS, seed=0):
    """Rows of three layers: n negatives, and n positives that lie further by the same step of each layer."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(LAYERS, D, generator=torch.Generator().manual_seed(99))
    return {
        i: torch.cat((rows := torch.randn(n, D, generator=generator), rows + 2 * steps[i])) for i in range(LAYERS)
    }, steps


def store_of(path, n=PAIRS, seed=0, **settings):
    pairs = torch.stack((torch.arange(n), torch.arange(n, 2 * n)), dim=1)
    return write_pair_store(path, planted(n, seed)[0], pairs, modules=MODULES, **settings)


def adapted(seed=0, base=None, **fields):
    base = vivid_model() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, DiffConfig(**fields))


def trainer_of(model, folder, train, evaluation=None, retain=None, **changes):
    changes = {"eval_strategy": "no", "save_strategy": "no", **changes} if evaluation is None else changes
    changes = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, **changes}
    arguments = DiffTrainingArguments(str(folder / "out"), **changes)
    return DiffTrainer(model, arguments, train_dataset=train, eval_dataset=evaluation, retain_dataset=retain)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DiffLayer)]


def randomised(model, scale=0.2):
    """Networks whose last layer is not zero."""
    with torch.no_grad():
        for layer in layers_of(model):
            layer.diff_network["default"][-1].weight.normal_(std=scale)
    return model


# Networks and loss


@pytest.mark.parametrize(
    "fields, widths",
    [
        ({}, [(32, 16), (16, 8), (8, 4), (4, 32)]),
        ({"hidden_size": 7}, [(32, 7), (7, 7), (7, 7), (7, 32)]),
        ({"num_layers": 1}, [(32, 32)]),
        ({"num_layers": 2}, [(32, 16), (16, 32)]),
    ],
)
def test_networks_have_the_shape_of_angle_networks_and_the_width_of_the_model_as_output(fields, widths):
    network = layers_of(adapted(**fields))[0].diff_network["default"]
    linear = [m for m in network if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == widths
    assert not linear[-1].weight.any() and not linear[-1].bias.any()
    assert [type(m) for m in network][1::2] == [nn.GELU] * (len(widths) - 1)


def plain_loss(network, positive, negative, retained=None, weight=1.0):
    """Of single tokens, in a loop."""
    terms = []
    for a, b in zip(positive, negative, strict=True):
        terms.append(((network(a) - torch.zeros(D)) ** 2).mean())
        terms.append(((network(b) - (a - b)) ** 2).mean())
    total = sum(terms) / len(terms)
    if retained is not None:
        total = total + weight / 2 * sum((network(r) ** 2).mean() for r in retained) / len(retained)
    return total


@torch.no_grad()
def test_the_loss_equals_a_plain_loop_over_tokens():
    model = randomised(adapted())
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randn(5, LAYERS, 2, D, generator=generator)
    retained = torch.randn(4, LAYERS, D, generator=generator)
    stacked = StackedDiff(layers_of(model), "default")
    errors, size, squares = stacked(pairs, retained)
    found = loss(errors.permute(1, 2, 0), squares.T, retain_weight=0.7)
    without = loss(stacked(pairs)[0].permute(1, 2, 0))
    for i, layer in enumerate(layers_of(model)):
        network, of_block = layer.diff_network["default"], (pairs[:, i, 0], pairs[:, i, 1])
        torch.testing.assert_close(found.total[i], plain_loss(network, *of_block, retained[:, i], 0.7))
        torch.testing.assert_close(without.total[i], plain_loss(network, *of_block))
        torch.testing.assert_close(size[:, i], (of_block[0] - of_block[1]).square().mean(dim=-1))
    assert torch.equal(loss(errors.permute(1, 2, 0), squares.T, retain_weight=0.0).total, without.total)


def test_squared_errors_of_a_case_by_hand():
    predicted = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]]])  # at one positive and one negative activation
    shift = torch.tensor([[2.0, 1.0]])
    assert squared_errors(predicted, shift).tolist() == [[0.5], [0.5]]
    assert loss(squared_errors(predicted, shift)[None]).total.item() == 0.5


# Training


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_training_is_that_of_a_plain_loop(tmp_path):
    """Of one block at a time, with PyTorch's own AdamW, and each block's gradient clipped by itself."""
    store, rows = store_of(tmp_path / "store"), planted()[0]
    model, expected = adapted(), adapted()
    options = {"learning_rate": 1e-2, "num_train_epochs": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 32, "max_grad_norm": 0.5}
    trainer_of(model, tmp_path, store, **options).train()
    for i, layer in enumerate(layers_of(expected)):
        network = layer.diff_network["default"]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            for batch in torch.arange(PAIRS).split(32):
                optimizer.zero_grad()
                plain_loss(network, rows[i][PAIRS + batch], rows[i][batch]).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
    for found, plain in zip(layers_of(model), layers_of(expected), strict=True):
        for a, b in zip(found.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_and_finds_the_planted_step(tmp_path):
    train, held_out = store_of(tmp_path / "train", n=400), store_of(tmp_path / "held out", n=40, seed=1)
    model = adapted()
    options = {"learning_rate": 1e-2, "num_train_epochs": 12, "save_strategy": "no", "load_best_model_at_end": False}
    trainer = trainer_of(model, tmp_path, train, held_out, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_relative_error"] == pytest.approx(1) and before["eval_positive_loss"] == 0
    assert after["eval_relative_error"] < 0.3 and after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_loss"] == pytest.approx((after["eval_positive_loss"] + after["eval_negative_loss"]) / 2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"positive_loss", "negative_loss", "relative_error", "relative_error_layer_2"} <= set(logged[0])
    negative, steps = planted(40, seed=1)[0], planted()[1]
    with torch.no_grad():
        for i, layer in enumerate(layers_of(model)):
            moved = layer.edit(negative[i][:40], "default") - negative[i][:40]
            assert torch.cosine_similarity(moved.mean(dim=0), steps[i], dim=0) > 0.95
            assert not torch.allclose(moved, torch.zeros(D))
    config = model.peft_config["default"]
    assert config.fitted_on["token_pairs"] == 400 and "retain" not in config.fitted_on


def test_the_evaluation_is_the_mean_over_all_pairs(tmp_path):
    """Whatever the batches are."""
    held_out, rows = store_of(tmp_path / "held out", n=21), planted(21)[0]
    model = randomised(adapted())
    found = trainer_of(model, tmp_path, None, held_out, per_device_eval_batch_size=8).evaluate()
    losses, relative = [], []
    with torch.no_grad():
        for i, layer in enumerate(layers_of(model)):
            network, positive, negative = layer.diff_network["default"], rows[i][21:], rows[i][:21]
            losses.append(plain_loss(network, positive, negative))
            errors = (network(negative) - (positive - negative)).square().mean()
            relative.append(float(errors / (positive - negative).square().mean()))
    assert found["eval_loss"] == pytest.approx(float(sum(losses)) / LAYERS, rel=1e-5)
    assert [found[f"eval_relative_error_layer_{i}"] for i in range(LAYERS)] == pytest.approx(relative, rel=1e-5)


def test_a_retain_set_is_left_alone_and_recorded(tmp_path):
    store = store_of(tmp_path / "store", n=200)
    generator = torch.Generator().manual_seed(7)
    away = 3 * torch.randn(LAYERS, 1, D, generator=generator)
    rows = {i: away[i] + 0.3 * torch.randn(150, D, generator=generator) for i in range(LAYERS)}
    retain = write_text_store(tmp_path / "retain", rows, modules=MODULES)
    moved = {}
    for name, told in (("told", retain), ("not told", None)):
        model = adapted()
        options = {"learning_rate": 1e-2, "num_train_epochs": 12, "retain_weight": 2.0}
        trainer = trainer_of(model, tmp_path / name, store, retain=told, **options)
        trainer.train()
        with torch.no_grad():
            moved[name] = sum(
                float((layer.edit(rows[i], "default") - rows[i]).norm()) for i, layer in enumerate(layers_of(model))
            )
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert ("retain_loss" in logged[-1]) == (told is not None)
        if told is not None:
            assert logged[-1]["retain_loss"] < 0.2
            assert model.peft_config["default"].fitted_on["retain"] == {"texts": 1, "tokens": 150, "weight": 2.0}
    assert moved["told"] < 0.5 * moved["not told"]


def test_checkpoints_resume_to_the_same_weights(tmp_path):
    store = store_of(tmp_path / "store")
    options = {"learning_rate": 1e-2, "num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": None}
    whole, resumed = adapted(), adapted(seed=5)
    trainer_of(whole, tmp_path / "a", store, **options).train()
    checkpoint = tmp_path / "a" / "out" / "checkpoint-6"
    trainer = trainer_of(resumed, tmp_path / "b", store, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(layers_of(whole), layers_of(resumed), strict=True)
    assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"another configuration \(num_layers is 4 there, 2 here\): resume with"):
        trainer_of(adapted(num_layers=2), tmp_path / "c", store, **options).train(str(checkpoint))


# The edit


@pytest.mark.parametrize("strength", [1.0, -0.5])
@torch.no_grad()
def test_the_edit_equals_a_hook_written_by_hand(strength):
    model = randomised(adapted(strength=strength))
    actual = logits(model)
    networks = [layer.diff_network["default"] for layer in layers_of(model)]
    bare = vivid_model()
    for block, network in zip(bare.model.layers, networks, strict=True):
        block.register_forward_hook(lambda module, args, out, network=network: out + strength * network(out))
    torch.testing.assert_close(actual, logits(bare))
    with edit_strength(model, 0):
        assert torch.equal(logits(model), logits(vivid_model()))


@torch.no_grad()
def test_bfloat16_rounds_the_result_only():
    model = randomised(adapted(base=vivid_model(dtype=torch.bfloat16)))
    layer, h = layers_of(model)[1], torch.randn(2, 5, D).bfloat16()
    network = layer.diff_network["default"]
    assert network[0].weight.dtype == torch.float32
    assert torch.equal(layer.edit(h, "default"), (h.float() + network(h.float())).bfloat16())
    assert logits(model).dtype == torch.bfloat16


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = randomised(adapted(strength=0.7, layers_to_transform=[0, 2]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vivid_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.peft_config["default"].strength == 0.7


def test_what_is_refused(tmp_path):
    model, store = adapted(), store_of(tmp_path / "store")
    with pytest.raises(TypeError, match=r"^args must be DiffTrainingArguments, got HPRTrainingArguments"):
        DiffTrainer(model, HPRTrainingArguments(str(tmp_path)), train_dataset=store)
    with pytest.raises(ValueError, match=r"no Diff adapter of this model"):
        of_another = get_peft_model(vivid_model(), HPRConfig())
        DiffTrainer(of_another, DiffTrainingArguments(str(tmp_path), eval_strategy="no"), train_dataset=store)
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True has no meaning for Diff: the language model"):
        DiffTrainingArguments(str(tmp_path), gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"^adapter 'default' cannot be merged: it adds a vector of its own to each"):
        model.merge_and_unload()


def test_the_card_says_what_it_is(tmp_path):
    model = adapted(layers_to_transform=[0, 2])
    trainer_of(model, tmp_path, store_of(tmp_path / "store"), num_train_epochs=1).train()
    card = str(model_card(model.peft_config["default"]))
    assert "# Diff adapter" in card and "The outputs of decoder blocks 0, 2." in card
    assert "Trained on 96 pairs of answer tokens" in card and "It cannot be merged into the weights" in card


# Commands


def test_commands_make_an_adapter_and_go_on_after_an_interruption(tmp_path, run_command, monkeypatch):
    model, data = ASSETS / "model", ASSETS / "demonstrations.jsonl"
    collect = ("collect", model, data, "--site", "block", "--tokens", "answer", "--layers", "2-3")
    for name, rows in (("store", ("--limit", 24)), ("held-out", ("--skip", 24, "--limit", 8))):
        status, printed = run_command(*collect[:3], tmp_path / name, *collect[3:], *rows)
        assert status == 0, printed.err
    out = tmp_path / "adapter"
    train = ("train-diff", model, tmp_path / "store", out, "--eval-store", tmp_path / "held-out", "--epochs", 2)
    original, batches = peft_edit.training.pairs.TokenPairs.__getitems__, []

    def stop(self, indices):
        batches.append(indices)
        if len(batches) == 13:
            raise KeyboardInterrupt
        return original(self, indices)

    whole = (*train[:3], tmp_path / "whole", *train[4:])
    status, printed = run_command(*whole)
    assert status == 0 and "error, as a share of the difference" in printed.out, printed.err
    record = json.loads((tmp_path / "whole" / "train_diff.json").read_text())
    steps = record["steps"]
    assert set(record["change"]) == {"2", "3"} and record["change_of"] == "the tokens of positive answers"
    assert re.search(rf"^2 .* {record['change']['2']:.3f}$", printed.out, re.MULTILINE)
    with monkeypatch.context() as patch:
        patch.setattr(peft_edit.training.pairs.TokenPairs, "__getitems__", stop)
        monkeypatch.setattr(sys, "argv", ["peft-edit", *map(str, train)])
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main()
    assert (out / "train_diff.unfinished.json").exists() and Interrupted(out, "train-diff").checkpoints
    status, printed = run_command("train-hpr", *train[1:])
    assert status == 2 and "holds something else than an adapter" in printed.err
    status, printed = run_command(*train)
    assert status == 0, printed.err
    found, expected = (json.loads((folder / "train_diff.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert found["steps"] == steps and found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "DIFF" and config["layers_to_transform"] == [2, 3]
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "train_diff.json")
    ]
    test = ASSETS / "test.jsonl"
    status, printed = run_command("evaluate", model, test, "--adapter", out, "--limit", 5, "--batch-size", 64)
    assert status == 0 and "MC1 " in printed.out, printed.err
    for refused in (("merge", model, out, tmp_path / "no"), ("export-lora", model, out, tmp_path / "no")):
        status, printed = run_command(*refused)
        assert status == 2 and "it adds a vector of its own to each token" in printed.err
        assert printed.err.count("\n") == 1 and not (tmp_path / "no").exists()
