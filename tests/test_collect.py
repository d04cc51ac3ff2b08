"""Collected activations are those of plain forward passes, each unique sequence is run once, and an interrupted
collection goes on to the same bytes."""

import json
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from datasets import Dataset
from edits import EDITS, at, edited_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_prompts import TEMPLATE, byte_tokenizer, word_tokenizer
from tiny import FAMILIES, base_logits, logits, tiny_model, vivid_model
from transformers import GenerationConfig

import peft_edit.files
from peft_edit import ActivationStore, SEAConfig, collect_activations, edit_strength, fingerprint
from peft_edit.activations import batches as schedule
from peft_edit.activations import neutral as generating
from peft_edit.activations.store import FORMAT_VERSION, ShardFile, shards
from peft_edit.data import CONTRAST_FEATURES
from peft_edit.files import LOCK
from peft_edit.models.run import batch_answers


# The word "w5" is token 5, so that the tests know every id without the tokenizer.
TOKENIZER = word_tokenizer([f"w{i}" for i in range(1, 64)])
MLP_OUTPUTS = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "gemma": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
}
BLOCKS = {name: output.partition("{}")[0] + "{}" for name, output in MLP_OUTPUTS.items()}
SITES = {"mlp": MLP_OUTPUTS, "block": BLOCKS}

# prompt, positives, negatives, neutral; prompts of several lengths, answers that share their beginning
QUESTIONS = [
    ([3, 4, 5], [[6, 7], [8]], [[6, 9, 10], [11], [6, 7, 12]], [13, 14]),
    ([3], [[15, 16, 17, 18]], [[19]], [20]),
    ([21, 22, 23, 24, 25, 26], [[27], [28, 29]], [[30, 31]], [32, 33, 34]),
    ([35, 36], [[6]], [[37, 38, 39], [40]], [41]),
    ([3, 4, 5], [[42]], [[43]], [44]),  # a prompt that occurred before
]
IDS = [10, 3, 7, 25, 4]


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def contrast(questions=QUESTIONS, ids=IDS, **columns):
    rows = [
        {
            **dict.fromkeys(CONTRAST_FEATURES),
            "id": row_id,
            "prompt": text(prompt),
            "positives": [text(answer) for answer in positives],
            "negatives": [text(answer) for answer in negatives],
            "neutral": None if neutral is None else text(neutral),
        }
        for row_id, (prompt, positives, negatives, neutral) in zip(ids, questions, strict=True)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Dataset.from_list(rows, features=CONTRAST_FEATURES)


def without_neutral(*places):
    return [(*q[:3], None) if i in places else q for i, q in enumerate(QUESTIONS)]


class Literal:
    """What modules give for one sequence, without padding: (s, d) each."""

    def __init__(self, model, *names):
        self.model, self.names, self.known = model, names, {}

    def __call__(self, ids, name=None):
        if tuple(ids) not in self.known:
            rows, handles = {}, []
            for module_name in self.names:
                module = self.model.get_submodule(module_name)
                handles.append(module.register_forward_hook(self._keep(rows, module_name, len(ids))))
            with torch.no_grad():
                self.model(input_ids=torch.tensor([ids]))
            for handle in handles:
                handle.remove()
            self.known[tuple(ids)] = rows
        return self.known[tuple(ids)][name or self.names[0]]

    @staticmethod
    def _keep(rows, name, length):
        def hook(module, args, output):
            output = output[0] if isinstance(output, (tuple, list)) else output
            rows[name] = output.reshape(length, -1).clone()  # Falcon adds to it in place

        return hook


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@contextmanager
def recorded(decoder):
    """The (input_ids, attention_mask) of each call of a decoder."""
    calls = []
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs["input_ids"], kwargs["attention_mask"])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def sequences_of(calls):
    return [tuple(ids[mask.bool()].tolist()) for batch, masks in calls for ids, mask in zip(batch, masks, strict=True)]


