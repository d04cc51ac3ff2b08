"""Plain texts: every token of them, for what an edit shall leave alone."""

import json

import pytest
import torch
from datasets import Dataset
from test_prompts import byte_tokenizer
from tiny import tiny_model

from peft_edit import ActivationStore, collect_activations, fit_sea, load_contrast_set
from peft_edit.activations import batches
from peft_edit.data.texts import load_texts


TEXTS = ["The sky is blue.", "Cats", "A much longer text than the others, of several words", "Cats", "\té"]
TOKENIZER = byte_tokenizer("<s> $A")


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=300, initializer_range=0.2)


def expected(model, name, text):
    """A loop over hooks: activations of every token at a module."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with handle, torch.no_grad():
        model(torch.tensor([TOKENIZER(text)["input_ids"]]))
    return kept[0][0]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_every_token_of_every_text_at_both_sites(model, tmp_path, batch_size, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_SEQUENCES", 2)
    store = collect_activations(
        model, TOKENIZER, TEXTS, tmp_path, tokens="all", site=("mlp", "block"), batch_size=batch_size
    )
    lengths = [len(TOKENIZER(text)["input_ids"]) for text in TEXTS]
    assert len(store) == sum(lengths) and store.tokens == "all"
    assert store.questions().tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert sum(shard["rows"] for shard in store.metadata["shards"]) == sum(lengths) - lengths[3]  # once each
    for site in store.sites:
        at = store.at(site)
        for layer in at.layers:
            rows = at.gather(at.text_tokens(), [layer])[0]
            wanted = torch.cat([expected(model, at.modules[layer], text) for text in TEXTS])
            assert torch.allclose(rows, wanted, atol=1e-5)


def test_texts_are_gone_on_with_and_are_of_the_same_texts(model, tmp_path):
    first = collect_activations(model, TOKENIZER, TEXTS, tmp_path, tokens="all")
    again = collect_activations(model, TOKENIZER, Dataset.from_dict({"text": TEXTS}), tmp_path, tokens="all")
    assert first.metadata == again.metadata
    with pytest.raises(ValueError, match="data_fingerprint"):
        collect_activations(model, TOKENIZER, TEXTS[1:], tmp_path, tokens="all")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".json"])
def test_files_of_texts(tmp_path, suffix):
    texts, file = ["one, two", 'a "quoted" text'], tmp_path / f"texts{suffix}"
    rows = Dataset.from_dict({"text": texts})
    if suffix == ".txt":
        file.write_text("\n\n".join(texts) + "\n")
    elif suffix == ".csv":
        rows.to_csv(file)
    elif suffix == ".parquet":
        rows.to_parquet(file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows.to_list()))
    else:
        rows.to_json(file)
    data = load_texts(str(file))
    assert data["text"] == texts and data["id"] == [0, 1] and data.info.dataset_name == file.name


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "there are no texts"),
        (["a", 3], "row 1: a text must be text, got int"),
        (["a", " "], "row 1: a text must be text, got empty text"),
        (Dataset.from_dict({"body": ["a"]}), "texts need a column 'text', the data set has body"),
        ("nowhere.txt", "there is no file nowhere.txt with texts"),
        (3, "texts must be a list of text, a Dataset or a file, got int"),
        (["\ud800"], "row 0: the text has half of a surrogate pair"),
    ],
)
def test_texts_that_are_none(model, tmp_path, texts, message):
    with pytest.raises(ValueError, match=message) as caught:
        collect_activations(model, TOKENIZER, texts, tmp_path / "store", tokens="all")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_a_text_that_is_too_long(tmp_path):
    model = tiny_model(vocab_size=300, max_position_embeddings=20)
    with pytest.raises(ValueError, match=r"row 2: the text has .* tokens, the model takes 20: .* truncate=True"):
        collect_activations(model, TOKENIZER, TEXTS, tmp_path / "store", tokens="all")
    assert not (tmp_path / "store").exists()
    store = collect_activations(model, TOKENIZER, TEXTS, tmp_path / "store", tokens="all", truncate=True)
    assert store.questions().bincount().max() == 20


def test_a_line_ends_where_the_line_ends(tmp_path):
    (tmp_path / "texts.txt").write_bytes("one\u2028line\x0cof text\r\n\nanother\n".encode())
    assert load_texts(tmp_path / "texts.txt")["text"] == ["one\u2028line\x0cof text", "another"]


def test_a_file_without_the_column(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match="lacks the columns text; it has body"):
        load_texts(tmp_path / "texts.jsonl")


@pytest.mark.parametrize(
    "option", [{"neutral": "prompt"}, {"answers": "all"}, {"max_new_tokens": 5}, {"template_time": "2026-01-31"}]
)
def test_options_of_answers_have_no_meaning_for_texts(model, tmp_path, option):
    with pytest.raises(ValueError, match=f"tokens='all' takes plain texts, which have no {next(iter(option))}"):
        collect_activations(model, TOKENIZER, TEXTS, tmp_path, tokens="all", **option)


def test_texts_have_no_prompt_format(model, tmp_path):
    with pytest.raises(ValueError, match="tokens='all' takes plain texts, which have no prompt_format"):
        collect_activations(model, TOKENIZER, TEXTS, tmp_path, tokens="all", prompt_format="chat")


def test_stores_of_texts_and_of_answers_are_not_taken_for_each_other(model, tmp_path):
    texts = collect_activations(model, TOKENIZER, TEXTS, tmp_path / "texts", tokens="all")
    rows = [{"prompt": "Q?", "positives": ["yes"], "negatives": ["no"]}] * 2
    data = load_contrast_set(Dataset.from_list(rows))
    answers = collect_activations(model, TOKENIZER, data, tmp_path / "answers", neutral="prompt")
    for read in (texts.positive, texts.negative):
        with pytest.raises(ValueError, match="holds plain texts, which demonstrate nothing"):
            read(0)
    with pytest.raises(ValueError, match=r"holds plain texts \(tokens='all'\): collect with tokens='answer'"):
        texts.pairs()
    with pytest.raises(ValueError, match=r"holds answers \(tokens='last'\): collect plain texts with tokens='all'"):
        answers.text_tokens()
    with pytest.raises(ValueError, match="holds plain texts: collect with tokens='last' for SEA"):
        from peft import get_peft_model

        from peft_edit import SEAConfig

        fit_sea(get_peft_model(tiny_model(vocab_size=300, initializer_range=0.2), SEAConfig()), texts)
    assert repr(ActivationStore(texts.path)).count("tokens") == 2
