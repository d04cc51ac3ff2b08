"""Stores made from tensors, and what reading refuses."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch
from damage import damages, one_line, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stores import write_pair_store, write_text_store

from peft_edit import ActivationStore
from peft_edit.activations.store import FORMAT_VERSION, begin, layout, reader
from peft_edit.adapters.match import describe_data


SIGNS = ("positive", "negative", "neutral")


def random_sets(layers=(0, 2), n=5, d=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    return {sign: {layer: torch.randn(n, d, generator=generator).to(dtype) for layer in layers} for sign in SIGNS}


def write_answer_store(path, shard_rows, d=3):
    """A store of answer tokens, written in shards of these sizes; returns its layers' rows."""
    pairs = torch.tensor([[0, 3], [1, 4], [5, 2], [0, 2]])
    rows = {layer: torch.randn(sum(shard_rows), d) for layer in (1, 4)}
    question, modules = torch.tensor([7, 7, 9, 9]), {"1": "h.1", "4": "h.4"}
    write_pair_store(path, rows, pairs, question=question, shard_rows=shard_rows, modules=modules)
    return rows, pairs


def write_meta(path, **changes):
    file = path / "meta.json"
    meta = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in meta.items() if value is not ...}))


def one_line_error(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layers", [(0,), (3, 0, 11)])
def test_what_is_stored_is_what_is_read(tmp_path, dtype, layers):
    sets = random_sets(layers, dtype=dtype)
    written = ActivationStore.from_tensors(tmp_path / "new" / "store", **sets, site="block", tokens="mean")
    for opened in (written, ActivationStore(str(tmp_path / "new" / "store"))):
        assert (len(opened), opened.layers, opened.hidden_size) == (5, sorted(layers), 4)
        assert (opened.site, opened.tokens, opened.questions().tolist()) == ("block", "mean", [0, 1, 2, 3, 4])
        for sign in SIGNS:
            for layer in layers:
                read = getattr(opened, sign)(layer)
                assert read.dtype == dtype
                assert torch.equal(read, sets[sign][layer])
        assert repr(opened).startswith("ActivationStore('") and "5 demonstrations" in repr(opened)


@given(n=st.integers(0, 6), d=st.integers(1, 5))
def test_any_number_of_demonstrations(tmp_path_factory, n, d):
    sets = random_sets((0,), n, d)
    opened = ActivationStore.from_tensors(tmp_path_factory.mktemp("store"), **sets)
    assert all(torch.equal(getattr(opened, sign)(0), sets[sign][0]) for sign in SIGNS)


def test_tensors_may_be_views_and_are_not_changed(tmp_path):
    sets = {sign: {0: torch.randn(4, 6).T, 1: torch.randn(12, 4)[::2]} for sign in SIGNS}
    before = {sign: [tensor.clone() for tensor in tensors.values()] for sign, tensors in sets.items()}
    opened = ActivationStore.from_tensors(tmp_path, **sets)
    for sign in SIGNS:
        assert all(torch.equal(getattr(opened, sign)(i), before[sign][i]) for i in (0, 1))
        assert all(torch.equal(sets[sign][i], before[sign][i]) for i in (0, 1))


def test_metadata_say_what_the_store_is(tmp_path):
    ActivationStore.from_tensors(tmp_path, **random_sets(dtype=torch.bfloat16), modules={0: "h.0.mlp"})
    meta = json.loads((tmp_path / "meta.json").read_text())
    (shard,) = meta.pop("shards")
    content = (tmp_path / shard["file"]).read_bytes()
    assert shard.pop("sha256") == hashlib.sha256(content[-2 * 15 * 4 * 2 :]).hexdigest()  # of its two tensors
    assert shard == {"file": "shard-00000.safetensors", "first_row": 0, "rows": 15}
    assert meta == {
        "format_version": FORMAT_VERSION,
        "complete": True,
        "sites": ["mlp"],
        "tokens": "last",
        "hidden_size": 4,
        "dtype": "bfloat16",
        "modules": {"mlp": {"0": "h.0.mlp", "2": None}},
        "model": None,
        "revision": None,
        "fingerprint": None,
        "active_adapters": [],
    }
    assert sorted(load_file(tmp_path / shard["file"])) == ["mlp.0", "mlp.2"]
    names = {".lock", "index.safetensors", "meta.json", "shard-00000.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize("shard_rows", [[6], [1, 2, 3], [2, 2, 2], [1] * 6])
def test_rows_are_gathered_over_shards(tmp_path, shard_rows):
    rows, pairs = write_answer_store(tmp_path, shard_rows)
    opened = ActivationStore(tmp_path)
    assert (len(opened), opened.layers, opened.questions().tolist()) == (4, [1, 4], [7, 7, 9, 9])
    assert torch.equal(opened.pairs(), pairs) and opened.pairs().dtype == torch.int64
    assert "4 token pairs" in repr(opened)
    for layer in (1, 4):
        assert torch.equal(opened.answer_tokens(layer), rows[layer])
        assert torch.equal(opened.negative(layer), rows[layer][pairs[:, 0]])
        assert torch.equal(opened.positive(layer), rows[layer][pairs[:, 1]])


def test_reading_maps_the_tensors_of_one_layer_only(tmp_path, monkeypatch):
    write_answer_store(tmp_path, [2, 4])
    names = ("positive", "negative", "answer_tokens")
    stores = {name: ActivationStore(tmp_path) for name in names}
    read = []

    class Recorder:
        def __init__(self, file, framework):
            self.opened = original(file, framework=framework)

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.opened.get_tensor(name)

    original = reader.safe_open
    monkeypatch.setattr(reader, "safe_open", Recorder)
    for name, opened in stores.items():
        read.clear()
        getattr(opened, name)(4)
        assert read == ["block.4"] * (1 if name == "positive" else 2)  # all of them lie in the second shard
    read.clear()
    stores["negative"].gather(torch.tensor([5, 0]), [4])  # mapped already
    assert read == []


@pytest.mark.parametrize("shard_rows", [[6], [2, 4], [1, 1, 4], [3, 1, 2]])
def test_gathering_rows_in_any_order(tmp_path, shard_rows):
    stored, _ = write_answer_store(tmp_path, shard_rows)
    opened = ActivationStore(tmp_path)
    for rows in ([5, 0, 2, 2, 1], [4], [], list(range(6))):
        gathered = opened.gather(torch.tensor(rows, dtype=torch.int64), [4, 1])
        assert torch.equal(gathered, torch.stack([stored[4][rows], stored[1][rows]]))
    copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy.gather(torch.tensor([3]), [1])[0], stored[1][3:4])
    with pytest.raises(ValueError, match=r"has layers \[1, 4\], got 2"):
        opened.gather(torch.tensor([0]), [2])


def test_changing_what_was_read_does_not_change_the_store(tmp_path):
    rows, _ = write_answer_store(tmp_path, [6])
    opened = ActivationStore(tmp_path)
    opened.answer_tokens(1).zero_()
    opened.positive(1).zero_()
    assert torch.equal(opened.answer_tokens(1), rows[1])


BAD_TENSORS = {
    "no layers": ({sign: {} for sign in SIGNS}, "layers must be block indices"),
    "a layer that is no index": ({sign: {"a": torch.ones(2, 3)} for sign in SIGNS}, "layers must be block indices"),
    "layers differ": ({"negative": {0: torch.ones(5, 4)}}, r"must have the same layers, got \[0, 2\], \[0\]"),
    "no neutral": ({"neutral": {}}, r"must have the same layers"),
    "another number of rows": (
        {"neutral": {0: torch.ones(5, 4), 2: torch.ones(6, 4)}},
        r"= \(5, 4\), got neutral\[2\] of shape \(6, 4\)",
    ),
    "another width": ({"positive": {0: torch.ones(5, 4), 2: torch.ones(5, 3)}}, r"got positive\[2\] of shape \(5, 3\)"),
    "not a matrix": ({sign: {0: torch.ones(4)} for sign in SIGNS}, r"got positive\[0\] of shape \(4,\)"),
    "integers": (
        {sign: {0: torch.ones(5, 4).long()} for sign in SIGNS},
        r"one of float64, .* got positive\[0\] of int64",
    ),
    "dtypes differ": ({"negative": {0: torch.ones(5, 4), 2: torch.ones(5, 4).half()}}, r"negative\[2\] of .*float16"),
    "unknown site": ({"site": "head"}, "site must be one of 'mlp', 'block', 'attention', got 'head'"),
    "unknown tokens": ({"tokens": "first"}, "tokens must be one of 'last', 'mean', 'random', got 'first'"),
    "tokens without rows": ({"tokens": "answer"}, "tokens must be one of"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_before_anything_is_written(tmp_path, case):
    changes, match = BAD_TENSORS[case]
    one_line_error(lambda: ActivationStore.from_tensors(tmp_path / "store", **random_sets() | changes), match)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    one_line_error(lambda: ActivationStore.from_tensors(tmp_path, **random_sets()), "is not empty")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    one_line_error(lambda: ActivationStore.from_tensors(tmp_path / "notes.txt", **random_sets()), "is a file")
    (tmp_path / "store").mkdir()
    ActivationStore.from_tensors(tmp_path / "store", **random_sets())
    one_line_error(lambda: ActivationStore.from_tensors(tmp_path / "store", **random_sets()), "is not empty")


@pytest.mark.parametrize("damage", ["not json", "[1, 2]", "{}", '"text"', "", b"\xff\xfe\xff"])
def test_a_damaged_manifest_is_named(tmp_path, damage):
    ActivationStore.from_tensors(tmp_path, **random_sets())
    (tmp_path / "meta.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    one_line_error(lambda: ActivationStore(tmp_path), r"meta\.json is damaged")


@pytest.mark.parametrize("field", sorted(layout.Manifest.__required_keys__))
def test_a_manifest_that_lacks_a_field_is_damaged(tmp_path, field):
    ActivationStore.from_tensors(tmp_path, **random_sets())
    write_meta(tmp_path, **{field: ...})
    one_line_error(lambda: ActivationStore(tmp_path), rf"meta\.json is damaged \(no {field}\)")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"first_row": 2}, r"shards\[1\]\.first_row is 2, 4 follows from the others"),
        ({"first_row": "4"}, r"shards\[1\]\.first_row must be an integer, got '4'"),
        ({"file": "../other/shard-00001.safetensors"}, r"shards\[1\]\.file is '\.\./other/shard-00001\.safetensors'"),
        ({"file": "shard-00000.safetensors"}, r"shards\[1\]\.file is 'shard-00000\.safetensors'"),
        ({"rows": "2"}, r"shards\[1\]\.rows must be an integer, got '2'"),
        ({"rows": True}, r"shards\[1\]\.rows must be an integer, got True"),
        ({"rows": -2}, r"shards\[1\] is "),
        ({"sha256": "0" * 63}, r"shards\[1\] is "),
    ],
)
def test_shards_that_the_manifest_lies_about(tmp_path, changes, match):
    write_answer_store(tmp_path / "other", [4, 2])  # what is outside the folder exists
    write_answer_store(tmp_path / "store", [4, 2])
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    meta["shards"][1] |= changes
    write(tmp_path / "store" / "meta.json", meta)
    one_line_error(lambda: ActivationStore(tmp_path / "store"), rf"meta\.json is damaged \({match}.*collect again")