def hooks_of(model):
    return [(n, list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()]


def files(path):
    found = path.iterdir() if path.exists() else ()
    return {file.name: file.read_bytes() for file in found if file.name != LOCK}


def expected_pairs(question, answers):
    prompt, positives, negatives, _ = question
    chosen = product(positives, negatives) if answers == "all" else [(positives[0], negatives[0])]
    return [(prompt + positive, prompt + negative) for positive, negative in chosen]


# The very site


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_single_forward_passes(tmp_path, family, site):
    model = tiny_model(family)
    names = {layer: SITES[site][family].format(layer) for layer in range(3)}
    literal = Literal(model, *names.values())
    for i, batching in enumerate(({}, {"batch_size": 2}, {"max_tokens_per_batch": 13}, {"batch_size": 1})):
        found = collect_activations(
            model, TOKENIZER, contrast(), tmp_path / str(i), site=site, answers="all", neutral="text", **batching
        )
        assert found.modules == names
        assert (found.layers, found.hidden_size, found.site) == ([0, 1, 2], 32, site)
        assert len(found) == 6 + 1 + 2 + 2 + 1
        for layer, name in names.items():
            rows, questions = {"positive": [], "negative": [], "neutral": []}, []
            for row_id, question in zip(IDS, QUESTIONS, strict=True):
                for positive, negative in expected_pairs(question, "all"):
                    rows["positive"].append(literal(positive, name)[-1])
                    rows["negative"].append(literal(negative, name)[-1])
                    rows["neutral"].append(literal(question[0] + question[3], name)[-1])
                    questions.append(row_id)
            for sign, expected in rows.items():
                close(getattr(found, sign)(layer), torch.stack(expected))
            assert found.questions().tolist() == questions


def test_the_last_block_is_taken_before_the_final_norm(tmp_path, llama):
    with torch.no_grad():
        llama.model.norm.weight.fill_(3.0)
    found = collect_activations(llama, TOKENIZER, contrast(), tmp_path, site="block", neutral="text")
    ids = torch.tensor([QUESTIONS[0][0] + QUESTIONS[0][1][0]])
    with torch.no_grad():
        after_norm = llama(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        close(llama.model.norm(found.positive(2)[0]), after_norm)
    assert not torch.allclose(found.positive(2)[0], after_norm, atol=1e-2)


def test_layers_and_other_modules(tmp_path, llama):
    some = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "some", layers=range(1, 3), neutral="prompt")
    assert some.layers == [1, 2]
    wide = collect_activations(
        llama, TOKENIZER, contrast(), tmp_path / "wide", layers=2, target_modules=["up_proj"], neutral="prompt"
    )
    assert (wide.layers, wide.hidden_size) == ([2], 48)
    ids = QUESTIONS[1][0] + QUESTIONS[1][1][0]
    close(wide.positive(2)[1], Literal(llama, "model.layers.2.mlp.up_proj")(ids)[-1])
    with pytest.raises(ValueError, match=r"different widths, \[32, 48\]"):
        collect_activations(
            llama, TOKENIZER, contrast(), tmp_path / "mixed", target_modules=r".*(1.*down|2.*up)_proj", neutral="prompt"
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_store(tmp_path, llama, dtype):
    exact = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", neutral="text")
    found = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "b", neutral="text", dtype=dtype)
    assert torch.equal(found.positive(1), exact.positive(1).to(getattr(torch, dtype)))
    assert found.metadata["dtype"] == dtype


@pytest.mark.parametrize("tokens", ["last", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(tmp_path, llama, dtype, tokens):
    exact = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", neutral="text", tokens=tokens)
    found = collect_activations(llama.to(dtype), TOKENIZER, contrast(), tmp_path / "b", neutral="text", tokens=tokens)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05 * float(exact.positive(1).abs().max())
    torch.testing.assert_close(found.positive(1), exact.positive(1), atol=tolerance, rtol=0)


# Which tokens


def test_mean_and_random_tokens_are_taken_from_the_answer(tmp_path, llama):
    stores = {
        (tokens, seed): collect_activations(
            llama, TOKENIZER, contrast(), tmp_path / f"{tokens}{seed}", tokens=tokens, seed=seed, answers="all"
        )
        for tokens, seed in [("mean", 0), *(("random", seed) for seed in range(6))]
    }
    literal = Literal(llama, MLP_OUTPUTS["llama"].format(1))
    pairs = [(len(q[0]), ids) for q in QUESTIONS for ids in expected_pairs(q, "all")]
    places = {}
    for sign, which in (("positive", 0), ("negative", 1)):
        for i, (start, ids) in enumerate(pairs):
            answer = literal(ids[which])[start:]
            close(getattr(stores["mean", 0], sign)(1)[i], answer.mean(dim=0))
            for seed in range(6):
                distances = (answer - getattr(stores["random", seed], sign)(1)[i]).abs().amax(dim=1)
                assert distances.min() < 1e-5
                places.setdefault(tuple(ids[which]), []).append(int(distances.argmin()))
    # every answer that demonstrates several times shows the same token, and longer answers show various ones
    assert len(set(places[(3, 15, 16, 17, 18)])) > 1
    first_answer = [i for i, (_, ids) in enumerate(pairs) if ids[0] == [3, 4, 5, 6, 7]]
    for seed in range(6):
        shown = stores["random", seed].positive(1)[first_answer]
        assert len(first_answer) == 3 and torch.equal(shown, shown[:1].expand_as(shown))


def test_every_answer_token_once_and_the_pairs_of_the_same_place(tmp_path, llama):
    found = collect_activations(llama, TOKENIZER, contrast(), tmp_path, tokens="answer", site="block")
    literal = Literal(llama, BLOCKS["llama"].format(1))
    expected, questions = [], []
    for row_id, (prompt, positives, negatives, _) in zip(IDS, QUESTIONS, strict=True):
        for positive, negative in product(positives, negatives):
            shorter = min(len(positive), len(negative))
            first = next((i for i in range(shorter) if positive[i] != negative[i]), shorter)
            for place in range(first, shorter):
                at = len(prompt) + place
                expected.append((literal(prompt + negative)[at], literal(prompt + positive)[at]))
                questions.append(row_id)
    pairs = found.pairs()
    assert pairs.shape == (len(expected), 2) and len(found) == len(expected)
    assert found.questions().tolist() == questions
    rows = found.answer_tokens(1)
    close(rows[pairs[:, 0]], torch.stack([negative for negative, _ in expected]))
    close(rows[pairs[:, 1]], torch.stack([positive for _, positive in expected]))
    assert torch.equal(found.negative(1), rows[pairs[:, 0]]) and torch.equal(found.positive(1), rows[pairs[:, 1]])
    assert len(rows) == sum(len(answer) for q in QUESTIONS for answer in (*q[1], *q[2]))
    assert found.metadata["answers"] == "all" and found.metadata["neutral"] is None


def test_answers_of_which_one_begins_the_other_make_no_pairs(tmp_path, llama):
    questions = [([3], [[4, 5]], [[4, 5, 6], [4, 7]], None)]
    found = collect_activations(llama, TOKENIZER, contrast(questions, [0]), tmp_path / "a", tokens="answer")
    assert len(found) == 1 and len(found.answer_tokens(0)) == 7
    with pytest.raises(ValueError, match="no pair of answers differs"):
        collect_activations(
            llama, TOKENIZER, contrast([([3], [[4]], [[4, 5]], None)], [0]), tmp_path / "b", tokens="answer"
        )
    assert not (tmp_path / "b").exists()


def test_a_merge_over_the_joint_makes_the_first_place_count(tmp_path):
    # "? " is one token with these answers and none with the prompt alone: the prompts' ids differ, no place is skipped
    tokenizer = byte_tokenizer("<s> $A", merges=[("?", "Ġ")])
    model = tiny_model("llama", vocab_size=300)
    data = contrast([([], [[]], [[]], None)], [0], prompt=["Q?"], positives=[["ab"]], negatives=[["\nab"]])
    found = collect_activations(model, tokenizer, data, tmp_path, tokens="answer")
    assert found.metadata["prompt_format"] == "plain"
    assert len(found) == 2  # "ab" against "\na", the first of which follow "? " and "?"


# Which answers


def test_random_answers_are_those_of_the_seed(tmp_path, llama):
    literal = Literal(llama, MLP_OUTPUTS["llama"].format(0))
    shown = set()
    for seed in range(5):
        found = collect_activations(
            llama, TOKENIZER, contrast(), tmp_path / str(seed), answers="random", seed=seed, neutral=None
        )
        again = collect_activations(
            llama, TOKENIZER, contrast(), tmp_path / f"{seed} again", answers="random", seed=seed, neutral=None
        )
        assert torch.equal(found.positive(0), again.positive(0)) and len(found) == len(QUESTIONS)
        negatives = [literal(QUESTIONS[0][0] + answer)[-1] for answer in QUESTIONS[0][2]]
        distances = [float((row - found.negative(0)[0]).abs().max()) for row in negatives]
        assert min(distances) < 1e-5
        shown.add(distances.index(min(distances)))
    assert len(shown) > 1


def test_first_answers(tmp_path, llama):
    found = collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral=None)
    literal = Literal(llama, MLP_OUTPUTS["llama"].format(2))
    for i, question in enumerate(QUESTIONS):
        ((positive, negative),) = expected_pairs(question, "first")
        close(found.positive(2)[i], literal(positive)[-1])
        close(found.negative(2)[i], literal(negative)[-1])
    with pytest.raises(ValueError, match="has no neutral activations"):
        found.neutral(0)


# Neutral activations


def literal_greedy(model, prompt, steps, stop):
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids


def generating_model(family, stop):
    """A model whose greedy answers are of various lengths."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    # `generate` fills in from here what it is not told; none of it is greedy.
    model.generation_config = GenerationConfig(
        eos_token_id=stop, repetition_penalty=4.0, min_new_tokens=6, num_beams=2, do_sample=True, max_length=4
    )
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_neutral_is_the_end_of_the_greedy_answer(tmp_path, family):
    free = [literal_greedy(generating_model(family, None), q[0], 5, []) for q in QUESTIONS]
    # one token that ends some answers at once and one that ends some later
    stop = [free[0][len(QUESTIONS[0][0])], free[2][-1]]
    model = generating_model(family, stop)
    own = model.generation_config
    found = collect_activations(
        model, TOKENIZER, contrast(), tmp_path, neutral="generated", max_new_tokens=5, batch_size=2
    )
    assert model.generation_config is own
    literal = Literal(model, MLP_OUTPUTS[family].format(1))
    for i, question in enumerate(QUESTIONS):
        ids = literal_greedy(model, question[0], 5, stop)
        close(found.neutral(1)[i], literal(ids)[-1])
        if i in (0, 4):
            assert ids == question[0]  # it ended at once: the last prompt token


def answered(model, prompts, steps, batch_size=8):
    """Greedy answers to prompts, in their order."""
    parts = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    return [answer for batch in batch_answers(model, TOKENIZER, prompts, parts, steps) for answer in batch]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_answers_are_those_of_generate(family):
    model = generating_model(family, 9)
    prompts = [q[0] for q in QUESTIONS]
    found = answered(model, prompts, 6)
    model.generation_config = GenerationConfig(eos_token_id=9, pad_token_id=9)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        generated = output[0, len(prompt) :].tolist()
        assert answer == (generated[: generated.index(9)] if 9 in generated else generated)


def test_a_model_without_an_end_of_sequence_answers_in_full(llama):
    llama.generation_config = GenerationConfig()
    assert [len(answer) for answer in answered(llama, [[4, 5], [3]], 7, batch_size=1)] == [7, 7]
    llama.generation_config = None
    assert len(answered(llama, [[3]], 7)[0]) <= 7
    assert llama.generation_config is None


def test_neutral_text_prompt_and_auto(tmp_path, llama):
    literal = Literal(llama, MLP_OUTPUTS["llama"].format(2))
    data = contrast(without_neutral(1, 3))
    found = {
        neutral: collect_activations(
            llama, TOKENIZER, data, tmp_path / neutral, neutral=neutral, max_new_tokens=3
        ).neutral(2)
        for neutral in ("prompt", "auto", "generated")
    }
    for i, (prompt, _, _, neutral) in enumerate(QUESTIONS):
        close(found["prompt"][i], literal(prompt)[-1])
        close(found["generated"][i], literal(literal_greedy(llama, prompt, 3, [2]))[-1])
        if i in (1, 3):
            close(found["auto"][i], found["generated"][i])
        else:
            close(found["auto"][i], literal(prompt + neutral)[-1])


@pytest.mark.parametrize(("lacking", "chosen"), [((), "text"), (range(5), "generated"), ((1, 3), "text and generated")])
def test_the_store_records_the_neutral_that_was_chosen(tmp_path, llama, lacking, chosen):
    data = contrast(without_neutral(*lacking))
    assert len(data) == 5
    found = collect_activations(llama, TOKENIZER, data, tmp_path / "a", max_new_tokens=2)
    assert found.metadata["neutral"] == chosen
    if chosen != "text and generated":  # what was chosen may be asked for as well
        again = collect_activations(llama, TOKENIZER, data, tmp_path / "a", max_new_tokens=2, neutral=chosen)
        assert again.metadata == found.metadata


def test_only_the_prompts_that_need_it_are_answered_and_each_once(tmp_path, llama, monkeypatch):
    asked = []
    original = generating.batch_answers

    def greedy(model, tokenizer, prompts, batches, *others):
        asked.extend(list(prompts[i]) for batch in batches for i in batch)
        return original(model, tokenizer, prompts, batches, *others)

    monkeypatch.setattr(generating, "batch_answers", greedy)
    collect_activations(llama, TOKENIZER, contrast(without_neutral(0, 1, 4)), tmp_path / "a")
    assert asked == [[3, 4, 5], [3]]
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "b")
    collect_activations(llama, TOKENIZER, contrast(without_neutral(0)), tmp_path / "c", tokens="answer")
    assert len(asked) == 2


# What is run


@pytest.mark.parametrize(
    "arguments",
    [
        {"neutral": "text", "answers": "all"},
        {"neutral": "prompt", "answers": "all", "tokens": "mean"},
        {"neutral": "prompt"},
        {"neutral": None, "answers": "all"},
        {"tokens": "answer"},
    ],
    ids=str,
)
def test_each_unique_sequence_is_run_once_without_the_head(tmp_path, llama, arguments):
    used = []
    llama.lm_head.register_forward_hook(lambda *call: used.append(call))
    with recorded(llama.model) as calls:
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, **arguments)
    which = "all" if arguments.get("tokens") == "answer" else arguments.get("answers", "first")
    expected = {tuple(ids) for q in QUESTIONS for pair in expected_pairs(q, which) for ids in pair}
    if arguments.get("neutral") == "text":
        expected |= {tuple(q[0] + q[3]) for q in QUESTIONS}
    if arguments.get("neutral") == "prompt":
        expected |= {tuple(q[0]) for q in QUESTIONS}
    assert sorted(sequences_of(calls)) == sorted(expected)
    assert used == []


@pytest.mark.parametrize("limits", [(None, 8192), (3, 8192), (None, 20), (2, 9), (None, 1)])
def test_batches_keep_within_their_limits(tmp_path, llama, limits):
    batch_size, max_tokens = limits
    with recorded(llama.model) as calls:
        data = contrast(without_neutral(*range(5)))
        collect_activations(
            *(llama, TOKENIZER, data, tmp_path / "generated"),
            max_new_tokens=2,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens,
        )
    shapes = [tuple(ids.shape) for ids, _ in calls]
    generated = [shapes[i - 1] for i in range(1, len(shapes)) if shapes[i][1] == 1 and shapes[i - 1][1] > 1]
    generated = [(rows, length + 2) for rows, length in generated]
    arguments = {"batch_size": batch_size, "max_tokens_per_batch": max_tokens}
    with recorded(llama.model) as calls:
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", neutral="prompt", answers="all", **arguments)
    for shapes in (generated, [tuple(ids.shape) for ids, _ in calls]):
        assert shapes
        assert all(rows <= (batch_size or rows) for rows, _ in shapes)
        assert all(rows == 1 or rows * length <= max_tokens for rows, length in shapes)
        if max_tokens == 8192:
            assert max(rows for rows, _ in shapes) == (batch_size or sum(rows for rows, _ in shapes))


def test_the_longest_sequences_are_run_first(tmp_path, llama):
    with recorded(llama.model) as calls:
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="text", batch_size=1)
    lengths = [ids.shape[1] for ids, _ in calls]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("neutral", ["text", "generated"])
def test_the_model_is_left_as_it_was(tmp_path, llama, neutral, failing):
    llama.train()
    llama.model.layers[1].eval()
    calls = []

    def fail_later(module, args):
        assert not module.training and not torch.is_grad_enabled()
        calls.append(args)
        if failing and len(calls) > 1:
            raise RuntimeError("out of memory")

    llama.model.layers[1].mlp.register_forward_pre_hook(fail_later)
    before, config = hooks_of(llama), llama.generation_config
    modes = [module.training for module in llama.modules()]
    weights = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    arguments = {"neutral": neutral, "batch_size": 1}
    if failing:
        with pytest.raises(RuntimeError, match="out of memory"):
            collect_activations(llama, TOKENIZER, contrast(), tmp_path, **arguments)
    else:
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, **arguments)
    assert hooks_of(llama) == before and llama.generation_config is config
    assert [module.training for module in llama.modules()] == modes
    assert all(torch.equal(parameter, weights[name]) for name, parameter in llama.named_parameters())
    assert torch.is_grad_enabled() and len(calls) > 1


# Adapted models


@pytest.mark.parametrize("site", SITES)
def test_with_an_active_edit_rows_are_what_the_edit_receives(tmp_path, site):
    data, plain = contrast(), tiny_model("falcon")
    before = collect_activations(plain, TOKENIZER, data, tmp_path / "plain", site=site, neutral="text")
    model = get_peft_model(
        tiny_model("falcon"), SEAConfig(site=site, init_weights=False, projections="negative", rescale="none")
    )
    after = collect_activations(model, TOKENIZER, data, tmp_path / "edited", site=site, neutral="text")
    assert after.metadata["active_adapters"] == ["default"] and before.metadata["active_adapters"] == []
    assert after.metadata["fingerprint"] == before.metadata["fingerprint"] == fingerprint(plain)
    assert after.modules == before.modules
    close(after.positive(0), before.positive(0))
    assert not torch.allclose(after.positive(1), before.positive(1), atol=1e-4)

    # the input of the second edit, seen from the edit itself
    received = []
    bare = model.get_base_model()
    layer = bare.get_submodule(SITES[site]["falcon"].format(1))
    layer = layer if site == "mlp" else layer.sea
    original = layer.edit
    layer.edit = lambda h, name: received.append(h) or original(h, name)
    with torch.no_grad():
        model(input_ids=torch.tensor([QUESTIONS[0][0] + QUESTIONS[0][1][0]]))
    del layer.edit
    close(after.positive(1)[0], received[0].reshape(-1, 32)[-1])

    with model.disable_adapter():
        disabled = collect_activations(model, TOKENIZER, data, tmp_path / "off", site=site, neutral="text")
    assert disabled.metadata["active_adapters"] == []
    close(disabled.positive(2), before.positive(2))


@pytest.mark.parametrize("around", [True, False], ids=["below LoRA", "alone"])
@pytest.mark.parametrize("edit", [edit for edit in EDITS if at(edit) == "mlp"])
def test_rows_are_unedited_where_lora_lies_around_the_edit(tmp_path, edit, around):
    """The LoRA adapter is the identity, so that the first site's rows are those of the bare model."""
    model = edited_model(edit)
    model = get_peft_model(model.get_base_model(), LoraConfig(target_modules=["down_proj"])) if around else model
    rows = [
        collect_activations(adapted, TOKENIZER, contrast(), tmp_path / name, neutral="text", layers=0)
        for name, adapted in (("plain", vivid_model()), ("edited", model))
    ]
    close(rows[1].positive(0), rows[0].positive(0))
    assert not torch.allclose(logits(model), base_logits(), atol=1e-3)


def test_another_methods_adapter_is_part_of_what_an_edit_receives(tmp_path, llama):
    llama.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "lora")
    alone = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "lora", neutral="text")
    ids = QUESTIONS[0][0] + QUESTIONS[0][1][0]
    close(alone.positive(0)[0], Literal(llama, "model.layers.0.mlp.down_proj")(ids)[-1])

    llama.add_adapter(SEAConfig(init_weights=False), "sea")
    llama.set_adapter(["lora", "sea"])
    both = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "both", neutral="text")
    assert both.metadata["active_adapters"] == ["lora", "sea"]
    close(both.positive(0), alone.positive(0))
    assert not torch.allclose(both.positive(1), alone.positive(1), atol=1e-4)


