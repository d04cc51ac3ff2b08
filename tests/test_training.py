"""HPR training: the weights are those of a plain loop over the layers, whatever the Trainer is asked to do besides."""

import json
import math
import pickle
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import train_hpr_processes
from launching import launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from stores import write_pair_store
from test_collect import BLOCKS, TOKENIZER, contrast
from tiny import CONFIGS, FAMILIES, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from peft_edit import (
    ActivationStore,
    HPRConfig,
    HPRTrainer,
    HPRTrainingArguments,
    SEAConfig,
    collect_activations,
    fingerprint,
    select_layers,
)
from peft_edit.tuners.hpr import HPRLayer
from peft_edit.tuners.hpr.train import StackedHPR, TokenPairs


D, LAYERS, PAIRS = 32, (0, 1, 2), 64
TERMS = {"loss", "probe_loss", "angle_loss", "probe_accuracy", "angle_error"}
LOGGED = TERMS | {f"probe_accuracy_layer_{layer}" for layer in LAYERS}


def directions(layer):
    """Two orthogonal unit vectors: what positives and negatives differ in, and what they share."""
    v = torch.randn(D, generator=torch.Generator().manual_seed(1000 + layer)).sign() / D**0.5
    return v, torch.cat((v[: D // 2], -v[D // 2 :]))


def planted(n=PAIRS, seed=0, shift=1.0, layers=LAYERS):
    """Layer to 2 n rows: negatives, shifted by -v, then positives, shifted by +v."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(n).unsqueeze(1)
    rows = {}
    for layer in layers:
        v, common = directions(layer)
        rows[layer] = shift * (sign * v + common) + 0.3 * torch.randn(2 * n, D, generator=generator)
    return rows


def write_store(path, rows=None, pairs=None, shards=1, modules=None, **settings):
    """A store of answer tokens for a tiny llama. By default each row is in one pair, the negatives shuffled."""
    rows = planted() if rows is None else rows
    count = len(next(iter(rows.values())))
    if pairs is None:
        generator = torch.Generator().manual_seed(count)
        half = count // 2
        pairs = torch.stack((torch.randperm(half, generator=generator), torch.arange(half, 2 * half)), dim=1)
    modules = modules or {str(layer): BLOCKS["llama"].format(layer) for layer in rows}
    shard_rows = [len(chunk) for chunk in torch.arange(count).tensor_split(shards)]
    return write_pair_store(path, rows, pairs, shard_rows=shard_rows, modules=modules, **settings)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", shards=3)


@pytest.fixture
def held_out(tmp_path):
    return write_store(tmp_path / "held out", planted(n=21, seed=1))


def adapted(family="llama", seed=0, base=None, **fields):
    base = tiny_model(family) if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, HPRConfig(**fields))


def native(seed=0, adapter="default", **fields):
    model = tiny_model()
    torch.manual_seed(seed)
    model.add_adapter(HPRConfig(**fields), adapter)
    return model


def arguments(folder, **changes):
    changes = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 0.05, **changes}
    return HPRTrainingArguments(str(folder), **changes)


def trainer_of(model, folder, train, evaluation=None, callbacks=None, adapter_name=None, mismatch=False, **changes):
    changes = {"eval_strategy": "no", "save_strategy": "no", **changes} if evaluation is None else changes
    return HPRTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=callbacks,
        adapter_name=adapter_name,
        allow_fingerprint_mismatch=mismatch,
    )


def trained(*args, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return trainer


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, HPRLayer)]


def weights(model, adapter="default"):
    """Copies of an adapter's tensors, by names without those of the adapter and the `PeftModel`."""
    return {
        f"{layer.site}.{part}.{name}": tensor.clone()
        for layer in layers_of(model)
        if layer.has_adapter(adapter)
        for part in HPRLayer.adapter_layer_names
        for name, tensor in getattr(layer, part)[adapter].state_dict().items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 0
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys() and len(one) > 0
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def one_line_error(call, *parts, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


# The stacked weights


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_angle_layers": 1}, {"num_angle_layers": 2}, {"num_angle_layers": 3, "angle_hidden_size": 5}],
    ids=str,
)
def test_stacked_layers_give_what_the_layers_give(fields):
    layers = layers_of(adapted(init_weights=False, **fields))
    stacked = StackedHPR(layers, "default")
    activations = torch.randn(5, 3, 2, D)
    activations[0, 0, 0] = 0
    logits, angles, target = stacked(activations)
    assert logits.shape == angles.shape == (5, 3, 2) and target.shape == (5, 3)
    cosine = torch.cosine_similarity(activations[:, :, 0].double(), activations[:, :, 1].double(), dim=-1)
    cosine[0, 0] = 1
    torch.testing.assert_close(target, torch.acos(cosine).float(), rtol=0, atol=1e-6)
    for i, layer in enumerate(layers):
        expected = layer.probe_logits(activations[:, i], "default"), layer.angles(activations[:, i], "default")
        torch.testing.assert_close((logits[:, i], angles[:, i]), expected, rtol=0, atol=1e-6)
    for half in (torch.bfloat16, torch.float16):
        rounded = stacked(activations.to(half))
        assert {x.dtype for x in rounded} == {torch.float32}
        torch.testing.assert_close(rounded, stacked(activations.to(half).float()))


@pytest.mark.parametrize("fields", [{}, {"num_angle_layers": 1}, {"angle_hidden_size": 7}], ids=str)
def test_stacked_weights_go_back_bit_for_bit(fields):
    source, target = (adapted(init_weights=False, seed=seed, **fields) for seed in (0, 1))
    before = weights(source)
    StackedHPR(layers_of(source), "default").copy_to(layers_of(target), "default")
    assert_equal(weights(target), before)
    assert_equal(weights(source), before)


# The optimisation


def learning_rates(schedule, highest, warmup, steps):
    """Of each step, as Transformers' schedules give them."""
    for step in range(steps):
        done = (step - warmup) / max(1, steps - warmup)
        after = {"constant": 1, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
        yield highest * (step / warmup if schedule != "constant" and step < warmup else after)


def plain_loop(model, store, batches, optimizer_of, rates, max_norm):
    """Train each layer by itself; returns the mean loss over the layers of each step."""
    losses = torch.zeros(len(batches))
    for i, layer in enumerate(layers_of(model)):
        probe, network = layer.hpr_probe["default"], layer.hpr_angle["default"]
        parameters = [*probe.parameters(), *network.parameters()]
        optimizer = optimizer_of(
            [
                {"params": [p for p in parameters if p.dim() > 1]},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0},
            ]
        )
        for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            positive, negative = store.positive(i)[batch], store.negative(i)[batch]
            x = torch.cat((positive, negative))
            labels = torch.tensor([1.0, 0.0]).repeat_interleave(len(batch))
            truth = torch.acos(torch.cosine_similarity(positive, negative, dim=-1))
            predicted = math.pi * torch.sigmoid(network(x).squeeze(1))
            loss = nn.functional.binary_cross_entropy_with_logits(probe(x).squeeze(1), labels)
            loss = loss + (predicted - torch.cat((torch.zeros(len(batch)), truth))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            losses[step] += loss.detach() / len(LAYERS)
    return losses.tolist()


@pytest.fixture
def batches(monkeypatch):
    """Indices of every batch that is read from now on."""
    read, original = [], TokenPairs.__getitems__

    def getitems(self, indices):
        read.append(list(indices))
        return original(self, indices)

    monkeypatch.setattr(TokenPairs, "__getitems__", getitems)
    return read


def adamw(groups):
    return torch.optim.AdamW(groups, weight_decay=0.1, foreach=False, fused=False)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1.0, weight_decay=0.1, foreach=False)


@pytest.mark.parametrize(
    "optimizer_of, changes",
    [
        (adamw, {"lr_scheduler_type": "cosine"}),
        (adamw, {"lr_scheduler_type": "linear", "max_grad_norm": 0.1, "learning_rate": 2e-3}),
        (adamw, {"lr_scheduler_type": "constant", "optim": "adamw_torch"}),
        (sgd, {"lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "optim": "sgd", "learning_rate": 0.05}),
    ],
    ids=lambda x: getattr(x, "__name__", None) or x["lr_scheduler_type"],
)
def test_training_equals_a_plain_loop(tmp_path, store, batches, optimizer_of, changes):
    model, plain = adapted(), adapted()
    trainer = trained(model, tmp_path / "run", store, weight_decay=0.1, warmup_steps=0.1, logging_steps=1, **changes)
    epochs = [[i for batch in batches[first : first + 4] for i in batch] for first in range(0, 20, 4)]
    assert len(batches) == 20 and all(sorted(epoch) == [*range(PAIRS)] for epoch in epochs)
    assert epochs[0] != epochs[1] != [*range(PAIRS)]
    args = trainer.args
    rates = list(learning_rates(args.lr_scheduler_type.value, args.learning_rate, 2, 20))
    losses = plain_loop(plain, store, [*batches], optimizer_of, rates, args.max_grad_norm)
    assert max(logged(trainer, "grad_norm")) > args.max_grad_norm
    assert_close(weights(model), weights(plain), 1e-5)
    assert logged(trainer) == pytest.approx(losses, abs=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in weights(model).values())


def test_defaults_are_those_of_the_paper(tmp_path):
    args = HPRTrainingArguments(str(tmp_path))
    assert (args.num_train_epochs, args.learning_rate, args.train_batch_size) == (5, 5e-4, 16)
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(1000) == 50
    assert args.optim.value.startswith("adamw_torch") and args.weight_decay == 0
    assert args.load_best_model_at_end and args.metric_for_best_model == "probe_accuracy" and args.greater_is_better
    assert not HPRTrainingArguments(str(tmp_path), eval_strategy="no").load_best_model_at_end


def test_a_block_trains_as_if_it_were_alone(tmp_path, store):
    together, alone = adapted(), adapted(layers_to_transform=[1])
    alone.load_state_dict({name: t for name, t in together.state_dict().items() if name in alone.state_dict()})
    for name, model in (("together", together), ("alone", alone)):
        trained(model, tmp_path / name, store)
    found = weights(alone)
    assert {name.split(".")[2] for name in found} == {"1"}
    assert_close({name: tensor for name, tensor in weights(together).items() if name in found}, found)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_huge_gradients_of_a_block_change_no_other(tmp_path, optim):
    rows = planted()
    huge = {**rows, 0: 1e4 * rows[0]}
    models = []
    for name, activations in (("usual", rows), ("huge", huge)):
        models.append(adapted())
        trained(models[-1], tmp_path / name, write_store(tmp_path / f"{name} store", activations), optim=optim)
    usual, other = map(weights, models)
    same = {name: torch.equal(usual[name], other[name]) for name in usual}
    assert {name for name in same if not same[name]} == {name for name in same if ".layers.0." in name}
    assert all(tensor.isfinite().all() for tensor in other.values())


@pytest.mark.parametrize("changes", [{"learning_rate": 5e-3}, {"optim": "sgd", "learning_rate": 0.5}], ids=str)
def test_a_planted_direction_is_found(tmp_path, changes):
    store, held_out = (write_store(tmp_path / str(seed), planted(600, seed, shift=1.5)) for seed in (0, 1))
    model = adapted()
    best = {"metric_for_best_model": "loss", "greater_is_better": False}
    trainer = trained(model, tmp_path / "run", store, held_out, **best, **changes)
    for index, layer in enumerate(layers_of(model)):
        w = layer.hpr_probe["default"].weight[0]
        assert torch.cosine_similarity(w, directions(index)[0], dim=0) > 0.99
    metrics = trainer.evaluate()
    assert metrics["eval_probe_accuracy"] > 0.99 and metrics["eval_angle_error"] < 0.15
    model.save_pretrained(tmp_path / "adapter")
    assert_equal(weights(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), weights(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_activations_of_a_model_to_its_edit(tmp_path, family):
    base = tiny_model(family)
    store = collect_activations(base, TOKENIZER, contrast(), tmp_path / "store", site="block", tokens="answer")
    model = adapted(family)
    trained(model, tmp_path / "run", store, store, per_device_train_batch_size=2, learning_rate=0.01)
    assert model.peft_config["default"].base_model_fingerprint == store.metadata["fingerprint"] == fingerprint(base)
    questions = len(store.questions().unique())
    assert model.peft_config["default"].fitted_on == {
        "tokens": "answer",
        "prompt_format": "plain",
        "questions": questions,
        "token_pairs": len(store),
    }
    select_layers(model, store, top_k=2, prune=True)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected, plain, found = (m(input_ids=ids).logits for m in (model.eval(), base, again))
    assert torch.equal(found, expected) and not torch.equal(found, plain)


# What the Trainer offers


class At(TrainerCallback):
    """Calls a function of an event's arguments when a step is reached."""

    def __init__(self, event, step, action):
        def call(args, state, control, **kwargs):
            if state.global_step == step:
                action(control, **kwargs)

        setattr(self, event, call)


def stop_and_save(control, **kwargs):
    control.should_training_stop = control.should_save = True


def peft_beside_another(**fields):
    """With the adapter "other", which is not active, and the active "default"."""
    model = adapted(init_weights=False, layers_to_transform=[0, 1])
    torch.manual_seed(1)
    model.add_adapter("other", HPRConfig(**fields))
    return model


def native_beside_another(**fields):
    model = native(init_weights=False, layers_to_transform=[0, 1])
    torch.manual_seed(1)
    model.add_adapter(HPRConfig(**fields), "other")
    model.set_adapter("default")
    return model


KINDS = {
    "PeftModel": (adapted, "default"),
    "PeftModel, not active": (peft_beside_another, "other"),
    "native": (native, "default"),
    "native, named": (lambda **fields: native(adapter="other", **fields), "other"),
    "native, not active": (native_beside_another, "other"),
}


@pytest.mark.parametrize("step", [4, 6], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, store, kind, step):
    make, adapter = KINDS[kind]
    options = {"num_train_epochs": 3, "adapter_name": adapter, "save_strategy": "steps", "save_steps": 100}
    whole = make()
    beside = weights(whole)
    expected = trained(whole, tmp_path / "whole", store, **options)
    first = trained(make(), tmp_path / "run", store, **options, callbacks=[At("on_step_end", step, stop_and_save)])
    assert first.state.global_step == step
    model = make()
    trainer = trainer_of(model, tmp_path / "run", store, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}") if step == 4 else True)
    assert_equal(weights(model, adapter), weights(whole, adapter))
    assert trainer.state.global_step == expected.state.global_step == 12
    assert logged(trainer)[-1] == logged(expected)[-1]
    if adapter != "default" and "default" in model.peft_config:
        assert_equal(weights(model), beside)


def test_resuming_with_evaluations_and_selected_layers(tmp_path, store, held_out):
    options = {"num_train_epochs": 4, "learning_rate": 0.01, "per_device_train_batch_size": 32}
    stop = At("on_epoch_end", 4, lambda control, **kwargs: setattr(control, "should_training_stop", True))
    whole, first, second = (adapted(init_weights=False, selected_layers=[0, 2]) for _ in range(3))
    expected = trained(whole, tmp_path / "whole", store, held_out, **options)
    trained(first, tmp_path / "run", store, held_out, callbacks=[stop], **options)
    trainer = trainer_of(second, tmp_path / "run", store, held_out, **options)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(weights(second), weights(whole))
    assert {name.split(".")[2] for name in weights(whole)} == {"0", "2"}
    assert trainer.state.best_metric == expected.state.best_metric
    assert logged(trainer, "eval_loss") == logged(expected, "eval_loss")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Weights and logs of the same training in one process and in two, which cannot share the evaluation evenly."""
    folder = tmp_path_factory.mktemp("processes")
    stores = [
        write_store(folder / name, planted(n, seed, shift=0.3)).path
        for name, n, seed in (("train", PAIRS, 0), ("eval", 21, 1))
    ]
    two = partial(launch, folder / "printed", "train_hpr_processes", 2)
    results = []
    for name, run in (("one", train_hpr_processes.train), ("two", two)):
        out = folder / name
        out.mkdir()
        run(*stores, out)
        tensors = load_file(out / "adapter" / "adapter_model.safetensors")
        results.append((tensors, json.loads((out / "log.json").read_text())))
    return results


def test_two_processes_train_as_one(processes):
    (one, log), (two, other_log) = processes
    assert_close(one, two)
    entries, others = ([entry for entry in entries if "loss" in entry] for entries in (log, other_log))
    assert len(entries) == len(others) == 8 and all(set(entry) > LOGGED for entry in entries)
    for entry, other in zip(entries, others, strict=True):
        assert entry == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("name", sorted(LOGGED))
def test_two_processes_evaluate_as_one(processes, name):
    one, two = ([entry[f"eval_{name}"] for entry in log if f"eval_{name}" in entry] for _, log in processes)
    assert one == pytest.approx(two, abs=1e-5) and len(one) == 2


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path, store):
    models = adapted(), adapted()
    one = trained(models[0], tmp_path / "one", store, logging_steps=4)
    two = trained(
        models[1],
        tmp_path / "two",
        store,
        logging_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
    )
    assert one.state.global_step == two.state.global_step == 20
    assert_close(*map(weights, models))
    for name in ("loss", "probe_loss", "angle_error", "probe_accuracy_layer_1"):
        assert logged(one, name) == pytest.approx(logged(two, name), abs=1e-5) and len(logged(one, name)) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"bf16_full_eval": True, "fp16": False},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"auto_find_batch_size": True, "use_cache": True, "eval_accumulation_steps": 1},
        {"train_sampling_strategy": "sequential"},
        {"optim": "sgd", "learning_rate": 0.5},
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "linear", "dataloader_num_workers": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0},
    ],
    ids=str,
)
def test_other_ways_to_train(tmp_path, store, held_out, changes):
    changes = {"learning_rate": 0.01, "num_train_epochs": 4, **changes}
    model = adapted()
    trainer = trained(model, tmp_path / "run", store, held_out, **changes)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights(model).values())
    assert trainer.evaluate()["eval_probe_accuracy"] > 0.95
    assert logged(trainer)[-1] < logged(trainer)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_becomes_float32(tmp_path, store, dtype):
    model = adapted().to(dtype)
    trained(model, tmp_path / "run", store, num_train_epochs=1)
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "hpr_" not in name} == {dtype}


def test_early_stopping(tmp_path, store, held_out):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trained(adapted(), tmp_path / "run", store, held_out, callbacks=[stop], learning_rate=0.0)
    assert trainer.state.epoch == 2 and len(logged(trainer, "eval_loss")) == 2


def test_the_best_weights_are_kept_and_not_the_last(tmp_path, store, held_out):
    """Probes that point the wrong way but in the third epoch."""
    adapter = adapted()
    for index, layer in enumerate(layers_of(adapter)):
        layer.hpr_probe["default"].weight.data = -directions(index)[0][None]
    kept = {}

    def turn(control, model, **kwargs):
        kept.update(weights(adapter))
        model.probe.data.neg_()

    callbacks = [At("on_epoch_begin", step, turn) for step in (8, 12)]
    trainer = trained(adapter, tmp_path / "run", store, held_out, callbacks=callbacks, learning_rate=1e-5)
    accuracy = logged(trainer, "eval_probe_accuracy")
    assert [round(value) for value in accuracy] == [0, 0, 1, 0, 0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-12")
    assert_equal(weights(adapter), kept)
    assert trainer.evaluate()["eval_probe_accuracy"] == accuracy[2]


def test_checkpoints_are_adapters(tmp_path, store, held_out):
    numbers = []

    class Count(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            numbers.append(len(list(Path(args.output_dir).glob("checkpoint-*"))))

    model = adapted()
    trainer = trained(model, tmp_path / "run", store, held_out, callbacks=[Count()])
    assert len(numbers) == 5 and max(numbers) <= 2
    folder = trainer.state.best_model_checkpoint
    loaded = tiny_model()
    loaded.load_adapter(folder)
    assert_equal(weights(PeftModel.from_pretrained(tiny_model(), folder)), weights(model))
    assert_equal(weights(loaded), weights(model))


# The language model takes no part


def on_meta(family="llama", config=None, auto=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config or CONFIGS[family]())


def with_adapter(base, kind):
    torch.manual_seed(0)
    if kind == "PeftModel":
        return get_peft_model(base, HPRConfig())
    base.add_adapter(HPRConfig())
    return base


def not_run(*args):
    raise AssertionError("the language model was run")


@pytest.mark.parametrize("kind", ["PeftModel", "native"])
def test_the_model_takes_no_part(tmp_path, store, held_out, kind):
    models = {}
    for name, base in (("memory", tiny_model()), ("meta", on_meta())):
        for module in base.modules():
            module.register_forward_pre_hook(not_run)
        models[name] = model = with_adapter(base, kind)
        before = {n: p for n, p in model.named_parameters() if "hpr_" not in n}
        copies = {n: p.clone() for n, p in before.items()}
        trained(model, tmp_path / name / "run", store, held_out)
        after = {n: p for n, p in model.named_parameters() if "hpr_" not in n}
        assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
        assert {p.is_meta for p in after.values()} == {name == "meta"}
        assert not any(p.requires_grad or p.grad is not None for p in after.values())
        assert name == "meta" or all(torch.equal(copies[n], after[n]) for n in after)
        model.save_pretrained(tmp_path / name / "adapter")
    assert_equal(weights(models["memory"]), weights(models["meta"]))
    assert_equal(*(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in models))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "meta" / "adapter")
    assert_equal(weights(again), weights(models["meta"]))


# What is logged


def by_hand(model, store):
    """Metrics of a store, from the layers themselves, in float64."""
    parts = []
    for index, layer in enumerate(layers_of(model)):
        positive, negative = store.positive(index), store.negative(index)
        logits = torch.stack([layer.probe_logits(x, "default") for x in (positive, negative)]).double()
        angles = torch.stack([layer.angles(x, "default") for x in (positive, negative)]).double()
        truth = torch.acos(torch.cosine_similarity(positive.double(), negative.double(), dim=1))
        bce = nn.functional.softplus(torch.stack((-logits[0], logits[1]))).mean()
        square = torch.cat((angles[0], angles[1] - truth)).square().mean()
        accuracy = torch.cat((logits[0] > 0, logits[1] <= 0)).double().mean()
        parts.append(torch.stack((bce, square, accuracy, (angles[1] - truth).abs().mean())).detach())
    parts = torch.stack(parts)
    metrics = dict(zip(("probe_loss", "angle_loss", "probe_accuracy", "angle_error"), parts.mean(dim=0), strict=True))
    metrics |= {f"probe_accuracy_layer_{index}": accuracy for index, accuracy in enumerate(parts[:, 2])}
    return {name: float(value) for name, value in metrics.items()} | {"loss": float(parts[:, :2].sum(dim=1).mean())}


def measured(entry, prefix="eval_"):
    """The metrics among what an evaluation gives, without their prefix."""
    found = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
    return {name: found[name] for name in LOGGED}


@pytest.mark.parametrize("batch", [4, 16, 21, 64])
def test_an_evaluation_is_what_the_layers_give(tmp_path, store, held_out, batch):
    model = adapted(init_weights=False)
    trainer = trained(model, tmp_path / "run", store, held_out, per_device_eval_batch_size=batch)
    assert measured(trainer.evaluate()) == pytest.approx(by_hand(model, held_out), abs=1e-5)
    assert measured(trainer.evaluate(str(store.path))) == pytest.approx(by_hand(model, store), abs=1e-5)
    predicted = trainer.predict(store)
    assert measured(predicted.metrics, "test_") == pytest.approx(by_hand(model, store), abs=1e-5)
    assert len(predicted.label_ids) == PAIRS


@pytest.mark.parametrize("new", [True, False])
def test_an_evaluation_needs_no_training_data(tmp_path, held_out, new):
    model = adapted(init_weights=new)
    before = weights(model)
    assert measured(trainer_of(model, tmp_path / "run", None, held_out).evaluate()) == pytest.approx(
        by_hand(model, held_out), abs=1e-5
    )
    assert_equal(weights(model), before)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_training_logs_are_means_since_the_last(tmp_path, store, held_out, steps):
    model = adapted(init_weights=False)
    trainer = trained(model, tmp_path / "run", store, held_out, learning_rate=0.0, logging_steps=steps)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 20 // steps and all(set(entry) > LOGGED for entry in entries)
    means = {name: sum(entry[name] for entry in entries) / len(entries) for name in LOGGED}
    assert means == pytest.approx(by_hand(model, store), abs=1e-5)
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["probe_loss"] + entry["angle_loss"], abs=1e-5)
        of_layers = [entry[f"probe_accuracy_layer_{layer}"] for layer in LAYERS]
        assert entry["probe_accuracy"] == pytest.approx(sum(of_layers) / 3)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 5 and all(measured(entry) == measured(evaluations[0]) for entry in evaluations)


@pytest.mark.parametrize("opened", [True, False])
def test_several_evaluation_stores(tmp_path, store, held_out, opened):
    stores = {"same": store, "other": held_out}
    given = stores if opened else {name: str(value.path) for name, value in stores.items()}
    model = adapted()
    trainer = trained(model, tmp_path / "run", store, given, metric_for_best_model="other_probe_accuracy")
    metrics = trainer.evaluate()
    for name, value in stores.items():
        assert measured(metrics, f"eval_{name}_") == pytest.approx(by_hand(model, value), abs=1e-5)
        assert len(logged(trainer, f"eval_{name}_loss")) >= 5
    assert trainer.state.best_metric == max(logged(trainer, "eval_other_probe_accuracy"))
    once = trainer.evaluate({"new": given["other"]})
    assert measured(once, "eval_new_") == measured(metrics, "eval_other_")


def test_one_of_several_evaluation_stores_decides(tmp_path, store, held_out):
    one_line_error(
        lambda: trainer_of(adapted(), tmp_path / "run", store, {"same": store, "other": held_out}),
        "metric_for_best_model='same_probe_accuracy'",
    )


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", min), ("angle_error", min), ("eval_loss", min), ("probe_accuracy", max)]
)
def test_the_best_evaluation_by_any_metric(tmp_path, metric, best):
    stores = [write_store(tmp_path / str(seed), planted(seed=seed, shift=0.2)) for seed in (0, 1)]
    trainer = trained(adapted(), tmp_path / "run", *stores, metric_for_best_model=metric, learning_rate=2e-3)
    values = logged(trainer, f"eval_{metric.removeprefix('eval_')}")[:5]
    assert len(set(values)) > 1 and trainer.state.best_metric == best(values)


def test_schedules_that_watch_a_metric_know_its_direction(tmp_path):
    stores = [write_store(tmp_path / str(seed), planted(seed=seed, shift=0.2)) for seed in (0, 1)]
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0}
    scheduler = trained(adapted(), tmp_path / "run", *stores, **options).lr_scheduler
    assert scheduler.mode == "max" and scheduler.best > 0.5
    assert arguments(tmp_path, metric_for_best_model="loss", **options).lr_scheduler_kwargs["mode"] == "min"


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"eval_strategy": "steps", "eval_steps": 5}, False),
        ({"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best"}, True),
        ({"save_strategy": "no"}, False),
        ({"eval_strategy": "no"}, False),
    ],
)
def test_the_best_is_kept_where_it_can_be(tmp_path, changes, kept):
    assert arguments(tmp_path, **changes).load_best_model_at_end is kept


def test_embeddings_stay_out_of_checkpoints(tmp_path, store, held_out):
    model = adapted()
    model.get_base_model().resize_token_embeddings(70)
    trainer = trained(model, tmp_path / "run", store, held_out, mismatch=True)
    tensors = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert all(".hpr.hpr_" in name for name in tensors)


def test_selection_between_trainings(tmp_path, store):
    model = adapted(init_weights=False)
    trainer = trained(model, tmp_path / "run", store, num_train_epochs=1)
    (kept,) = select_layers(model, store, top_k=1, prune=True).selected
    trainer.save_model(tmp_path / "saved")
    assert {f".layers.{kept}." in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors")} == {
        True
    }
    one_line_error(trainer.train, "pruned", "make a new HPRTrainer")
    assert len(trained(model, tmp_path / "again", store, num_train_epochs=1).layers) == 1


def test_a_checkpoint_of_another_model_is_not_resumed_from(tmp_path):
    first, second = adapted(), adapted(base=tiny_model(seed=5))
    stores = [write_store(tmp_path / str(i), fingerprint=fingerprint(model)) for i, model in enumerate((first, second))]
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    trained(first, tmp_path / "run", stores[0], **options)
    resumed = trainer_of(second, tmp_path / "run", stores[1], **options)
    one_line_error(lambda: resumed.train(resume_from_checkpoint=True), "another model", fingerprint(first))
    allowed = trainer_of(second, tmp_path / "run", stores[1], mismatch=True, **options)
    assert allowed.train(resume_from_checkpoint=True).global_step == 2 * PAIRS // 16


def test_adapters_on_meta_are_refused(tmp_path, store):
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["llama"]()), HPRConfig())
    one_line_error(lambda: trainer_of(model, tmp_path / "run", store), "torch.device('meta')")
    one_line_error(lambda: select_layers(model, store, top_k=1), "on the meta device")


@pytest.mark.parametrize(
    ("fields", "changes", "kind", "part"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, ValueError, "modules_to_save=['lm_head']"),
        ({}, {"compute_metrics": len}, TypeError, "compute_metrics of its own"),
        ({}, {"data_collator": len}, TypeError, "data_collator of its own"),
    ],
)
def test_what_the_trainer_does_itself(tmp_path, store, fields, changes, kind, part):
    args = arguments(tmp_path / "run", eval_strategy="no")
    one_line_error(lambda: HPRTrainer(adapted(**fields), args, train_dataset=store, **changes), part, kind=kind)


def test_other_adapters_stay_frozen_while_checkpoints_are_saved(tmp_path, store):
    model = native()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    model.set_adapter("default")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer_of(model, tmp_path / "run", store).save_model()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.active_adapters() == ["default"]


def test_a_refused_adapter_keeps_its_dtype(tmp_path, store):
    model = adapted().half()
    (tmp_path / "mlp").mkdir()
    one_line_error(lambda: trainer_of(model, tmp_path / "run", store, tmp_path / "mlp"), "no activation store")
    assert {p.dtype for layer in layers_of(model) for p in layer.hpr_angle.parameters()} == {torch.float16}


def test_the_tokenizer_is_saved_with_the_adapter(tmp_path, store, demo_tokenizer):
    args = arguments(tmp_path / "run", eval_strategy="no")
    HPRTrainer(adapted(), args, train_dataset=store, processing_class=demo_tokenizer).save_model()
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_the_card_is_the_one_of_the_adapter(tmp_path, store, held_out):
    trainer = trainer_of(adapted(), tmp_path / "run", store, held_out)
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    trainer.create_model_card(model_name="mine")
    assert (tmp_path / "run" / "README.md").read_text() == card and "library_name: peft" in card


# Reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3, 10])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 0), (1,)], ids=str)
def test_batches_are_rows_of_the_store(tmp_path, dtype, shards, layers):
    rows = {layer: tensor.to(dtype) for layer, tensor in planted().items()}
    store = write_store(tmp_path / "store", rows, shards=shards)
    dataset = TokenPairs(store, layers)
    assert len(dataset) == PAIRS
    for indices in ([5], [63, 0, 0, 7], list(range(PAIRS))):
        batch = dataset.__getitems__(indices)["activations"]
        assert batch.shape == (len(indices), len(layers), 2, D) and batch.dtype == dtype
        for i, layer in enumerate(layers):
            negative, positive = store.pairs()[indices].T
            assert torch.equal(batch[:, i, 0], rows[layer][positive])
            assert torch.equal(batch[:, i, 1], rows[layer][negative])
    assert torch.equal(dataset[7]["activations"], dataset.__getitems__([7])["activations"][0])


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("shards", [1, 3])
def test_a_batch_reads_its_rows_only(tmp_path, monkeypatch, shards):
    store = write_store(tmp_path / "store", planted(2000), shards=shards)
    mapped, original = [], ActivationStore._map
    monkeypatch.setattr(ActivationStore, "_map", lambda self, *a: mapped.append(a) or original(self, *a))
    dataset = TokenPairs(store, LAYERS)
    dataset.__getitems__([*range(0, 2000, 100)])
    with Largest() as seen:
        for start in range(10):
            batch = dataset.__getitems__([*range(start, 2000, 200)])["activations"]
    assert seen.elements == batch.numel()
    assert len(mapped) == len(set(mapped)) == shards * len(LAYERS)


def test_worker_processes_read_the_same(tmp_path, store):
    dataset = TokenPairs(store, LAYERS)
    batches = [batch["activations"] for batch in DataLoader(dataset, batch_size=24, collate_fn=lambda batch: batch)]
    dumped = pickle.dumps(dataset)
    assert len(dumped) < sum(tensor.nbytes for tensor in planted().values()) / 4
    copied = pickle.loads(dumped)
    assert torch.equal(copied.__getitems__([*range(24)])["activations"], batches[0])
    models = adapted(), adapted()
    for workers, model in enumerate(models):
        trained(model, tmp_path / str(workers), store, num_train_epochs=1, dataloader_num_workers=workers)
    assert_equal(*map(weights, models))


def test_half_precision_activations_train(tmp_path):
    rows = planted()
    models = adapted(), adapted()
    for model, dtype in zip(models, (torch.bfloat16, torch.float32), strict=True):
        rounded = {layer: tensor.bfloat16().to(dtype) for layer, tensor in rows.items()}
        store = write_store(tmp_path / f"{dtype} store", rounded)
        trained(model, tmp_path / str(dtype), store, num_train_epochs=2)
    assert_close(*map(weights, models))


# What is refused


def row_store(path):
    sets = {sign: {layer: torch.randn(4, D) for layer in LAYERS} for sign in ("positive", "negative", "neutral")}
    return ActivationStore.from_tensors(path, **sets, site="block")


BAD_STORES = {
    "rows": (row_store, ("one row an answer", "tokens='answer'")),
    "site": (lambda path: write_store(path, site="mlp"), ("the output of 'mlp'", "'block'", "collect")),
    "width": (
        lambda path: write_store(path, {layer: torch.randn(8, 16) for layer in LAYERS}),
        ("hidden size 16", "has 32", "another model"),
    ),
    "layers": (
        lambda path: write_store(path, planted(layers=(0, 2))),
        ("layers [0, 2]", "[1]", "layers_to_transform"),
    ),
    "modules": (
        lambda path: write_store(path, modules={str(layer): f"model.layers.{layer}.mlp" for layer in LAYERS}),
        ("model.layers.0.mlp", "model.layers.0:", "target_modules"),
    ),
    "model": (
        lambda path: write_store(path, fingerprint="0" * 16, model="someone/other"),
        ("another model", "someone/other", "0" * 16, "allow_fingerprint_mismatch=True"),
    ),
    "empty": (lambda path: write_store(path, pairs=torch.empty(0, 2, dtype=torch.int64)), ("no token pair",)),
    "no store": (lambda path: path, ("is no activation store", "meta.json")),
}


@pytest.mark.parametrize("place", ["train", "eval", "one of several", "evaluate"])
@pytest.mark.parametrize("case", BAD_STORES)
def test_stores_that_do_not_fit_are_refused(tmp_path, store, case, place):
    make, parts = BAD_STORES[case]
    bad, folder = make(tmp_path / "bad"), tmp_path / "run"
    calls = {
        "train": lambda: trainer_of(adapted(), folder, bad),
        "eval": lambda: trainer_of(adapted(), folder, store, bad),
        "one of several": lambda: trainer_of(adapted(), folder, store, {"good": store, "bad": tmp_path / "bad"}),
        "evaluate": lambda: trainer_of(adapted(), folder, store, store).evaluate(bad),
    }
    one_line_error(calls[place], *parts)
    assert not folder.exists() or place == "evaluate"


def test_another_fingerprint_may_be_allowed(tmp_path, store, held_out):
    other = write_store(tmp_path / "other", fingerprint="0" * 16)
    models = adapted(), adapted()
    trained(models[0], tmp_path / "one", store)
    trained(models[1], tmp_path / "two", other, mismatch=True)
    assert_equal(*map(weights, models))
    assert [m.peft_config["default"].base_model_fingerprint for m in models] == [None, "0" * 16]


def test_a_store_of_this_model_is_accepted(tmp_path):
    own = write_store(tmp_path / "own", fingerprint=fingerprint(tiny_model()))
    model = adapted()
    trained(model, tmp_path / "run", own, num_train_epochs=1)
    model.save_pretrained(tmp_path / "adapter")
    config = HPRConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_fingerprint == fingerprint(tiny_model()) == own.metadata["fingerprint"]


BAD_MODELS = {
    "SEA": (lambda: get_peft_model(tiny_model(), SEAConfig()), {}, ("'default'", "SEA", "add one of HPR")),
    "LoRA": (
        lambda: get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])),
        {},
        ("'default'", "LORA", "add one of HPR"),
    ),
    "none": (tiny_model, {}, ("adapter",)),
    "unknown": (adapted, {"adapter_name": "mine"}, ("'mine'", "default (HPR)")),
    "no layers": (lambda: adapted(selected_layers=[]), {}, ("selected_layers=[]", "nothing to train")),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_without_an_adapter_to_train_are_refused(tmp_path, store, case):
    make, options, parts = BAD_MODELS[case]
    one_line_error(lambda: trainer_of(make(), tmp_path / "run", store, **options), *parts)


def test_arguments_that_do_not_suit_are_refused(tmp_path, store):
    plain = TrainingArguments(str(tmp_path / "run"), report_to="none")
    one_line_error(lambda: HPRTrainer(adapted(), plain, train_dataset=store), "HPRTrainingArguments", kind=TypeError)
    one_line_error(
        lambda: HPRTrainer(adapted(), arguments(tmp_path / "run"), train_dataset=store),
        "'epoch'",
        "eval_dataset",
        "eval_strategy='no'",
    )


UNSUITED = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "use_liger_kernel": True,
    "train_sampling_strategy": "group_by_length",
    "group_by_length": True,
    "include_num_input_tokens_seen": "all",
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "optim_target_modules": "all-linear",
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "include_for_metrics": ["inputs"],
    "remove_unused_columns": True,
}
# Versions of Transformers differ in what they have.
UNSUITED = {name: UNSUITED[name] for name in UNSUITED if name in signature(HPRTrainingArguments).parameters}


@pytest.mark.parametrize("name", UNSUITED)
def test_options_without_a_meaning_here_are_one_line_each(tmp_path, store, name):
    value = UNSUITED[name]
    one_line_error(
        lambda: arguments(tmp_path / "run", **{name: value}),
        f"{name}={value!r} has no meaning for HPR: ",
        "leave it out",
    )
    later = arguments(tmp_path / "run", eval_strategy="no")
    setattr(later, name, value)
    one_line_error(lambda: HPRTrainer(adapted(), later, train_dataset=store), f"{name}={value!r}")


def test_the_best_needs_what_decides(tmp_path, store, held_out):
    one_line_error(
        lambda: arguments(tmp_path / "run", prediction_loss_only=True),
        "prediction_loss_only=True leaves out 'probe_accuracy'",
        "metric_for_best_model='loss'",
    )
    changes = {"prediction_loss_only": True, "metric_for_best_model": "loss", "num_train_epochs": 1}
    trained(adapted(), tmp_path / "run", store, held_out, **changes)


@pytest.mark.parametrize("place", ["train", "eval"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_stop_the_training(tmp_path, store, held_out, value, place):
    rows = planted()
    rows[1][int(store.pairs()[40, 1]), 5] = value
    bad = write_store(tmp_path / "bad", rows)
    model = adapted(init_weights=False)
    before = weights(model)
    trainer = trainer_of(model, tmp_path / "run", *((bad, held_out) if place == "train" else (store, bad)))
    one_line_error(trainer.train, "layer 1", "model.layers.1", "nan" if place == "train" else "", "activations")
    assert_equal(weights(model), before)
    assert model.peft_config["default"].base_model_fingerprint is None


def test_a_training_that_diverges_stops(tmp_path, store):
    model = adapted()
    before = weights(model)
    trainer = trainer_of(model, tmp_path / "run", store, learning_rate=1e38, optim="sgd", max_grad_norm=0)
    one_line_error(trainer.train, "layer 0", "lower the learning rate")
    assert_equal(weights(model), before)


@pytest.mark.parametrize(
    "other, parts",
    [
        ({"num_angle_layers": 2}, ("num_angle_layers", "is 4 there, 2 here")),
        ({"angle_hidden_size": 16}, ("angle_hidden_size", "is None there, 16 here")),
        ({"layers_to_transform": [0, 1]}, ("layers", "[0, 1, 2] there, [0, 1] here")),
        ({"selected_layers": [0, 2]}, ("layers", "[0, 1, 2] there, [0, 2] here")),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, store, other, parts):
    trained(adapted(), tmp_path / "run", store, save_strategy="epoch", num_train_epochs=1)
    model = adapted(**other)
    before = weights(model)
    trainer = trainer_of(model, tmp_path / "run", store, save_strategy="epoch")
    one_line_error(lambda: trainer.train(resume_from_checkpoint=True), "checkpoint-4", "another configuration", *parts)
    assert_equal(weights(model), before)


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_what_is_no_checkpoint_is_refused(tmp_path, store, folder):
    (tmp_path / "empty").mkdir()
    trainer = trainer_of(adapted(), tmp_path / "run", store)
    one_line_error(
        lambda: trainer.train(resume_from_checkpoint=str(tmp_path / folder)), folder, "is no checkpoint of HPRTrainer"
    )


# The fingerprint of a model on meta


def head_less(model, path, **options):
    model.base_model.save_pretrained(path, **options)


def whole(model, path, **options):
    model.save_pretrained(path, **options)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=str)
@pytest.mark.parametrize("save", [whole, head_less])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fingerprint_of_a_model_on_meta(tmp_path, family, save, options, auto):
    model = tiny_model(family)
    save(model, tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    meta = on_meta(config=AutoConfig.from_pretrained(tmp_path), auto=auto)
    assert fingerprint(meta) == fingerprint(model)
    assert fingerprint(get_peft_model(meta, HPRConfig())) == fingerprint(model)
    assert all(p.is_meta for name, p in meta.named_parameters() if "hpr_" not in name)


def remove_weights(path):
    for file in path.glob("*.safetensors"):
        file.unlink()


def remove_one_shard(path):
    sorted(path.glob("*.safetensors"))[1].unlink()


def other_shapes(path):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 40}))


@pytest.mark.parametrize("damage", [remove_weights, remove_one_shard, other_shapes])
def test_no_fingerprint_where_the_weights_are_not_at_hand(tmp_path, caplog, damage):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    damage(tmp_path / "model")
    meta = on_meta(config=AutoConfig.from_pretrained(tmp_path / "model"))
    assert fingerprint(meta) is None
    own = write_store(tmp_path / "store", fingerprint="0" * 16)
    trained(adapted(base=meta), tmp_path / "run", own, num_train_epochs=1)
    assert caplog.text.count("cannot be compared with the weights of the model") == 1


@pytest.mark.parametrize("name", ["", "nobody/has-this-model", "/nowhere"])
def test_no_fingerprint_without_files(name):
    meta = on_meta()
    meta.config._name_or_path = name
    assert fingerprint(meta) is None


def test_a_store_of_another_model_than_that_on_meta_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    for seed in (0, 1):
        store = write_store(tmp_path / str(seed), fingerprint=fingerprint(tiny_model(seed=seed)))
        model = adapted(base=on_meta(config=config))
        if seed == 0:
            trained(model, tmp_path / "run", store, num_train_epochs=1)
            assert model.peft_config["default"].base_model_fingerprint == fingerprint(model)
        else:
            one_line_error(lambda m=model, s=store: trainer_of(m, tmp_path / "run", s), "another model")
