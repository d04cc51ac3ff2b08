"""Bars move while a batch runs, and end where they should."""

import pytest
import torch
from edits import EDITS, edited_model
from test_collect import QUESTIONS, TOKENIZER, contrast
from tiny import FAMILIES, token_ids, vivid_model
from tqdm import tqdm
from transformers import GenerationConfig

from peft_edit import collect_activations, evaluate_multiple_choice, perplexity
from peft_edit.models.run import TokenProgress, batch_answers, inference


class Bar:
    def __init__(self):
        self.steps = []

    def update(self, step):
        self.steps.append(step)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bar_moves_with_each_block(family):
    model, bar = vivid_model(family), Bar()
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with inference(model):
        with TokenProgress(model, bar).over(18):
            model(input_ids=token_ids(2, 9))
        assert bar.steps == pytest.approx([6, 6, 6, 0])
        with TokenProgress(model, bar).over(10):  # fewer than run, as without padding
            model(input_ids=token_ids(2, 9))
        assert bar.steps[4:] == pytest.approx([6, 4, 0, 0])
        with TokenProgress(model, bar).over(30):  # more, as what is cached
            model(input_ids=token_ids(2, 9))
        assert bar.steps[8:] == pytest.approx([6, 6, 6, 12])
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks


def test_a_bar_moves_during_generation():
    model, bar = vivid_model(), Bar()
    model.generation_config = GenerationConfig()
    prompts = [[4, 5, 6], [7, 8, 9]]
    (answers,) = batch_answers(model, TOKENIZER, prompts, [[0, 1]], 5, TokenProgress(model, bar))
    assert [len(answer) for answer in answers] == [5, 5]
    assert len(bar.steps) == 5 * 3 + 1 and sum(bar.steps) == pytest.approx(2 * (3 + 5))
    assert max(bar.steps) < 2.1  # of 16


def test_after_a_failure_the_model_has_no_hooks_left(llama):
    bar = Bar()
    with pytest.raises(ZeroDivisionError), TokenProgress(llama, bar).over(10):
        raise ZeroDivisionError
    assert bar.steps == [] and not any(module._forward_hooks for module in llama.modules())


def test_a_model_without_known_blocks_moves_the_bar_after_the_batch():
    bar = Bar()
    with TokenProgress(torch.nn.Linear(2, 2), bar).over(10):
        pass
    assert bar.steps == [10]


@pytest.fixture
def bars(monkeypatch):
    """The bars that are made: description, unit, total, and where they ended."""
    made = []
    close = tqdm.close

    def closed(self):
        made.append((self.desc, self.unit, self.total, self.n))
        close(self)

    monkeypatch.setattr(tqdm, "close", closed)
    return made


@pytest.mark.parametrize("edit", [None, *EDITS])
def test_every_bar_of_a_model_counts_tokens_and_ends_full(tmp_path, bars, edit):
    model = vivid_model() if edit is None else edited_model(edit)
    data = contrast([(*question[:3], None) for question in QUESTIONS])
    collect_activations(model, TOKENIZER, data, tmp_path / "store", max_new_tokens=3)
    evaluate_multiple_choice(model, TOKENIZER, data)
    perplexity(model, TOKENIZER, ["w3 w4 w5", "w6 w7"], batch_size=1)
    found = {desc.rstrip(": "): (unit, total, n) for desc, unit, total, n in bars if desc}
    for name in ("generating neutral answers", "collecting", "evaluating", "perplexity"):
        unit, total, n = found[name]
        assert unit == "token" and total > 0 and n == pytest.approx(total), name
