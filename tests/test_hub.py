"""Adapters to and from a Hub on this machine, by the unmodified client in another process."""

import json
import os
import shutil
import signal
import socket
import time

import pytest
from hub_client import (
    ASSETS,
    adapted,
    base_model,
    client_process,
    command,
    load,
    load_auto,
    push_by_transformers,
    push_folder,
    push_model,
    push_native,
    try_to_load,
)
from hub_repository import Repository, commit_id
from hub_server import HubServer, fail, hang_up
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights
from test_cards import results

from peft_edit.adapters.card import is_generated
from peft_edit.adapters.read import read_config
from peft_edit.adapters.unfinished import UNFINISHED
from peft_edit.models.fingerprint import adapter_record
from peft_edit.tuners.method import methods


TOKENS = {"hf_write": ("user", "write"), "hf_read": ("user", "read"), "hf_other": ("other", "write")}
WRITE = {"token": "hf_write"}
METHODS = tuple(methods())
EVALUATE = ("evaluate", ASSETS / "model", ASSETS / "test.jsonl", "--limit", 4, "--adapter")


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens=TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    with client_process(hub.environment(home)) as run:
        yield run


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def pushed(client):
    """Repositories user/SEA, user/HPR and so on, and the logits with the adapters."""
    return {method: client(push_model, method, f"user/{method}", **WRITE)["default"] for method in METHODS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved adapters."""
    root = tmp_path_factory.mktemp("saved")
    for method in METHODS:
        adapted(method).save_pretrained(root / method)
    return root


def repository(hub, name) -> Repository:
    return hub.repositories[f"models/{name}"]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_pushed_is_loaded(hub, client, pushed, method):
    assert client(load, f"user/{method}") == pushed[method]
    assert client(load_auto, f"user/{method}") == pushed[method]
    made = repository(hub, f"user/{method}")
    ((branch, message, paths),) = made.log
    assert (branch, message) == ("main", f"Upload {method} adapter")
    assert sorted(paths) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not made.private


@pytest.mark.parametrize("method", METHODS)
def test_the_card_is_ours_and_names_the_repository(hub, pushed, method):
    card = repository(hub, f"user/{method}").files["README.md"].decode()
    assert is_generated(card) and f'PeftModel.from_pretrained(base, "user/{method}")' in card
    assert f"- {method.lower()}\n" in card


def test_adapters_added_by_transformers(hub, client):
    expected = client(push_native, "user/native", **WRITE)
    assert client(load, "user/native") == expected
    assert is_generated(repository(hub, "user/native").files["README.md"].decode())


def test_all_from_the_hub(hub, client):
    files = {path.name: path.read_bytes() for path in (ASSETS / "model").iterdir()}
    hub.repositories["models/user/base"] = Repository(files, owner="user")
    expected = client(push_model, "SEA", "user/sea-of-base", base="user/base", **WRITE)["default"]
    assert client(load_auto, "user/sea-of-base") == expected
    card = ModelCard(repository(hub, "user/sea-of-base").files["README.md"].decode())
    assert card.data.base_model == "user/base" and 'from_pretrained("user/base")' in card.text
    arguments = ("evaluate", "user/base", ASSETS / "test.jsonl", "--limit", 4, "--adapter", "user/sea-of-base")
    status, out, err = client(command, *arguments)
    assert status == 0 and "MC1 " in out, err


def test_results_in_the_card_of_a_model(hub, client, folders):
    record = adapter_record(read_config(folders / "SEA"), load_peft_weights(str(folders / "SEA"), "cpu"))
    measured = results(data={"name": "truthful_qa"}, adapters=[{"name": "SEA", **record}], mc1=0.5)
    client(push_model, "SEA", "user/results", base_model="user/base", results=[measured], **WRITE)
    card = ModelCard(repository(hub, "user/results").files["README.md"].decode())
    assert card.data.base_model == "user/base" and card.data.eval_results[0].metric_value == 0.5
    assert "Measured on `truthful_qa`, 7 questions, prompt format `plain`." in card.text


def test_pushing_the_same_again_makes_no_commit(hub, client, pushed):
    client(push_model, "SEA", "user/SEA", **WRITE)
    assert len(repository(hub, "user/SEA").log) == 1


@pytest.mark.parametrize("method", METHODS)
def test_branches_and_revisions(hub, client, pushed, folders, method):
    name = f"user/{method}-branches"
    main = client(push_model, method, name, **WRITE)["default"]
    with_others = client(push_model, method, name, "default", "second", revision="second-try", **WRITE)
    made = repository(hub, name)
    assert [branch for branch, *_ in made.log] == ["main", "second-try"]
    assert "second/adapter_config.json" not in made.files and "second/README.md" in made.branches["second-try"]
    assert client(load, name) == main
    assert client(load, name, revision="second-try", subfolder="second") == with_others["second"] != main
    card = made.branches["second-try"]["second/README.md"].decode()
    assert f'PeftModel.from_pretrained(base, "{name}", subfolder="second")' in card
    status, _, err = client(command, *EVALUATE, f"{name}@second-try")
    assert status == 0, err


def test_commands_that_write_models_take_revisions(hub, client, folders, tmp_path):
    assert client(push_folder, folders / "HPR", "user/two", **WRITE) == "done"
    assert client(push_folder, folders / "SEA", "user/two", revision="sea", **WRITE) == "done"
    for name in ("export-lora", "merge"):
        status, _, err = client(command, name, ASSETS / "model", "user/two@sea", tmp_path / name)
        assert status == 0 and (tmp_path / name).exists(), err
        status, _, err = client(command, name, ASSETS / "model", "user/two@none", tmp_path / "none")
        assert status == 2 and "user/two has no revision none" in err and err.count("\n") == 1, err


def merge(client, adapter, out, repo_id, *options, token="hf_write"):
    return client(command, "merge", ASSETS / "model", adapter, out, "--push", repo_id, *options, token=token)


def test_a_merged_checkpoint_goes_up_in_one_commit(hub, client, folders, tmp_path):
    status, out, err = merge(client, folders / "SEA", tmp_path / "out", "user/merged", "--private")
    assert status == 0 and f"Uploaded: {hub.url}/user/merged/commit/" in out, err
    made = repository(hub, "user/merged")
    assert made.private and [message for _, message, _ in made.log] == ["Upload merged model"]
    assert set(made.files) - {".gitattributes"} == {path.name for path in (ASSETS / "model").iterdir()}
    assert made.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["preupload", "upload", "commit"])
def test_a_merged_checkpoint_that_is_not_uploaded(hub, client, folders, tmp_path, stage):
    hub.faults[stage], expected = FAULTS[stage]
    hub.storage.clear()
    status, out, err = merge(client, folders / "SEA", tmp_path / "out", "user/unmerged")
    line = err.splitlines()[-1]
    assert status == 2 and "Uploaded" not in out and line.startswith("peft-edit: the upload to user/unmerged failed: ")
    assert expected.split(" to the Hub")[0].replace("adapter_model", "model") in line
    assert f"{tmp_path / 'out'} is complete: run hf upload user/unmerged" in line and (tmp_path / "out").exists()
    assert "models/user/unmerged" not in hub.repositories


@pytest.mark.parametrize(
    ("token", "expected"), [("hf_wrong", "there is no valid token ("), (None, "there is no token: log in")]
)
def test_a_token_that_is_wrong_is_found_before_merging(client, folders, tmp_path, token, expected):
    status, _, err = merge(client, folders / "SEA", tmp_path / "out", "user/unmerged", token=token)
    assert status == 2 and expected in err and err.count("\n") == 1 and not (tmp_path / "out").exists(), err


def test_adapters_in_folders_alone_get_an_index(hub, client):
    found = client(push_model, "SEA", "user/folders", "truth", "fair", **WRITE)
    card = repository(hub, "user/folders").files["README.md"].decode()
    assert is_generated(card) and "- [truth](truth/README.md): SEA adapter" in card
    assert client(load, "user/folders", subfolder="fair") == found["fair"]


def test_earlier_commits_stay_reachable(hub, client, folders):
    assert client(push_folder, folders / "SEA", "user/history", **WRITE) == "done"
    assert client(push_folder, folders / "HPR", "user/history", commit_message="Another method", **WRITE) == "done"
    made = repository(hub, "user/history")
    assert [message for _, message, _ in made.log] == ["Upload SEA adapter", "Another method"]
    first = next(commit for commit, files in made.history.items() if "adapter_config.json" in files)
    assert client(load, "user/history", revision=first) != client(load, "user/history")


def test_pull_requests(hub, client, pushed, folders):
    before = dict(repository(hub, "user/SEA").files)
    status, out, err = client(command, "push", folders / "HPR", "user/SEA", "--create-pr", token="hf_other")
    assert status == 0 and out.startswith(f"Pull request: {hub.url}/user/SEA/discussions/1"), err
    assert repository(hub, "user/SEA").files == before
    assert client(load, "user/SEA", revision="refs/pr/1") == client(load, "user/HPR")


def test_private_repositories(hub, client, folders):
    status, out, err = client(command, "push", folders / "SEA", "secret", "--private", token="hf_write")
    assert status == 0 and f"{hub.url}/user/secret/commit/" in out, err
    assert f"names {ASSETS / 'model'} as its base model, which others do not have" in err
    assert repository(hub, "user/secret").private
    # PEFT says no more than that it cannot find the file.
    for token in (None, "hf_other", "hf_wrong"):
        assert "adapter_config.json" in client(try_to_load, "user/secret", token=token)
        status, _, err = client(command, *EVALUATE, "user/secret", token=token)
        reason = "there is no valid token (" if token == "hf_wrong" else "there is no user/secret on the Hub, or your"
        assert status == 2 and reason in err and err.count("\n") == 1, err
    assert client(load, "user/secret", token="hf_read") is not None
    assert client(command, *EVALUATE, "user/secret", token="hf_read")[0] == 0


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("user/missing", "there is no user/missing on the Hub"),
        ("user/SEA@missing", "user/SEA has no revision missing"),
        ("user/empty", "it has no adapter_config.json"),
        ("user/a/b", "there is no folder user/a/b"),
    ],
)
def test_adapters_that_are_not_there(hub, client, pushed, adapter, expected):
    hub.repositories["models/user/empty"] = Repository(owner="user")
    status, _, err = client(command, *EVALUATE, adapter)
    assert status == 2 and expected in err and err.count("\n") == 1, err


def unreachable() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": unreachable()}], ids=["off", "down"])
def test_without_the_hub(hub, home, client, pushed, folders, variables):
    for method in METHODS:
        client(load, f"user/{method}")
    with client_process(hub.environment(home, **variables)) as run:
        if "HF_HUB_OFFLINE" in variables:  # elsewhere the client waits for the Hub to come back
            assert all(run(load, f"user/{method}") == pushed[method] for method in METHODS)
            status, _, err = run(command, *EVALUATE, "user/never-loaded")
            assert status == 2 and "it is not in the cache" in err and err.count("\n") == 1, err
        assert run(command, *EVALUATE, "user/SEA")[0] == 0
        status, _, err = run(command, "push", folders / "SEA", "user/offline", token="hf_write")
        expected = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in variables else "the Hub cannot be reached"
        assert status == 2 and expected in err and err.count("\n") == 1, err


FAULTS = {
    "validate": (fail(400), "Invalid metadata in README.md"),
    "preupload": (fail(413, "Payload too large"), "the Hub answers 413 (Payload too large)"),
    "batch": (fail(403, "Storage limit reached"), "the token may not do that (Storage limit reached)"),
    "upload": (fail(403, "Signature expired"), "Error while uploading 'adapter_model.safetensors' to the Hub"),
    "verify": (fail(404), "Error while uploading 'adapter_model.safetensors' to the Hub"),
    "commit": (hang_up, "the Hub cannot be reached"),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_failures_leave_nothing_behind(hub, client, folders, stage):
    hub.faults[stage], expected = FAULTS[stage]
    hub.repositories["models/user/there"] = Repository(owner="user")
    before = dict(repository(hub, "user/there").files)
    for arguments in (["user/new"], ["user/new", "--revision", "branch"], ["user/there", "--revision", "branch"]):
        hub.storage.clear()
        status, out, err = client(command, "push", folders / "SEA", *arguments, token="hf_write")
        assert status == 2 and expected in err and err.count("\n") == 1 and out == "", err
        assert f"the upload to {arguments[0]} failed" in err
    assert "models/user/new" not in hub.repositories
    there = repository(hub, "user/there")
    assert (there.files, there.branches, there.log) == (before, {}, [])
    hub.faults.clear()
    assert client(push_folder, folders / "SEA", "user/there", **WRITE) == "done"


def test_what_cannot_be_taken_back_is_said(hub, client, folders):
    hub.faults |= {"commit": fail(403), "delete": fail(403)}
    status, _, err = client(command, "push", folders / "SEA", "user/stuck", token="hf_write")
    assert status == 2 and "user/stuck was created, is empty and cannot be deleted" in err and err.count("\n") == 1
    assert repository(hub, "user/stuck").log == []


def test_a_commit_whose_answer_is_lost_stays(hub, client, folders):
    def commit_and_hang_up(handler):
        handler.wfile = open(os.devnull, "wb")  # noqa: SIM115
        del hub.faults["commit"]
        handler._answer("commit", {"name": "models/user/lost", "revision": "main"})
        handler.close_connection = True

    hub.faults["commit"] = commit_and_hang_up
    status, _, err = client(command, "push", folders / "SEA", "user/lost", token="hf_write")
    assert status == 2 and "user/lost has a new commit all the same" in err
    assert len(repository(hub, "user/lost").log) == 1


def test_what_somebody_pushed_meanwhile_is_not_overwritten(hub, client, folders):
    """Between the look at the repository's README and the commit."""
    hub.repositories["models/user/shared"] = Repository(owner="user")

    def somebody_is_faster(handler):
        del hub.faults["preupload"]
        repository(hub, "user/shared").files["README.md"] = b"# By hand"
        handler._answer("preupload", {"name": "models/user/shared", "revision": "main"})

    hub.faults["preupload"] = somebody_is_faster
    status, _, err = client(command, "push", folders / "SEA", "user/shared", token="hf_write")
    assert status == 2 and "somebody has changed user/shared meanwhile" in err and err.count("\n") == 1, err
    assert repository(hub, "user/shared").files["README.md"] == b"# By hand" and not repository(hub, "user/shared").log
    assert client(push_folder, folders / "SEA", "user/shared", **WRITE) == "done"
    assert repository(hub, "user/shared").files["README.md"] == b"# By hand"


def test_a_checkpoint_does_not_overwrite_what_somebody_pushed_meanwhile(hub, client, folders, tmp_path):
    hub.repositories["models/user/shared-model"] = Repository(owner="user")

    def somebody_is_faster(handler):
        del hub.faults["preupload"]
        repository(hub, "user/shared-model").files["README.md"] = b"# By hand"
        handler._answer("preupload", {"name": "models/user/shared-model", "revision": "main"})

    hub.faults["preupload"] = somebody_is_faster
    status, _, err = merge(client, folders / "SEA", tmp_path / "out", "user/shared-model")
    assert status == 2 and "somebody has changed user/shared-model meanwhile" in err, err
    assert not repository(hub, "user/shared-model").log


def test_every_commit_names_the_one_before(hub, client, folders, tmp_path):
    """The Hub refuses a commit with a parent that is no longer the last; one without a parent overwrites."""
    hub.repositories["models/user/parents"] = Repository(owner="user")
    parents = []

    def look(handler):
        header = json.loads(handler.body.decode().splitlines()[0])["value"]
        parents.append(header.get("parentCommit"))
        del hub.faults["commit"]
        handler._answer("commit", {"name": "models/user/parents", "revision": "main"})

    for push in (
        lambda: client(push_folder, folders / "SEA", "user/parents", **WRITE),
        lambda: client(push_folder, folders / "HPR", "user/parents", create_pr=True, **WRITE),
        lambda: client(push_model, "HPR", "user/parents", **WRITE),
        lambda: merge(client, folders / "SEA", tmp_path / "out", "user/parents"),
    ):
        hub.faults["commit"] = look
        before = commit_id(repository(hub, "user/parents").files)
        push()
        assert "commit" not in hub.faults and parents[-1] == before


def test_a_lost_connection_is_tried_again(hub, client, folders):
    def once(handler):
        del hub.faults["upload"]
        hang_up(handler)

    hub.faults["upload"] = once
    hub.storage.clear()
    assert client(push_folder, folders / "SEA", "user/again", **WRITE) == "done"
    assert len(repository(hub, "user/again").log) == 1


def test_an_interrupt_leaves_nothing_behind(hub, client, folders):
    worker = client(os.getpid)

    def interrupt(handler):
        # Each time that it is tried again: Python drops an interrupt that arrives while it finalizes an object.
        os.kill(worker, signal.SIGINT)
        time.sleep(0.5)  # and it is to arrive while the client waits
        hang_up(handler)

    hub.faults["upload"] = interrupt
    hub.storage.clear()
    assert client(push_folder, folders / "SEA", "user/interrupted", **WRITE).startswith("KeyboardInterrupt")
    del hub.faults["upload"]
    assert "models/user/interrupted" not in hub.repositories


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        (None, "user/new", "there is no valid token (Invalid username"),
        (None, "new", "there is no token: log in"),
        ("hf_wrong", "user/new", "there is no valid token (Invalid credentials"),
        ("hf_read", "user/new", "the token may not do that (Forbidden: you must use a write token"),
        ("hf_write", "other/new", "the token may not do that (You don't have the rights"),
        ("hf_write", "a/b/c", "Repo id must be"),
    ],
)
def test_pushing_without_the_right(hub, client, folders, token, repo_id, expected):
    status, _, err = client(command, "push", folders / "SEA", repo_id, token=token)
    assert status == 2 and expected in err and err.count("\n") == 1, err
    assert f"models/{repo_id}" not in hub.repositories


