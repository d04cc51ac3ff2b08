"""Generated answers: against plain decoding, whatever the batches, after interruptions, and the best of several."""

import json
import math

import pytest
import torch
from datasets import Dataset
from edits import edited_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collect import TOKENIZER, contrast, text
from tiny import tiny_model, vivid_model
from transformers import BertConfig, BertLMHeadModel

from peft_edit import edit_strength, files, generate_answers
from peft_edit.answering import generate as module
from peft_edit.answering.drawing import Drawing, seed_of
from peft_edit.answering.options import AnswerOptions
from peft_edit.answering.rows import summary
from peft_edit.data.prompt_files import is_prompt_file, load_prompts


PROMPTS = [text(ids) for ids in ([3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [3, 4, 5], [13])]
DRAWN = {"do_sample": True, "max_new_tokens": 6, "seed": 7}


def decoded(model, prompt, new):
    """Token ids of the greedy answer, one forward pass a token, and the log-likelihood of each, the end included."""
    ids, found, end = TOKENIZER(prompt)["input_ids"], [], model.config.eos_token_id
    for _ in range(new):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        token = int(log_p.argmax())
        found.append(float(log_p[token]))
        if token == end:
            break
        ids = [*ids, token]
    return ids[len(TOKENIZER(prompt)["input_ids"]) :], found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_greedy_answers_are_those_of_plain_decoding(family):
    model = edited_model("HPR", family, gate=0.5)
    rows = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=7, batch_size=3)
    assert [(row["id"], row["model"]) for row in rows] == [(i, who) for i in range(5) for who in ("base", "edited")]
    for row in rows:
        assert row["prompt"] == PROMPTS[row["id"]]
        if row["model"] == "base":
            with model.disable_adapter():
                ids, found = decoded(model, row["prompt"], 7)
        else:
            ids, found = decoded(model, row["prompt"], 7)
        assert row["answer"] == TOKENIZER.decode(ids, skip_special_tokens=True).strip() and row["tokens"] == len(ids)
        assert row["finished"] == (len(ids) < 7)
        assert row["log_likelihood"] == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.9},
    ],
)
def test_tokens_are_drawn_by_the_distribution_of_transformers(options):
    scores = torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0, -0.5, 0.2, -3.0])
    wanted = scores / options.get("temperature", 1)
    order = wanted.argsort(descending=True)
    keep = torch.ones(8, dtype=torch.bool)
    if "top_k" in options:
        keep[order[options["top_k"] :]] = False
    if "top_p" in options:
        p = torch.where(keep, wanted, -math.inf).softmax(dim=0)[order]
        keep[order[(p.cumsum(dim=0) - p) >= options["top_p"]]] = False
    if "min_p" in options:
        p = wanted.softmax(dim=0)
        keep &= p >= options["min_p"] * p.max()
    wanted = torch.where(keep, wanted, -math.inf).softmax(dim=0)
    count = 4000
    drawing = Drawing(AnswerOptions(do_sample=True, **options), [seed_of(0, i, 0) for i in range(count)])
    chosen = drawing(torch.zeros(count, 1, dtype=torch.int64), scores.expand(count, -1)).argmax(dim=1)
    share = chosen.bincount(minlength=8) / count
    assert not share[~keep].any()
    assert (share - wanted).abs().max() < 5 * (0.25 / count) ** 0.5
    torch.testing.assert_close(drawing.log_likelihoods[0], scores.log_softmax(dim=0)[chosen])


def test_a_sample_depends_on_its_seed_and_row_alone():
    model = edited_model("HPR")
    data = contrast()
    rows = generate_answers(model, TOKENIZER, data, **DRAWN)
    for batch_size in (1, 2, 64):
        others = generate_answers(model, TOKENIZER, data, batch_size=batch_size, **DRAWN)
        assert [row["answer"] for row in others] == [row["answer"] for row in rows]
    some = generate_answers(model, TOKENIZER, data.select([3, 1]), **DRAWN)
    by_id = {(row["id"], row["model"]): row["answer"] for row in rows}
    assert all(by_id[row["id"], row["model"]] == row["answer"] for row in some)
    assert len({row["answer"] for row in rows}) > len(rows) / 2
    # The first and the last row have the same prompt.
    assert by_id[10, "base"] != by_id[4, "base"]
    other = generate_answers(model, TOKENIZER, data, **{**DRAWN, "seed": 8})
    assert [row["answer"] for row in other] != [row["answer"] for row in rows]
    again = generate_answers(model, TOKENIZER, PROMPTS, **DRAWN)
    torch.manual_seed(0)
    assert generate_answers(model, TOKENIZER, PROMPTS, **DRAWN) == again


