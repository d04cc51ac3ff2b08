"""A collection goes through its files in one direction, and its options are those of a dataclass."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
from test_architecture import PACKAGE, imports
from test_collect import TOKENIZER, contrast, without_neutral

import peft_edit.activations
from peft_edit import collect_activations
from peft_edit.activations.arguments import CollectArguments


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
    with pytest.raises(TypeError, match="has no argument 'zzz': it has model, tokenizer, data, path, site"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", zzz=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        collect_activations(llama, TOKENIZER, contrast())
    assert not (tmp_path / "a").exists()


def test_options_that_were_checked_can_be_given_again(tmp_path, llama):
    options = vars(CollectArguments(site=("mlp", "block"), layers=range(2), tokens="answer"))
    assert collect_activations(llama, TOKENIZER, contrast(), tmp_path, **options).sites == ["mlp", "block"]