def test_what_is_no_adapter_is_not_pushed(hub, client, folders, tmp_path):
    shutil.copytree(folders / "SEA", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    sent = len(hub.requests)
    for folder, expected in (
        ("cut", "cannot be read"),
        ("foreign", "holds no adapter"),
        ("none", "there is no folder"),
    ):
        status, _, err = client(command, "push", tmp_path / folder, "user/no-adapter", token="hf_write")
        assert status == 2 and expected in err and err.count("\n") == 1, err
    assert len(hub.requests) == sent


def test_a_readme_that_somebody_wrote_stays(hub, client, folders, tmp_path):
    assert client(push_folder, folders / "SEA", "user/mine", **WRITE) == "done"
    made = repository(hub, "user/mine")
    card = made.files["README.md"]
    for own in (b"# Mine\n", card.replace(b"## Limits", b"## My limits")):
        made.files["README.md"] = own
        assert client(push_folder, folders / "HPR", "user/mine", **WRITE) == "done"
        assert made.files["README.md"] == own
        assert client(push_folder, folders / "SEA", "user/mine", **WRITE) == "done"
    made.files["README.md"] = card
    assert client(push_folder, folders / "HPR", "user/mine", **WRITE) == "done"
    assert made.files["README.md"] != card and is_generated(made.files["README.md"].decode())
    # One that the user has in the folder goes up as it is.
    shutil.copytree(folders / "SEA", tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("# From here\n")
    assert client(push_folder, tmp_path / "own", "user/mine", **WRITE) == "done"
    assert made.files["README.md"] == b"# From here\n"


def test_a_readme_that_somebody_wrote_stays_in_a_folder_too(hub, client, tmp_path):
    model = adapted("SEA", "default", "truth")
    model.save_pretrained(tmp_path)
    assert client(push_folder, tmp_path, "user/mine-too", **WRITE) == "done"
    made = repository(hub, "user/mine-too")
    card = made.files["truth/README.md"]
    for own in (b"# Mine\n", card.replace(b"## Limits", b"## My limits")):
        made.files["truth/README.md"] = own
        model.peft_config["truth"].strength = model.peft_config["default"].strength = 0.25 + len(own)
        model.save_pretrained(tmp_path)
        assert client(push_folder, tmp_path, "user/mine-too", **WRITE) == "done"
        assert made.files["truth/README.md"] == own
        assert f"`{0.25 + len(own)}`".encode() in made.files["README.md"]  # the other's card follows
    made.files["truth/README.md"] = card
    assert client(push_folder, tmp_path, "user/mine-too", **WRITE) == "done"
    assert made.files["truth/README.md"] != card and is_generated(made.files["truth/README.md"].decode())
    # On another branch somebody else's README counts.
    made.branches["other"] = made.files | {"truth/README.md": b"# Theirs\n"}
    assert client(push_folder, tmp_path, "user/mine-too", revision="other", **WRITE) == "done"
    assert made.branches["other"]["truth/README.md"] == b"# Theirs\n"


def test_a_readme_that_is_a_folder_stays_here(hub, client, folders, tmp_path):
    shutil.copytree(folders / "SEA", tmp_path / "sea")
    (tmp_path / "sea" / "README.md").unlink()
    (tmp_path / "sea" / "README.md").mkdir()
    assert client(push_folder, tmp_path / "sea", "user/no-readme", **WRITE) == "done"
    assert "README.md" not in repository(hub, "user/no-readme").files


def test_transformers_pushes_its_stub_and_we_replace_it(hub, client, folders):
    client(push_by_transformers, "SEA", "user/stub", **WRITE)
    made = repository(hub, "user/stub")
    assert "[More Information Needed]" in made.files["README.md"].decode()
    assert client(push_folder, folders / "SEA", "user/stub", **WRITE) == "done"
    assert is_generated(made.files["README.md"].decode())


def test_adapters_of_other_methods_go_up_with_their_own_cards(hub, client, pushed, tmp_path):
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    # The Hub takes no local folder for a base model, which PEFT writes into its card.
    assert 'README.md. - "base_model" with value' in client(push_folder, tmp_path, "user/lora", **WRITE)
    (tmp_path / "README.md").write_text("# Mine\n")
    assert client(push_folder, tmp_path, "user/lora", **WRITE) == "done"
    made = repository(hub, "user/lora")
    assert made.files["README.md"] == (tmp_path / "README.md").read_bytes()
    assert made.log[0][1] == "Upload LORA adapter" and client(load, "user/lora") != client(load, "user/SEA")
    (tmp_path / "README.md").unlink()
    assert client(push_folder, tmp_path, "user/bare", **WRITE) == "done"
    assert "README.md" not in repository(hub, "user/bare").files


def test_what_is_no_adapter_stays_here(hub, client, folders, tmp_path):
    shutil.copytree(folders / "HPR", tmp_path / "trained")
    for name in ("checkpoint-10", ".cache", "runs/today"):
        shutil.copytree(folders / "HPR", tmp_path / "trained" / name)
    (tmp_path / "trained" / "train_hpr.json").write_text("{}")
    for name in (f"train_hpr{UNFINISHED}", f"another_method{UNFINISHED}"):
        (tmp_path / "trained" / name).write_text("{}")
    assert client(push_folder, tmp_path / "trained", "user/trained", **WRITE) == "done"
    known = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "train_hpr.json"}
    assert set(repository(hub, "user/trained").files) == known
