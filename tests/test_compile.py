"""torch.compile: one graph, and while decoding no more graphs than the model has without an edit.

A graph takes a second or two to make, most of it for the model. So what is the code of one method is tried with each,
and what all methods share with an edit of each site.
"""

import functools

import pytest
import torch
from edits import EDITS as GENERAL
from edits import at
from peft import get_peft_model
from tiny import logits, tiny_model, token_ids
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from peft_edit import HPRConfig, SEAConfig, edit_strength
from peft_edit.tuners.frozen import FrozenWeight


SEA, HPR = (functools.partial(config, init_weights=False) for config in (SEAConfig, HPRConfig))
# Each of them a list of what makes the configurations of the adapters.
VARIANTS = {
    "SEA, token": [SEA],
    "SEA, mean": [functools.partial(SEA, rescale="mean", strength=0.5)],
    "SEA, feature map": [functools.partial(SEA, feature_map="tanh", input_scale=3.0)],
    "two SEA adapters": [SEA, functools.partial(SEA, site="block")],
    "HPR, reflection": [functools.partial(HPR, gate=0.6, rotation="reflection")],
    "HPR, last token": [functools.partial(HPR, gate=0.6, token_scope="last")],
}
EDITS = {edit: [make] for edit, make in GENERAL.items()} | VARIANTS
OF_EACH_SITE = list({at(edit): edit for edit in reversed(GENERAL)}.values())
PROMPT = 5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def edited_model(edit, family="llama"):
    model = tiny_model(family, initializer_range=0.2, num_hidden_layers=1)
    torch.manual_seed(0)
    for i, make in enumerate(EDITS[edit] if edit else ()):
        if i == 0:
            model = get_peft_model(model, make()).eval()
        else:
            model.add_adapter("second", make())
            model.base_model.set_adapter(["default", "second"])
    return model


def counting_backend():
    """A compiler that runs the graphs as they are, and the list of them."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def decoded(model, call, cache):
    """Logits of a prompt and of five tokens after it, one at a time."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=16) if cache == "static" else DynamicCache(config=config)
    ids = token_ids(2, PROMPT + 5)
    for start, end in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + 5))):
        yield call(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits


def compiled_decoding(edit, cache):
    """Number of graphs after the prompt and after each token; the logits are those of the model itself."""
    model, (backend, graphs) = edited_model(edit), counting_backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []
    for actual, expected in zip(decoded(model, compiled, cache), decoded(model, model, cache), strict=True):
        torch.testing.assert_close(actual, expected)
        seen.append(len(graphs))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == len(graphs)
    return seen


@functools.cache
def base_decoding(cache):
    torch._dynamo.reset()
    counters.clear()
    result = compiled_decoding(None, cache)
    torch._dynamo.reset()
    counters.clear()
    return result


LAST_TOKEN = "HPR, last token"  # the one whose code asks how many tokens there are


@pytest.mark.parametrize(
    "edit, cache", [(edit, "dynamic" if edit in OF_EACH_SITE else "static") for edit in (*GENERAL, LAST_TOKEN)]
)
def test_decoding_takes_the_graphs_of_the_base_model(edit, cache):
    # The prompt, a token, and where the cache grows a token at any length.
    expected = [1, 2, 3, 3, 3, 3] if cache == "dynamic" else [1, 2, 2, 2, 2, 2]
    assert compiled_decoding(edit, cache) == base_decoding(cache) == expected


@pytest.mark.parametrize(
    "edit, family",
    [
        *((edit, "llama") for edit in VARIANTS if edit != LAST_TOKEN),
        *((edit, "gpt2" if at(edit) == "mlp" else "falcon") for edit in GENERAL),  # a bias, blocks that return tuples
    ],
)
def test_variants_and_other_families_are_one_graph(edit, family):
    model, (backend, graphs) = edited_model(edit, family), counting_backend()
    torch.testing.assert_close(logits(torch.compile(model, backend=backend, fullgraph=True)), logits(model))
    assert len(graphs) == 1 and not counters["graph_break"]


@pytest.mark.parametrize("edit", [None, *OF_EACH_SITE])
def test_generation_compiles_once(edit):
    """As Transformers compiles it for a static cache."""
    model, (backend, graphs) = edited_model(edit), counting_backend()
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # by default on accelerators only
    ids = token_ids(2, PROMPT)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, do_sample=False, **options)
    for _ in range(2):
        actual = model.generate(
            input_ids=ids, do_sample=False, cache_implementation="static", compile_config=compile_config, **options
        )
        assert torch.equal(actual, expected) and len(graphs) == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("edit", GENERAL)
def test_changes_after_compiling_are_followed(edit):
    model, (backend, graphs) = edited_model(edit), counting_backend()
    torch.manual_seed(1)
    model.add_adapter("other", EDITS[edit][0]())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []

    def check(**kwargs):
        seen.append(logits(model, **kwargs))
        torch.testing.assert_close(logits(compiled, **kwargs), seen[-1])
        before = len(graphs)
        logits(compiled, **kwargs)
        assert len(graphs) == before

    check()
    with edit_strength(model, 0.5):
        check()
    if edit in OF_EACH_SITE:
        with model.disable_adapter():
            check()
        model.set_adapter("other")
        check()
        check(adapter_names=["default", "other"])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert not counters["graph_break"]


FROZEN = [edit for edit in GENERAL if all(not p.requires_grad for p in edited_model(edit).parameters())]
FROZEN_OF_EACH_SITE = [edit for edit in OF_EACH_SITE if edit in FROZEN]


@pytest.mark.parametrize(
    "edit, full, value",
    [
        *((edit, True, "nan") for edit in FROZEN),
        *((edit, True, "meta") for edit in FROZEN_OF_EACH_SITE),
        (FROZEN[0], False, "nan"),
    ],
)
def test_a_weight_that_was_never_loaded_is_noticed_while_compiling(edit, full, value):
    """And not a silent NaN of the graph."""
    model, (backend, _) = edited_model(edit), counting_backend()
    weights = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    assert weights and not any(weight.checked for weight in weights)
    empty = torch.empty_like(weights[0].weight, device="meta" if value == "meta" else None)
    weights[0].weight = torch.nn.Parameter(empty if value == "meta" else empty.fill_(torch.nan), requires_grad=False)
    compiled = torch.compile(model, backend=backend, fullgraph=full)
    with pytest.raises((RuntimeError, ValueError), match=f"{weights[0].label} was not loaded") as error:
        logits(compiled)
    assert full or isinstance(error.value, ValueError)  # the very error of eager mode


@pytest.mark.parametrize("edit", FROZEN_OF_EACH_SITE)
def test_a_weight_that_comes_later_is_looked_at_too(edit):
    model, (backend, graphs) = edited_model(edit), counting_backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    weights = {name: module for name, module in model.named_modules() if isinstance(module, FrozenWeight)}
    assert all(weight.checked for weight in weights.values()) and len(graphs) == 1
    name, weight = next(iter(weights.items()))
    parent, _, child = name.rpartition(".")
    broken = type(weight)(torch.full_like(weight.weight, torch.nan), weight.label)
    model.get_submodule(parent)[child] = broken
    with pytest.raises(RuntimeError, match=f"{weight.label} was not loaded"):
        logits(compiled)


@pytest.mark.parametrize("edit", FROZEN_OF_EACH_SITE)
def test_an_export_needs_weights_that_were_looked_at(edit):
    model, ids = edited_model(edit).get_base_model(), token_ids()
    with pytest.raises(ValueError, match="was not looked at yet: call the model once before it is exported"):
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    expected = logits(model, ids)
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, expected)
