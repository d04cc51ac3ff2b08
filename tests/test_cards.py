import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from damage import damages, one_line, write
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model

from peft_edit import ActivationStore, HPRConfig, SEAConfig, fit_sea
from peft_edit.adapters.card import for_repository, index_card, is_generated, may_replace, model_card, write_card
from peft_edit.adapters.save import save_adapter
from peft_edit.cli import main
from peft_edit.cli.hub import card
from peft_edit.models.fingerprint import adapter_record, tensors_of
from peft_edit.tuners.method import methods


every_method = pytest.mark.parametrize("method", methods().values(), ids=list(methods()))
LLAMA = "meta-llama/Llama-2-7b-hf"
FINGERPRINT = "0" * 16


def results(config=None, data=None, ids=range(7), **changes) -> dict:
    """Results as `evaluate --json` writes them: of the base model, or with a configuration's adapter. Values of mc1,
    mc2 and perplexity, and the texts of that, may be changed by their names."""
    given = {"mc1": 0.4, "mc2": 0.5} if config is None else {"mc1": 0.65, "mc2": 0.6}
    given = {name: {"value": changes.pop(name, value)} for name, value in given.items()}
    effects = {
        "texts": changes.pop("texts", {"file": "unrelated.txt", "digest": "e" * 16, "count": 64}),
        "perplexity": changes.pop("perplexity", 2.0 if config is None else 2.125),
    }
    adapters = [] if config is None else [{"name": "/home/me/sea", **adapter_record(config, {})}]
    return {
        "version": 2,
        "model": {"name": "/home/me/m", "revision": None, "fingerprint": FINGERPRINT, "dtype": "float32"},
        "adapters": adapters,
        "strength": 1.0,
        "data": {
            **dict.fromkeys(("name", "subset", "split", "files")),
            **{"rows": len(ids), "of_rows": len(ids), "digest": "d" * 16, **(data or {})},
        },
        "prompts": {"format": "plain", "template": None, "examples": None},
        "measures": given,
        "side_effects": [effects],
        "questions": [{"id": i, "mc1": True, "mc2": 0.5, "log_likelihoods": {"yes": -1.0}} for i in ids],
        "versions": {},
        **changes,
    }


def text_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def sea_config(**changes) -> SEAConfig:
    sites = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    statistics = {"rms": 1.0, "mean_rescale": 1.25, "mean_rescale_deviation": 0.5, "relative_error": 0.0625}
    return SEAConfig(
        **{
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": LLAMA,
            "rank_pattern": {site: [5 + i, 7] for i, site in enumerate(sites)},
            "fit_statistics": {site: {**statistics, "strength": 1.0} for site in sites},
            "fitted_on": {"data": "truthful_qa", "questions": 367, "demonstrations": 400},
            "base_model_fingerprint": FINGERPRINT,
            **changes,
        }
    )


def hpr_config(**changes) -> HPRConfig:
    return HPRConfig(
        **{
            "base_model_name_or_path": LLAMA,
            "selected_layers": [3],
            "probe_accuracy": {"3": 0.97, "11": 0.91},
            "fitted_on": {"data": "preferences.jsonl", "questions": 30, "token_pairs": 4000},
            **changes,
        }
    )


def test_metadata_of_sea():
    data = {"name": "truthful_qa", "split": "test"}
    metadata = model_card(sea_config(), results=[results(data=data), results(sea_config(), data)]).data
    assert metadata.base_model == LLAMA and metadata.library_name == "peft"
    assert metadata.pipeline_tag == "text-generation" and metadata.datasets == ["truthfulqa/truthful_qa"]
    assert {"sea", "activation-editing", "peft-edit"} <= set(metadata.tags)
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in metadata.eval_results] == [
        ("mc1", 0.65, "truthfulqa/truthful_qa", "test"),
        ("mc2", 0.6, "truthfulqa/truthful_qa", "test"),
    ]