# Interruptions


SMALL = {"batch_size": 2, "neutral": "generated", "answers": "all", "max_new_tokens": 3}


class Killed(Exception):
    pass


def kill_after(monkeypatch, shards):
    """Fail when so many shards have their names."""
    original, published = ShardFile.publish, []

    def publish(self):
        if len(published) == shards:
            raise Killed
        published.append(self.path)
        return original(self)

    monkeypatch.setattr(ShardFile, "publish", publish)


@pytest.fixture
def shard_a_batch(monkeypatch):
    monkeypatch.setattr(schedule, "SHARD_BYTES", 1)


@pytest.fixture
def whole(tmp_path, llama, shard_a_batch):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "whole", **SMALL)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("tokens", ["last", "answer"])
@pytest.mark.parametrize("shards", [0, 1, 4])
def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path, llama, shard_a_batch, monkeypatch, shards, tokens):
    arguments = SMALL | {"tokens": tokens}
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "whole", **arguments)
    path = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, shards)
        collect_activations(llama, TOKENIZER, contrast(), path, **arguments)
    with pytest.raises(ValueError, match="not collected completely"):
        ActivationStore(path)
    assert len([*path.glob("shard-*")]) == shards and not json.loads((path / "meta.json").read_text())["complete"]

    head = []
    llama.lm_head.register_forward_hook(lambda *call: head.append(call))
    with recorded(llama.model) as calls:
        collect_activations(llama, TOKENIZER, contrast(), path, **arguments)
    index = load_file(path / "index.safetensors")
    planned = [tuple(ids.tolist()) for ids in index["token_ids"].split(index["sequence_lengths"].tolist())]
    assert sequences_of(calls) == planned[2 * shards :]
    assert files(path) == files(tmp_path / "whole") and head == []