def test_the_base_model_and_an_edit_without_strength_draw_the_same():
    model = edited_model("HPR")
    with edit_strength(model, 0):
        rows = generate_answers(model, TOKENIZER, PROMPTS, **DRAWN)
    assert [row["answer"] for row in rows[::2]] == [row["answer"] for row in rows[1::2]]
    base = generate_answers(vivid_model(), TOKENIZER, PROMPTS, **DRAWN)
    assert {row["model"] for row in base} == {"base"}
    assert [row["answer"] for row in base] == [row["answer"] for row in rows[::2]]
    edited = generate_answers(model, TOKENIZER, PROMPTS, models="edited", **DRAWN)
    assert {row["model"] for row in edited} == {"edited"}
    assert not any(layer.training for layer in model.modules())


def test_the_best_of_several_is_the_likeliest():
    model = edited_model("HPR")
    one = generate_answers(model, TOKENIZER, PROMPTS, **DRAWN)
    rows = generate_answers(model, TOKENIZER, PROMPTS, best_of=4, batch_size=3, **DRAWN)
    for row, first in zip(rows, one, strict=True):
        assert len(row["candidates"]) == 4 and "score" not in row
        assert row["candidates"][0] == pytest.approx({name: first[name] for name in row["candidates"][0]})
        best = max(row["candidates"], key=lambda candidate: candidate["log_likelihood"])
        assert {name: row[name] for name in best} == best
    assert summary(rows)["base"]["log_likelihood"] > summary(one)["base"]["log_likelihood"]
    assert summary(rows)["edited"]["answers"] == len(PROMPTS) and "score" not in summary(rows)["base"]


def count_words(row, answers):
    assert row["positives"] and isinstance(row["id"], int)
    return [len(set(answer.split())) for answer in answers]


def test_the_best_of_several_by_a_function():
    rows = generate_answers(edited_model("HPR"), TOKENIZER, contrast(), best_of=5, score=count_words, **DRAWN)
    for row in rows:
        scores = [len(set(candidate["answer"].split())) for candidate in row["candidates"]]
        assert [candidate["score"] for candidate in row["candidates"]] == scores
        assert row["score"] == max(scores) and row["answer"] == row["candidates"][scores.index(max(scores))]["answer"]
    means = summary(rows)["base"]
    assert means["score"] >= means["first_score"]
    named = generate_answers(
        edited_model("HPR"), TOKENIZER, contrast(), best_of=5, score="test_answering:count_words", **DRAWN
    )
    assert named == rows


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.parametrize("batch_size, best_of, kept", [(2, 1, 3), (4, 2, 3), (16, 1, 1)])
def test_an_interrupted_run_ends_with_the_same_file(batch_size, best_of, kept, tmp_path, monkeypatch):
    model, options = edited_model("HPR"), {**DRAWN, "batch_size": batch_size, "best_of": best_of}
    rows = generate_answers(model, TOKENIZER, PROMPTS, out=tmp_path / "whole.jsonl", **options)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line) for line in whole.decode().splitlines()] == rows and len(rows) == 10
    out = tmp_path / "new" / "killed.jsonl"
    calls, original = [], module.batch_answers

    def killing(*arguments):
        calls.append(1)
        if len(calls) > kept:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "batch_answers", killing)
        generate_answers(model, TOKENIZER, PROMPTS, out=out, **options)
    held = out.read_bytes() if out.exists() else b""
    assert whole.startswith(held) and held.count(b"\n") == (4 if kept > 1 else 0)
    assert generate_answers(model, TOKENIZER, PROMPTS, out=out, **options) == rows
    assert out.read_bytes() == whole and [file.name for file in out.parent.iterdir()] == ["killed.jsonl"]


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_anywhere_is_completed(tmp_path_factory, data):
    model, out = edited_model("HPR"), tmp_path_factory.mktemp("cut") / "a.jsonl"
    options = {"max_new_tokens": 3, "batch_size": 2}
    rows = generate_answers(model, TOKENIZER, PROMPTS, out=out, **options)
    whole = out.read_bytes()
    out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert generate_answers(model, TOKENIZER, PROMPTS, out=out, **options) == rows
    assert out.read_bytes() == whole


