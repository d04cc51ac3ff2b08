"""Results record all that they follow from, and are compared only where that is the same."""

import copy
import hashlib
import json

import pytest
import torch
from conftest import ASSETS
from datasets import concatenate_datasets
from edits import EDITS, edited_model, two_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import PATHS, base_of, link_base
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from test_cards import FINGERPRINT, results, sea_config
from test_cli import BBQ, MODEL, TEST, refused, run  # noqa: F401 - a fixture
from test_collect import TOKENIZER, contrast
from test_prompts import TEMPLATE, byte_tokenizer
from tiny import tiny_model, vivid_model

from peft_edit import SEAConfig, edit_strength, evaluate, evaluate_multiple_choice, fingerprint, load_contrast_set
from peft_edit.adapters.card import model_card, write_card
from peft_edit.data.contexts import QA_PRIMER
from peft_edit.data.prompts import PromptOptions, prompt_record
from peft_edit.evaluation.comparing import check_comparable
from peft_edit.evaluation.results import read_results, record
from peft_edit.models.fingerprint import adapter_record, tensors_of


PLAIN = {"format": "plain", "template": None, "template_arguments": None, "template_time": None, "examples": None}


every_edit = pytest.mark.parametrize("edit", EDITS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# What is recorded


def evaluated(run, file, *arguments):  # noqa: F811
    status, out, err = run("evaluate", MODEL, *arguments, "--json", file)
    assert status == 0, err
    return json.loads(file.read_text()), out


def test_evaluate_records_all_that_its_results_follow_from(run, tmp_path, demo_model):  # noqa: F811
    model = get_peft_model(demo_model, SEAConfig(init_weights=False))
    model.save_pretrained(tmp_path / "sea")
    options = ["--adapter", tmp_path / "sea", "--strength", 0.5, "--skip", 3, "--limit", 4]
    found, out = evaluated(run, tmp_path / "a.json", TEST, *options, "--texts", ASSETS / "unrelated.txt")
    assert "Prompt format: plain\n" in out
    of_adapter = adapter_record(model.peft_config["default"], tensors_of(model, "default"))
    assert found["version"] == 2 and found["strength"] == 0.5
    assert found["model"] == {
        "name": MODEL,
        "revision": None,
        "fingerprint": fingerprint(demo_model),
        "dtype": "float32",
    }
    assert found["adapters"] == [{"name": str(tmp_path / "sea"), **of_adapter}]
    digest = found["data"].pop("digest")
    assert found["data"] == {
        **{"name": "test.jsonl", "subset": None, "split": None, "files": None},
        **{"rows": 4, "of_rows": 180, "examples": None},
    }
    ids = [question["id"] for question in found["questions"]]
    assert ids == load_contrast_set(TEST)["id"][3:7]
    assert set(found["questions"][0]) >= {"id", "mc1", "mc2", "log_likelihoods"}
    assert found["prompts"] == PLAIN
    texts = (ASSETS / "unrelated.txt").read_text().splitlines()
    expected = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    (effects,) = found["side_effects"]
    assert effects["texts"] == {"file": "unrelated.txt", "digest": expected, "count": len(texts)}
    assert effects["base_perplexity"] > 1 and found["base_questions"] != found["questions"]
    assert found["intervals"] == {"confidence": 0.95, "resamples": 2000, "seed": 0}
    assert {"peft_edit", "peft", "transformers", "torch", "tokenizers", "python"} == set(found["versions"])
    assert found["command"] == "evaluate" and found["options"]["limit"] == 4
    # The same rows, otherwise asked for, are the same data.
    again = record(
        demo_model, TOKENIZER, load_contrast_set(TEST, ids=ids), {}, prompts=PromptOptions(prompt_format="plain")
    )
    assert again["data"] == found["data"] | {"digest": digest}


def test_a_local_copy_and_its_part_are_recorded(run, tmp_path):  # noqa: F811
    arguments = ["bbq", "--data-files", BBQ, "--subset", "age_ambig", "--prompt-format", "few_shot_qa"]
    found, out = evaluated(run, tmp_path / "a.json", *arguments)
    assert "Prompt format: few_shot_qa\n" in out
    assert found["data"] | {"digest": None} == {
        **{"name": "bbq", "subset": "age_ambig", "split": None, "files": ["bbq_30.jsonl"]},
        **{"rows": 2, "of_rows": 2, "digest": None, "examples": None},
    }
    assert found["prompts"] == PLAIN | {"format": "few_shot_qa", "examples": QA_PRIMER}


def test_prompts_are_recorded_as_chosen():
    tokenizer = byte_tokenizer()
    assert prompt_record(tokenizer, PromptOptions())["format"] == "plain"
    tokenizer.chat_template = TEMPLATE
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]
    chosen = PLAIN | {"format": "chat", "template": digest}
    assert (
        prompt_record(tokenizer, PromptOptions())
        == prompt_record(tokenizer, PromptOptions(prompt_format="chat"))
        == chosen
    )
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "x"}
    assert prompt_record(tokenizer, PromptOptions(prompt_format="chat")) == chosen
    tokenizer.chat_template = TEMPLATE + " "
    assert prompt_record(tokenizer, PromptOptions())["template"] != digest
    assert prompt_record(tokenizer, PromptOptions(prompt_format="plain"))["template"] is None


