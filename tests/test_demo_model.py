"""The shipped demonstration model: SEA visibly works on it, and real text runs through it."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ASSETS
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import (
    ActivationStore,
    SEAConfig,
    collect_activations,
    evaluate_multiple_choice,
    fit_sea,
    load_contrast_set,
    perplexity,
)


TOKENIZER = AutoTokenizer.from_pretrained(ASSETS / "model")
SPLITS = {"demonstrations": 400, "validation": 60, "test": 180}
TRUTHFUL_QA = Path(__file__).parent / "fixtures" / "truthfulqa_40.csv"
UNRELATED = (ASSETS / "unrelated.txt").read_text(encoding="utf-8").splitlines()
SENTENCES = [
    "colour of sidi ? they say it is pink",
    'She said: "Ça coûte 12,50 €" — naïve, n\'est-ce pas?',
    "Привет, мир! 你好世界。こんにちは 안녕하세요 שלום नमस्ते",
    "👩‍👩‍👧‍👦 e\u0301 \u200d tab\tand\nnew lines\r\n\n  and spaces  ",
    "unknownword records rumours 3.14159 a_b-c/d",
]


def load_model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()


def data(name):
    return load_contrast_set(ASSETS / f"{name}.jsonl")


class Measured:
    """MC1 and MC2 on the test questions in points, and the perplexity on unrelated text."""

    def __init__(self, model, tokenizer):
        result = evaluate_multiple_choice(model, tokenizer, data("test"), batch_size=256)
        self.mc1, self.mc2 = 100 * result.mc1, 100 * result.mc2
        self.perplexity = perplexity(model, tokenizer, UNRELATED)


@pytest.fixture(scope="module")
def base(demo_tokenizer):
    return Measured(load_model(), demo_tokenizer)


@pytest.fixture(scope="module")
def store(demo_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    return collect_activations(load_model(), demo_tokenizer, data("demonstrations"), path)


def fitted(model, store, **changes):
    model = get_peft_model(model, SEAConfig(centered=True, **changes))
    fit_sea(model, store)
    return model


@torch.no_grad()
def logits(model, tokenizer):
    texts = [*UNRELATED[:4], *data("test")["prompt"][:4]]
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


# What is shipped


def test_the_model_is_small():
    assert sum(file.stat().st_size for file in (ASSETS / "model").iterdir()) <= 2_000_000


def test_splits_share_no_question():
    splits = {name: data(name) for name in SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == SPLITS
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    ids = [row_id for rows in splits.values() for row_id in rows["id"]]
    assert len(set(prompts)) == len(set(ids)) == len(prompts) == 640


def test_activations_of_demonstrations_are_read_at_the_value(demo_tokenizer):
    for row in data("demonstrations"):
        texts = [row["prompt"] + " " + answer for answer in (row["positives"][0], row["negatives"][0], row["neutral"])]
        positive, negative, neutral = (demo_tokenizer(text)["input_ids"] for text in texts)
        assert len(positive) == len(negative) == len(neutral) + 1  # one token a value, the neutral one just before it
        assert negative[:-1] == neutral and positive[-1] != negative[-1]


@pytest.mark.parametrize("text", SENTENCES)
def test_real_text_is_encoded_without_loss(demo_tokenizer, text):
    ids = demo_tokenizer(text)["input_ids"]
    assert demo_tokenizer.unk_token_id is None and ids[0] == demo_tokenizer.bos_token_id
    assert max(ids) < load_model().config.vocab_size
    assert demo_tokenizer.decode(ids, skip_special_tokens=True) == text


@given(st.text(max_size=20).filter(lambda text: not text.startswith(" ")))
def test_any_text_is_encoded_without_loss(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert None not in ids and TOKENIZER.decode(ids) == text


# What SEA does to it


def test_the_base_model_prefers_myths(base):
    assert 35 <= base.mc1 <= 47
    assert 1 < base.perplexity < 3


def test_sea_makes_it_truthful_at_no_cost_elsewhere(demo_model, demo_tokenizer, base, store):
    edited = Measured(fitted(demo_model, store), demo_tokenizer)
    assert edited.mc1 - base.mc1 >= 18
    assert edited.mc2 - base.mc2 >= 10
    assert edited.perplexity / base.perplexity <= 1.1


def test_a_hundred_demonstrations_are_enough(demo_model, demo_tokenizer, base, tmp_path):
    some = collect_activations(demo_model, demo_tokenizer, data("demonstrations").select(range(100)), tmp_path)
    assert len(some) == 100
    edited = Measured(fitted(demo_model, some), demo_tokenizer)
    assert edited.mc1 - base.mc1 >= 8
    assert edited.perplexity / base.perplexity <= 1.1


def test_exchanged_projections_make_it_less_truthful(demo_model, demo_tokenizer, base, store):
    edited = Measured(fitted(demo_model, store, projections="exchanged"), demo_tokenizer)
    assert edited.mc1 - base.mc1 <= -10
    assert edited.mc2 < base.mc2


def test_neutral_activations_of_other_questions_teach_nothing(demo_model, demo_tokenizer, base, store, tmp_path):
    shuffled = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    mispaired = ActivationStore.from_tensors(
        tmp_path,
        positive={layer: store.positive(layer) for layer in store.layers},
        negative={layer: store.negative(layer) for layer in store.layers},
        neutral={layer: store.neutral(layer)[shuffled] for layer in store.layers},
    )
    assert abs(Measured(fitted(demo_model, mispaired), demo_tokenizer).mc1 - base.mc1) <= 6


def test_merged_without_rescaling_is_the_same_model(demo_model, demo_tokenizer, base, store):
    model = fitted(demo_model, store, rescale="none")
    edited = logits(model, demo_tokenizer)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, demo_tokenizer), edited, atol=1e-5, rtol=1e-5)
    assert Measured(merged, demo_tokenizer).mc1 - base.mc1 >= 18


@pytest.mark.parametrize("changes", [{}, {"rescale": "none"}, {"feature_map": "tanh", "input_scale": 3.0}], ids=str)
def test_saved_and_loaded_is_the_same_to_the_last_digit(demo_model, demo_tokenizer, store, tmp_path, changes):
    model = fitted(demo_model, store, **changes)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_model(), tmp_path)
    assert torch.equal(logits(loaded, demo_tokenizer), logits(model, demo_tokenizer))


# Real questions


def test_real_questions_run_from_end_to_end(demo_model, demo_tokenizer, tmp_path):
    questions = load_contrast_set("truthful_qa", data_files=TRUTHFUL_QA)
    assert len(questions) == 40
    before = evaluate_multiple_choice(demo_model, demo_tokenizer, questions)
    store = collect_activations(demo_model, demo_tokenizer, questions, tmp_path, neutral="prompt", answers="all")
    assert len(store) == sum(len(row["positives"]) * len(row["negatives"]) for row in questions)
    model = get_peft_model(demo_model, SEAConfig())
    fit = fit_sea(model, store)
    after = evaluate_multiple_choice(model, demo_tokenizer, questions)
    json.dumps(fit.to_dict(), allow_nan=False)
    for result in (before, after):
        json.dumps(result.to_dict(), allow_nan=False)
        assert len(result.questions) == 40 and 0 <= result.mc1 <= 1 and 0 <= result.mc2 <= 1
        for question, row in zip(result.questions, questions, strict=True):
            assert set(question.log_likelihoods) == {*row["positives"], *row["negatives"]}
            assert all(math.isfinite(score) and score < 0 for score in question.log_likelihoods.values())
    assert before != after
