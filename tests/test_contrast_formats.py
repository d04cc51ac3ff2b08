"""Data as people bring it: every format of a `Dataset`, long and broken text, conversations as TRL's DPO takes them."""

import csv
import json
import re

import pandas
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from test_collect import TOKENIZER, contrast
from test_contrast import ROW, assistant, load_jsonl, user

from peft_edit import SEAConfig, collect_activations, evaluate_multiple_choice, fit_sea, load_contrast_set
from peft_edit.data import check_contrast_set


# Formats of a data set


FORMATS = {
    "torch": lambda data: data.with_format("torch"),
    "numpy": lambda data: data.with_format("numpy"),
    "pandas": lambda data: data.with_format("pandas"),
    "arrow": lambda data: data.with_format("arrow"),
    "some columns": lambda data: data.with_format("torch", columns=["prompt"]),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_data_set_counts_as_what_it_holds_whatever_its_format(form, tmp_path, llama):
    data, formatted = contrast(), FORMATS[form](contrast())
    assert load_contrast_set(formatted).to_list() == data.to_list()
    stores = [collect_activations(llama, TOKENIZER, d, tmp_path / str(i)) for i, d in enumerate((data, formatted))]
    assert stores[0].metadata["data_fingerprint"] == stores[1].metadata["data_fingerprint"]
    results = [evaluate_multiple_choice(llama, TOKENIZER, d).to_dict() for d in (data, formatted)]
    assert results[0] == results[1]


def test_a_transform_is_refused_as_nothing_applies_it(tmp_path, llama):
    data = contrast().with_transform(lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]})
    for call in (
        lambda: load_contrast_set(data),
        lambda: collect_activations(llama, TOKENIZER, data, tmp_path / "store"),
        lambda: evaluate_multiple_choice(llama, TOKENIZER, data),
    ):
        with pytest.raises(ValueError, match=r"the data set has a transform .*: store them with data\.map"):
            call()


@pytest.mark.parametrize(
    "data, remedy",
    [
        ([ROW] * 50, r"got a list: pass Dataset.from_list\(rows\)"),
        ({"prompt": ["Q?"] * 50}, r"got a dict: pass Dataset.from_dict\(columns\)"),
        (DatasetDict(train=Dataset.from_list([ROW])), "got a DatasetDict: pass one of its splits"),
        (Dataset.from_list([ROW]).to_iterable_dataset(), r"got a IterableDataset: pass Dataset.from_list\(list\(data"),
        (pandas.DataFrame([ROW]), r"got a DataFrame: pass Dataset.from_pandas\(frame\)"),
    ],
)
def test_what_is_no_data_set_is_told_in_a_word_how_to_become_one(data, remedy, tmp_path, llama):
    with pytest.raises(ValueError, match=remedy):
        load_contrast_set(data)
    with pytest.raises(ValueError, match=r"a contrast set needs .*: load it with load_contrast_set\(data\)"):
        evaluate_multiple_choice(llama, TOKENIZER, data)


# Text


@pytest.mark.parametrize("length", [131_072, 131_073, 400_000])
def test_csv_cells_may_be_as_long_as_the_file(length, tmp_path):
    limit = csv.field_size_limit()
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), ("x" * length, "yes", "no")])
    (row,) = load_contrast_set(tmp_path / "data.csv")
    assert len(row["prompt"]) == length and csv.field_size_limit() == limit


COLUMNS = ("prompt", "positives", "negatives", "neutral", "mc1_choices", "messages", "category")


@settings(max_examples=40)
@given(column=st.sampled_from(COLUMNS), half=st.integers(0xD800, 0xDFFF), before=st.text(max_size=3))
@example(column="prompt", half=0xD83D, before="")
def test_half_a_surrogate_pair_names_row_and_file(column, half, before, tmp_path_factory):
    bad = before.encode("utf-8", "ignore").decode() + chr(half)
    values = {"messages": [user(bad)], "mc1_choices": ["yes", bad], "positives": [bad], "negatives": [bad]}
    rows = [ROW, {**ROW, column: values.get(column, bad)}]
    with pytest.raises(ValueError) as caught:
        load_jsonl(tmp_path_factory.getbasetemp(), *rows)
    assert re.search(rf"row 1 of '.*data\.jsonl': {column} has half of a surrogate pair \(\\ud", str(caught.value))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "\\ud83d\\ude00?", "chosen": "yes", "rejected": "no"}')
    assert load_contrast_set(tmp_path / "data.jsonl")[0]["prompt"] == "😀?"