def test_other_rows_and_texts_have_other_digests(llama):
    def digest(data):
        return record(llama, TOKENIZER, data, {})["data"]["digest"]

    data = contrast()
    known = digest(data)
    assert digest(data.select(range(len(data)))) == digest(data.with_format("numpy")) == known
    others = [data.select([1, 0]), data.select([0])]
    others += [data.map(lambda row: {"prompt": "w5"}), data.map(lambda row: {"mc1_choices": ["w1", "w2"]})]
    digests = [digest(other) for other in others]
    assert len({known, *digests}) == len(others) + 1


def test_adapters_in_memory_are_recorded():
    model = two_adapters("SEA at the MLP")
    data, names = contrast(), {"other": "user/other"}
    model.base_model.set_adapter(["default", "other"])
    with edit_strength(model, 2):
        found = record(model, TOKENIZER, data, {}, strength=2.0, names=names)
    assert [adapter["name"] for adapter in found["adapters"]] == ["default", "user/other"]
    assert found["adapters"][0]["weights"] != found["adapters"][1]["weights"]
    with model.disable_adapter():
        assert record(model, TOKENIZER, data, {})["adapters"] == []
    assert found["model"]["fingerprint"] == fingerprint(vivid_model())


@every_edit
def test_an_adapter_has_one_record_in_memory_and_on_disk(tmp_path, edit):
    link_base(tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(base_of(tmp_path), EDITS[edit](modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    config, weights = PeftConfig.from_pretrained(tmp_path / "adapter"), load_peft_weights(tmp_path / "adapter", "cpu")
    expected = adapter_record(config, weights)
    assert adapter_record(model.peft_config["default"], tensors_of(model, "default")) == expected
    for name, load in PATHS.items():
        loaded = load(tmp_path)
        adapter = list(loaded.peft_config)[-1]
        assert adapter_record(loaded.peft_config[adapter], tensors_of(loaded, adapter)) == expected, name
    around = get_peft_model(
        PATHS["PeftModel"](tmp_path).get_base_model(), LoraConfig(target_modules=["down_proj"]), "lora"
    )
    assert adapter_record(config, tensors_of(around, "default"))["weights"] == expected["weights"]
    changed = copy.deepcopy(weights)
    next(iter(changed.values())).flatten()[0] += 1
    assert adapter_record(config, changed)["weights"] != expected["weights"]
    renamed = copy.deepcopy(config)
    renamed.base_model_name_or_path = "user/base"
    assert adapter_record(renamed, weights) == expected
    renamed.init_weights = True
    assert adapter_record(renamed, weights)["config"] != expected["config"]


# What is compared


def test_results_that_match_are_compared():
    check_comparable([read_results(r) for r in (results(), results(sea_config()), results(sea_config(), strength=2.0))])


DATA = {"name": "own.jsonl"}
CHANGES = {
    "model.fingerprint": {"model": {"name": "m", "fingerprint": "1" * 16, "dtype": "float32"}},
    "model.dtype": {"model": {"name": "m", "fingerprint": FINGERPRINT, "dtype": "bfloat16"}},
    "questions": {"ids": range(3)},
    "data.digest": {"data": DATA | {"digest": "0" * 16}},
    "prompts.format": {"prompts": PLAIN | {"format": "chat"}},
    "prompts.template": {"prompts": PLAIN | {"template": "1" * 16}},
    "prompts.template_arguments": {"prompts": {"format": "plain", "template_arguments": {"enable_thinking": False}}},
    "texts.digest": {"texts": {"file": "unrelated.txt", "digest": "1" * 16, "count": 64}},
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", CHANGES)
def test_results_that_differ_are_refused_in_one_line_that_names_what(tmp_path, name, order):
    config = sea_config(base_model_fingerprint=None)
    contents = [results(data=DATA), results(config, **{"data": DATA, **CHANGES[name]})][::order]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json and .*b\.json must agree in {name}, got .+ and .+: \w+") as caught:
        model_card(config, results=files)
    assert "\n" not in str(caught.value)


RENAMED = [{"name": "renamed.jsonl"}, {"name": "own.jsonl", "files": ["copy.jsonl"]}, {"name": None, "split": "x"}]


@pytest.mark.parametrize("renamed", RENAMED, ids=str)
def test_the_same_rows_under_another_name_are_compared(renamed):
    config = sea_config()
    text = str(model_card(config, results=[results(data=DATA), results(config, renamed)]))
    assert "| this adapter | 65.0 (+25.0) | 60.0 (+10.0) |" in text and text.count("Measured on ") == 1
    with pytest.raises(ValueError, match=r"must agree in prompts\.format"):
        model_card(config, results=[results(data=DATA), results(config, renamed, prompts={"format": "chat"})])
    with pytest.raises(ValueError, match="are of the same model on the same data"):
        model_card(config, results=[results(data=DATA), results(data=renamed)])
    apart = str(model_card(config, results=[results(data=DATA), results(config, renamed | {"digest": "1" * 16})]))
    assert "| this adapter | 65.0 | 60.0 |" in apart and apart.count("Measured on ") == 2


def test_the_values_that_differ_are_shown():
    config = sea_config()
    chat = results(config, prompts={"format": "chat", "template": "1" * 16, "examples": None})
    with pytest.raises(ValueError, match=r'in prompts.format, got "plain" and "chat": evaluate all in one prompt form'):
        model_card(config, results=[results(), chat])
    with pytest.raises(ValueError, match=r"in questions, got 7 and 3: .* with the same skip and limit$"):
        model_card(config, results=[results(), results(config, ids=range(3))])
    with pytest.raises(ValueError, match=r"in questions, got id 0 and id 1: "):
        model_card(config, results=[results(), results(config, ids=range(1, 8))])


def test_without_a_fingerprint_names_tell_models_apart():
    config = sea_config()
    named = [results(c, model={"name": f"m{i}", "fingerprint": None}) for i, c in enumerate((None, config))]
    with pytest.raises(ValueError, match=r'in model.name, got "m0" and "m1": evaluate one base model'):
        model_card(config, results=named)


def test_results_of_another_adapter_or_model_are_refused(tmp_path):
    config = sea_config()
    for other, message in (
        (results(sea_config(strength=2.0)), "is of another adapter .*, config .*evaluate with adapter='this adapter'"),
        (results(config, adapters=results(config)["adapters"] * 2), "is of several adapters .*: evaluate with this"),
        (results(model={"name": "m", "fingerprint": "1" * 16}), "must agree in the fingerprint of the base model"),
    ):
        with pytest.raises(ValueError, match=message):
            model_card(config, results=[other])
    model = edited_model("SEA at the MLP")
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    of_it = results(adapters=[{"name": "x", **adapter_record(config, tensors_of(model, "default"))}])
    assert write_card(tmp_path, config, results=[of_it])
    torch.manual_seed(5)
    edited_model("SEA at the MLP", seed=5).save_pretrained(tmp_path)  # the same configuration
    with pytest.raises(ValueError, match=r"is of another adapter .*, weights "):
        write_card(tmp_path, config, results=[of_it])


def test_what_the_commands_measured_makes_a_card(run, tmp_path, demo_model):  # noqa: F811
    """Base plain against edited chat, other ids, or another model: each was published as a change."""
    model = get_peft_model(demo_model, SEAConfig(init_weights=False))
    model.save_pretrained(tmp_path / "sea")
    files = {}
    for name, options in {
        "base": ["--limit", 4],
        "edited": ["--limit", 4, "--adapter", tmp_path / "sea"],
        "others": ["--limit", 4, "--skip", 4],
        "few": ["--limit", 4, "--prompt-format", "few_shot_qa"],
    }.items():
        files[name] = tmp_path / f"{name}.json"
        evaluated(run, files[name], TEST, *options)

    def card(*names):
        return ["card", tmp_path / "sea", *(a for name in names for a in ("--results", files[name]))]

    assert run(*card("base", "edited"))[0] == 0
    text = (tmp_path / "sea" / "README.md").read_text()
    assert "Measured on `test.jsonl`, 4 of 180 questions, prompt format `plain`." in text and "model-index" not in text
    ids = load_contrast_set(TEST)["id"]
    assert f"must agree in questions, got id {ids[4]} and id {ids[0]}: " in refused(run, *card("others", "edited"))
    assert "must agree in prompts.examples, got " in refused(run, *card("few", "edited"))


# What is read


@pytest.mark.parametrize("version", [None, 0, 1, "2", True, 2.0])
def test_results_of_other_releases_are_refused(version):
    with pytest.raises(ValueError, match=r"has version .* of the results, this release reads 2: evaluate again with"):
        read_results(results() | {"version": version})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *(
            ({name: value}, f"value of {name} is {value}, which must be from 0 to 1")
            for name in ("mc1", "mc2")
            for value in (-3, 500, float("nan"), float("inf"))
        ),
        ({"measures": {"mc1": {"value": 0.5, "base": 2}}}, "base of mc1 is 2, which must be from 0 to 1"),
        (
            {"measures": {"bbq_bias_ambiguous": {"value": -2}}},
            "value of bbq_bias_ambiguous is -2, which must be from -1",
        ),
        ({"measures": {"mc1": {"value": "0.5"}}}, r"measures\['mc1'\]\.value must be a number or null"),
        *(
            ({"perplexity": value}, "perplexity is .*, which must be 1 or more and fin")
            for value in (0.5, float("inf"))
        ),
        ({"texts": None}, r"side_effects\[0\]\.texts must be "),
        (
            {"texts": {"file": {"a": 1}, "digest": "1", "count": 1}},
            r"side_effects\[0\].texts.file must be text or null, got ",
        ),
        (
            {"side_effects": [{"texts": {"digest": "1", "count": 1}, "kl_p95": -0.5}]},
            "kl_p95 is -0.5, which must be 0 or",
        ),
        (
            {"side_effects": [{"texts": {"digest": "1", "count": 1}, "touched": 1.5}]},
            "touched is 1.5, which is no share",
        ),
        *(({"strength": value}, "strength is .*, which must be 0 or more and finite") for value in (-1, float("nan"))),
        ({"data": {"rows": None}}, "data.rows must be an integer, got None"),
        ({"data": {"rows": 20, "of_rows": 20}}, "data.rows is 20, and there are 7 questions"),
        ({"data": {"of_rows": 3}}, "data.of_rows is 3, data.rows is 7"),
        ({"questions": []}, "data.rows is 7, and there are 0 questions"),
        ({"questions": [results()["questions"][0]] * 7}, "a question is there twice"),
    ],
    ids=str,
)
def test_results_that_nothing_can_have_are_refused(changes, expected):
    data = changes.pop("data", None)
    with pytest.raises(
        ValueError, match=rf"^results is damaged \({expected}.*\): evaluate again with this rel"
    ) as error:
        read_results(results(data=data, **changes))
    assert "\n" not in str(error.value)


def test_a_sum_of_probabilities_may_be_rounded_above_one():
    assert read_results(results(mc2=1.0000000000000002, perplexity=1.0)).measures["mc2"]["value"] > 1


def test_more_rows_than_a_data_set_has_are_no_whole_one(llama):
    """Of data sets that were put together `datasets` keeps what is known of the first."""
    data = load_contrast_set(TEST)
    known, more = (record(llama, TOKENIZER, d, {})["data"] for d in (data, concatenate_datasets([data, data])))
    assert (known["rows"], known["of_rows"], more["rows"], more["of_rows"]) == (180, 180, 360, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
WHOLE = results(sea_config(), {"name": "own.jsonl"})
PLACES = [(key,) for key in WHOLE] + [
    (key, inner) for key in ("model", "data", "prompts", "measures") for inner in WHOLE[key]
]
PLACES += [("measures", "mc1", "value"), *(("side_effects", 0, inner) for inner in WHOLE["side_effects"][0])]
PLACES += [("side_effects", 0, "texts", inner) for inner in WHOLE["side_effects"][0]["texts"]]
PLACES += [("adapters", 0), ("adapters", 0, "config"), ("questions", 0), ("questions", 0, "id"), ("data", "files", 0)]


@settings(max_examples=80)
@given(st.sampled_from(PLACES), JSON, st.booleans())
def test_one_field_that_is_damaged_is_refused_in_one_line_or_means_no_harm(place, value, missing):
    damaged = copy.deepcopy(WHOLE)
    damaged["data"]["files"] = ["own.csv"]
    *path, last = place
    target = damaged
    for part in path:
        target = target[part]
    if missing and isinstance(target, dict):
        del target[last]
    else:
        target[last] = value
    try:
        model_card(sea_config(), results=[damaged])
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith("results ")


def test_evaluation_in_python_is_recorded_too():
    model = tiny_model()
    data = contrast()
    measured = evaluate_multiple_choice(model, TOKENIZER, data)
    read = read_results(evaluate(model, TOKENIZER, data))
    found = {name: measure["value"] for name, measure in read.measures.items()}
    assert found == {"mc1": measured.mc1, "mc2": measured.mc2} and read.ids == data["id"]