@pytest.mark.parametrize(
    "name",
    ["meta.json", "generated-00000.json", "generated-00001.json", "index.safetensors", "shard-00002.safetensors"],
)
def test_a_file_that_was_half_written_is_written_again(tmp_path, llama, whole, monkeypatch, name):
    original = peft_edit.files.publish

    def publish(temporary, final):
        if final.name == name:
            temporary.write_bytes(b"half")
            raise Killed
        original(temporary, final)

    path = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module in (peft_edit.files, shards):
            patch.setattr(module, "publish", publish)
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    assert not (path / name).exists()
    collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    assert files(path) == whole


def test_answers_that_were_generated_are_kept(tmp_path, llama, whole, monkeypatch):
    path, generate, calls = tmp_path / "killed", llama.generate, []

    def count(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            raise Killed
        return generate(*args, **kwargs)

    monkeypatch.setattr(llama, "generate", count)
    with pytest.raises(Killed):
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    assert (path / "generated-00000.json").exists()
    collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    assert len(calls) == 1 + 2 and files(path) == whole  # four different prompts, two in a batch


@pytest.mark.parametrize("damage", ["truncated", "altered", "longer", "header", "missing"])
def test_a_damaged_shard_of_an_incomplete_store_is_collected_again(tmp_path, llama, whole, monkeypatch, caplog, damage):
    path = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    shard = path / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[:-5])
    if damage == "longer":
        shard.write_bytes(content + b"0")
    if damage in ("altered", "header"):
        content[-1 if damage == "altered" else 20] ^= 1
        shard.write_bytes(content)
    with recorded(llama.model) as calls:
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    assert files(path) == whole
    assert len(calls) == sum(name.startswith("shard") for name in whole) - 3
    assert ("shard-00002.safetensors is damaged: it is collected again" in caplog.text) == (damage != "missing")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_of_a_complete_store_what_is_missing_is_collected_again(tmp_path, llama, shard_a_batch, damage):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, **SMALL)
    before, shard = files(tmp_path), tmp_path / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[:-5])
    with recorded(llama.model) as calls:  # other batches than those of the store are no matter
        found = collect_activations(llama, TOKENIZER, contrast(), tmp_path, **SMALL | {"batch_size": 3})
    assert len(calls) == 1 and files(tmp_path) == before and len(found.positive(0)) == len(found)


