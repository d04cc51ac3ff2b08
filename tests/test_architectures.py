"""The page examples/architectures.md is what examples/architectures.py writes: its table is what the script finds."""

import re
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from test_collect import TOKENIZER, contrast

from peft_edit import HPRConfig, SEAConfig, collect_activations, evaluate_multiple_choice, fit_sea
from peft_edit.models.sites import find_sites


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "examples"))
import architectures  # noqa: E402
from architectures import FAMILIES, NOT_TRIED, Row, edited, logits, page, reason, table, tiny_model, try_family  # noqa: E402


PAGE = (REPOSITORY / "examples" / "architectures.md").read_text(encoding="utf-8")
(VERSION,) = re.findall(r"Transformers, here (\d+\.\d+)", PAGE)
SHOWN = {
    family: Row(*results)
    for families, *results in re.findall(r"^\| ([\w, -]+)" + r" \| (.*?)" * 5 + r" \|$", PAGE, flags=re.MULTILINE)
    for family in families.split(", ")
    if family not in ("families", "---")
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", sorted(set(SHOWN) & set(FAMILIES)))
def test_page_shows_what_a_family_can_do(family):
    found = try_family(family)
    assert astuple(found) == astuple(SHOWN[family]), "run python examples/architectures.py --write"


def test_page_shows_every_family():
    assert len(SHOWN) > 180 and not set(SHOWN) & set(NOT_TRIED)
    assert set(FAMILIES) <= set(SHOWN) or Version(transformers.__version__).release[:2] != Version(VERSION).release


def test_page_is_what_the_script_writes():
    assert page(SHOWN, VERSION) == PAGE, "run python examples/architectures.py --write"


def test_script_writes_the_page(tmp_path, monkeypatch, capsys):
    """From what it finds in all families; names of families and --write exclude each other."""
    monkeypatch.setattr(architectures, "__file__", str(tmp_path / "architectures.py"))
    monkeypatch.setattr(architectures, "FAMILIES", list(SHOWN))
    monkeypatch.setattr(architectures, "try_family", SHOWN.get)
    monkeypatch.setattr(architectures.logging, "set_verbosity_error", lambda: None)  # other tests read the log
    monkeypatch.setattr(transformers, "__version__", f"{VERSION}.0")
    monkeypatch.setattr(sys, "argv", ["architectures.py", "--write"])
    architectures.main()
    assert (tmp_path / "architectures.md").read_text(encoding="utf-8") == PAGE

    monkeypatch.setattr(sys, "argv", ["architectures.py", "--write", "llama"])
    with pytest.raises(SystemExit):
        architectures.main()
    assert "leave out their names" in capsys.readouterr().err


def test_table_groups_families_with_the_same_results():
    yes, no = Row(*["yes"] * 5), Row("no", *["yes"] * 4)
    lines = table({"a": no, "b": yes, "c": yes}).splitlines()
    assert lines[2:] == ["| b, c | yes | yes | yes | yes | yes |", "| a | no | yes | yes | yes | yes |"]


def test_reasons_name_no_module():
    message = "adapter 'default' cannot be merged: it edits the output of model.layers.0.mlp, which is odd; keep it"
    assert reason(ValueError(message)) == "it edits the output of a module, which is odd"


@pytest.mark.parametrize(
    "family, found",
    [
        ("deepseek_v4", r"\(1, 9, 4, 32\)"),
        ("gemma3n_text", r"\(4, 1, 9, 32\)"),
        ("qwen4_exp_text", r"\(1, 9, 128\)"),
        ("reformer", "ReformerOutput"),
    ],
)
def test_blocks_without_one_residual_stream_are_refused(family, found):
    match = rf"^the edit at [\w.]+\.0 needs one tensor of width 32, the module gives {found}: choose another site"
    for config in (SEAConfig(site="block", init_weights=False), HPRConfig(init_weights=False)):
        model = edited(tiny_model(family), config)
        with pytest.raises(ValueError, match=match):
            logits(model)
        with model.disable_adapter():
            logits(model)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma3n_text", "reformer", "prophetnet"])
def test_collecting_needs_one_activation_for_each_position(family, tmp_path):
    with pytest.raises(ValueError, match=r"^[\w.]+ gives .* not one activation for each position of each row"):
        collect_activations(tiny_model(family), TOKENIZER, contrast(), tmp_path, site="block", tokens="answer")


@torch.no_grad()
def test_a_head_that_takes_several_streams_gives_the_logits_of_all():
    """ProphetNet's takes (b, n-grams, s, d): here there are two n-grams and two positions."""
    model, answers = tiny_model("prophetnet"), ([[5], [6]], [[7], [8]])
    (found,) = evaluate_multiple_choice(model, TOKENIZER, contrast([([3, 4], *answers, None)], [0])).questions
    expected = model(input_ids=torch.tensor([[3, 4]]), use_cache=False).logits[0, -1].log_softmax(dim=-1)
    assert found.log_likelihoods == pytest.approx({f"w{i}": float(expected[i]) for i in (5, 6, 7, 8)}, abs=1e-4)


def test_positions_before_rows_are_refused():
    """A batch of several adapters could not tell them apart, nor could a collection."""
    for config in (SEAConfig(), SEAConfig(site="block"), HPRConfig()):
        with pytest.raises(ValueError, match="XLNetLMHeadModel begin with the positions and not with the rows"):
            edited(tiny_model("xlnet"), config)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama4_text", "openai-gpt", "cpmant", "prophetnet", "xlstm", "gpt_oss"])
def test_mixed_batches_of_unusual_shapes(family):
    """Flattened, in lists, with prompts or further streams beside the tokens."""
    ids = torch.stack((torch.arange(3, 12), torch.arange(20, 29)))
    for config in (SEAConfig(init_weights=False), HPRConfig(init_weights=False, gate=1.0)):
        model = edited(tiny_model(family), config)
        expected = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
        mixed = model(input_ids=ids, use_cache=False, adapter_names=["__base__", "default"]).logits
        torch.testing.assert_close(mixed, torch.stack((base[0], expected[1])), rtol=1e-4, atol=1e-4)
        assert not torch.equal(base, expected)


# Where a family's MLP ends, for those whose names or structure mislead.
MLP = {
    "git": "output.dense",  # as deep a vision tower
    "jetmoe": "mlp",  # experts without linear layers
    "openai-gpt": "mlp.c_proj",
    "phi4_multimodal": "mlp.down_proj",
    "recurrent_gemma": "mlp_block.down_proj",
    "roberta-prelayernorm": "output.dense",
    "xmod": "output.dense",  # language adapters behind it
    "zamba2": "shared_transformer.feed_forward.down_proj",  # a projection and Mamba behind it
}


@pytest.mark.parametrize("family", MLP)
def test_where_the_mlp_ends(family):
    layer = 1 if family == "zamba2" else 0
    (site,) = find_sites(tiny_model(family), "mlp", layers=layer).values()
    assert site.split(f".{layer}.", 1)[1] == MLP[family]


def test_blocks_of_one_sublayer_each():
    """Nemotron-H: of Mamba, experts, attention and an MLP only the second and the last have one."""
    model = tiny_model("nemotron_h")
    tails = ["mixer" if i == 1 else "mixer.down_proj" for i in (1, 3)]
    assert find_sites(model, "mlp", layers=[1, 3]) == {
        i: f"model.layers.{i}.{t}" for i, t in zip((1, 3), tails, strict=True)
    }
    for layers in (None, 0, 2):
        with pytest.raises(ValueError, match="gives the output of their MLP: pass layers_to_transform without them"):
            find_sites(model, "mlp", layers=layers)


def test_collecting_from_blocks_that_return_lists(tmp_path):
    """As GPT's do: a list that begins with the activations."""
    model = tiny_model("openai-gpt")
    store = collect_activations(model, TOKENIZER, contrast(), tmp_path, site="block", tokens="answer")
    assert store.answer_tokens(1).shape[1] == 32 and store.answer_tokens(1).isfinite().all()
    model = get_peft_model(model, SEAConfig(site="block"))
    fit_sea(model, collect_activations(model, TOKENIZER, contrast(), tmp_path / "last", site="block"))
    with model.disable_adapter():
        base = logits(model)
    assert not torch.equal(logits(model), base)


@torch.no_grad()
def test_shared_weights_are_not_merged():
    """Zamba's blocks share one transformer: what is merged for one block would edit the others too."""
    config = SEAConfig(rescale="none", init_weights=False, layers_to_transform=[1, 3])
    model = edited(tiny_model("zamba2"), config)
    first, second = (layer.get_base_layer() for layer in model.modules() if hasattr(layer, "sea_positive"))
    assert first is not second and first.weight is second.weight
    before, weight = logits(model), first.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weights of model\.layers\.1.* are shared with another module") as error:
            merge()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before) and torch.equal(first.weight, weight)