def test_a_finished_file_is_read_and_one_of_other_answers_left_alone(tmp_path, monkeypatch):
    model, out = edited_model("HPR"), tmp_path / "a.jsonl"
    rows = generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3)
    whole = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "batch_answers", None)
        assert generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3, batch_size=1) == rows
    others = [
        (model, PROMPTS, {"max_new_tokens": 4}),
        (model, PROMPTS[:2], {"max_new_tokens": 3}),
        (model, PROMPTS, {"max_new_tokens": 3, "models": "edited"}),
        (edited_model("HPR", seed=1), PROMPTS, {"max_new_tokens": 3}),
        (edited_model("HPR", gate=0.1), PROMPTS, {"max_new_tokens": 3}),
        (edited_model("HPR").bfloat16(), PROMPTS, {"max_new_tokens": 3}),
    ]
    for other, prompts, options in others:
        with pytest.raises(ValueError, match="holds answers to other prompts, or of another model"):
            generate_answers(other, TOKENIZER, prompts, out=out, **options)
    out.write_text('{"id": 3}\n')
    for resume in (True, False):  # what is no answer is not replaced either
        with pytest.raises(ValueError, match="has a line 1 that is no answer of an earlier run"):
            generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3, resume=resume)
    assert out.read_text() == '{"id": 3}\n'
    lines = whole.splitlines(keepends=True)
    for damaged in (lines[1:], lines[:1] * 2):
        out.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="or lacks some of its first: choose another file"):
            generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3)
    generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3, resume=False)
    assert out.read_bytes() == whole
    with (
        files.locked_place(out),
        pytest.raises(ValueError, match=r"another run is writing .*a.jsonl"),
    ):
        generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3)