def test_a_damaged_index_is_named(tmp_path, llama, whole, monkeypatch):
    path = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    index = path / "index.safetensors"
    content = bytearray(index.read_bytes())
    index.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"index\.safetensors cannot be read"):
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    content[-3] ^= 1  # another token id, which nothing but the checksum tells
    index.write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.safetensors is damaged: delete it"):
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
    for _ in range(2):  # of the interrupted collection, then of the complete one
        index.unlink()
        collect_activations(llama, TOKENIZER, contrast(), path, **SMALL)
        assert files(path) == whole


@pytest.mark.parametrize("tokens", ["last", "mean", "answer"])
def test_shards_do_not_change_what_is_read(tmp_path, llama, monkeypatch, tokens):
    arguments = {"tokens": tokens, "neutral": "text", "answers": "all", "batch_size": 2}
    one = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "one", **arguments)
    monkeypatch.setattr(schedule, "SHARD_BYTES", 1000)
    many = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "many", **arguments)
    assert len(one.metadata["shards"]) == 1 and len(many.metadata["shards"]) > 2
    for layer in range(3):
        for sign in ("positive", "negative", "neutral") if tokens != "answer" else ("positive", "negative"):
            assert torch.equal(getattr(one, sign)(layer), getattr(many, sign)(layer))
    if tokens == "answer":
        assert torch.equal(one.answer_tokens(1), many.answer_tokens(1)) and torch.equal(one.pairs(), many.pairs())


