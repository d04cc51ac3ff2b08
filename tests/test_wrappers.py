"""Models that are compiled, or spread over devices: every entry sees the model inside."""

import os

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import (
    HPRConfig,
    HPRTrainer,
    HPRTrainingArguments,
    MeanDifferenceConfig,
    SEAConfig,
    collect_activations,
    combine_sea,
    edit_strength,
    evaluate_multiple_choice,
    fingerprint,
    fit_mean_difference,
    fit_sea,
    load_contrast_set,
    perplexity,
    push_to_hub,
    sea_to_lora,
    select_layers,
)
from peft_edit.adapters import hub
from peft_edit.demo import ASSETS
from peft_edit.models.fingerprint import adapters_fingerprint
from peft_edit.models.sites import find_sites, unwrap, without_wrappers


TOKENIZER = AutoTokenizer.from_pretrained(ASSETS / "model")
DATA = load_contrast_set(ASSETS / "demonstrations.jsonl").select(range(6))
TEXTS = (ASSETS / "unrelated.txt").read_text().splitlines()[:3]
RANDOM = {"init_weights": False}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def distributed_copy(model):
    """As DistributedDataParallel wraps it, which refuses a model that has nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        next(model.parameters()).requires_grad = True
    return DistributedDataParallel(model)


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": distributed_copy,
    "DataParallel of a compiled one": lambda model: nn.DataParallel(compiled(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def without_compiling():
    """Only what is around the models matters here; test_compile.py makes graphs."""
    with torch.compiler.set_stance("force_eager"):
        yield


def base():
    # DataParallel takes a model to a GPU where there is one.
    return AutoModelForCausalLM.from_pretrained(ASSETS / "model").to(DEVICE)


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(base(), config).eval()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    rows = collect_activations(base(), TOKENIZER, DATA, path / "rows", neutral="prompt")
    return rows, collect_activations(base(), TOKENIZER, DATA, path / "pairs", site="block", tokens="answer")


@every_wrapper
def test_what_is_collected_is_that_of_the_model(tmp_path, stores, wrap):
    models = {"base": base, "adapted": lambda: adapted(HPRConfig(**RANDOM))}
    expected = {"base": stores[0]}
    expected["adapted"] = collect_activations(models["adapted"](), TOKENIZER, DATA, tmp_path / "a", neutral="prompt")
    for name, make in models.items():
        store = collect_activations(wrap(make()), TOKENIZER, DATA, tmp_path / name, neutral="prompt")
        assert store.metadata == expected[name].metadata
        assert all(torch.equal(store.positive(i), expected[name].positive(i)) for i in store.layers)


@every_wrapper
def test_what_is_measured_is_that_of_the_model(wrap):
    model = adapted(HPRConfig(gate=0.6, **RANDOM))
    expected = evaluate_multiple_choice(model, TOKENIZER, DATA), perplexity(model, TOKENIZER, TEXTS)
    with edit_strength(model, 0.5):
        weaker = perplexity(model, TOKENIZER, TEXTS)
    wrapped = wrap(model)
    assert evaluate_multiple_choice(wrapped, TOKENIZER, DATA).mc2 == pytest.approx(expected[0].mc2, rel=1e-5)
    assert perplexity(wrapped, TOKENIZER, TEXTS) == pytest.approx(expected[1], rel=1e-5)
    with edit_strength(wrapped, 0.5):
        assert perplexity(wrapped, TOKENIZER, TEXTS) == pytest.approx(weaker, rel=1e-5)
    assert fingerprint(wrapped) == fingerprint(model) and adapters_fingerprint(wrapped) == adapters_fingerprint(model)
    assert find_sites(wrapped, "mlp") == find_sites(model, "mlp")
    assert unwrap(wrapped) is model.get_base_model() and without_wrappers(wrapped) is model


@every_wrapper
def test_what_is_learnt_is_learnt_by_the_model(tmp_path, stores, wrap, monkeypatch):
    rows, pairs = stores
    sea = adapted(SEAConfig(rescale="none"))
    sea.add_adapter("second", SEAConfig(rescale="none"))
    sea.add_adapter("third", SEAConfig(rescale="none"))
    wrapped = wrap(sea)
    for name in ("default", "second"):
        assert len(fit_sea(wrapped, rows, name).layers) == 5 and sea.peft_config[name].rank_pattern
    assert combine_sea(wrapped, ["default", "second"]) in sea.peft_config
    assert sea_to_lora(wrapped, tmp_path / "lora").rank and (tmp_path / "lora" / "adapter_config.json").exists()

    pushed = []
    monkeypatch.setattr(hub, "push_folder", lambda folder, *args, **kwargs: pushed.append(os.listdir(folder)))
    push_to_hub(wrapped, "user/name")
    assert "adapter_config.json" in pushed[0]

    mean = adapted(MeanDifferenceConfig())
    fit_mean_difference(wrap(mean), pairs)
    assert mean.peft_config["default"].fit_statistics

    hpr = adapted(HPRConfig())
    options = {"max_steps": 2, "eval_strategy": "no", "save_steps": 1, "save_strategy": "steps", "use_cpu": True}
    arguments = HPRTrainingArguments(tmp_path / "run", **options, report_to="none", disable_tqdm=True)
    HPRTrainer(wrap(hpr), arguments, train_dataset=pairs).train()
    assert hpr.peft_config["default"].fitted_on and (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").exists()
    selection = select_layers(wrap(hpr), pairs, top_k=2)
    assert hpr.peft_config["default"].selected_layers == selection.selected


def test_caches_are_not_given_to_what_splits_batches():
    seen = []

    class Splitting(nn.DataParallel):
        def forward(self, *inputs, **kwargs):
            seen.append(kwargs)
            return super().forward(*inputs, **kwargs)

    evaluate_multiple_choice(Splitting(base()), TOKENIZER, DATA)
    assert seen and all(kwargs.keys() == {"input_ids", "attention_mask", "use_cache"} for kwargs in seen)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compiled", "DataParallel"])
@pytest.mark.parametrize("config", [SEAConfig, HPRConfig, MeanDifferenceConfig])
def test_adapters_are_added_before_a_model_is_wrapped(wrap, config):
    """Afterwards the names of its modules are others, which the file would hold."""
    with pytest.raises(ValueError, match=r"wrapped already \(.*\), .*: add the adapter to the model inside") as error:
        get_peft_model(wrap(tiny_model()), config())
    assert "\n" not in str(error.value)