def test_a_replaced_file_stays_until_there_is_an_answer(tmp_path, monkeypatch):
    model, out = edited_model("HPR"), tmp_path / "a.jsonl"
    generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=3)
    before = out.read_bytes()
    monkeypatch.setattr(module, "batch_answers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=4, resume=False)
    assert out.read_bytes() == before


def test_the_file_of_the_prompts_is_no_place_for_answers(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("w3 w4\n")
    with pytest.raises(ValueError, match=r"^out .* is the file of the prompts: choose another file"):
        generate_answers(edited_model("HPR"), TOKENIZER, prompts, out=tmp_path / "x" / ".." / "p.txt", resume=False)
    assert prompts.read_text() == "w3 w4\n"
    with pytest.raises(ValueError, match="score must be log_likelihood or module:function, got 3"):
        generate_answers(edited_model("HPR"), TOKENIZER, PROMPTS, score=3)


def wrong(row, answers):
    return [math.nan] * len(answers)


def fails(row, answers):
    return row["nothing"]


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    model, out = edited_model("HPR"), tmp_path / "a.jsonl"
    merged = edited_model("SEA at the MLP")
    merged.merge_adapter()
    encoder = BertLMHeadModel(BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    cases = [
        (model, [], {}, "the prompts has no prompts"),
        (vivid_model(), PROMPTS, {"models": "both"}, "has no active adapter"),
        (merged, PROMPTS, {}, "an adapter is merged"),
        (encoder, PROMPTS, {}, "is an encoder"),
        (tiny_model("gpt2"), PROMPTS, {"max_new_tokens": 64}, "has 69 tokens, the model takes 64"),
        (model, PROMPTS, {"temperature": 0.5}, r"temperature=0.5 is of a draw: pass do_sample=True"),
        (model, PROMPTS, {"best_of": 2}, r"best_of=2 needs answers that differ: pass do_sample=True"),
        (model, PROMPTS, {"top_p": 0.0, "do_sample": True}, r"top_p must be a number in \(0, 1\], got 0.0"),
        (model, PROMPTS, {"models": "all"}, "models must be one of None, 'base', 'edited', 'both'"),
        (model, PROMPTS, {"score": "words"}, "score must be log_likelihood or module:function, got 'words'"),
        (model, PROMPTS, {"score": "no_module_here:f"}, "no_module_here cannot be imported"),
        (model, PROMPTS, {"score": "math:nothing"}, "the module math has no function nothing"),
        (model, PROMPTS, {"score": "math:pi"}, "the module math has no function pi"),
        (model, PROMPTS, {"score": wrong}, r"the score test_answering:wrong gave \[nan\] for the 1 answers to row 0"),
        (model, PROMPTS, {"score": fails}, "the score test_answering:fails failed on row 0 .KeyError"),
    ]
    for other, prompts, options, message in cases:
        with pytest.raises(ValueError, match=message):
            generate_answers(other, TOKENIZER, prompts, out=out, **{"max_new_tokens": 2, **options})
        assert not out.exists()
    with pytest.raises(TypeError, match="no argument 'temprature': did you mean 'temperature'"):
        generate_answers(model, TOKENIZER, PROMPTS, temprature=1)
    with pytest.raises(ValueError, match=r"out .* is a folder: choose a file"):
        generate_answers(model, TOKENIZER, PROMPTS, out=tmp_path)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the model gives NaN: load it in a wider dtype"):
        generate_answers(model, TOKENIZER, PROMPTS, out=out, max_new_tokens=2)


def test_files_of_prompts(tmp_path):
    def prompts_of(name, content):
        file = tmp_path / name
        file.write_text(content)
        assert is_prompt_file(file)
        return load_prompts(file)

    assert prompts_of("a.txt", "w3 w4\n\nw5\r\n")["prompt"] == ["w3 w4", "w5"]
    data = prompts_of("b.jsonl", '{"prompt": "w3", "id": 5, "more": [1]}\n{"prompt": "w4", "id": 2}\n')
    assert list(data["id"]) == [5, 2] and list(data["prompt"]) == ["w3", "w4"] and data["positives"] == [[], []]
    turns = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    for column in ("prompt", "messages"):
        data = prompts_of("c.jsonl", json.dumps({column: turns}))
        assert data["messages"] == [turns] and list(data["prompt"]) == ["w3\nw4\nw5"]
    assert load_prompts(iter(["w3"])).column_names == contrast().column_names
    contrasts = tmp_path / "d.jsonl"
    contrasts.write_text('{"prompt": "a", "positives": ["b"], "negatives": ["c"]}\n')
    assert not is_prompt_file(contrasts) and not is_prompt_file("truthful_qa") and is_prompt_file("nothing.txt")
    for content, message in [
        ("", "has no prompts: pass at least one"),
        ('{"question": "w3"}', "lacks a column prompt or messages; it has question"),
        ('{"prompt": ""}', "row 0: prompt must be text, got empty text"),
        ('{"prompt": 3}', "row 0: prompt must be text, or messages a conversation, got int"),
        (json.dumps({"messages": turns[:2]}), "row 0: messages end with an answer: leave it out"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "the id stands in several rows"),
    ]:
        file = tmp_path / "bad.jsonl"
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_prompts(file)
    with pytest.raises(ValueError, match="there is no file"):
        load_prompts(tmp_path / "nothing.txt")


def test_a_contrast_set_in_another_format_is_answered():
    data = contrast()
    assert isinstance(data, Dataset)
    rows = generate_answers(vivid_model(), TOKENIZER, data.with_format("numpy"), max_new_tokens=2)
    assert rows == generate_answers(vivid_model(), TOKENIZER, data, max_new_tokens=2)
