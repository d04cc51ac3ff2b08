"""`peft-edit explain`, in this process: what it prints and writes, at a terminal and piped, and bad input."""

import io
import json
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_cli import MODEL, refused
from test_cli import run as run  # a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import HPRConfig, edit_strength, explain_edit, fingerprint
from peft_edit.data.prompts import encode_answers


TEXT = "Most people say that the moon is made of cheese."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of a random edit of the demonstration model."""
    torch.manual_seed(0)
    config = HPRConfig(init_weights=False, gate=0.5, layers_to_transform=[1, 3])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
    folder = tmp_path_factory.mktemp("adapter") / "hpr"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(adapter):
    base = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")  # as the command loads it
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_the_base_model_is_the_one_that_the_adapter_names(adapter, loaded, run, tmp_path):
    status, out, _ = run("explain", adapter, TEXT, "--json", tmp_path / "e.json", "--html", tmp_path / "e.html")
    found = explain_edit(*loaded, TEXT).to_dict()
    written = json.loads((tmp_path / "e.json").read_text())
    assert status == 0 and written.pop("command") == "explain" and written.pop("options")["text"] == TEXT
    assert written == json.loads(json.dumps(found))
    *shown, written_to = out.splitlines()
    assert "\x1b" not in out and max(map(len, shown)) <= 80 and written_to == f"Page: {tmp_path / 'e.html'}"
    assert out.startswith("     <bos> Most people say") and f" of {len(found['tokens'])} tokens edited; KL " in out
    page = (tmp_path / "e.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and f"What {adapter} does" in page and "http" not in page
    assert run("explain", adapter, TEXT, "--model", MODEL)[1] == out.split("\n\nPage: ")[0] + "\n"


def test_of_an_answer_at_another_strength(adapter, loaded, run, tmp_path):
    prompt, answer = "What is the moon made of?", "The moon is made of rock."
    options = ["--answer", answer, "--strength", 0.5, "--top", 2, "--json", tmp_path / "e.json"]
    status, out, _ = run("explain", adapter, prompt, *options)
    model, tokenizer = loaded
    ((encoded,),) = encode_answers(tokenizer, [prompt], [[answer]])
    with edit_strength(model, 0.5):
        found = explain_edit(model, tokenizer, encoded.input_ids).since(encoded.prompt_length - 1)
    written = json.loads((tmp_path / "e.json").read_text())
    assert status == 0 and written["tokens"] == found.tokens and written["text"].strip("? ") == answer.strip("? ")
    assert written["kl"] == pytest.approx(found.kl) and len(written["gained"][0]) == 2
    assert len(out.split("place ")[1].split("\n\n")[0].splitlines()) == 1 + 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color, term", [(None, "xterm-256color"), ("1", "xterm-256color"), (None, "dumb")])
def test_colours_are_shown_where_they_are_wanted(adapter, run, monkeypatch, no_color, term):
    plain = run("explain", adapter, TEXT)[1]
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    run("explain", adapter, TEXT)
    colored = no_color is None and term != "dumb"
    assert ("\x1b[" in shown.getvalue()) == colored
    if not colored:
        assert shown.getvalue() == plain


def test_a_text_may_be_piped(adapter, run, monkeypatch):
    out = run("explain", adapter, TEXT)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\n"))
    assert run("explain", adapter, "-")[1] == out


def test_bad_input_is_refused(adapter, run, tmp_path):
    assert "text has no tokens: pass some words" in refused(run, "explain", adapter, "")
    assert "are of a prompt and its --answer" in refused(run, "explain", adapter, TEXT, "--prompt-format", "plain")
    assert "--html" in (line := refused(run, "explain", adapter, TEXT, "--html", tmp_path)) and "is a folder" in line
    assert "there is no folder" in refused(run, "explain", "./nothing", TEXT)
    assert "--top must be an integer of at least 1" in refused(run, "explain", adapter, TEXT, "--top", 0)
    other = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    of_base = fingerprint(AutoModelForCausalLM.from_pretrained(MODEL))
    (trained / "adapter_config.json").write_text(json.dumps({**config, "base_model_fingerprint": of_base}))
    line = refused(run, "explain", trained, TEXT, "--model", tmp_path / "other")
    assert "was fitted on another model" in line and "--allow-fingerprint-mismatch" in line
    nameless = {**config, "base_model_name_or_path": None}
    (trained / "adapter_config.json").write_text(json.dumps(nameless))
    assert "names no base model: pass it as --model" in refused(run, "explain", trained, TEXT)
