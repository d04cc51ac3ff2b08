"""What an edit does to other text, against plain loops and cases by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from edits import EDITS, edited_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_collect import TOKENIZER, text
from tiny import FAMILIES, tiny_model, vivid_model

from peft_edit import HPRConfig, edit_strength, perplexity, side_effects
from peft_edit.evaluation.side_effects import SideEffectsMeter, percentile
from peft_edit.evaluation.texts import text_batches
from peft_edit.tuners.angle import angle_between
from peft_edit.tuners.layer import edit_layers
from peft_edit.tuners.observing import observed_edits


MODULE = sys.modules["peft_edit.evaluation.side_effects"]  # the package has a function of that name
TEXTS = [text(ids) for ids in ([5, 6, 7, 8, 9, 10, 11, 12], [6, 7, 5], [12, 11, 10, 9, 8], [5], [7, 7, 7, 8])]


def literal(model, texts=TEXTS):
    """KL of each predicted token and negative log-likelihoods of both models, one text at a time, in float64."""
    kl, nll, base_nll = [], [], []
    for row in texts:
        ids = torch.tensor([TOKENIZER(row)["input_ids"]])
        with torch.no_grad():
            q = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            with model.disable_adapter():
                p = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        for i in range(ids.shape[1] - 1):
            kl.append(float((p[i].exp() * (p[i] - q[i])).sum()))
            nll.append(-float(q[i, ids[0, i + 1]]))
            base_nll.append(-float(p[i, ids[0, i + 1]]))
    return kl, nll, base_nll


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_loop(edit, family):
    model = edited_model(edit, family)
    kl, nll, base_nll = literal(model)
    for batch_size in (1, 3, 16):
        found = side_effects(model, TOKENIZER, TEXTS, batch_size=batch_size)
        assert found.tokens == len(kl)
        assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
        assert found.kl_p95 == pytest.approx(np.percentile(kl, 95), rel=1e-3, abs=1e-6)
        assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
        assert found.base_perplexity == pytest.approx(math.exp(np.mean(base_nll)), rel=1e-4)
        assert found.perplexity_ratio == pytest.approx(found.perplexity / found.base_perplexity, rel=1e-12)
        assert found.perplexity == pytest.approx(perplexity(model, TOKENIZER, TEXTS, batch_size=batch_size), rel=1e-6)
    assert not any(layer.observer for layer in edit_layers(model))


def test_a_case_by_hand():
    """Two tokens over two words: the base is even, the edited model gives 3/4 and 1/4."""
    meter = SideEffectsMeter()
    meter.update(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
    meter.update(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
    found, kl = meter.result(), 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.tokens == 2
    assert found.kl_mean == pytest.approx(kl / 2, rel=1e-6)
    assert found.kl_p95 == pytest.approx(0.95 * kl, rel=1e-6)
    assert found.base_perplexity == pytest.approx(2)
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.5)) / 2))
    assert (found.touched, found.norm_change, found.angle, found.sites) == (None, None, None, {})


@pytest.mark.parametrize("edit", EDITS)
def test_no_strength_no_effect(edit):
    model = edited_model(edit)
    with edit_strength(model, 0):
        found = side_effects(model, TOKENIZER, TEXTS)
    assert (found.kl_mean, found.kl_p95, found.perplexity_ratio) == (0, 0, 1)
    assert (found.touched, found.norm_change, found.angle) == (0, 0, 0)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "family", ["llama", "opt", "falcon"]
)  # OPT flattens batch and sequence before the MLP's output
def test_changes_of_activations(edit, family):
    """Of a single edited layer, by hooks of our own."""
    model = edited_model(edit, family, layers_to_transform=1)
    (layer,) = edit_layers(model)
    seen = []

    def keep(edit_one):
        def kept(h, name):
            out = edit_one(h, name)
            # Copies: Falcon adds the output of attention to that of the MLP in place.
            seen.append(tuple(x.reshape(-1, x.shape[-1]).clone() for x in (h, out)))
            return out

        return kept

    layer.edit = keep(layer.edit)
    touched, norms, angles = [], [], []
    for row in TEXTS:
        ids = torch.tensor([TOKENIZER(row)["input_ids"]])
        with torch.no_grad():
            model(input_ids=ids)
        h, out = seen.pop()
        for a, b in zip(h[:-1], out[:-1], strict=True):
            touched.append(not torch.equal(a, b))
            if touched[-1]:
                norms.append(abs(float(b.norm() / a.norm()) - 1))
                angles.append(float(angle_between(a, b)))
    del layer.edit
    found = side_effects(model, TOKENIZER, TEXTS, batch_size=2)
    assert found.touched == np.mean(touched) and found.touched > 0
    assert found.norm_change == pytest.approx(np.mean(norms), rel=1e-3, abs=1e-6)
    assert found.angle == pytest.approx(np.mean(angles), rel=1e-3)
    assert found.sites == {
        layer.site: {"layer": 1, "touched": found.touched, "norm_change": found.norm_change, "angle": found.angle}
    }


def test_hpr_touches_the_tokens_below_the_gate():
    model = edited_model("HPR", gate=0.1)
    negative = []
    for row in TEXTS:
        states, handles = {}, []
        for layer in edit_layers(model):

            def keep(block, args, out, site=layer.site, states=states):
                states[site] = out[0] if isinstance(out, tuple) else out

            handles.append(layer.get_base_layer().register_forward_hook(keep, prepend=True))
        ids = torch.tensor([TOKENIZER(row)["input_ids"]])
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        rows = []
        for layer in edit_layers(model):
            w = layer.hpr_probe["default"].weight[0]
            rows.append(torch.sigmoid(states[layer.site][0, :-1] @ w) <= 0.1)
        negative.append(torch.stack(rows))  # (sites, tokens)
    negative = torch.cat(negative, dim=1)
    found = side_effects(model, TOKENIZER, TEXTS)
    assert 0 < found.touched < 1
    assert found.touched == float(negative.any(dim=0).double().mean())
    shares = [site["touched"] for site in found.sites.values()]
    assert shares == pytest.approx(negative.double().mean(dim=1).tolist())
    assert found.norm_change < 1e-5


def test_two_methods_at_one_site_have_an_entry_each():
    model = vivid_model("llama")
    torch.manual_seed(0)
    model.add_adapter(HPRConfig(init_weights=False, gate=1.0, layers_to_transform=1), "hpr")
    config = EDITS["MEAN_DIFFERENCE at the block"](layers_to_transform=1)
    model.add_adapter(config, "mean")
    model.set_adapter(["hpr", "mean"])
    found = side_effects(model, TOKENIZER, TEXTS)
    assert sorted(found.sites) == ["model.layers.1 HPRLayer", "model.layers.1 MeanDifferenceLayer"]
    assert found.touched == 1
    assert found.norm_change > 0


def test_lora_has_no_sites():
    torch.manual_seed(0)
    model = get_peft_model(vivid_model(), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    found = side_effects(model, TOKENIZER, TEXTS)
    kl, nll, _ = literal(model)
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-3) and found.kl_mean > 0
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert (found.touched, found.norm_change, found.angle, found.sites) == (None, None, None, {})


def test_models_after_add_adapter_and_their_state_stay():
    torch.manual_seed(0)
    base = vivid_model()
    expected = edited_model("HPR")
    base.add_adapter(EDITS["HPR"](), "default")
    base.load_state_dict({n.removeprefix("base_model.model."): v for n, v in expected.state_dict().items()})
    base.train()
    assert side_effects(base, TOKENIZER, TEXTS) == side_effects(expected, TOKENIZER, TEXTS)
    assert base.training and base.active_adapters() == ["default"]
    assert not any(layer.disable_adapters for layer in edit_layers(base))


def test_refusals():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no active adapter"):
        side_effects(tiny_model(), TOKENIZER, TEXTS)
    model = edited_model("SEA at the MLP")
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        side_effects(model, TOKENIZER, TEXTS)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="no active adapter"):
        side_effects(model, TOKENIZER, TEXTS)
    with pytest.raises(ValueError, match="needs texts of at least two tokens"):
        side_effects(model, TOKENIZER, TEXTS[3:4])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        side_effects(model, TOKENIZER, TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        SideEffectsMeter().update(torch.zeros(1, 2), torch.full((1, 2), math.nan), torch.tensor([0]))


@pytest.mark.parametrize("edit", EDITS)
def test_what_sees_edits_sees_only_inside_and_once(edit):
    model = edited_model(edit)
    (batch,) = text_batches(model, TOKENIZER, TEXTS, 16, "it")
    seen, again = [], observed_edits(model, print)
    with observed_edits(model, lambda layer, before, after: seen.append(layer.site)):
        batch.predict(model)
        with pytest.raises(ValueError, match="observed already"):
            again.__enter__()
    batch.predict(model)
    assert seen == [layer.site for layer in edit_layers(model)]


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_that_of_numpy(values, share):
    values = np.array(values, dtype=np.float32)
    expected = np.percentile(values.astype(np.float64), 100 * share)
    assert percentile(torch.tensor(values), share) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_do_not_matter(rows, monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 10, 7), torch.randint(7, (10,))
    whole, parts = SideEffectsMeter(), SideEffectsMeter()
    whole.update(*logits, targets)
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 7 * rows)
    parts.update(*logits, targets)
    names = ("perplexity", "base_perplexity", "kl_mean", "kl_p95")
    for name in names:
        assert getattr(parts.result(), name) == pytest.approx(getattr(whole.result(), name), rel=1e-6)
    assert parts.kl.dtype == torch.float32 and len(parts.kl) == 10