def test_a_complete_store_is_used_as_it_is(tmp_path, llama):
    first = collect_activations(llama, TOKENIZER, contrast(), tmp_path, **SMALL)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with recorded(llama.model) as calls:
        again = collect_activations(llama, TOKENIZER, contrast(), tmp_path, **SMALL)
    assert calls == [] and torch.equal(first.positive(0), again.positive(0))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


ARGUMENTS = {"neutral": "text", "answers": "all", "batch_size": 4}
OTHER = {
    "sites": {"site": "block"},
    "tokens": {"tokens": "mean"},
    "neutral": {"neutral": "prompt"},
    "answers": {"answers": "first"},
    "modules": {"layers": [0]},
    "max_new_tokens": {"max_new_tokens": 4},
    "dtype": {"dtype": "bfloat16"},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 3},
    "max_tokens_per_batch": {"max_tokens_per_batch": 7},
}


# The batches of a complete store are history; those of an incomplete one decide how it goes on.
BATCHES = ("batch_size", "max_tokens_per_batch")
CHANGES = [(name, True) for name in OTHER if name not in BATCHES] + [(name, False) for name in ("seed", *BATCHES)]


@pytest.mark.parametrize(("name", "complete"), CHANGES)
def test_a_store_of_other_arguments_is_kept_unless_it_is_to_be_replaced(tmp_path, llama, monkeypatch, name, complete):
    data, arguments = contrast(), ARGUMENTS | OTHER[name]
    if complete:
        collect_activations(llama, TOKENIZER, data, tmp_path / "a", **ARGUMENTS)
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, 0)
            collect_activations(llama, TOKENIZER, data, tmp_path / "a", **ARGUMENTS)
    before = files(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"other arguments \(.*\b{name} is .* there, .* here.*resume=False") as error:
        collect_activations(llama, TOKENIZER, data, tmp_path / "a", **arguments)
    assert "\n" not in str(error.value) and files(tmp_path / "a") == before
    collect_activations(llama, TOKENIZER, data, tmp_path / "a", **arguments, resume=False)
    collect_activations(llama, TOKENIZER, data, tmp_path / "b", **arguments)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_complete_store_is_reused_with_other_batches(tmp_path, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, **ARGUMENTS)
    before = files(tmp_path)
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, **ARGUMENTS | {"batch_size": 1})
    assert files(tmp_path) == before


