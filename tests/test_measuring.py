"""A base model and its edit, measured in one run."""

import json

import numpy as np
import pytest
import torch
from conftest import ASSETS
from edits import EDITS, edited_model
from peft import LoraConfig, get_peft_model
from test_cli import MODEL, TEST, refused, run  # noqa: F401 - a fixture
from test_collect import TOKENIZER, contrast
from test_contrast_known import LOCAL
from tiny import tiny_model, vivid_model

from peft_edit import evaluate, evaluate_multiple_choice, load_contrast_set, perplexity, side_effects
from peft_edit.data.in_context import with_examples
from peft_edit.evaluation.showing import SHIFT
from peft_edit.evaluation.statistics import interval, resamples


TEXTS = ["w3 w4 w5 w6", "w7 w8 w9"]
every_edit = pytest.mark.parametrize("edit", EDITS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@every_edit
def test_one_run_measures_what_separate_ones_do(edit):
    model, data = edited_model(edit), contrast(category=["a", "b", "a", "b", None])
    found = evaluate(model, TOKENIZER, data, texts={"one.txt": TEXTS, "two.txt": TEXTS[:1]})
    after, before = (
        evaluate_multiple_choice(model, TOKENIZER, data),
        evaluate_multiple_choice(vivid_model(), TOKENIZER, data),
    )
    for name in ("mc1", "mc2"):
        measure = found["measures"][name]
        assert (measure["value"], measure["base"]) == pytest.approx((getattr(after, name), getattr(before, name)))
        assert measure["difference"] == pytest.approx(measure["value"] - measure["base"])
        assert measure["low"] <= measure["value"] <= measure["high"]
    assert [q["mc2"] for q in found["base_questions"]] == pytest.approx([q.mc2 for q in before.questions])
    assert [effects["texts"]["file"] for effects in found["side_effects"]] == ["one.txt", "two.txt"]
    expected = side_effects(model, TOKENIZER, TEXTS).to_dict()
    assert {name: found["side_effects"][0][name] for name in expected} == expected
    (of_a,) = [of for name, of in found["categories"].items() if name == "a"]
    assert of_a["questions"] == 2 and set(found["categories"]) == {"a", "b"}
    assert of_a["measures"]["mc2"]["value"] == pytest.approx(np.mean([after.questions[i].mc2 for i in (0, 2)]))
    assert of_a["measures"]["mc2"]["base"] == pytest.approx(np.mean([before.questions[i].mc2 for i in (0, 2)]))
    changes = [after.questions[i].mc2 - before.questions[i].mc2 for i in (0, 2)]
    drawn = [np.repeat(changes, row.astype(int)).mean() for row in resamples(2)]
    bounds = of_a["measures"]["mc2"]["difference_low"], of_a["measures"]["mc2"]["difference_high"]
    assert bounds == pytest.approx(interval(np.array(drawn))) and "p_value" not in of_a["measures"]["mc2"]


def test_intervals_of_differences_are_paired():
    """Against a plain loop over the same resamples."""
    model, data = edited_model("SEA at the MLP"), contrast()
    found = evaluate(model, TOKENIZER, data, resamples=50, bootstrap_seed=3)
    changes = [a["mc2"] - b["mc2"] for a, b in zip(found["questions"], found["base_questions"], strict=True)]
    plain = [np.repeat(changes, row.astype(int)).mean() for row in resamples(len(data), 50, 3)]
    measure = found["measures"]["mc2"]
    assert (measure["difference_low"], measure["difference_high"]) == pytest.approx(interval(np.array(plain)))
    assert found["intervals"] == {"confidence": 0.95, "resamples": 50, "seed": 3}


def test_a_base_model_has_no_comparison():
    found = evaluate(vivid_model(), TOKENIZER, contrast(), texts=TEXTS)
    assert set(found["measures"]) == {"mc1", "mc2"} and found["base_questions"] is None
    assert found["measures"]["mc1"]["base"] is found["measures"]["mc1"]["p_value"] is None
    (effects,) = found["side_effects"]
    assert effects["perplexity"] == pytest.approx(perplexity(vivid_model(), TOKENIZER, TEXTS)) and len(effects) == 2


def test_the_base_may_have_been_measured_before(tmp_path, monkeypatch):
    model, data = edited_model("SEA at the MLP"), contrast()
    expected = evaluate(model, TOKENIZER, data)
    base = evaluate(vivid_model(), TOKENIZER, data)
    (tmp_path / "base.json").write_text(json.dumps(base))
    runs = []
    monkeypatch.setattr(
        "peft_edit.evaluation.measuring.evaluate_multiple_choice",
        lambda *args, **options: runs.append(1) or evaluate_multiple_choice(*args, **options),
    )
    for known in (base, tmp_path / "base.json"):
        found = evaluate(model, TOKENIZER, data, base_results=known)
        assert found["measures"] == expected["measures"] and found["base_questions"] == expected["base_questions"]
    assert len(runs) == 2
    for known, message in (
        (expected, "results is of an adapter: pass results of the base model alone"),
        (evaluate(vivid_model(), TOKENIZER, data.select(range(3))), "results is of other questions|agree in questions"),
        (evaluate(tiny_model(seed=5), TOKENIZER, data), "must agree in model.fingerprint"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, TOKENIZER, data, base_results=known)
    with pytest.raises(ValueError, match=r"^base_results need an adapter, beside which they stand: leave them out"):
        evaluate(vivid_model(), TOKENIZER, data, base_results=base)


def test_without_the_base_an_adapter_is_measured_alone():
    model = edited_model("HPR")
    found = evaluate(model, TOKENIZER, contrast(), base=False, texts=TEXTS)
    assert found["adapters"] and found["measures"]["mc1"]["base"] is None and "kl_mean" not in found["side_effects"][0]
    assert found["side_effects"][0]["perplexity"] == pytest.approx(perplexity(model, TOKENIZER, TEXTS))


def test_metrics_are_those_asked_for():
    model, data = edited_model("SEA at the MLP"), contrast()
    found = evaluate(model, TOKENIZER, data, ["kl", "shift"], texts=TEXTS)
    assert tuple(found["measures"]) == SHIFT and set(found["side_effects"][0]) == {
        "texts",
        "tokens",
        "kl_mean",
        "kl_p95",
    }
    bbq = load_contrast_set("bbq", data_files=LOCAL["bbq"][0], ids=range(3))
    found = evaluate(get_peft_model(*DEMO()), tokenizer_of_demo(), bbq)
    assert "bbq_accuracy" in found["measures"] and "false_to_true" in found["measures"]


def DEMO():
    from transformers import AutoModelForCausalLM

    from peft_edit import SEAConfig

    return AutoModelForCausalLM.from_pretrained(ASSETS / "model"), SEAConfig(init_weights=False)


def tokenizer_of_demo():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "model")


def test_lora_is_measured_too():
    model = get_peft_model(vivid_model(), LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    found = evaluate(model, TOKENIZER, contrast(), texts=TEXTS)
    assert found["measures"]["mc2"]["difference"] != 0 and found["side_effects"][0]["touched"] is None


@pytest.mark.parametrize(
    ("metrics", "options", "expected"),
    [
        (["mc3"], {}, r"metrics must be of mc, bbq, .*, got 'mc3'"),
        ([], {}, r"metrics must be some of mc, .*, got none"),
        (["kl"], {}, r"metrics: kl needs texts: pass some, or leave it out"),
        (["shift"], {"base": False}, r"metrics: shift needs the base model: leave out base=False"),
        (["bbq"], {}, r"metrics: bbq needs the column unknown, which row \d+ has not"),
        (["crows_pairs"], {}, r"metrics: crows_pairs needs one positive and one negative sentence, row "),
        (None, {"resamples": 0}, r"resamples must be a number of at least 1|resamples must be "),
        (None, {"texts": "w3 w4"}, r"there is no file w3 w4 with texts"),
        (None, {"texts": {"a": ["w3 w4", ""]}}, r"row 1: a text must be text, got empty text"),
        ("mc3", {}, r"metrics must be of mc, bbq, .*, got 'mc3'"),
    ],
)
def test_what_cannot_be_measured(metrics, options, expected, monkeypatch):
    """And it is said before anything is measured."""
    monkeypatch.setattr("peft_edit.evaluation.measuring.evaluate_multiple_choice", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=rf"^{expected}") as caught:
        evaluate(edited_model("SEA at the MLP"), TOKENIZER, contrast(), metrics, **options)
    assert "\n" not in str(caught.value)


def test_the_base_of_a_merged_adapter_is_gone():
    model = edited_model("SEA at the MLP")
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged"):
        evaluate(model, TOKENIZER, contrast())


def test_two_models_are_compared_only_where_an_adapter_is_active():
    with pytest.raises(
        ValueError, match=r"^metrics: shift compares an edited model with its base model, and no adapter"
    ):
        evaluate(vivid_model(), TOKENIZER, contrast(), ["shift"])


# Examples in the prompt


def test_examples_stand_before_every_question():
    data, examples = contrast(), contrast(ids=range(20, 25))
    found = with_examples(data, examples, 2, seed=1)
    first, *others = found["prompt"]
    answered = first.removesuffix(data["prompt"][0])
    assert answered.count("\n\n") == 2 and answered.endswith("\n\n")
    assert found["id"] == data["id"] and found["positives"] == data["positives"]
    for row, prompt in zip(data, [first, *others], strict=True):
        head = prompt.removesuffix(row["prompt"])
        assert head.count("\n\n") == 2 and f"{row['prompt'].rstrip()} {row['positives'][0]}\n" not in head
    assert with_examples(data, examples, 2, seed=1)["prompt"] == found["prompt"]


def test_examples_are_turns_of_a_chat():
    data = contrast()
    found = with_examples(data, data, 1, chat=True)
    (first, *_) = found["messages"]
    assert [message["role"] for message in first] == ["user", "assistant", "user"]
    assert first[-1]["content"] == data["prompt"][0] != first[0]["content"]


def test_more_examples_than_questions_are_refused():
    with pytest.raises(
        ValueError, match=r"^examples=5 are more than the 3 questions other than that of row \d+: lower it"
    ):
        with_examples(contrast(), contrast(), 5)
    with pytest.raises(ValueError, match=r"^examples must be at least 1, got 0"):
        with_examples(contrast(), contrast(), 0)


def test_the_command_puts_examples_before_the_questions(run, tmp_path):  # noqa: F811
    arguments = ["evaluate", MODEL, TEST, "--limit", 6, "--json", tmp_path / "a.json"]
    status, out, err = run(*arguments, "--examples", 2, "--examples-data", ASSETS / "validation.jsonl")
    assert status == 0, err
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["data"]["examples"]["count"] == 2 and found["data"]["examples"]["name"] == "validation.jsonl"
    assert "Examples in the prompt: 2\n" in out
    line = refused(
        run, *arguments, "--examples", 2, "--examples-data", ASSETS / "validation.jsonl", "--examples-split", "x"
    )
    assert "split" in line