# Dialogues in one text


DIALOGUE = "Human: Hi\n\nAssistant: Hello.\n\nHuman: Q?\n\nAssistant:"
TURNS = [user("Hi"), assistant("Hello."), user("Q?")]


@pytest.mark.parametrize("start", ["\n\n", "", "\n", "  \n\n"])
@pytest.mark.parametrize("prompt", [None, "Q?", DIALOGUE, "\n\n" + DIALOGUE])
def test_dialogues_hold_their_prompt_with_and_without_one_beside_them(start, prompt, tmp_path):
    record = {"chosen": start + DIALOGUE + " yes", "rejected": start + DIALOGUE + " no"}
    (row,) = load_jsonl(tmp_path, record | ({} if prompt is None else {"prompt": prompt}))
    assert (row["messages"], row["positives"], row["negatives"]) == (TURNS, ["yes"], ["no"])


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"chosen": DIALOGUE + " yes\n\nHuman: Ok", "rejected": DIALOGUE + " no"},
            "row 0: chosen must have one assistant message after the prompt, got assistant, user: end both "
            "conversations after the first answer in which they differ, or leave the row out",
        ),
        (
            {"chosen": DIALOGUE + " yes", "rejected": "no"},
            r"row 0: there is no prompt, and rejected is no dialogue of the form '\\n\\nHuman: .*' that holds one: "
            "fill the prompt in",
        ),
        (
            {"prompt": "another", "chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"},
            "row 0: prompt is not among the messages that chosen and rejected begin with",
        ),
        (
            {"question": "Q?", "chosen": "yes", "rejected": "no"},
            "lacks the column prompt, .* it has question, chosen, rejected: rename the column that is the prompt",
        ),
        (
            {"chosen": "\n\nUser: Q?\n\nBot: yes", "rejected": "\n\nUser: Q?\n\nBot: no"},
            r"lacks the column prompt, and its answers hold none, .* dialogues of the form '\\n\\nHuman: ",
        ),
    ],
)
def test_what_is_wrong_with_a_dialogue(record, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_jsonl(tmp_path, record)
    assert "\n" not in str(caught.value)


# Conversations


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "21 degrees"}
TURN = st.sampled_from([SYSTEM, user("Q?"), assistant("A."), TOOL, {"role": "developer", "content": "Be kind."}])


@given(
    prompt=st.lists(TURN, min_size=1, max_size=4),
    shared=st.lists(TURN, max_size=3),
    explicit=st.sampled_from(["prompt", "repeated", "implicit"]),
    parts=st.booleans(),
)
def test_conversations_load_in_each_of_trls_forms(prompt, shared, explicit, parts, tmp_path_factory):
    """The prompt is all that comes before the first different answer, be it in a column of its own or not."""
    prefix = {"prompt": [], "repeated": prompt, "implicit": prompt}[explicit]
    if explicit == "prompt" and shared[: len(prompt)] == prompt:
        return  # reads as a prompt that is repeated
    record = {"chosen": [*prefix, *shared, assistant("yes")], "rejected": [*prefix, *shared, assistant("no")]}
    if explicit != "implicit":
        record["prompt"] = prompt
    if parts:
        halves = (slice(2), slice(2, None))
        record = {
            column: [
                {**turn, "content": [{"type": "text", "text": turn["content"][part]} for part in halves]}
                for turn in turns
            ]
            for column, turns in record.items()
        }
    (row,) = load_jsonl(tmp_path_factory.getbasetemp(), record)
    assert row["messages"] == [*prompt, *shared]
    assert (row["positives"], row["negatives"]) == (["yes"], ["no"])


CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
PAIR = {"prompt": [user("Q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": [user("Q?"), {**assistant(""), "tool_calls": CALL}, TOOL]}, "prompt has a message with tool_calls"),
        ({"prompt": [user("Q?"), {**TOOL, "name": "weather"}]}, "prompt has a message with name"),
        ({"chosen": [{**assistant("yes"), "reasoning_content": "Hm."}]}, "chosen has a message with reasoning_content"),
        ({"tools": CALL}, "tools changes what the model reads, which is not supported: leave the row out"),
        ({"tools": json.dumps(CALL)}, "tools changes what the model reads"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs changes what the model reads"),
        ({"images": ["a.png"]}, "images changes what the model reads"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]},
            "prompt has a message with a part of type image, only text is supported",
        ),
        (
            {"chosen": [assistant("a"), user("b"), assistant("c")]},
            "chosen must have one assistant message .*: end both",
        ),
        ({"chosen": [TOOL]}, "chosen must have one assistant message after the prompt, got tool"),
    ],
)
def test_what_a_contrast_set_cannot_hold_is_refused_by_row(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"row 1: {message}") as caught:
        load_jsonl(tmp_path, PAIR, PAIR | change)
    assert "\n" not in str(caught.value)
    assert len(load_jsonl(tmp_path, PAIR, PAIR | change, ids=[0])) == 1


@pytest.mark.parametrize("blank", [None, [], "[]", ""])
def test_columns_of_tools_that_say_nothing_do_no_harm(blank, tmp_path):
    filled = {**PAIR, "tools": blank, "chat_template_kwargs": {"enable_thinking": None}}
    assert load_jsonl(tmp_path, filled).to_list() == load_jsonl(tmp_path, PAIR).to_list()
    turns = {column: [{**turn, "tool_calls": None, "name": None} for turn in PAIR[column]] for column in PAIR}
    assert load_jsonl(tmp_path, turns).to_list() == load_jsonl(tmp_path, PAIR).to_list()


# Data sets put together


def test_the_questions_of_two_sets_with_the_same_ids_stay_apart(tmp_path, llama, caplog):
    first = contrast()
    second = first.map(lambda row: {"prompt": row["prompt"] + " w1"})
    both = concatenate_datasets([first, second])
    store = collect_activations(llama, TOKENIZER, both, tmp_path / "store", neutral="text")
    assert "5 of the 10 rows have the id of another row" in caplog.text
    assert store.questions().tolist() == list(range(10))

    model = get_peft_model(llama, SEAConfig())
    fit_sea(model, store)
    assert model.peft_config["default"].fitted_on.items() >= {"questions": 10, "demonstrations": 10}.items()
    with model.disable_adapter():
        assert [q.id for q in evaluate_multiple_choice(model, TOKENIZER, both).questions] == list(range(10))


@given(ids=st.lists(st.integers(-5, 5), min_size=1, max_size=8))
@settings(max_examples=25)
def test_rows_keep_their_ids_where_these_differ(ids):
    rows = [{**row, "id": i} for row, i in zip(contrast().to_list() * 2, ids, strict=False)]
    checked = check_contrast_set(Dataset.from_list(rows, features=contrast().features))
    assert checked["id"][:] == (ids if len(set(ids)) == len(ids) else list(range(len(ids))))
    assert checked.features == contrast().features
    assert [{**row, "id": 0} for row in checked] == [{**row, "id": 0} for row in rows]


# Folders and names


@pytest.mark.parametrize(
    "file, message",
    [
        ("adapter_config.json", r"the folder \S*runs/top_k_5 is an adapter \(adapter_config.json\), and no data set"),
        ("meta.json", "is a store of activations"),
        ("config.json", "is a model"),
        ("state.json", "is written by save_to_disk .* pass load_from_disk"),
        ("broken.json", r"the folder \S*runs/top_k_5 on this machine cannot be read as data \(JSON"),
        ("notes.bin", "on this machine cannot be read as data"),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_folder_is_never_looked_for_on_the_hub(file, message, relative, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "top_k_5"
    folder.mkdir(parents=True)
    (folder / file).write_text("{,")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_contrast_set("runs/top_k_5" if relative else str(folder))
    assert "Hub" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_data_loads(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(PAIR))
    assert load_contrast_set(tmp_path)[0]["positives"] == ["yes"]


@pytest.mark.parametrize("name", ["./missing", "../missing/file", "a/b/c", "/missing/folder", "~/missing"])
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {name}: change name"):
        load_contrast_set(name)


@pytest.mark.parametrize(
    "line, message", [("[" * 100_000, "nested too deeply"), ('{"prompt": ' + "9" * 5000 + "}", "too many digits")]
)
def test_what_python_does_not_read_names_file_and_line(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 1: .*{message}.*: leave it out"):
        load_contrast_set(tmp_path / "rows.jsonl")