def test_other_data_models_and_tokenizers_are_noticed(tmp_path, llama):
    def collect(model=llama, tokenizer=TOKENIZER, data=None):
        return collect_activations(model, tokenizer, data or contrast(), tmp_path, neutral="prompt")

    collect()
    with pytest.raises(ValueError, match="data_fingerprint is"):
        collect(data=contrast(QUESTIONS[:-1], IDS[:-1]))
    with pytest.raises(ValueError, match="data_fingerprint is"):
        collect(tokenizer=word_tokenizer([f"w{i}" for i in range(63, 0, -1)]))
    with pytest.raises(ValueError, match="fingerprint is"):
        collect(tiny_model(seed=1))
    with pytest.raises(ValueError, match="active_adapters is"):
        collect(get_peft_model(tiny_model(), SEAConfig()))


def test_other_weights_configurations_and_strengths_of_an_adapter_are_noticed(tmp_path):
    def adapted(seed=0, **changes):
        base = tiny_model()
        torch.manual_seed(seed)
        return get_peft_model(base, SEAConfig(init_weights=False, **changes))

    def collect(model):
        return collect_activations(model, TOKENIZER, contrast(), tmp_path / "store", neutral="prompt")

    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    collect(model)
    collect(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"))  # the same, from disk
    collect(model.get_base_model())
    with edit_strength(model, 2.0), pytest.raises(ValueError, match="adapters_fingerprint is"):
        collect(model)
    for other in (adapted(seed=1), adapted(rescale="none")):
        with pytest.raises(ValueError, match="adapters_fingerprint is"):
            collect(other)
    native = tiny_model()
    native.load_adapter(str(tmp_path / "adapter"))
    collect(native)


def test_another_chat_template_is_noticed(tmp_path):
    model, data = tiny_model(vocab_size=300), contrast(QUESTIONS[:1], IDS[:1])
    tokenizer = byte_tokenizer("<s> $A", chat_template=TEMPLATE)
    found = collect_activations(model, tokenizer, data, tmp_path, neutral="prompt")
    assert found.metadata["prompt_format"] == "chat"
    tokenizer.chat_template = TEMPLATE.replace("</s>", "")
    with pytest.raises(ValueError, match="data_fingerprint is"):
        collect_activations(model, tokenizer, data, tmp_path, neutral="prompt")
    with pytest.raises(ValueError, match="prompt_format is 'chat' there, 'plain' here"):
        collect_activations(model, tokenizer, data, tmp_path, neutral="prompt", prompt_format="plain")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "meta.json", "index.safetensors.txt", "shard-00000.safetensors"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, llama, name, resume):
    (tmp_path / name).write_text('{"mine": 1}')
    with recorded(llama.model) as calls, pytest.raises(ValueError, match=r"is not empty|is damaged"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="generated", resume=resume)
    assert files(tmp_path) == {name: b'{"mine": 1}'}
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / name, neutral="generated", resume=resume)
    assert calls == []  # it is noticed before any work