def test_metadata_of_hpr():
    metadata = model_card(hpr_config()).data
    assert metadata.base_model == LLAMA and "hpr" in metadata.tags
    # A file of the user's is no data set on the Hub, and nothing was measured.
    assert metadata.datasets is None and metadata.eval_results is None and metadata.pipeline_tag is None


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (
            sea_config(),
            [
                "# SEA adapter for Llama-2-7b-hf",
                f"activations of [{LLAMA}](https://huggingface.co/{LLAMA})",
                '| `rescale` | `"token"` |',
                "| `positive_energy` | `0.998` |",
                "| 1 | `model.layers.1.mlp.down_proj` | 6 | 7 | 1.250 | 0.062 |",
                "to 400 demonstrations from 367 questions of [truthfulqa/truthful_qa](https://huggingface.co/datasets/",
                f'AutoModelForCausalLM.from_pretrained("{LLAMA}")',
                "import peft_edit",
                "the errors are in the table above",
                "@inproceedings{qiu2024spectral",
            ],
        ),
        (sea_config(rescale="none"), ["It can be merged into the weights exactly"]),
        (
            sea_config(fitted_on={"demonstrations": 9, "tokens": "last", "neutral": "text", "prompt_format": "chat"}),
            ["Of the activations: tokens `last`, neutral `text`, prompt format `chat`."],
        ),
        (sea_config(fit_statistics={}), ["It cannot be merged into the weights: the mean of the factors"]),
        (sea_config(site="block"), ["It cannot be merged into the weights (edit of whole decoder blocks)"]),
        (
            sea_config(feature_map="tanh"),
            ['| `feature_map` | `"tanh"` |', "cannot be merged into the weights (feature"],
        ),
        (sea_config(projections="exchanged"), ["the reverse edit"]),
        (
            hpr_config(gate=0.1),
            [
                "# HPR adapter for Llama-2-7b-hf",
                "| `gate` | `0.1` |",
                "| 3 | 0.9700 | yes |",
                "| 11 | 0.9100 | no |",
                "Trained on 4000 pairs of answer tokens",
                "from 30 questions of `preferences.jsonl`.",
                "It cannot be merged into the weights: each token has an angle of its own",
                "@inproceedings{pham2024householder",
            ],
        ),
        (hpr_config(token_scope="last"), ["so that results depend on padding"]),
        (hpr_config(probe_accuracy={}), ["The outputs of decoder blocks 3."]),
        (hpr_config(probe_accuracy={}, selected_layers=None), ["The outputs of all decoder blocks."]),
        (hpr_config(probe_accuracy={}, selected_layers=[]), ["## Layers\n\nNone."]),
    ],
)
def test_what_a_card_says(config, lines):
    text = str(model_card(config))
    assert [line for line in lines if line not in text] == []
    assert "\n\n\n" not in text and "None |" not in text and "{" not in text.partition("## Citation")[0]


def test_layers_are_in_order():
    config = SEAConfig(rank_pattern={f"model.layers.{i}.mlp.down_proj": [3, 4] for i in (10, 2, 1)})
    places = [str(model_card(config)).index(f"| {i} | `model.layers.{i}.") for i in (1, 2, 10)]
    assert places == sorted(places)


def test_what_is_not_known_is_left_out():
    text = str(model_card(SEAConfig(rank_pattern={"layers.0": [1, 2]}, fit_statistics={"layers.0": {"rms": 1.0}})))
    assert "base_model:" not in text and "datasets:" not in text and "model-index" not in text
    for absent in ("energy", "centered", "## Data", "## Results", "## Side effects", "mean rescale", "fingerprint"):
        assert absent not in text, absent
    text = str(model_card(sea_config(fitted_on={"demonstrations": 9})))
    assert "Fitted in closed form to 9 demonstrations.\n" in text
    assert "**It has not been fitted: it edits nothing.**" in str(model_card(SEAConfig()))
    assert "not been fitted" not in str(model_card(sea_config()))


