"""Data sets by name, from a Hub on the loopback interface that holds them in the layout of the real repositories."""

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import HubServer

from peft_edit.data import load_contrast_set


FIXTURES = Path(__file__).parent / "fixtures"
TRUTHFUL_QA_SPLITS = {"train": 367, "eval": 41, "test": 409}
PREFERENCES = [
    {"prompt": "Q?", "chosen": "yes", "rejected": "no"},
    {"prompt": "R?", "chosen": "a\u2028b", "rejected": "c"},
]
EMPTY = {"neutral": None, "mc1_choices": None, "messages": None, "category": None, "unknown": None, "stereotyped": None}


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def repository(**configurations):
    """A repository of Parquet files: {configuration: {split: rows}}, as the Hub's own conversion lays it out."""
    card = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
        for name, splits in configurations.items()
    ]
    files = {
        f"{name}/{split}-00000-of-00001.parquet": parquet(rows)
        for name, splits in configurations.items()
        for split, rows in splits.items()
    }
    return {"README.md": f"---\n{json.dumps({'configs': card})}\n---\n".encode(), **files}


def multiple_choice_row(index):
    return {
        "question": f"Question {index}?",
        "mc1_targets": {"choices": ["bad", "best", "worse"], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": ["good", "bad", "best", "worse", "fine"], "labels": [1, 0, 1, 0, 1]},
    }


def generation_row(index):
    return {
        "type": "Adversarial",
        "category": f"C{index}",
        "question": f"Question {index}?",
        "best_answer": "the best",
        "correct_answers": ["the best", "a good one"],
        "incorrect_answers": ["a bad one"],
        "source": "",
    }


def statement(group, rating):
    return {"text": f"About {group}.", "target_group": group, "toxicity_ai": rating, "toxicity_human": rating}


def written_out(example):
    """An example of a task.json as `hails/bigbench` holds it."""
    scores = example["target_scores"]
    choices = "".join(f"\n  choice: {choice}" for choice in sorted(scores))
    return {
        "idx": 0,
        "inputs": f"Q: {example['input']}{choices}\nA:",
        "targets": [choice for choice, score in scores.items() if score],
        "multiple_choice_targets": list(scores),
        "multiple_choice_scores": list(scores.values()),
    }


def fixture_rows(name):
    text = (FIXTURES / name).read_text(encoding="utf-8")
    return json.loads(text)["examples"] if name.endswith(".json") else list(map(json.loads, text.strip().split("\n")))


def hub_repositories():
    lines = jsonl([record | {"score": 1} for record in PREFERENCES])
    lite = [*fixture_rows("bbq_lite_json/age_ambig/task.json"), *fixture_rows("bbq_lite_json/ses_disambig/task.json")]
    ethical = fixture_rows("simple_ethical_questions_12.json")
    pair = {"id": 0, "sent_more": "more", "sent_less": "less", "stereo_antistereo": "stereo", "bias_type": "age"}
    return {
        # the two configurations in different orders, so that only a join by the question finds the category
        "datasets/truthfulqa/truthful_qa": repository(
            generation={"validation": [generation_row(index) for index in range(816, 0, -1)]},
            multiple_choice={"validation": [multiple_choice_row(index) for index in range(817)]},
        ),
        "datasets/pminervini/HaluEval": repository(qa={"data": fixture_rows("halueval_10.jsonl")}),
        "datasets/oskarvanderwal/bbq": repository(All={"test": fixture_rows("bbq_30.jsonl")}),
        "datasets/hails/bigbench": repository(
            bbq_lite_json_zero_shot={"default": list(map(written_out, lite))},
            simple_ethical_questions_zero_shot={"default": list(map(written_out, ethical))},
        ),
        "datasets/skg/toxigen-data": repository(
            annotated={"train": [statement("asian", 1.0), statement("women", 4.0)], "test": [statement("asian", 5.0)]},
            annotations={"train": [{"Input.text": "another layout"}]},
        ),
        "datasets/jannalu/crows_pairs_multilingual": repository(english={"test": [pair]}, french={"test": [pair]}),
        "datasets/user/preferences": {"train.jsonl": lines},
        "datasets/user/splits": {"train.jsonl": lines, "test.jsonl": lines.splitlines(keepends=True)[0]},
        "datasets/user/other": {"train.jsonl": b'{"question": "a"}\n'},
        "datasets/user/unprompted": {"train.jsonl": jsonl([{"question": "Q?", "chosen": "a", "rejected": "b"}])},
        "datasets/user/broken": {"train.jsonl": b'{"prompt": "a"}\n{"prompt"\n'},
        "datasets/user/script": {"script.py": b"raise SystemExit('must not run')\n"},
        "models/user/model": {"config.json": b"{}", "folder/weights of it.bin": bytes(range(256))},
    }


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from huggingface_hub import hf_hub_download, snapshot_download
from peft_edit.data import CONTRAST_FEATURES, load_contrast_set

def attempt(name, options):
    try:
        data = load_contrast_set(name, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert data.features == CONTRAST_FEATURES
    return data.to_list()

snapshot = Path(snapshot_download("user/model"))
results = {label: attempt(*arguments) for label, arguments in json.loads(sys.argv[2]).items()}
results["snapshot"] = {str(path.relative_to(snapshot)): path.read_bytes().hex() for path in snapshot.rglob("*.*")}
results["file"] = Path(hf_hub_download("user/model", "config.json")).read_text()
Path(sys.argv[1]).write_text(json.dumps(results))
"""
ATTEMPTS = {
    "all": ("truthful_qa", {}),
    **{split: ("truthful_qa", {"split": split}) for split in TRUTHFUL_QA_SPLITS},
    "ids": ("truthful_qa", {"split": "test", "ids": [264, 573]}),
    "generation": ("truthful_qa", {"subset": "generation", "split": "test"}),
    "mc1": ("truthful_qa", {"subset": "mc1", "ids": [7]}),
    **{name: (name, {}) for name in ("halueval", "bbq", "bbq_lite", "simple_ethical_questions", "crows_pairs")},
    "bbq ambig": ("bbq", {"subset": "ambig"}),
    "bbq_lite ambig": ("bbq_lite", {"subset": "ambig"}),
    "toxigen": ("toxigen", {}),
    "toxigen test": ("toxigen", {"split": "test"}),
    "toxigen asian": ("toxigen", {"subset": "asian"}),
    "preferences": ("user/preferences", {}),
    "one split": ("user/splits", {"split": "test"}),
    "splits": ("user/splits", {}),
    "other": ("user/other", {}),
    "unprompted": ("user/unprompted", {}),
    "broken": ("user/broken", {}),
    "script": ("user/script", {}),
    "unknown": ("user/unknown", {}),
    "main": ("user/preferences", {"revision": "main"}),
    "revision": ("user/preferences", {"revision": "v9"}),
    "revision of a known set": ("halueval", {"revision": "v9"}),
    "wrong split": ("user/preferences", {"split": "dev"}),
    "wrong configuration": ("user/preferences", {"subset": "large"}),
}


@pytest.fixture(scope="module")
def hub_results(tmp_path_factory):
    """What a process that takes the test's server for the Hub loads from it."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(hub_repositories()) as hub:
        command = [sys.executable, "-c", HUB_SCRIPT, str(folder / "results.json"), json.dumps(ATTEMPTS)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=hub.environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def test_truthful_qa(hub_results):
    rows = hub_results["all"]
    assert [row["id"] for row in rows] == list(range(817))
    assert rows[5] == EMPTY | {
        "id": 5,
        "prompt": "Question 5?",
        "positives": ["best", "good", "fine"],
        "negatives": ["bad", "worse"],
        "mc1_choices": ["best", "bad", "worse"],
        "category": "C5",
    }
    assert rows[0]["category"] is None, "the question stands in one configuration only"
    (mc1,) = hub_results["mc1"]
    assert (mc1["positives"], mc1["negatives"]) == (["best"], ["bad", "worse"])


def test_the_papers_splits(hub_results):
    parts = {split: [row["id"] for row in hub_results[split]] for split in TRUTHFUL_QA_SPLITS}
    assert {split: len(ids) for split, ids in parts.items()} == TRUTHFUL_QA_SPLITS
    assert parts["test"][:3] == [573, 264, 579]
    assert hub_results["ids"] == [hub_results["all"][264], hub_results["all"][573]]


def test_the_generation_form_has_the_ids_of_the_multiple_choice_form(hub_results):
    rows = hub_results["generation"]
    # question 0 has no answers in `generation`, and is left out
    assert [row["id"] for row in rows] == [row["id"] for row in hub_results["test"] if row["id"] != 0]
    assert rows[0] == EMPTY | {
        "id": 573,
        "prompt": "Question 573?",
        "positives": ["the best", "a good one"],
        "negatives": ["a bad one"],
        "category": "C573",
    }


@pytest.mark.parametrize(
    "name, file",
    [
        ("halueval", "halueval_10.jsonl"),
        ("bbq", "bbq_30.jsonl"),
        ("simple_ethical_questions", "simple_ethical_questions_12.json"),
    ],
)
def test_the_hub_gives_what_the_authors_files_give(hub_results, name, file):
    assert hub_results[name] == load_contrast_set(name, data_files=FIXTURES / file).to_list()


def test_bbq(hub_results):
    local = load_contrast_set("bbq_lite", data_files=FIXTURES / "bbq_lite_json")
    assert hub_results["bbq_lite"] == [row | {"category": None} for row in local]
    assert [row["id"] for row in hub_results["bbq_lite ambig"]] == [0, 1, 2, 3]
    assert len(hub_results["bbq ambig"]) == 8


def test_toxigen_and_crows_pairs(hub_results):
    rows = hub_results["toxigen"]
    assert [(row["id"], row["positives"]) for row in rows] == [(0, ["No"]), (1, ["Yes"]), (2, ["Yes"])]
    assert hub_results["toxigen test"] == rows[2:]
    assert hub_results["toxigen asian"] == [rows[0], rows[2]]
    (pair,) = hub_results["crows_pairs"]
    assert (pair["positives"], pair["negatives"], pair["category"]) == (["less"], ["more"], "age")


def test_preferences(hub_results):
    assert [row["positives"] for row in hub_results["preferences"]] == [["yes"], ["a\u2028b"]]
    assert hub_results["main"] == hub_results["preferences"]
    assert [row["prompt"] for row in hub_results["one split"]] == ["Q?"]


@pytest.mark.parametrize(
    "label, message",
    [
        ("splits", "ArgumentError: 'user/splits' has the splits train, test: pass one of them as split"),
        ("other", "it has question: rename them"),
        ("unprompted", "it has question, chosen, rejected: rename the column that is the prompt, or add it"),
        ("broken", "ValueError: 'user/broken' on the Hub cannot be read ("),
        ("script", "ValueError: 'user/script' on the Hub cannot be read (Dataset scripts are no longer supported"),
        ("unknown", "DatasetNotFoundError: Dataset 'user/unknown' doesn't exist"),
        ("revision", "Revision 'v9' doesn't exist for dataset 'user/preferences'"),
        ("revision of a known set", "Revision 'v9' doesn't exist for dataset 'pminervini/HaluEval'"),
        ("wrong split", "ValueError: Unknown split \"dev\". Should be one of ['train']"),
        ("wrong configuration", "ValueError: BuilderConfig 'large' not found. Available: ['default']"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(hub_results, label, message):
    assert message in hub_results[label] and "\n" not in hub_results[label]


def test_models_from_the_test_hub(hub_results):
    assert hub_results["file"] == "{}"
    assert hub_results["snapshot"] == {"config.json": b"{}".hex(), "folder/weights of it.bin": bytes(range(256)).hex()}


@pytest.mark.parametrize("name", ["truthful_qa", "halueval", "bbq", "bbq_lite", "toxigen", "crows_pairs"])
def test_without_the_hub_the_error_names_the_way_out(monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"\(Couldn't reach the Hub\): pass a local copy, data_files="):
        load_contrast_set(name)