def test_a_store_is_replaced_only_by_data_that_can_be_collected(tmp_path, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="has no neutral text"):
        collect_activations(llama, TOKENIZER, contrast(without_neutral(0)), tmp_path, neutral="text", resume=False)
    assert files(tmp_path) == before


def test_a_store_with_something_else_beside_it_is_not_replaced(tmp_path, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"also holds notes\.txt"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt", resume=False)
    assert files(tmp_path) == before


def test_the_metadata_of_a_collected_store(tmp_path, llama):
    llama.config._name_or_path, llama.config._commit_hash = "user/name", "abc123"
    found = collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="text", dtype="bfloat16")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta == found.metadata
    expected = {
        "format_version": FORMAT_VERSION,
        "complete": True,
        "model": "user/name",
        "revision": "abc123",
        "fingerprint": fingerprint(llama),
        "sites": ["mlp"],
        "tokens": "last",
        "neutral": "text",
        "answers": "first",
        "prompt_format": "plain",
        "dtype": "bfloat16",
        "hidden_size": 32,
        "active_adapters": [],
        "data": {
            **dict.fromkeys(("name", "subset", "split", "files")),
            **{"rows": len(QUESTIONS), "of_rows": None},
        },
        "modules": {"mlp": {str(i): f"model.layers.{i}.mlp.down_proj" for i in range(3)}},
    }
    assert {name: meta[name] for name in expected} == expected
    assert [set(shard) for shard in meta["shards"]] == [{"file", "first_row", "rows", "sha256"}]
    assert not [name for name in files(tmp_path) if name.startswith(".")]


# Bad input


UNKNOWN = {
    "site": "heads",
    "tokens": "first",
    "neutral": "best",
    "answers": "best",
    "dtype": "float64",
    "prompt_format": "llama",
    "max_new_tokens": 0,
    "batch_size": 0,
    "max_tokens_per_batch": 0,
    "layers": 3,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_values_are_named(tmp_path, llama, name):
    words = "lower layers_to_transform" if name == "layers" else rf"{name} must be .*got {UNKNOWN[name]!r}"
    with pytest.raises(ValueError, match=words) as error:
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", **{name: UNKNOWN[name]})
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_data_that_cannot_be_collected(tmp_path, llama):
    with pytest.raises(ValueError, match="the contrast set is empty"):
        collect_activations(llama, TOKENIZER, contrast().select([]), tmp_path / "a")
    with pytest.raises(ValueError, match="row 25 has no neutral text"):
        collect_activations(llama, TOKENIZER, contrast(without_neutral(3)), tmp_path / "a", neutral="text")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_sequence_longer_than_the_model_takes_is_refused(tmp_path, family):
    model = tiny_model(family)
    model.config.max_position_embeddings = 64
    questions = [([3] * 60, [[4] * 4], [[5]], [6] * 4)]
    collect_activations(model, TOKENIZER, contrast(questions, [0]), tmp_path / "fits", neutral="text")
    collect_activations(
        model, TOKENIZER, contrast(questions, [0]), tmp_path / "generated", neutral="generated", max_new_tokens=4
    )
    with pytest.raises(ValueError, match=r"row 9: prompt and generated answer has 65 tokens.*: lower max_new_tokens"):
        collect_activations(
            model, TOKENIZER, contrast(questions, [9]), tmp_path / "long", neutral="generated", max_new_tokens=5
        )
    questions[0][1][0].append(7)
    with pytest.raises(ValueError, match="row 9: prompt and answer has 65 tokens, the model takes 64: leave the row"):
        collect_activations(model, TOKENIZER, contrast(questions, [9]), tmp_path / "long", neutral="text")
    assert not (tmp_path / "long").exists()


def test_activations_that_are_not_finite_name_their_layer(tmp_path, llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1: the activations \(mlp\) of neutral, question 7 are not finite"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="text")


def test_activations_too_large_for_the_store_name_their_layer(tmp_path, llama):
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight.mul_(1e9)
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", neutral="text")
    with pytest.raises(ValueError, match=r"layer 2: .*not finite: .*store in a wider dtype"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "b", neutral="text", dtype="float16")


def test_data_that_are_no_contrast_set_are_refused(llama, tmp_path):
    raw = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    with pytest.raises(ValueError, match=r"needs the columns id, positives, .* too: load it with load_contrast_set"):
        collect_activations(llama, TOKENIZER, raw, tmp_path / "store")
    assert not (tmp_path / "store").exists()