def contents(opened):
    """All that can be read of a store."""
    names = ("positive", "negative", "answer_tokens" if opened.tokens == "answer" else "neutral")
    rows = {(name, layer): getattr(opened, name)(layer) for name in names for layer in opened.layers}
    pairs = {"pairs": opened.pairs()} if opened.tokens == "answer" else {}
    return rows | pairs | {"questions": opened.questions(), "layers": torch.tensor(opened.layers)}


def collected_store(path):
    """A store as `collect_activations` describes it."""
    write_answer_store(path, [1, 2, 3])
    data = {"name": "truthful_qa", "split": "train", "rows": 2}
    write_meta(path, model="m", revision=None, neutral=None, prompt_format="plain", data=data, seed=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stores of rows and of pairs, to be damaged."""
    root = tmp_path_factory.mktemp("whole")
    ActivationStore.from_tensors(root / "rows", **random_sets())
    collected_store(root / "pairs")
    return root


@pytest.mark.parametrize("kind", ["rows", "pairs"])
@given(data=st.data())
@settings(max_examples=150)
def test_one_field_of_the_manifest_that_lies(whole, tmp_path_factory, kind, data):
    """The store reads as before, or one line says why it does not: there are never other rows."""
    path = tmp_path_factory.mktemp("damaged") / "store"
    shutil.copytree(whole / kind, path)
    write(path / "meta.json", data.draw(damages(json.loads((path / "meta.json").read_text()))))
    try:
        opened = ActivationStore(path)
        found = contents(opened)
        assert all(checked for _, checked in opened.check_files())
        describe_data(opened)
        repr(opened)
    except ValueError as error:
        assert one_line(error)
    else:
        expected = contents(ActivationStore(whole / kind))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    shutil.rmtree(path)


def test_what_is_no_complete_store_of_this_version_is_refused(tmp_path):
    one_line_error(lambda: ActivationStore(tmp_path / "nowhere"), "is no activation store")
    one_line_error(lambda: ActivationStore(tmp_path), "is no activation store: it has no meta.json")
    folder = tmp_path / "store"
    ActivationStore.from_tensors(folder, **random_sets())
    one_line_error(lambda: ActivationStore(folder / "meta.json"), "is no activation store")
    write_meta(folder, complete=False)
    one_line_error(lambda: ActivationStore(folder), "not collected completely: collect again with the same arguments")
    write_meta(folder, complete=True, format_version=99)
    one_line_error(lambda: ActivationStore(folder), f"format version 99, this release reads {FORMAT_VERSION}")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("file", ["index.safetensors", "shard-00000.safetensors"])
def test_a_damaged_file_is_named(tmp_path, file, damage):
    ActivationStore.from_tensors(tmp_path, **random_sets())
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if damage == "truncated":
        (tmp_path / file).write_bytes(content[:-9])
    one_line_error(lambda: ActivationStore(tmp_path).positive(0), rf"{file} cannot be read .* resume=False")


@pytest.mark.parametrize("name", ["answer_pairs", "texts"])
@pytest.mark.parametrize(
    ("first", "count"),
    [(5, 2**63 - 1), (2**63 - 1, 2**63 - 1), (2**63 - 1, 1), (5, 2), (6, 1), (0, -1), (-1, 1), (-(2**63), -(2**63))],
)
def test_rows_that_the_index_has_from_nowhere(tmp_path, name, first, count):
    """Also where a sum of 64 bits would pass for one of them."""
    rows, modules = {1: torch.randn(6, 3)}, {"1": "h.1"}
    if name == "texts":
        write_text_store(tmp_path, rows, modules=modules, lengths=[2, 4])
    else:
        write_pair_store(tmp_path, rows, torch.tensor([[0, 3], [1, 4]]), modules=modules)
    index = load_file(tmp_path / "index.safetensors")
    index[name][0, :-1], index[name][0, -1] = first, count
    save_file(index, tmp_path / "index.safetensors")
    match = rf"is damaged \({name} names rows that are not among the 6 of the store\): collect again with resume=False"
    one_line_error(lambda: ActivationStore(tmp_path), match)


def test_a_shard_without_the_layer_is_damaged(tmp_path):
    ActivationStore.from_tensors(tmp_path, **random_sets())
    save_file({"mlp.0": torch.ones(15, 4)}, tmp_path / "shard-00000.safetensors")
    one_line_error(
        lambda: ActivationStore(tmp_path).positive(0),
        r"shard-00000\.safetensors is damaged: it and meta\.json disagree about mlp\.2; collect again",
    )


@pytest.mark.parametrize("read", [*SIGNS])
@pytest.mark.parametrize("layer", [1, -1, 3])
def test_a_missing_layer_is_named(tmp_path, read, layer):
    opened = ActivationStore.from_tensors(tmp_path, **random_sets())
    one_line_error(lambda: getattr(opened, read)(layer), rf"has layers \[0, 2\], got {layer}")


def test_stores_of_rows_have_no_answer_tokens_and_the_other_way_round(tmp_path):
    of_rows = ActivationStore.from_tensors(tmp_path / "rows", **random_sets())
    one_line_error(of_rows.pairs, r"one row an answer \(tokens='last'\): collect with tokens='answer'")
    one_line_error(lambda: of_rows.answer_tokens(0), "one row an answer")
    write_answer_store(tmp_path / "answers", [6])
    of_answers = ActivationStore(tmp_path / "answers")
    one_line_error(lambda: of_answers.neutral(1), "has no neutral activations .*: collect again")


def test_beginning_removes_the_files_of_a_store(tmp_path):
    write_answer_store(tmp_path, [1, 2, 3])
    settings = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / ".shard-00003.safetensors.tmp").touch()  # what a killed run leaves
    begin(tmp_path, settings)
    assert [file.name for file in tmp_path.iterdir()] == ["meta.json"]