def test_results_before_and_after():
    config = sea_config()
    strong = results(config, strength=2.0, mc1=0.7)
    text = str(model_card(config, results=[strong, results(config), results()]))
    caption = "Measured on 7 questions, prompt format `plain`."
    assert f"{caption}\n\n| model | MC1 % | MC2 % |\n|---|---:|---:|\n" in text
    rows = ["| base model | 40.0 | 50.0 |", "| this adapter | 65.0 (+25.0) | 60.0 (+10.0) |"]
    rows.append("| this adapter, strength 2 | 70.0 (+30.0) | 60.0 (+10.0) |")
    assert "\n".join(rows) in text
    assert "## Side effects\n\nOn other text, `unrelated.txt`: 64 texts.\n\n| model | perplexity | ratio |" in text
    assert "| base model | 2.000 |  |\n| this adapter | 2.125 | 1.062 |" in text
    assert "/home" not in text


def test_results_on_several_data():
    config = sea_config()
    other = results(config, {"name": "own.jsonl", "digest": "1" * 16}, prompts={"format": "chat", "template": "f" * 16})
    bbq = {"name": "bbq", "subset": "age_ambig", "files": ["bbq.jsonl"], "of_rows": 30, "digest": "2" * 16}
    card = model_card(config, results=[results(), other, results(config, bbq)])
    assert "Measured on `own.jsonl`, 7 questions, prompt format `chat`.\n\n| model | MC1 % | MC2 % |\n" in str(card)
    assert "| this adapter | 65.0 | 60.0 |" in str(card)  # no base on the same data
    assert "`bbq`, subset `age_ambig`, a local copy (`bbq.jsonl`), 7 of 30 questions, prompt" in str(card)


HUB = {"name": "truthful_qa", "split": "train"}


@pytest.mark.parametrize(
    ("data", "claimed"),
    [
        (HUB, "truthfulqa/truthful_qa"),
        ({"name": "user/preferences"}, "user/preferences"),
        ({"name": "bbq", "subset": "age_ambig"}, "oskarvanderwal/bbq"),
        (HUB | {"of_rows": 367}, None),  # a part: limit, skip or ids
        (HUB | {"of_rows": None}, None),  # not known to be all
        (HUB | {"files": ["TruthfulQA.csv"]}, None),
        ({"name": "preferences.jsonl"}, None),
        ({}, None),
    ],
)
def test_the_metadata_claims_no_data_set_of_the_hub_for_files_and_parts(data, claimed):
    found = model_card(sea_config(), results=[results(sea_config(), data)]).data.eval_results or []
    assert {result.dataset_type for result in found} == ({claimed} if claimed else set())


def test_the_metadata_claims_no_data_set_of_the_hub_for_what_an_adapter_was_fitted_to():
    fitted_on = {"data": "truthful_qa", "split": "train", "files": ["TruthfulQA.csv"], "demonstrations": 9}
    card = model_card(sea_config(fitted_on=fitted_on))
    assert card.data.datasets is None
    assert "of `truthful_qa` (split `train`, a local copy, `TruthfulQA.csv`)." in str(card)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", r"must be what peft-edit evaluate --json wrote, with version and questions"),
        ('{"adapter": null}', r"must be what peft-edit evaluate --json wrote, with version and questions"),
        (json.dumps(results() | {"version": 1}), r"has version 1 of the results, this release reads 2"),
        (json.dumps(results(adapters=5)), r"is damaged \(adapters must be a list, got 5\)"),
        (json.dumps(results(strength="2")), r"is damaged \(strength must be a number, got '2'\)"),
        (json.dumps(results(data={"name": 5})), r"is damaged \(data\.name must be text or null, got 5\)"),
        ("{", "is no JSON"),
    ],
)
def test_other_results_are_refused(tmp_path, content, expected):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=f"results.json {expected}"):
        model_card(sea_config(), results=[tmp_path / "results.json"])


NAMES = st.text(st.sampled_from("ab`|\n#*_<[\u2028\\ "), min_size=1, max_size=12).filter(str.strip)


