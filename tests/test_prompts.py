from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_edit import collect_activations, evaluate_multiple_choice, load_contrast_set
from peft_edit.data.contexts import QA_PRIMER, join_messages
from peft_edit.data.prompts import encode_answers, encode_prompts, listed_choices, resolve_prompt_format


SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and message.content == 'bad' %}{{ raise_exception('no\nsuch role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(single=None, merges=(), chat_template=None, **special):
    """One token a byte, besides `merges`; `single` is the post-processor's template, such as "<s> $A </s>"."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if single is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer.add_special_tokens(SPECIAL)
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["</s>", *words])}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


PLAIN = {
    "bare": byte_tokenizer(),
    "bos": byte_tokenizer("<s> $A"),
    "eos": byte_tokenizer("$A </s>"),
    "bos and eos": byte_tokenizer("<s> $A </s>"),
    # as in GPT-2's family, where one token is both
    "bos is eos": byte_tokenizer("</s> $A", bos_token="</s>"),
}
FIRST = {"bare": [], "bos": [BOS], "eos": [], "bos and eos": [BOS], "bos is eos": [EOS]}
CHAT = byte_tokenizer("<s> $A </s>", chat_template=TEMPLATE)
texts = st.text(alphabet="ab? \n\té", max_size=6)


def encode_one(tokenizer, prompt, answer, messages=None, prompt_format="auto"):
    return encode_answers(
        tokenizer, [prompt], [[answer]], messages=messages and [messages], prompt_format=prompt_format
    )[0][0]


@pytest.mark.parametrize("kind", PLAIN)
@given(prompt=texts, answer=texts.filter(bool))
def test_plain_ids_are_those_of_the_joined_text(kind, prompt, answer):
    tokenizer = PLAIN[kind]
    encoded = encode_one(tokenizer, prompt, answer)
    space = "" if not prompt or prompt[-1].isspace() or answer[0].isspace() else " "
    body = tokenizer(prompt + space + answer, add_special_tokens=False)["input_ids"]
    if prompt.strip() or FIRST[kind]:
        assert encoded.input_ids == FIRST[kind] + body
    else:
        assert encoded.input_ids == [BOS, *body]  # stands in for the prompt that has no tokens
    assert encoded.prompt_ids + encoded.answer_ids == encoded.input_ids
    assert tokenizer.decode(encoded.answer_ids) == prompt[len(prompt.rstrip()) :] + space + answer
    assert encoded.prompt_ids == encode_prompts(tokenizer, [prompt])[0]


@given(
    prompt=texts.filter(lambda text: text.strip()),
    space=st.text(" \n", min_size=1, max_size=3),
    answer=texts.filter(bool),
)
def test_white_space_belongs_to_the_answer_on_whichever_side_it_was_written(prompt, space, answer):
    prompt = prompt.rstrip()
    assert encode_one(PLAIN["bos"], prompt + space, answer) == encode_one(PLAIN["bos"], prompt, space + answer)


@pytest.mark.parametrize("tokenizer", [*PLAIN.values(), CHAT], ids=[*PLAIN, "chat"])
def test_a_batch_gives_what_single_calls_give(tokenizer):
    prompts, answers = ["  ", "Q?", "A: ", "x"], [["d"], ["a", " b", "ccc"], ["d"], []]
    batch = encode_answers(tokenizer, prompts, answers)
    singles = zip(prompts, answers, strict=True)
    assert batch == [[encode_one(tokenizer, prompt, answer) for answer in row] for prompt, row in singles]
    assert [[one.prompt_ids for one in row] for row in batch] == [
        [ids] * len(row) for ids, row in zip(encode_prompts(tokenizer, prompts), answers, strict=True)
    ]
    assert encode_answers(tokenizer, [], []) == encode_prompts(tokenizer, []) == []


def test_the_tokenizer_is_called_on_all_texts_at_once(monkeypatch):
    calls = []
    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs)
    )
    encode_answers(PLAIN["bos"], ["Q?"] * 50, [["a", "b"]] * 50)
    assert len(calls) == 2  # the batch, and one text to see what the tokenizer puts first


@pytest.mark.parametrize("kind", ["bos", "bos and eos"])
def test_bos_stands_once_where_the_prompt_spells_it_out(kind):
    assert encode_one(PLAIN[kind], "<s>Q?", "a") == encode_one(PLAIN[kind], "Q?", "a")


def test_an_eos_that_the_answer_spells_out_is_kept():
    assert encode_one(PLAIN["bos and eos"], "Q?", "a</s>").answer_ids[-1] == EOS


def test_a_merge_over_the_joint_is_cut_at_the_length_of_the_prompt_alone():
    tokenizer = byte_tokenizer("<s> $A", merges=[("?", "Ġ")])
    encoded = encode_one(tokenizer, "Q?", "ab")
    assert [tokenizer.decode([index]) for index in encoded.input_ids] == ["<s>", "Q", "? ", "a", "b"]
    assert encoded.prompt_length == 3
    with pytest.raises(ValueError, match=r"row 17: the answer ' ' gives no tokens"):
        encode_answers(tokenizer, ["Q?"], [[" "]], row_ids=[17])


def test_word_level_tokenizer():
    tokenizer = word_tokenizer(["colour", "of", "X", "?", "red"])
    encoded = encode_one(tokenizer, "colour of X ?", "red")
    assert (encoded.prompt_ids, encoded.answer_ids) == ([1, 2, 3, 4], [5])
    assert encode_one(tokenizer, "", "red").prompt_ids == [0]  # EOS, where there is no BOS


def test_a_prompt_without_tokens_needs_bos_or_eos():
    tokenizer = word_tokenizer(["red"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0: the prompt gives no tokens"):
        encode_prompts(tokenizer, [" "])
    with pytest.raises(ValueError, match="row 0: the prompt gives no tokens"):
        encode_answers(tokenizer, [" "], [["red"]])


def test_chat_answers_follow_the_generation_prompt_without_end_of_turn():
    encoded = encode_one(CHAT, "Q? ", " a")
    assert CHAT.decode(encoded.prompt_ids) == "<s><|user|>Q? </s><|assistant|>"
    assert CHAT.decode(encoded.answer_ids) == " a"
    assert encoded.input_ids.count(BOS) == 1
    assert encode_prompts(CHAT, ["Q? "]) == [encoded.prompt_ids]


@given(prompt=texts, answer=texts.filter(bool))
def test_chat_ids_are_those_of_the_templates_text(prompt, answer):
    encoded = encode_one(CHAT, prompt, answer)
    turns = [{"role": "user", "content": prompt}]
    template_ids = CHAT.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encoded.prompt_ids == template_ids
    assert CHAT.decode(encoded.answer_ids) == answer


def test_messages_replace_the_prompt():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    chat = encode_one(CHAT, "ignored", "a", messages)
    assert CHAT.decode(chat.prompt_ids) == "<s><|system|>Be brief.</s><|user|>Q?</s><|assistant|>"
    plain = encode_one(CHAT, "ignored", "a", messages, prompt_format="plain")
    assert plain == encode_one(CHAT, join_messages(messages), "a", prompt_format="plain")
    assert CHAT.decode(plain.input_ids) == "<s>Be brief.\nQ? a"
    both = encode_prompts(CHAT, ["Q1", "Q2"], messages=[messages, None])
    assert both == [encode_prompts(CHAT, [""], messages=[messages])[0], encode_prompts(CHAT, ["Q2"])[0]]


def test_prompt_formats():
    assert resolve_prompt_format(CHAT) == resolve_prompt_format(CHAT, "chat") == "chat"
    assert resolve_prompt_format(PLAIN["bos"]) == resolve_prompt_format(CHAT, "plain") == "plain"
    with pytest.raises(
        ValueError, match="must be one of auto, chat, plain, few_shot_qa, lettered_choices, got 'llama'"
    ):
        encode_prompts(CHAT, ["Q?"], prompt_format="llama")
    with pytest.raises(ValueError, match="needs a chat template"):
        encode_prompts(PLAIN["bos"], ["Q?"], prompt_format="chat")


@pytest.mark.parametrize("tokenizer", [*PLAIN.values(), CHAT], ids=[*PLAIN, "chat"])
@pytest.mark.parametrize("prompt", ["R?", "R? "])
def test_an_empty_answer_is_refused(tokenizer, prompt):
    with pytest.raises(ValueError, match="row 1: the answer '' gives no tokens"):
        encode_answers(tokenizer, ["Q?", prompt], [["a"], ["b", ""]])


def test_a_failing_template_names_the_row_in_one_line():
    messages = [{"role": "system", "content": "bad"}]
    with pytest.raises(ValueError, match=r"row 5: the tokenizer's chat template fails .*no such role") as caught:
        encode_prompts(CHAT, ["Q?"], messages=[messages], row_ids=[5])
    assert "\n" not in str(caught.value)


# Named formats


CONTRAST = load_contrast_set(
    Dataset.from_list(
        [
            {
                "prompt": f"Question {n}? ",
                "positives": ["yes", "sure"],
                "negatives": ["no"],
                "mc1_choices": ["yes", "nay"],
            }
            for n in range(400)
        ]
    )
)


@pytest.mark.parametrize("kind", PLAIN)
def test_few_shot_questions_are_plain_text_after_the_primer(kind):
    tokenizer = PLAIN[kind]
    encoded = encode_one(tokenizer, " Where? ", "here", prompt_format="few_shot_qa")
    assert encoded == encode_one(tokenizer, f"{QA_PRIMER}Q: Where?\nA:", "here", prompt_format="plain")
    assert tokenizer.decode(encoded.answer_ids) == " here"
    assert encode_prompts(tokenizer, ["Where?"], prompt_format="few_shot_qa") == [encoded.prompt_ids]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    of_messages = encode_one(tokenizer, "ignored", "here", messages, prompt_format="few_shot_qa")
    assert of_messages == encode_one(tokenizer, "Be brief.\nWhere?", "here", prompt_format="few_shot_qa")


def test_the_primer_is_six_questions_and_answers():
    *examples, end = QA_PRIMER.split("\n\n")
    assert len(examples) == 6 and end == ""
    assert all([line[:3] for line in example.split("\n")] == ["Q: ", "A: "] for example in examples)


@pytest.mark.parametrize("tokenizer", [*PLAIN.values(), CHAT], ids=[*PLAIN, "chat"])
def test_lettered_choices_list_every_answer_and_the_answer_is_its_letter(tokenizer):
    data = CONTRAST.select(range(5))
    choices = listed_choices(data)
    assert choices == [["yes", "sure", "no", "nay"]] * 5
    options = {"prompt_format": "lettered_choices", "choices": choices}
    encoded = encode_answers(tokenizer, data["prompt"], choices, **options)
    prompts = encode_prompts(tokenizer, data["prompt"], **options)
    for n, (row, prompt_ids) in enumerate(zip(encoded, prompts, strict=True)):
        assert all(answer.prompt_ids == prompt_ids for answer in row)
        question, *listed, last = tokenizer.decode(prompt_ids, skip_special_tokens=True).split("\n")
        assert (question, last) == (f"Question {n}?", "Answer:")
        letters = [tokenizer.decode(answer.answer_ids) for answer in row]
        assert sorted(listed) == sorted(
            f"{letter.strip()}. {text}" for letter, text in zip(letters, choices[n], strict=True)
        )
        assert sorted(letters) == [" A", " B", " C", " D"] and listed == sorted(listed)


def test_the_right_choice_is_at_every_letter_about_as_often():
    encoded = encode_answers(
        PLAIN["bos"],
        CONTRAST["prompt"],
        [["yes"]] * len(CONTRAST),
        prompt_format="lettered_choices",
        choices=listed_choices(CONTRAST),
    )
    counts = Counter(row[0].answer_ids[-1] for row in encoded)
    # of 400 with four letters each, 100 is the mean and 8.7 the standard deviation
    assert len(counts) == 4 and all(65 <= count <= 135 for count in counts.values())


@given(choices=st.lists(st.sampled_from("abcdefgh"), min_size=2, unique=True), chooser=st.randoms())
def test_the_order_of_the_letters_is_that_of_the_texts(choices, chooser):
    """Whichever answers are right, and whatever else is encoded: an answer keeps its letter."""
    options = {"prompt_format": "lettered_choices"}
    alone = encode_answers(PLAIN["bos"], ["Q?"], [choices], choices=[choices], **options)[0]
    shuffled = chooser.sample(choices, len(choices))
    beside = encode_answers(PLAIN["bos"], ["R?", "Q?"], [[], choices], choices=[["x", "y"], shuffled], **options)[1]
    assert alone == beside


@pytest.mark.parametrize(
    "choices, answers, message",
    [
        (None, ["a"], "needs the choices of every prompt: pass choices"),
        ([["a", "a"]], ["a"], "row 9: .* lists 2 to 26 choices, got 1: leave the row out"),
        ([[str(n) for n in range(27)]], ["1"], "row 9: .* lists 2 to 26 choices, got 27: leave the row out"),
        ([["a", "b"]], ["a", "they say it is"], "row 9: 'they say it is' is none of the choices .* or another neutral"),
    ],
)
def test_choices_that_cannot_be_listed(choices, answers, message):
    options = {"prompt_format": "lettered_choices", "row_ids": [9]}
    with pytest.raises(ValueError, match=message) as caught:
        encode_answers(PLAIN["bos"], ["Q?"], [answers], choices=choices, **options)
    assert "\n" not in str(caught.value)
    assert len(encode_answers(PLAIN["bos"], ["Q?"], [["a"]], choices=[["a", "b"]], **options)[0]) == 1


def test_evaluation_scores_the_letters():
    tokenizer, model = PLAIN["bos"], tiny_model(vocab_size=300, initializer_range=0.2)
    assert tokenizer.pad_token is None
    data = CONTRAST.select(range(3))
    choices = listed_choices(data)
    result = evaluate_multiple_choice(model, tokenizer, data, prompt_format="lettered_choices")
    options = {"prompt_format": "lettered_choices", "choices": choices}
    for question, row, texts in zip(
        result.questions, encode_answers(tokenizer, data["prompt"], choices, **options), choices, strict=True
    ):
        for answer, text in zip(row, texts, strict=True):
            with torch.no_grad():
                scores = model(torch.tensor([answer.input_ids])).logits[0].log_softmax(dim=-1)
            places = range(answer.prompt_length, len(answer.input_ids))
            expected = sum(float(scores[place - 1, answer.input_ids[place]]) for place in places)
            assert question.log_likelihoods[text] == pytest.approx(expected, abs=1e-4)


def test_a_store_records_the_named_format(tmp_path):
    model = tiny_model(vocab_size=300)
    model.config.max_position_embeddings = 2048
    store = collect_activations(
        model, PLAIN["bos"], CONTRAST.select(range(2)), tmp_path, neutral="prompt", prompt_format="few_shot_qa"
    )
    assert store.metadata["prompt_format"] == "few_shot_qa"
