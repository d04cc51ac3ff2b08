"""A sweep finds of each setting what separate evaluations of a separately learnt adapter find, and goes on after an
interruption."""

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from test_collect import TOKENIZER, contrast, text
from tiny import tiny_model
from transformers import set_seed

from peft_edit import (
    HPRConfig,
    HPRTrainer,
    HPRTrainingArguments,
    MeanDifferenceConfig,
    SEAConfig,
    collect_activations,
    evaluate_multiple_choice,
    fit_mean_difference,
    fit_sea,
    perplexity,
    select_layers,
    side_effects,
    sweep,
)
from peft_edit.choosing import trial
from peft_edit.choosing.axes import Sources, layer_choices, settings_of
from peft_edit.choosing.budget import Budget, choose, front
from peft_edit.choosing.journal import JOURNAL
from peft_edit.evaluation.side_effects import HIGH, SideEffectsMeter, percentile
from peft_edit.tuners.sea.settings import SETTINGS


TEXTS = [text(range(i, i + 5 + i % 3)) for i in range(3, 12)]
RETAIN = [text(range(i, i + 12)) for i in range(3, 50, 4)]
LOOSE = {"perplexity_ratio": 1e6, "kl_p95": 1e6}


def strong(model):
    """Larger weights, so that edits show in the scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def base():
    return strong(tiny_model())


@pytest.fixture(scope="module")
def stores(base, tmp_path_factory):
    """Stores of demonstrations, at both sites, of token pairs, and of texts to leave alone."""
    folder = tmp_path_factory.mktemp("stores")
    options = {"answers": "all", "neutral": "prompt", "dtype": "float32"}
    pairs = {"site": "block", "tokens": "answer"}
    return {
        "mlp": collect_activations(base, TOKENIZER, contrast(), folder / "mlp", **options),
        "block": collect_activations(base, TOKENIZER, contrast(), folder / "block", site="block", **options),
        "pairs": collect_activations(base, TOKENIZER, contrast(), folder / "pairs", **pairs),
        "retain": collect_activations(base, TOKENIZER, RETAIN, folder / "retain", tokens="all"),
    }


def swept(base, grid, **options):
    options = {"validation": contrast(), "texts": TEXTS, "budget": LOOSE, "batch_size": 4, **options}
    return sweep(base, TOKENIZER, grid, **options)


def close(found, model):
    """Compare a row with separate evaluations of an edited model, and take the edit off."""
    scores = evaluate_multiple_choice(model, TOKENIZER, contrast(), batch_size=4)
    effects = side_effects(model, TOKENIZER, TEXTS, batch_size=4)
    model.unload()
    assert (found.scores.mc1, found.scores.mc2) == pytest.approx((scores.mc1, scores.mc2), abs=1e-6)
    expected = effects.to_dict()
    for name in ("tokens", "perplexity", "base_perplexity", "perplexity_ratio", "kl_mean", "kl_p95", "touched"):
        assert found.side_effects[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    for name in ("norm_change", "angle"):
        assert found.side_effects[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    for sites in (found.side_effects["sites"], expected["sites"]):
        for name in [name for name, site in sites.items() if site["touched"] == 0]:
            del sites[name]
    assert found.side_effects["sites"].keys() == expected["sites"].keys()
    assert found.scores.questions["mc2"] == pytest.approx([q.mc2 for q in scores.questions], abs=1e-6)
    assert found.scores.questions["mc1"] == [float(q.mc1) for q in scores.questions]


SEA_GRIDS = {
    "energies": {"positive_energy": [0.5, 0.9, 1], "negative_energy": [0.6, 0.95], "layers": "last 2"},
    "layers": {"layers": ["last 1", "first 2", "each", "windows of 2", "top 2 by signature", "top 1 by probe", "0,2"]},
    "form": {"centered": [True, False], "rescale": ["token", "none", "mean", "average"], "strength": 1.5},
    "map": [
        {"feature_map": "tanh", "input_scale": [1.0, 3.0], "energy": [0.9]},
        {"feature_map": "elu", "feature_space": ["activation", "feature"], "energy": [0.7, 0.95]},
    ],
    "projections": {"projections": ["positive", "negative", "exchanged"], "strength": 0.5},
    "retain": {"retain_energy": [0.5, 0.8, None], "energy": [0.8, 0.99]},
}


@pytest.mark.parametrize("axes, site", [*((axes, "mlp") for axes in SEA_GRIDS), ("energies", "block")])
def test_settings_of_sea_are_those_of_separate_fits(base, stores, axes, site):
    retain = stores["retain"] if axes == "retain" else None
    result = swept(base, SEA_GRIDS[axes], store=stores[site], retain=retain)
    assert len(result.found) >= 3
    for found in result.found:
        setting = dict(found.setting)
        layers = [int(i) for part in [setting.pop("layers")] for i in expand(part)]
        of_retain = setting.pop("retain_energy")
        fields = setting if of_retain is None else {**setting, "retain_energy": of_retain}
        config = SEAConfig(site=site, layers_to_transform=layers, task_type=TaskType.CAUSAL_LM, **fields)
        model = get_peft_model(base, config)
        fit_sea(model, stores[site], retain=None if of_retain is None else retain)
        close(found, model)


def expand(layers):
    """ "0-2,4" -> 0, 1, 2, 4."""
    for part in layers.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("store", ["mlp", "block", "pairs"])
def test_settings_of_mean_difference_are_those_of_separate_fits(base, stores, store):
    grid = {"layers": ["all", "last 1"], "strength": -0.5, "scale_to_rms": [True, False]}
    result = swept(base, grid, store=stores[store], method="mean_difference")
    assert len(result.found) == 4
    for found in result.found:
        fields = {name: found.setting[name] for name in ("strength", "scale_to_rms")}
        layers = list(expand(found.setting["layers"]))
        config = MeanDifferenceConfig(site=stores[store].site, layers_to_transform=layers, **fields)
        model = get_peft_model(base, config)
        fit_mean_difference(model, stores[store])
        close(found, model)


TRAINING = {"learning_rate": 1e-2, "num_train_epochs": 2.0, "per_device_train_batch_size": 4}


def trained(base, stores, folder, retain_weight, seed=0):
    """An adapter of all blocks, trained by itself."""
    set_seed(seed)
    model = get_peft_model(base, HPRConfig(task_type=TaskType.CAUSAL_LM, layers_to_transform=range(3)))
    options = {**TRAINING, "seed": seed, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = HPRTrainingArguments(str(folder), retain_weight=retain_weight, **options)
    HPRTrainer(
        model,
        arguments,
        train_dataset=stores["pairs"],
        eval_dataset=stores["pairs"],
        retain_dataset=stores["retain"] if retain_weight else None,
    ).train()
    return model


HPR_GRID = {"retain_weight": [0.0, 2.0], "top_k": [1, None], "gate": [0.5, 0.7], "alpha": 0.5, **TRAINING}


def test_settings_of_hpr_are_those_of_separate_trainings_and_selections(base, stores, tmp_path):
    given = {"store": stores["pairs"], "eval_store": stores["pairs"], "retain": stores["retain"], "method": "HPR"}
    result = swept(base, HPR_GRID, **given)
    assert len(result.found) == 8
    for found in result.found[1::3]:
        setting = found.setting
        model = trained(base, stores, tmp_path / "training", setting["retain_weight"])
        if setting["top_k"]:
            select_layers(model, stores["pairs"], top_k=setting["top_k"], prune=True)
        model.peft_config["default"].gate, model.peft_config["default"].alpha = setting["gate"], setting["alpha"]
        close(found, model.eval())


def test_settings_of_a_trained_adapter(base, stores, tmp_path):
    model = trained(base, stores, tmp_path / "training", 0.0)
    select_layers(model, stores["pairs"], top_k=3)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    grid = {"layers": ["all", "top 2 by probe", "last 1"], "gate": [0.3, 0.6], "rotation": ["angle", "reflection"]}
    result = swept(base, grid, adapter=tmp_path / "adapter", method="HPR", out=tmp_path / "out")
    assert len(result.found) == 12
    for found in result.found:
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        config = model.peft_config["default"]
        config.selected_layers = list(expand(found.setting["layers"]))
        config.gate, config.rotation = found.setting["gate"], found.setting["rotation"]
        close(found, model)
    with pytest.raises(ValueError, match="learning_rate is of a training, and adapter was trained"):
        swept(base, {"learning_rate": [1e-3]}, adapter=tmp_path / "adapter", method="HPR")


def same_adapter(one, other):
    """Compare two folders: configurations and tensors."""
    configs = [json.loads((folder / CONFIG_NAME).read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]
    first, second = (load_file(folder / SAFETENSORS_WEIGHTS_NAME) for folder in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_adapter_is_that_of_a_separate_fit(base, stores, tmp_path):
    grid = {"layers": ["last 2", "all"], "energy": [0.9], "retain_energy": [0.7], "rescale": ["none", "token"]}
    result = swept(base, grid, store=stores["mlp"], retain=stores["retain"], out=tmp_path / "out")
    setting = dict(result.chosen.setting)
    layers = list(expand(setting.pop("layers")))
    model = get_peft_model(base, SEAConfig(layers_to_transform=layers, task_type=TaskType.CAUSAL_LM, **setting))
    fit_sea(model, stores["mlp"], retain=stores["retain"])
    model.save_pretrained(tmp_path / "separate")
    model.unload()
    same_adapter(tmp_path / "out", tmp_path / "separate")
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["chosen"] == result.chosen.to_dict() and len(record["settings"]) == len(result.found)
    assert not hasattr(base, "peft_config")


def test_the_adapter_is_that_of_a_separate_training(base, stores, tmp_path):
    given = {"store": stores["pairs"], "eval_store": stores["pairs"], "method": "HPR"}
    result = swept(base, {"top_k": [1, 2], "gate": [0.7], **TRAINING}, out=tmp_path / "out", **given)
    model = trained(base, stores, tmp_path / "training", 0.0)
    select_layers(model, stores["pairs"], top_k=result.chosen.setting["top_k"], prune=True)
    model.peft_config["default"].gate = 0.7
    model.save_pretrained(tmp_path / "separate")
    model.unload()
    same_adapter(tmp_path / "out", tmp_path / "separate")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "training", "separate"}


# Interruptions

GRID = {"layers": ["last 1", "all"], "energy": [0.7, 0.95], "strength": [0.5, 1]}


def interrupt_after(monkeypatch, settings):
    measured = trial.Trials._measured
    left = [settings]

    def interrupted(self, setting):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return measured(self, setting)

    monkeypatch.setattr(trial.Trials, "_measured", interrupted)


def test_an_interrupted_sweep_goes_on_and_ends_the_same(base, stores, tmp_path, monkeypatch):
    expected = swept(base, GRID, store=stores["mlp"], out=tmp_path / "whole").to_dict()
    out = tmp_path / "out"
    for settings in (0, 3, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, settings)
            swept(base, GRID, store=stores["mlp"], out=out)
    lines = (out / JOURNAL).read_text().splitlines()
    assert len(lines) == 6  # the base model and five settings
    assert not (out / CONFIG_NAME).exists()
    with (out / JOURNAL).open("a") as file:
        file.write('{"key": "half a li')
    assert swept(base, GRID, store=stores["mlp"], out=out).to_dict() == expected
    same_adapter(out, tmp_path / "whole")
    assert (out / JOURNAL).read_text().splitlines()[:6] == lines
    with monkeypatch.context() as patch:  # now nothing is left to run
        interrupt_after(patch, 0)
        assert swept(base, GRID, store=stores["mlp"], out=out).to_dict() == expected


@pytest.mark.parametrize(
    "change",
    [{"texts": TEXTS[1:]}, {"validation": contrast().select([0, 1])}, {"budget": {"kl_p95": 1e6}}, {"batch_size": 3}],
    ids=lambda change: next(iter(change)),
)
def test_what_follows_from_other_things_is_measured_anew(base, stores, tmp_path, monkeypatch, change):
    swept(base, {"layers": "last 1"}, store=stores["mlp"], out=tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 0)
        swept(base, {"layers": "last 1"}, store=stores["mlp"], out=tmp_path / "out", **change)


def test_one_sweep_at_a_time_writes_a_folder(base, stores, tmp_path, monkeypatch):
    def again(self, setting):
        swept(base, GRID, store=stores["mlp"], out=tmp_path / "out")

    monkeypatch.setattr(trial.Trials, "of", again)
    with pytest.raises(ValueError, match="another sweep is writing"):
        swept(base, GRID, store=stores["mlp"], out=tmp_path / "out")


# Work


def test_shared_work_is_counted(base, stores):
    ran = [0]
    handles = [
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out: ran.__setitem__(0, ran[0] + kwargs["hidden_states"].shape[:2].numel()),
            with_kwargs=True,
        )
        for layer in base.model.layers
    ]
    try:
        evaluate_multiple_choice(base, TOKENIZER, contrast(), batch_size=4)
        questions, ran[0] = ran[0] // 3, 0
        perplexity(base, TOKENIZER, TEXTS, batch_size=4)
        texts, ran[0] = ran[0] // 3, 0
        result = swept(base, {"layers": ["last 1", "0,2", "1-2"], "strength": [0.5, 1]}, store=stores["mlp"])
    finally:
        for handle in handles:
            handle.remove()
    # of the base all three blocks; of the settings one, three and two
    assert [found.block_tokens for found in result.found] == [n * (questions + texts) for n in (1, 1, 3, 3, 2, 2)]
    assert result.base.block_tokens == 3 * (questions + texts)
    assert result.base.separate == 3 * (questions + 2 * texts)
    done = result.base.block_tokens + sum(found.block_tokens for found in result.found)
    assert result.saved == 6 * result.base.separate / done
    assert ran[0] >= done  # besides, it is looked whether blocks can be left out


def test_without_memory_the_results_are_the_same(base, stores):
    full = swept(base, GRID, store=stores["mlp"])
    none = swept(base, GRID, store=stores["mlp"], memory=0)
    for one, other in zip(full.found, none.found, strict=True):
        assert one.scores == other.scores and one.damage == other.damage
        assert one.side_effects == other.side_effects
    assert none.saved < full.saved


# Damage, and the choice


def test_hopeless_settings_stop_early_and_nothing_within_names_the_nearest(base, stores, tmp_path):
    grid = {"energy": [0.9], "strength": [0.001, 1, 3]}
    result = swept(base, grid, store=stores["mlp"], budget={"kl_p95": 0.01})
    mild, *harsh = result.found
    assert mild is result.chosen and mild.stopped is None and mild.scores is not None
    for found in harsh:
        assert found.scores is None and "kl_p95 is certain to be above 0.02" in found.stopped
        assert found.side_effects["tokens"] < mild.side_effects["tokens"]
    with pytest.raises(ValueError, match=r"no setting meets the budget; the nearest is strength=1.0: kl_p95 .*limit"):
        swept(base, {**grid, "strength": [1, 3]}, store=stores["mlp"], budget={"kl_p95": 0.01}, out=tmp_path / "out")
    assert len((tmp_path / "out" / JOURNAL).read_text().splitlines()) == 3
    assert not (tmp_path / "out" / CONFIG_NAME).exists()


def test_settings_whose_model_gives_nan_are_never_chosen(base, stores):
    grid = {"layers": "last 1", "strength": [0.01, 3.4e38]}
    result = swept(base, grid, store=stores["mlp"], method="MEAN_DIFFERENCE")
    broken = result.found[1]
    assert result.chosen is result.found[0]
    assert math.isinf(broken.damage) and "NaN or infinite" in broken.stopped and broken.to_dict()["damage"] is None
    json.dumps(result.to_dict(), allow_nan=False)


class Row:
    def __init__(self, damage, of_questions):
        self.damage, self.of_questions = damage, of_questions
        self.benefit = None if of_questions is None else sum(of_questions) / len(of_questions)


def test_the_rule_by_hand():
    # The differences from the best within the budget: means 0.25 and 0.5, of standard errors 0.25 and 0.289.
    rows = [Row(0.9, [1, 1, 1, 1]), Row(0.5, [0, 1, 1, 1]), Row(0.1, [0, 0, 1, 1]), Row(1.1, [2] * 4), Row(0.2, None)]
    assert choose(rows) is rows[1]
    assert choose(rows[3:]) is None
    assert choose([Row(0.5, [0.6, 0.6]), Row(0.4, [0.6, 0.6])]).damage == 0.4
    # Always a little worse is worse, however much the questions differ: their own standard error says nothing.
    assert choose([Row(0.5, [0.1, 0.9, 0.1, 0.9]), Row(0.1, [0.09, 0.89, 0.09, 0.89])]).damage == 0.5
    assert choose([Row(0.5, [0.6]), Row(0.1, [0.5])]).damage == 0.5


SCORES = st.none() | st.lists(st.floats(0, 1), min_size=3, max_size=3)
ROWS = st.lists(st.builds(Row, st.floats(0, 2), SCORES), min_size=1, max_size=8)


@given(ROWS)
def test_the_front_and_the_choice_are_those_of_all_comparisons(rows):
    measured = [row for row in rows if row.benefit is not None]

    def beaten(row):
        return any(o.benefit > row.benefit and o.damage < row.damage for o in measured)

    members = front(rows)
    assert not any(beaten(row) for row in members)
    for row in measured:
        assert any(o.benefit >= row.benefit and o.damage <= row.damage for o in members)
    chosen, within = choose(rows), [row for row in measured if row.damage <= 1]
    assert (chosen is None) == (not within)
    if within:
        best = max(within, key=lambda row: row.benefit)
        differences = [[b - o for b, o in zip(best.of_questions, row.of_questions, strict=True)] for row in within]
        errors = [statistics.stdev(of) / math.sqrt(3) for of in differences]
        gaps = [sum(of) / 3 - error for of, error in zip(differences, errors, strict=True)]
        # Of a gap of zero rounding decides, unless every question has the same score.
        assume(all(abs(gap) > 1e-9 or not any(of) for gap, of in zip(gaps, differences, strict=True)))
        as_good = [row for row, gap in zip(within, gaps, strict=True) if gap <= 1e-12]
        assert chosen in as_good and chosen.damage == min(row.damage for row in as_good)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=60), st.integers(1, 60), st.floats(0.1, 3))
def test_a_setting_that_is_certain_to_be_over_the_limit_is(values, read, limit):
    meter = SideEffectsMeter()
    meter._kl, meter._tokens = [torch.tensor(values[:read])], len(values[:read])
    for name, whole in (("kl_p95", percentile(torch.tensor(values), HIGH)), ("kl_mean", sum(values) / len(values))):
        if Budget({name: limit}).hopeless(meter, len(values), 1.0):
            assert whole > limit - 1e-5


def test_budget():
    budget = Budget({"perplexity_ratio": 1.05, "kl_p95": 0.5})
    assert budget.damage({"perplexity_ratio": 1.025, "kl_p95": 0.1}) == pytest.approx(0.5)
    assert budget.damage({"perplexity_ratio": 0.9, "kl_p95": 0.4}) == pytest.approx(0.8)
    meter = SideEffectsMeter()
    meter._kl, meter._tokens, meter._nll = [torch.zeros(25)], 25, 25 * math.log(1.21)
    assert budget.hopeless(meter, 100, 2.0) == "perplexity_ratio is 1.21 after 25 of 100 tokens"
    assert budget.hopeless(meter, 101, 2.0) is None
    meter._nll = 25 * math.log(1.19)
    assert budget.hopeless(meter, 100, 2.0) is None


# Bad input

BAD = [
    ({"energie": [0.9]}, {}, "has an axis 'energie' that the method has not: did you mean 'energy'?"),
    ({"gate": [0.9]}, {}, "has an axis 'gate' that the method has not: "),
    ({"energy": [0.9], "positive_energy": [0.8]}, {}, "sets 'positive_energy' also by 'energy': leave one of them out"),
    ({"energy": [1.5]}, {}, r"positive_energy must be in \(0, 1\], got 1.5"),
    ({"energy": []}, {}, "has no value on the axis 'energy'"),
    ({"strength": [-1]}, {}, "strength must be a number of 0 or more and finite, got -1.0"),
    ({"rescale": ["some"]}, {}, "rescale must be one of 'token', 'none', 'mean', 'average', got 'some'"),
    ({"input_scale": [2.0]}, {}, "input_scale is used by a feature map only"),
    ({"retain_energy": [0.9]}, {}, "retain_energy needs retain"),
    ({}, {"budget": {}}, "budget limits nothing: pass for example"),
    ({"layers": ["last 4"]}, {}, "'last 4': the model has 3 blocks"),
    ({"layers": [[2, 3]]}, {}, r"layers \[3\] are outside the model, which has 0 to 2"),
    ({"layers": ["lst 2"]}, {}, "layers must be all, last N, .*, got 'lst 2'"),
    ({"layers": ["top 2 by size"]}, {}, "layers can be ranked by probe or signature, got 'size'"),
    ({"layers": ["top 4 by probe"]}, {}, "top 4 of 3 blocks: choose from 1 to 3"),
    ([], {}, "grid has no setting"),
    ([3], {}, "grid must be a dict of axes, or a list of these, got 3"),
    ({}, {"budget": {"kl_95": 1}}, "budget limits 'kl_95', which it has not: did you mean 'kl_p95'?"),
    ({}, {"budget": {"perplexity_ratio": 0.9}}, "must limit perplexity_ratio to a number above 1, got 0.9"),
    ({}, {"criterion": "mc3"}, "criterion must be one of 'mc2', 'mc1', got 'mc3'"),
    ({}, {"method": "SAE"}, "method 'SAE' cannot be swept: did you mean 'SEA'?"),
    ({}, {"hopeless": 0.5}, "hopeless must be a number of 1 or more, got 0.5"),
    ({}, {"store": None}, "store is missing"),
    ({}, {"adapter": "x"}, "adapter is for methods that are trained"),
    ({"token_scope": ["last"]}, {"method": "MEAN_DIFFERENCE"}, "token_scope='last' cannot be swept"),
    ({}, {"method": "MEAN_DIFFERENCE", "retain": "retain"}, "retain is not used by mean-difference"),
    ({"retain_weight": [1.0]}, {"method": "HPR", "store": "pairs"}, "retain_weight needs retain"),
    ({"top_k": [1]}, {"method": "HPR", "store": "pairs"}, "top_k needs eval_store"),
    ({"top_k": [4]}, {"method": "HPR", "store": "pairs", "eval_store": "pairs"}, "top_k must be at most 3, got 4"),
    ({"layers": ["top 1 by probe"]}, {"method": "HPR", "store": "pairs"}, "use the axis top_k"),
]


@pytest.mark.parametrize("grid, options, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_in_one_line(base, stores, tmp_path, grid, options, message):
    options = {"store": "mlp", **options}
    for name in {"store", "eval_store", "retain"} & set(options):
        options[name] = stores.get(options[name])
    with pytest.raises(ValueError, match=message) as raised:
        swept(base, grid, out=tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() or [file.name for file in (tmp_path / "out").iterdir()] == [".sweep.lock"]


def test_other_models_and_folders_are_refused(base, stores, tmp_path):
    with pytest.raises(ValueError, match="was collected from another model"):
        swept(tiny_model(seed=5), {}, store=stores["mlp"])
    with pytest.raises(ValueError, match="was collected from another model"):
        swept(tiny_model(seed=5), {}, store=stores["pairs"], method="HPR")
    model = get_peft_model(tiny_model(), SEAConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        swept(model, {}, store=stores["mlp"])
    (tmp_path / CONFIG_NAME).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="holds an adapter of another method"):
        swept(base, {}, store=stores["mlp"], out=tmp_path)
    with pytest.raises(TypeError, match="did you mean 'budget'"):
        sweep(base, TOKENIZER, {}, validation=contrast(), texts=TEXTS, budgets={})


def test_windows_lie_side_by_side_and_reach_the_last_block():
    def windows(available, n):
        maker = SimpleNamespace(count=9, layers=available)
        return list(layer_choices(maker, f"windows of {n}"))

    assert windows([0, 1, 2, 3], 2) == [(0, 1), (2, 3)]
    assert windows([0, 1, 2, 3, 4], 3) == [(0, 1, 2), (2, 3, 4)]
    assert windows([0, 2, 3, 5, 6, 7], 2) == [(2, 3), (5, 6), (6, 7)]
    assert list(layer_choices(SimpleNamespace(count=9, layers=[1, 2]), None)) == [(1, 2)]
    with pytest.raises(ValueError, match="of 0,2 no 2 are neighbours: take smaller windows"):
        windows([0, 2], 2)


def test_a_grid_has_each_setting_once_in_its_order(base, stores):
    maker = SETTINGS(base, Sources(stores["mlp"]))
    settings = settings_of(maker, [{"layers": ["all", "0-2", [0, 1, 2], "first 3"]}, {"strength": [1, 2], "layers": 1}])
    assert [(setting.layers, setting.strength) for setting in settings] == [((0, 1, 2), 1.0), ((1,), 1.0), ((1,), 2.0)]