def shown(card) -> tuple[list[str], list[str]]:
    """Headings and code spans of a card as they are rendered, and how many cells the rows of its tables have."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(ModelCard(str(card)).text)
    inline = [token for token in tokens if token.type == "inline"]
    headings = [token.content for before, token in pairwise(tokens) if before.type == "heading_open"]
    return headings, [child.content for token in inline for child in token.children if child.type == "code_inline"]


@given(name=NAMES)
@settings(max_examples=40)
@example("x|y\n# H")
@example("a`b")
@example("``` |")
def test_names_of_others_are_no_markdown(name):
    """Each is one code span, and adds no heading, whatever is in it."""
    site = f"model.layers.0.{name}"
    data = {"name": f"./{name}.jsonl", "subset": name, "split": name, "files": [name]}
    measured = [results(data=data, prompts={"format": name}, texts={"file": name, "digest": "1" * 16, "count": 1})]
    fitted_on = {"data": "own", **dict.fromkeys(("subset", "split", "neutral"), name), "files": [name]}
    config = sea_config(fitted_on={**fitted_on, "demonstrations": 9}, rank_pattern={site: [1, 2]}, fit_statistics={})
    headings, spans = shown(model_card(config, results=measured))
    assert headings == shown(model_card(sea_config(), results=[results()]))[0]
    expected = re.sub(r"[\n\u2028]", " ", name)
    assert sum(expected.strip() == span.strip() for span in spans) == 9
    assert f"model.layers.0.{expected}".strip() in [span.strip() for span in spans]


def test_the_texts_to_leave_alone_are_told():
    retain = {"data": "passages.txt", "texts": 200, "tokens": 18352}
    card = str(model_card(sea_config(fitted_on={"questions": 9, "demonstrations": 9, "retain": retain})))
    assert "\nIt was told to leave other text alone: 18352 tokens of 200 texts of `passages.txt`.\n" in card
    assert "| `retain_energy` | `0.99` |" in card
    assert "leave other text alone" not in str(model_card(sea_config()))


def test_local_base_models_are_named_and_not_linked(tmp_path):
    config = sea_config(base_model_name_or_path=str(tmp_path / "my-model"))
    text = str(model_card(config))
    assert "base_model:" not in text and "activations of `my-model`" in text and str(tmp_path) not in text
    assert model_card(config, base_model=LLAMA).data.base_model == LLAMA
    with pytest.raises(ValueError, match="base_model must be an id on the Hub"):
        model_card(config, base_model=str(tmp_path))


def test_a_card_belongs_to_whoever_edits_it():
    card = str(model_card(sea_config()))
    assert is_generated(card) and is_generated(card.replace("\n", "\r\n"))
    assert is_generated(for_repository(card, "user/name")) and '(base, "user/name")' in for_repository(
        card, "user/name"
    )
    edited = [card.replace("## Limits", "## Bounds"), card.replace("tags:", "license: mit\ntags:"), "# Mine\n", ""]
    assert not any(map(is_generated, edited))
    assert [may_replace(text) for text in edited] == [False, False, False, True]
    # The metadata can be read and written again.
    assert is_generated(str(ModelCard(card)))


@every_method
def test_what_the_card_of_every_method_says(method):
    config = method.config(base_model_name_or_path=LLAMA, fitted_on={"data": "truthful_qa", "questions": 7})
    card = model_card(config)
    text, data = str(card), card.data
    assert f"\n# {method.short[0].upper()}{method.short[1:]} adapter for Llama-2-7b-hf\n" in text
    assert "import peft_edit" in text
    assert data.base_model == LLAMA and data.library_name == "peft" and data.datasets == ["truthfulqa/truthful_qa"]
    assert {method.name.lower(), "activation-editing", "peft-edit"} <= set(data.tags)
    assert all(f"| `{name}` | `{json.dumps(getattr(config, name))}` |" in text for name in method.card_settings(config))
    assert "\n\n\n" not in text and is_generated(text)


@every_method
def test_saving_writes_the_card_in_place_of_pefts(method, llama, tmp_path):
    model = get_peft_model(llama, method.config())
    model.save_pretrained(tmp_path)
    assert is_generated(text_of(tmp_path)) and "More Information Needed" not in text_of(tmp_path)
    before = text_of(tmp_path)
    model.peft_config["default"].base_model_name_or_path = LLAMA
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path) != before and LLAMA in text_of(tmp_path)


def test_adapters_that_transformers_saves_get_a_card_too(llama, tmp_path):
    llama.add_adapter(SEAConfig(strength=0.5))
    llama.save_pretrained(tmp_path)
    assert is_generated(text_of(tmp_path)) and "| `strength` | `0.5` |" in text_of(tmp_path)


@every_method
@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_a_readme_of_the_user_stays_byte_for_byte(method, llama, tmp_path, save):
    model = get_peft_model(llama, method.config())
    save(model, tmp_path)
    own = text_of(tmp_path).replace("## Limits", "## Bounds").encode() + b"\r\n"
    for text in (own, b"no metadata", b"\xff\xfe"):
        (tmp_path / "README.md").write_bytes(text)
        save(model, tmp_path)
        assert (tmp_path / "README.md").read_bytes() == text


def test_a_template_that_peft_left_is_replaced(llama, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "More Information Needed" in text_of(tmp_path) and may_replace(text_of(tmp_path))  # LoRA's is PEFT's matter
    assert not may_replace(text_of(tmp_path).replace("library_name:", "license: mit\nlibrary_name:"))
    assert not may_replace("---\nlicense: mit\n---\n")
    assert not may_replace(text_of(tmp_path).replace("[More Information Needed]", "Ask me.", 1))
    get_peft_model(llama, SEAConfig()).save_pretrained(tmp_path)
    assert is_generated(text_of(tmp_path))


def test_cards_of_several_adapters(llama, tmp_path):
    model = get_peft_model(llama, SEAConfig(), adapter_name="truth")
    model.add_adapter("fair", SEAConfig(strength=0.5))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert "| `strength` | `0.5` |" in text_of(tmp_path / "fair") and is_generated(text_of(tmp_path / "truth"))
    text = str(index_card({"truth": sea_config(), "fair": hpr_config(), "lora": LoraConfig()}))
    assert is_generated(text) and f"base_model:\n- {LLAMA}\n" in text
    assert "- [fair](fair/README.md): HPR adapter for Llama-2-7b-hf\n- lora\n" in text


def test_the_fit_records_its_data(llama, tmp_path):
    generator = torch.Generator().manual_seed(0)
    layers = {i: torch.randn(12, 32, generator=generator) for i in range(3)}
    store = ActivationStore.from_tensors(tmp_path / "store", positive=layers, negative=layers, neutral=layers)
    store.metadata["data"] = {"name": str(tmp_path / "mine.jsonl"), "rows": 12}
    model = get_peft_model(llama, SEAConfig())
    fit_sea(model, store)
    model.save_pretrained(tmp_path / "sea")
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "sea")
    expected = {"data": "mine.jsonl", "tokens": "last", "questions": 12, "demonstrations": 12}
    assert reloaded.peft_config["default"].fitted_on == expected
    assert "to 12 demonstrations from 12 questions of `mine.jsonl`." in text_of(tmp_path / "sea")
    assert str(tmp_path) not in json.dumps(expected) + text_of(tmp_path / "sea")


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["peft-edit", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit_:
        return exit_.code or 0, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_command_writes_the_results_into_the_card(llama, tmp_path, monkeypatch, capsys):
    sea = tmp_path / "sea"
    model = get_peft_model(llama, SEAConfig(init_weights=False))
    model.save_pretrained(sea)
    of_adapter = {"name": str(sea), **adapter_record(model.peft_config["default"], tensors_of(model, "default"))}
    given = []
    for name, content in (
        ("base", results()),
        ("edited", results(model.peft_config["default"], adapters=[of_adapter])),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        given += ["--results", tmp_path / f"{name}.json"]
    status, out, _ = run(monkeypatch, capsys, "card", sea, *given, "--base-model", LLAMA)
    assert status == 0 and out == f"Card: {sea / 'README.md'}\n"
    text = text_of(sea)
    assert "| this adapter | 65.0 (+25.0) |" in text and f"base_model: {LLAMA}\n" in text and is_generated(text)

    other = results(adapters=[of_adapter | {"weights": "0" * 16}])
    (tmp_path / "other.json").write_text(json.dumps(other))
    for arguments, expected in (
        ((sea, "--results", tmp_path / "other.json"), f"evaluate with --adapter {sea}"),
        ((sea, *given[:2], *given[:2]), "are of the same model on the same data: pass one of them"),
        ((sea,), "is not a generated card: move it away"),
        ((sea, "--base-model", "a/b/c"), "--base-model must be an id on the Hub"),
        ((sea, "--results", tmp_path / "none.json"), "there is no file"),
        ((tmp_path / "none",), "there is no folder"),
    ):
        (sea / "README.md").write_text("mine" if "generated" in expected else "")
        status, _, err = run(monkeypatch, capsys, "card", *arguments)
        assert status == 2 and expected in err and err.count("\n") == 1, err


@every_method
@pytest.mark.parametrize("own", ["folder", "dangling link", "loop"])
def test_a_readme_that_is_no_file_stays_and_the_adapter_is_saved(method, llama, tmp_path, own):
    path = tmp_path / "README.md"
    if own == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        path.symlink_to("README.md" if own == "loop" else "nowhere")
    for save in (lambda model, folder: model.save_pretrained(folder), save_adapter):
        save(get_peft_model(tiny_model(), method.config()), tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert path.is_symlink() or [file.name for file in path.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "nowhere").exists() and method.config.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a generated card: move it away"):
        card(tmp_path)


# What users, or other code, may put into a configuration after it was checked.
MALFORMED = [
    *({"fitted_on": value} for value in (None, 5, [], {"data": 5}, {"demonstrations": None}, {"token_pairs": []})),
    *({"fitted_on": {"demonstrations": 3}}, {"fitted_on": {"token_pairs": 3}}, {"base_model_name_or_path": "\0"}),
    *({"rank_pattern": {"model.layers.0": value}} for value in ([5], [], None, 5, "12")),
    *({"rank_pattern": value} for value in (None, {"²": [1, 2]}, {"x": [1, 2]})),
    *({"fit_statistics": value} for value in (None, 5, {"model.layers.0": 5}, {"²": {}}, {"x": {"norm": "a"}})),
    *({"probe_accuracy": value} for value in (None, 5, {"²": 1.0}, {"0": "a"}, {"0": None})),
    *({"task_type": 5}, {"selected_layers": 5, "probe_accuracy": {"0": 1.0}}, {"base_model_fingerprint": []}),
]


@every_method
@pytest.mark.parametrize("changes", MALFORMED, ids=str)
def test_a_card_never_fails_a_save(method, tmp_path, changes, caplog):
    config = method.config()
    for name, value in changes.items():
        config.__dict__[name] = value  # as in-place changes do, past all checks
    config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    (tmp_path / "README.md").unlink(missing_ok=True)
    failed = [record.message for record in caplog.records if "saved without a model card" in record.message]
    try:
        assert write_card(tmp_path, config)
    except Exception:
        assert len(failed) == 1 and "\n" not in failed[0]
    else:
        assert not failed


RESULT = results(sea_config(), {"name": "truthful_qa", "split": "test"})


@given(data=st.data())
@settings(max_examples=80)
def test_one_field_of_results_that_lies(tmp_path_factory, data):
    """There is a card, or one line says why not."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    write(path, data.draw(damages(RESULT)))
    try:
        written = model_card(sea_config(), results=[path, results()])
    except ValueError as error:
        assert one_line(error) and str(path) in str(error)
    else:
        assert is_generated(str(ModelCard(str(written))))


def test_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda self, text, **options: (self.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_card(tmp_path, sea_config())
    assert list(tmp_path.iterdir()) == []
