"""Scores are those of one full forward pass an answer, however they are batched and cached."""

import itertools
import json
import math
import random

import pytest
import torch
from edits import EDITS
from peft import get_peft_model
from test_collect import IDS, QUESTIONS, TOKENIZER, contrast, text
from test_prompts import TEMPLATE, byte_tokenizer
from tiny import FAMILIES, tiny_model

from peft_edit import evaluate_multiple_choice, perplexity
from peft_edit.data.prompts import encode_answers
from peft_edit.evaluation.likelihood import answer_log_likelihoods, cheapest_batches


# Small changes that exercise other caches and positions.
VARIANTS = {family: (family, {}) for family in FAMILIES} | {
    "gemma, short window": ("gemma", {"sliding_window": 4}),
    "falcon, alibi": ("falcon", {"alibi": True}),
}


def sharp(model):
    """Larger weights, so that tokens differ in their probability."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def literal_score(model, ids, prompt_length):
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(prompt_length, len(ids)))


def literal_scores(model, prompt, answers):
    return {text(answer): literal_score(model, prompt + answer, len(prompt)) for answer in answers}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_full_forward_passes(variant):
    family, changes = VARIANTS[variant]
    model = sharp(tiny_model(family, **changes))
    expected = [literal_scores(model, prompt, positives + negatives) for prompt, positives, negatives, _ in QUESTIONS]
    for batch_size in (1, 3, 64):
        result = evaluate_multiple_choice(model, TOKENIZER, contrast(), batch_size=batch_size)
        assert [question.id for question in result.questions] == IDS
        for question, scores in zip(result.questions, expected, strict=True):
            assert question.log_likelihoods == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_edited_models_score_with_the_cache_as_without(family, edit):
    base = sharp(tiny_model(family))
    plain = evaluate_multiple_choice(base, TOKENIZER, contrast())
    torch.manual_seed(0)
    model = get_peft_model(base, EDITS[edit]())
    result = evaluate_multiple_choice(model, TOKENIZER, contrast(), batch_size=5)
    for question, before, (prompt, positives, negatives, _) in zip(
        result.questions, plain.questions, QUESTIONS, strict=True
    ):
        expected = literal_scores(model, prompt, positives + negatives)
        assert question.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert question.log_likelihoods != pytest.approx(before.log_likelihoods, abs=1e-3)
    with model.disable_adapter():
        assert evaluate_multiple_choice(model, TOKENIZER, contrast()) == plain


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_prompts_and_answers_are_run_once(llama, batch_size):
    data = contrast(mc1_choices=[[text(q[1][0]), text(q[2][0]), "w50 w51"] for q in QUESTIONS])
    prompts, answers, heads = [], [], []

    def record(module, args, kwargs):
        rows = kwargs["input_ids"].tolist()
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # whatever this release of Transformers calls it
        (prompts if kwargs["use_cache"] and cache is None else answers).append(rows)

    llama.model.register_forward_pre_hook(record, with_kwargs=True)
    llama.lm_head.register_forward_pre_hook(lambda module, args: heads.append(len(args[0])))
    evaluate_multiple_choice(llama, TOKENIZER, data, batch_size=batch_size)
    # the last token of a prompt runs with its answers, whose first token it predicts
    assert sorted(row for rows in prompts for row in rows) == sorted(q[0][:-1] for q in QUESTIONS if len(q[0]) > 1)
    assert sum(map(len, answers)) == sum(heads) == sum(len(q[1]) + len(q[2]) + 1 for q in QUESTIONS)
    assert max(heads) <= batch_size and max(map(len, prompts), default=0) <= batch_size


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logits_of_tokens_that_are_not_scored(family):
    model, logits = tiny_model(family), []
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: logits.append(output.shape))
    evaluate_multiple_choice(model, TOKENIZER, contrast())
    assert {len(shape) for shape in logits} == {3}
    assert sum(shape[:2].numel() for shape in logits) == sum(len(a) for q in QUESTIONS for a in (*q[1], *q[2]))


def test_a_model_of_another_library_may_use_the_shape_of_its_logits(llama):
    class Own(type(llama)):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits.view(*input_ids.shape, -1)
            return output

    expected = evaluate_multiple_choice(llama, TOKENIZER, contrast())
    llama.__class__ = Own
    assert evaluate_multiple_choice(llama, TOKENIZER, contrast()) == expected


def test_answers_of_one_length_are_run_together(llama):
    """Of whichever question they are: no position is padding where each length fills its batches."""
    questions = [([3, 4 + i], [[9], [10, 11, 12]], [[13], [14, 15, 16]], None) for i in range(4)]
    shapes = []
    llama.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    evaluate_multiple_choice(llama, TOKENIZER, contrast(questions, range(4)), batch_size=4)
    assert sorted(shapes) == [(4, 1), (4, 1), (4, 3), (4, 3)]


def test_mc1_is_the_first_choice_against_all_others():
    model = sharp(tiny_model())
    for seed in range(6):
        answers = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:6].add(3).tolist()
        prompt, singles = [3, 4], [[i] for i in answers]
        scores = list(literal_scores(model, prompt, singles).values())
        data = contrast([(prompt, singles[:2], singles[2:], None)], [0])
        of_lists = evaluate_multiple_choice(model, TOKENIZER, data).questions[0]
        assert of_lists.mc1 == (scores[0] > max(scores[2:]))  # the second positive does not count
        choices = [text(singles[i]) for i in (4, 1, 5)]
        data = contrast([(prompt, singles[:2], singles[2:], None)], [0], mc1_choices=[choices])
        of_choices = evaluate_multiple_choice(model, TOKENIZER, data).questions[0]
        assert of_choices.mc1 == (scores[4] > max(scores[1], scores[5]))
        mass = [math.exp(score) for score in scores]
        assert of_lists.mc2 == of_choices.mc2 == pytest.approx(sum(mass[:2]) / sum(mass), abs=1e-6)


def test_a_choice_that_is_no_answer_counts_for_mc1_only():
    model = sharp(tiny_model())
    question = ([3, 4], [[5]], [[6]], None)
    alone = evaluate_multiple_choice(model, TOKENIZER, contrast([question], [0])).questions[0]
    data = contrast([question], [0], mc1_choices=[["w7", "w8 w9"]])
    more = evaluate_multiple_choice(model, TOKENIZER, data).questions[0]
    scores = literal_scores(model, [3, 4], [[5], [6], [7], [8, 9]])
    assert more.log_likelihoods == pytest.approx(scores, abs=1e-4)
    assert more.mc1 == (scores["w7"] > scores["w8 w9"])
    assert more.mc2 == pytest.approx(alone.mc2, abs=1e-6)


def test_ties_are_not_correct(llama):
    # white space makes other texts of the same tokens
    data = contrast([([3, 4], [[5]], [[6]], None)] * 2, [0, 1], mc1_choices=[["w5", " w5"], ["w5"] * 2])
    result = evaluate_multiple_choice(llama, TOKENIZER, data.select([0]))
    assert result.mc1 == 0 and result.questions[0].mc1 is False
    data = contrast([([3, 4], [[5]], [[5]], None)], [0], negatives=[[" w5"]])
    result = evaluate_multiple_choice(llama, TOKENIZER, data)
    assert result.mc1 == 0 and result.mc2 == pytest.approx(0.5)


def test_means_and_json(llama):
    result = evaluate_multiple_choice(llama, TOKENIZER, contrast())
    assert result.mc1 == pytest.approx(sum(q.mc1 for q in result.questions) / 5)
    assert result.mc2 == pytest.approx(sum(q.mc2 for q in result.questions) / 5)
    values = json.loads(json.dumps(result.to_dict()))
    assert (values["mc1"], values["mc2"], [q["id"] for q in values["questions"]]) == (result.mc1, result.mc2, IDS)
    assert all(0 <= q["mc2"] <= 1 and isinstance(q["mc1"], bool) for q in values["questions"])


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("kind", ["bos", "merge over the joint", "chat"])
def test_bytes_merges_and_chat(kind, batch_size):
    tokenizer = byte_tokenizer(
        "<s> $A",
        merges=[("?", "Ġ")] if kind == "merge over the joint" else (),
        chat_template=TEMPLATE if kind == "chat" else None,
    )
    model = sharp(tiny_model(vocab_size=300))
    prompts, answers = ["Q?", "Who is it?", ""], [["ab", "\ncd", "e"], ["I", "you\n"], ["x", "yz"]]
    data = contrast(
        QUESTIONS[:3],
        IDS[:3],
        prompt=prompts,
        positives=[row[:1] for row in answers],
        negatives=[row[1:] for row in answers],
    )
    result = evaluate_multiple_choice(model, tokenizer, data, batch_size=batch_size)
    encoded = encode_answers(tokenizer, prompts, answers)
    for question, texts, row in zip(result.questions, answers, encoded, strict=True):
        expected = [literal_score(model, one.input_ids, one.prompt_length) for one in row]
        assert question.log_likelihoods == pytest.approx(dict(zip(texts, expected, strict=True)), abs=1e-4)
    if kind == "merge over the joint":
        assert encoded[0][0].prompt_ids != encoded[0][1].prompt_ids


def test_models_without_a_cache_run_the_prompt_with_each_answer(llama, monkeypatch):
    expected = evaluate_multiple_choice(llama, TOKENIZER, contrast())
    original = type(llama.model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.past_key_values = None
        return output

    monkeypatch.setattr(type(llama.model), "forward", forward)
    found = evaluate_multiple_choice(llama, TOKENIZER, contrast())
    for one, other in zip(found.questions, expected.questions, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)


def test_unequal_numbers_of_answers(llama):
    encoded = encode_answers(TOKENIZER, ["w3 w4", "w5 w6", "w7"], [["w8"], ["w9", "w10 w11", "w12"], ["w13"]])
    scores = answer_log_likelihoods(llama, encoded, batch_size=2)
    assert [len(row) for row in scores] == [1, 3, 1]
    for row, answers in zip(scores, encoded, strict=True):
        assert row == pytest.approx([literal_score(llama, a.input_ids, a.prompt_length) for a in answers], abs=1e-4)


# Perplexity


TEXTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12", "w13 w14"]


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_single_passes(family):
    model = sharp(tiny_model(family))
    encoded = [[int(word[1:]) for word in line.split()] for line in TEXTS]
    total = -sum(literal_score(model, ids, 1) for ids in encoded)
    expected = math.exp(total / sum(len(ids) - 1 for ids in encoded))
    for batch_size in (1, 2, 64):
        assert perplexity(model, TOKENIZER, iter(TEXTS), batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_perplexity_counts_what_follows_bos():
    model, tokenizer = sharp(tiny_model(vocab_size=300)), byte_tokenizer("<s> $A")
    ids = tokenizer("é")["input_ids"]
    assert ids[0] == 0 and len(ids) == 3
    expected = math.exp(-literal_score(model, ids, 1) / 2)
    assert perplexity(model, tokenizer, ["é"]) == pytest.approx(expected, rel=1e-5)


# The model afterwards, and bad input


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_in_its_mode(llama, failing):
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]

    def fail(module, args):
        assert not module.training and not torch.is_grad_enabled()
        if failing:
            raise RuntimeError("out of memory")

    llama.model.layers[2].mlp.register_forward_pre_hook(fail)
    for call in (
        lambda: evaluate_multiple_choice(llama, TOKENIZER, contrast()),
        lambda: perplexity(llama, TOKENIZER, TEXTS),
    ):
        if failing:
            with pytest.raises(RuntimeError, match="out of memory"):
                call()
        else:
            call()
        assert [module.training for module in llama.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sequences_that_are_too_long_are_refused(family):
    model = tiny_model(family)
    model.config.max_position_embeddings = 64
    question = ([3] * 61, [[4] * 3], [[5]], None)
    evaluate_multiple_choice(model, TOKENIZER, contrast([question], [0]))
    perplexity(model, TOKENIZER, [text([3] * 64)])
    question[1][0].append(4)
    with pytest.raises(ValueError, match="the longest prompt and answer has 65 tokens, the model takes 64"):
        evaluate_multiple_choice(model, TOKENIZER, contrast([question], [0]))
    with pytest.raises(ValueError, match="has 65 tokens, the model takes 64"):
        perplexity(model, TOKENIZER, [text([3] * 65)])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_sizes(llama, batch_size):
    match = f"batch_size must be at least 1, got {batch_size}"
    with pytest.raises(ValueError, match=match):
        evaluate_multiple_choice(llama, TOKENIZER, contrast(), batch_size=batch_size)
    with pytest.raises(ValueError, match=match):
        perplexity(llama, TOKENIZER, TEXTS, batch_size=batch_size)


def test_nothing_to_evaluate(llama):
    with pytest.raises(ValueError, match="the contrast set is empty"):
        evaluate_multiple_choice(llama, TOKENIZER, contrast().select([]))
    for texts in ([], ["w3"], [""]):
        with pytest.raises(ValueError, match="perplexity needs texts of at least two tokens"):
            perplexity(llama, TOKENIZER, texts)


# Batches


def test_batches_cost_least():
    """Against all ways to cut a few sequences into batches."""
    generator = random.Random(0)
    for _ in range(50):
        lengths = sorted((generator.randint(1, 30) for _ in range(generator.randint(1, 8))), reverse=True)
        most, pass_tokens = generator.randint(1, 5), generator.choice([1, 8, 40])

        def cost(batches, lengths=lengths, pass_tokens=pass_tokens):
            return sum(lengths[b.start] * (b.stop - b.start) + pass_tokens for b in batches)

        ways = []
        for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
            ways.append([slice(*pair) for pair in itertools.pairwise(edges)])
        allowed = [way for way in ways if all(b.stop - b.start <= most for b in way)]
        found = cheapest_batches(lengths, most, pass_tokens)
        assert found in allowed and cost(found) == min(map(cost, allowed))
