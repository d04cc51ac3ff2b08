"""A collection goes through its files in one direction, and its options are those of a dataclass."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
from test_architecture import PACKAGE, imports
from test_collect import QUESTIONS, TOKENIZER, contrast, without_neutral

import peft_edit.activations
from peft_edit import ActivationStore, collect_activations
from peft_edit.activations import collect as collecting
from peft_edit.activations.arguments import CollectArguments
from peft_edit.arguments import ArgumentError


FOLDER = Path(peft_edit.activations.__file__).parent
# The way of a contrast set: from texts to tokens, to the model's own answers, to an index, to rows, to files.
ROUTE = (
    "collect.py",
    "encode.py",
    "neutral.py",
    "batches.py",
    "store/index.py",
    "run.py",
    "store/writer.py",
    "store/shards.py",
    "store/reader.py",
)


def entries(call):
    """For each call of a function that is written in a file of the route: that file, and the one it is called from."""
    found = []

    def file_of(frame):
        path = Path(frame.f_code.co_filename)
        name = path.relative_to(FOLDER).as_posix() if path.is_relative_to(FOLDER) else None
        return name if name in ROUTE else None

    def profile(frame, event, argument):
        if event == "call" and (name := file_of(frame)) is not None:
            caller = frame.f_back
            while caller is not None and file_of(caller) is None:
                caller = caller.f_back
            found.append((name, None if caller is None else file_of(caller)))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("options", [{"max_new_tokens": 3}, {"tokens": "answer"}], ids=str)
def test_a_contrast_set_goes_through_the_files_without_a_return(tmp_path, llama, options):
    data = contrast(without_neutral(0, 1, 2))
    found = entries(lambda: collect_activations(llama, TOKENIZER, data, tmp_path, **options))
    assert tuple(dict.fromkeys(name for name, _ in found)) == ROUTE
    assert [caller for name, caller in found if name == "collect.py"] == [None]  # one function, which is entered once
    for name, caller in found:
        assert caller is None or ROUTE.index(caller) <= ROUTE.index(name), f"{caller} calls {name}"


def test_stages_import_none_before_them():
    for place, name in enumerate(ROUTE[:-1]):  # the last opens what the others wrote
        before = {("peft_edit", "activations", *earlier[:-3].split("/")) for earlier in ROUTE[:place]}
        assert not imports(PACKAGE / "activations" / name) & before, name


def test_the_signature_shows_the_options(tmp_path, llama):
    shown = inspect.signature(collect_activations).parameters
    assert list(shown)[:4] == ["model", "tokenizer", "data", "path"]
    assert {name: shown[name].default for name in list(shown)[4:]} == {
        field.name: field.default for field in dataclasses.fields(CollectArguments)
    }
    with pytest.raises(
        TypeError, match=r"collect_activations\(\) has no argument 'batchsize': did you mean 'batch_size'"
    ):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", batchsize=3)
    with pytest.raises(TypeError, match="has no argument 'zzz': it has model, tokenizer, data, path, prompt_format"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", zzz=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        collect_activations(llama, TOKENIZER, contrast())
    assert not (tmp_path / "a").exists()


def test_options_that_were_checked_can_be_given_again(tmp_path, llama):
    options = vars(CollectArguments(site=("mlp", "block"), layers=range(2), tokens="answer"))
    assert collect_activations(llama, TOKENIZER, contrast(), tmp_path, **options).sites == ["mlp", "block"]


LONG = [([3] * 60, [[4] * 9], [[5]], None)]
REFUSED = {
    "a row without neutral text": (
        {"neutral": "text"},
        contrast(without_neutral(0)),
        "row 10 has no neutral text: fill the column, or pass <neutral='generated'> or 'prompt'",
    ),
    "a row that does not fit": (
        {"neutral": "prompt"},
        contrast(LONG, [9]),
        "row 9: prompt and answer has 69 tokens, the model takes 64: leave the row out, or pass <truncate=True> to cut "
        "its prompt on the left",
    ),
    "an answer that does not fit": (
        {"max_new_tokens": 5, "target_modules": ["down_proj"]},
        contrast([([3] * 60, [[4]], [[5]], None)], [9]),
        "row 9: prompt and generated answer has 65 tokens, the model takes 64: lower <max_new_tokens>, leave the row "
        "out, or pass <truncate=True> to cut its prompt on the left",
    ),
    "modules of different widths": (
        {"target_modules": r".*(1.*down|2.*up)_proj"},
        contrast(),
        "the <target_modules> are of different widths, [32, 48]: collect them one by one",
    ),
    "an unknown site": (
        {"site": "head"},
        contrast(),
        "<site> must be one of 'mlp', 'block', 'attention' or several, got 'head'",
    ),
    "no chat template": (
        {"prompt_format": "chat"},
        contrast(),
        "<prompt_format='chat'> needs a chat template and the tokenizer has none: pass 'plain', or set "
        "tokenizer.chat_template",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_carry_their_arguments_and_leave_nothing(tmp_path, llama, case):
    options, data, message = REFUSED[case]
    llama.config.max_position_embeddings = 64
    with pytest.raises(ArgumentError) as caught:
        collect_activations(llama, TOKENIZER, data, tmp_path / "a", **options)
    assert caught.value.message("<{}>".format) == message
    assert str(caught.value) == message.replace("<", "").replace(">", "")
    assert not (tmp_path / "a").exists()


def test_another_store_is_said_in_arguments(tmp_path, llama):
    path = tmp_path / "truncate=True"  # what users name stays as it is
    collect_activations(llama, TOKENIZER, contrast(), path, neutral="prompt")
    with pytest.raises(ArgumentError) as caught:
        collect_activations(llama, TOKENIZER, contrast(), path, neutral="prompt", seed=1, site="block")
    message = caught.value.message("<{}>".format)
    assert message.startswith(f"{path} holds a store collected with other arguments (sites is ['mlp'] there, ['block']")
    assert "; <seed> is 0 there, 1 here; " in message and message.endswith("or pass <resume=False> to replace it")
    with pytest.raises(ArgumentError) as caught:
        ActivationStore(path).pairs()
    assert caught.value.message("<{}>".format) == (
        f"{path} holds one row an answer (<tokens='last'>): collect with <tokens='answer'>"
    )


def test_a_store_that_is_replaced_by_another_run_in_between_is_said(tmp_path, llama, monkeypatch):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    (tmp_path / "shard-00000.safetensors").unlink()
    locked = collecting.locked

    def late(path):
        (path / "index.safetensors").unlink()
        return locked(path)

    monkeypatch.setattr(collecting, "locked", late)
    with pytest.raises(ValueError, match=r"another run has replaced what was in .*: run the same again"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    monkeypatch.undo()
    assert len(collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")) == len(QUESTIONS)
