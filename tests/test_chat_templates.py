"""Answers stand where the chat template itself writes them, whatever the template."""

import datetime
import json
import sys
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as rendering
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from test_prompts import byte_tokenizer
from tiny import tiny_model
from tokenizers import pre_tokenizers

from peft_edit import cli, collect_activations, evaluate_multiple_choice, load_contrast_set
from peft_edit.activations.arguments import CollectArguments
from peft_edit.data import chat
from peft_edit.data.prompts import PromptOptions, encode_answers, encode_prompts, resolve_prompt_format, settled
from peft_edit.models import run


USER = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}</U>"
ANSWER = "{% elif m.role == 'assistant' %}"
END = "{% endif %}{% endfor %}"
OPEN = "{% if add_generation_prompt %}<A>{% endif %}"
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
# template, text before an answer to "Where?", text of the answer " there "
FORMS = {
    "common": (f"{USER}{ANSWER}<A>{{{{ m.content }}}}</A>{END}{OPEN}", "<U>Where?</U><A>", " there "),
    "no generation prompt": (f"{USER}{ANSWER}<A>{{{{ m.content }}}}</A>{END}", "<U>Where?</U><A>", " there "),
    "content parts": (
        f"{USER.replace('{{ m.content }}', PARTS)}{ANSWER}<A>{PARTS}</A>{END}{OPEN}",
        "<U>Where?</U><A>",
        " there ",
    ),
    "opens thoughts": (
        f"{USER}{ANSWER}<A>{{{{ m.content }}}}</A>{END}{OPEN.replace('<A>', '<A><think>')}",
        "<U>Where?</U><A>",
        " there ",
    ),
    "writes empty thoughts": (
        f"{USER}{ANSWER}<A><think>\n\n</think>\n\n{{{{ m.content | trim('\n') }}}}</A>{END}{OPEN}",
        "<U>Where?</U><A><think>\n\n</think>\n\n",
        " there ",
    ),
    "channel": (
        f"{USER}{ANSWER}<A><|channel|>final<|message|>{{{{ m.content }}}}</A>{END}{OPEN}",
        "<U>Where?</U><A><|channel|>final<|message|>",
        " there ",
    ),
    "space": (
        f"{USER.replace('<U>', '[INST] ').replace('</U>', ' [/INST]')}{ANSWER}{{{{ ' ' + m.content }}}}</s>{END}",
        "[INST] Where? [/INST]",
        "  there ",
    ),
    "strips": (f"{USER}{ANSWER}<A>{{{{ m.content.strip() }}}}</A>{END}{OPEN}", "<U>Where?</U><A>", "there"),
    "trims": (f"{USER}{ANSWER}<A>{{{{ m.content | trim }}}}</A>{END}{OPEN}", "<U>Where?</U><A>", "there"),
    "marks generations": (
        f"{USER}{ANSWER}<A>{{% generation %}}{{{{ m.content }}}}</A>{{% endgeneration %}}{END}{OPEN}",
        "<U>Where?</U><A>",
        " there ",
    ),
}
SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
DATED = f"{{{{ strftime_now('%d %b %Y') }}}}{FORMS['common'][0]}"


def contrast(n=2):
    rows = [{"prompt": f"Question {i}?", "positives": ["yes, sure"], "negatives": ["no"]} for i in range(n)]
    return load_contrast_set(Dataset.from_list(rows))


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_stands_where_the_template_writes_it(form):
    template, before, answer = FORMS[form]
    tokenizer = byte_tokenizer(chat_template=template)
    [[encoded]] = encode_answers(tokenizer, ["Where?"], [[" there "]])
    assert tokenizer.decode(encoded.prompt_ids) == before
    assert tokenizer.decode(encoded.answer_ids) == answer
    assert encode_prompts(tokenizer, ["Where?"]) == [encoded.prompt_ids]


def test_the_test_has_all_templates():
    assert len(SHIPPED) >= 40


def rendered(tokenizer, turns):
    """A conversation in the template's own tokens, with contents as texts and in parts, where it takes both."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": role, "content": content(text)} for role, text in turns]
        try:
            yield tokenizer.apply_chat_template(messages, return_dict=False)
        except (TypeError, UndefinedError):
            continue


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_templates_in_wide_use(file):
    tokenizer = byte_tokenizer(chat_template=file.read_text(encoding="utf-8"))
    prompts, answers = ["Where is it?", "Who is she?"], ["It is in Paris.", "A\n\nqueen, I think"]
    rows = encode_answers(tokenizer, prompts, [answers] * 2)
    for prompt, row, alone in zip(prompts, rows, encode_prompts(tokenizer, prompts), strict=True):
        for answer, encoded in zip(answers, row, strict=True):
            assert tokenizer.decode(encoded.answer_ids).strip() == answer
            assert encoded.prompt_ids == alone and prompt in tokenizer.decode(alone)
            whole = rendered(tokenizer, [("user", prompt), ("assistant", answer)])
            assert encoded.input_ids in (ids[: len(encoded.input_ids)] for ids in whole)
    assert rows[0][0].prompt_ids != rows[1][0].prompt_ids


@given(prompt=st.text("ab? \n", min_size=1).filter(str.strip), answer=st.text("ab \n", min_size=1).filter(str.strip))
@pytest.mark.parametrize("form", ["common", "space", "strips", "content parts"])
def test_prompt_and_answer_are_the_rendered_conversation(form, prompt, answer):
    tokenizer = byte_tokenizer(chat_template=FORMS[form][0])
    [[encoded]] = encode_answers(tokenizer, [prompt], [[answer]])
    content = (lambda text: [{"type": "text", "text": text}]) if form == "content parts" else str
    turns = [{"role": "user", "content": content(prompt)}, {"role": "assistant", "content": content(answer)}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.startswith(tokenizer.decode(encoded.input_ids))
    assert tokenizer.decode(encoded.answer_ids).strip() == answer.strip()


def test_white_space_before_an_answer_is_cut_into_tokens_as_it_is_there():
    """GPT-2's pattern splits two new lines before a word, and not at the end of a text."""
    template = f"{USER}{ANSWER}<A>\n\n{{{{ m.content }}}}</A>{END}"
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")], chat_template=template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    [[encoded]] = encode_answers(tokenizer, ["Where?"], [["there"]])
    assert tokenizer.decode(encoded.prompt_ids) == "<U>Where?</U><A>\n\n"
    assert tokenizer.decode(encoded.answer_ids) == "there"
    assert encode_prompts(tokenizer, ["Where?"]) == [encoded.prompt_ids]


@pytest.mark.parametrize(
    "template, messages, message",
    [
        ("<U></U><A>{{ messages[-1].content }}", None, "leaves out, or changes, the message 'Where\\?' of the user"),
        (
            FORMS["common"][0].replace("{{ m.content }}</U>", "{{ m.content | upper }}</U>"),
            None,
            "leaves out, or changes",
        ),
        (FORMS["common"][0], [("system", "Be brief."), ("user", "Where?")], "leaves out a message of the system"),
        (f"{USER}{END}{OPEN}", None, "writes an answer 0 times"),
        (FORMS["common"][0] * 2, None, "writes an answer 2 times"),
        (FORMS["trims"][0].replace("trim", "upper"), None, "writes an answer 0 times"),
        (FORMS["common"][0].replace("<A>{{ m.content", "<A>{{ m.content.split('</think>')[-1]"), None, "as 'so'"),
        ("{{ nothing.there }}", None, "row 7: the tokenizer's chat template fails \\(UndefinedError"),
        ({"rag": "a", "tool_use": "b"}, None, "has no one chat template"),
    ],
)
def test_templates_that_lose_something_are_refused(template, messages, message):
    tokenizer = byte_tokenizer(chat_template=template)
    messages = messages and [[{"role": role, "content": content} for role, content in messages]]
    with pytest.raises(ValueError, match=message) as caught:
        encode_answers(tokenizer, ["Where?"], [["it is</think>so"]], messages=messages, row_ids=[7])
    assert "\n" not in str(caught.value) and "prompt_format='plain'" in str(caught.value)
    assert encode_answers(tokenizer, ["Where?"], [["it is</think>so"]], prompt_format="plain")


@pytest.mark.parametrize(
    "template, turns, role",
    [
        # its own word "user" is no message
        ("{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
         [("user", "user")], "user"),
        ("{% for m in messages[-2:] %}{{ m.content }} {% endfor %}",
         [("user", "Is it?"), ("assistant", "Yes"), ("user", "Is it? why?")], "user"),
        ("{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }} {% endif %}{% endfor %}",
         [("user", "food"), ("assistant", "soup"), ("user", "rice")], "assistant"),
        (FORMS["common"][0], [("system", "food"), ("user", "food of koge ?")], "system"),
    ],
)  # fmt: skip
def test_a_message_is_not_taken_for_written_where_its_text_stands_by_chance(template, turns, role):
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(ValueError, match=f"row 3: .* leaves out a message of the {role}"):
        encode_prompts(byte_tokenizer(chat_template=template), [""], messages=[messages], row_ids=[3])


def test_a_switch_that_the_template_takes_out_of_the_system_message_is_fine():
    template = FORMS["common"][0].replace("{% for", "<S>{{ messages[0].content.replace('/no_think', '') }}{% for", 1)
    messages = [{"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": "Where?"}]
    tokenizer = byte_tokenizer(chat_template=template)
    [ids] = encode_prompts(tokenizer, [""], messages=[messages])
    assert tokenizer.decode(ids) == "<S>Be brief. <U>Where?</U><A>"


def test_what_depends_on_the_answer_around_it_is_told():
    template = FORMS["common"][0].replace("<A>{{ m.content", "<A>[{{ m.content | length }}]{{ m.content")
    with pytest.raises(ValueError, match=r"row 0: what .* around an answer depends on the answer, as with 'here'"):
        encode_answers(byte_tokenizer(chat_template=template), ["Where?"], [["here"]])


def test_parts_are_not_written_as_python_writes_them():
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
    with pytest.raises(ValueError, match=r"row 0: .* takes contents as text, got parts"):
        encode_prompts(byte_tokenizer(chat_template=FORMS["common"][0]), [""], messages=[messages])
    [ids] = encode_prompts(byte_tokenizer(chat_template=FORMS["content parts"][0]), [""], messages=[messages])
    assert byte_tokenizer().decode(ids) == "<U>Where?</U><A>"


def test_a_template_that_asks_for_no_answer_renders_conversations():
    template = FORMS["common"][0].replace(OPEN, "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}")
    tokenizer = byte_tokenizer(chat_template=template)
    assert encode_prompts(tokenizer, ["Where?"]) == encode_prompts(tokenizer, ["Where?"])


@pytest.mark.parametrize("template", [5, ["a"]])
def test_a_template_that_is_no_text(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat_template must be text, got"):
        encode_prompts(tokenizer, ["Where?"])


def test_thoughts_of_earlier_answers_may_be_left_out():
    template = FORMS["common"][0].replace("<A>{{ m.content", "<A>{{ m.content.split('</think>')[-1]")
    tokenizer = byte_tokenizer(chat_template=template)
    turns = [("user", "Where?"), ("assistant", "<think>Hm</think>There."), ("user", "When?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    [ids] = encode_prompts(tokenizer, [""], messages=[messages])
    assert tokenizer.decode(ids) == "<U>Where?</U><A>There.</A><U>When?</U><A>"


@pytest.mark.parametrize("template", ["", " \n"])
def test_an_empty_template_is_none(template):
    tokenizer = byte_tokenizer(chat_template=template)
    assert resolve_prompt_format(tokenizer) == "plain"
    with pytest.raises(ValueError, match="prompt_format='chat' needs a chat template"):
        encode_prompts(tokenizer, ["Where?"], prompt_format="chat")


def test_a_named_default_template_is_used():
    named = byte_tokenizer(chat_template={"default": FORMS["common"][0], "rag": "x"})
    single = byte_tokenizer(chat_template=FORMS["common"][0])
    assert encode_prompts(named, ["Where?"]) == encode_prompts(single, ["Where?"])


@pytest.mark.parametrize(
    "form, said",
    [
        ("common", []),
        ("space", []),
        ("opens thoughts", ["writes '' before an answer in a conversation, and '<think>' where it asks for one"]),
        ("channel", ["writes '<|channel|>final<|message|>' before an answer"]),
        ("no generation prompt", ["writes '<A>' before an answer in a conversation, and '' where"]),
        ("marks generations", []),
    ],
)
def test_it_is_said_once_where_answers_stand(form, said, caplog, monkeypatch):
    monkeypatch.setattr(chat, "_TOLD", set())
    tokenizer = byte_tokenizer(chat_template=FORMS[form][0])
    for _ in range(2):
        encode_answers(tokenizer, ["Where?", "When?"], [["there"], []])
    assert len(caplog.messages) == len(said)
    assert all(text in message for text, message in zip(said, caplog.messages, strict=True))


def test_it_is_said_where_the_template_marks_something_else(caplog, monkeypatch):
    monkeypatch.setattr(chat, "_TOLD", set())
    template = FORMS["marks generations"][0].replace("{{ m.content }}</A>{% endg", "</A>{% endg")
    template = template.replace("<A>{% gen", "<A>{{ m.content }}{% gen")
    [[encoded]] = encode_answers(byte_tokenizer(chat_template=template), ["Where?"], [["there"]])
    assert byte_tokenizer().decode(encoded.answer_ids) == "there"
    assert caplog.messages == ["the chat template marks other text as generated than the answer: the answer is used"]


# Tokenizers without a template of their own


class OwnMethod(type(byte_tokenizer())):
    """As mistral-common's: no `chat_template`, and token ids that never were text."""

    def apply_chat_template(
        self, conversation, continue_final_message=False, tokenize=True, return_dict=True, tone=None
    ):
        if conversation[-1]["role"] == "assistant" and not continue_final_message:
            raise ValueError("Expected last role User or Tool")
        assert tokenize and not return_dict
        ids = [0]
        for message in conversation:
            mark = self.convert_tokens_to_ids({"user": "<|user|>", "assistant": "<|assistant|>"}[message["role"]])
            ids += [mark, *self(message["content"], add_special_tokens=False)["input_ids"]]
        return ids if tone is None else [*ids[:1], *self(tone, add_special_tokens=False)["input_ids"], *ids[1:]]


class Marked(OwnMethod):
    """As those of mistral-common that keep SentencePiece's marks when they decode."""

    def decode(self, *args, **kwargs):
        return super().decode(*args, **kwargs).replace(" ", "\u2581")


def test_marks_of_white_space_are_no_change():
    tokenizer = Marked(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    [[encoded]] = encode_answers(tokenizer, ["Where is it?"], [["over there"]])
    assert tokenizer.decode(encoded.answer_ids) == "over\u2581there"


def test_a_tokenizer_that_writes_conversations_itself():
    tokenizer = OwnMethod(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    assert tokenizer.chat_template is None and resolve_prompt_format(tokenizer) == "chat"
    [row, [empty]] = encode_answers(tokenizer, ["Where?", "When?"], [["here", " there"], ["now"]])
    assert [tokenizer.decode(answer.answer_ids) for answer in row] == ["here", " there"]
    assert tokenizer.decode(row[0].prompt_ids) == "<s><|user|>Where?<|assistant|>"
    assert tokenizer.decode(empty.input_ids) == "<s><|user|>When?<|assistant|>now"
    [with_tone] = encode_prompts(tokenizer, ["Where?"], template_arguments={"tone": "calm"})
    assert tokenizer.decode(with_tone) == "<s>calm<|user|>Where?<|assistant|>"
    with pytest.raises(ValueError, match="row 0: the tokenizer's chat template fails \\(TypeError"):
        encode_prompts(tokenizer, ["Where?"], template_arguments={"mood": "calm"})


# Arguments of the template


THINKING = FORMS["common"][0].replace(
    "<A>{{ m.content",
    "<A>{% if enable_thinking is not defined or enable_thinking %}<think></think>{% endif %}{{ m.content",
)


def test_template_arguments():
    tokenizer = byte_tokenizer(chat_template=THINKING)
    texts = [
        tokenizer.decode(encode_prompts(tokenizer, ["Where?"], template_arguments=arguments)[0])
        for arguments in (None, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert texts == ["<U>Where?</U><A><think></think>"] * 2 + ["<U>Where?</U><A>"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"enable_thinkin": False}, "reads no argument 'enable_thinkin' .*did you mean 'enable_thinking'"),
        ({"tokenize": True}, "template_arguments cannot give 'tokenize', which is set here"),
        ({"messages": []}, "template_arguments cannot give 'messages', which is set here"),
        ({"m": 1}, "reads no argument 'm'"),
        ({"": 1}, "reads no argument ''"),
        ({"enable_thinking": float("inf")}, "template_arguments must be a dict of JSON values"),
        ({"chat_template": "x"}, "template_arguments cannot give 'chat_template'"),
        ({"enable_thinking": {1}}, "template_arguments must be a dict of JSON values, or None, got"),
        ("enable_thinking", "template_arguments must be a dict of JSON values, or None, got 'enable_thinking'"),
    ],
)
def test_template_arguments_that_do_nothing_are_refused(arguments, message):
    tokenizer = byte_tokenizer(chat_template=THINKING)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_multiple_choice(tiny_model(vocab_size=300), tokenizer, contrast(), template_arguments=arguments)
    assert "\n" not in str(caught.value)


def test_an_argument_is_read_wherever_it_stands():
    tokenizer = byte_tokenizer(chat_template=FORMS["common"][0] + "{% if\nfoo %}{% endif %}")
    assert encode_prompts(tokenizer, ["Where?"], template_arguments={"foo": True})


def test_a_time_needs_a_template_that_tells_it():
    for tokenizer in (byte_tokenizer(), byte_tokenizer(chat_template=FORMS["common"][0])):
        with pytest.raises(ValueError, match=r"template_time='2026-01-31' has no meaning: .*; leave it out"):
            settled(tokenizer, PromptOptions(template_time="2026-01-31"))


def test_template_arguments_need_a_template(tmp_path):
    with pytest.raises(ValueError, match="template_arguments need prompt_format='chat', which is 'plain'"):
        evaluate_multiple_choice(tiny_model(vocab_size=300), byte_tokenizer(), contrast(), template_arguments={"a": 1})
    with pytest.raises(ValueError, match="template_arguments need prompt_format='chat', which is 'plain'"):
        collect_activations(
            tiny_model(vocab_size=300), byte_tokenizer(), contrast(), tmp_path / "s", template_arguments={"a": 1}
        )
    assert not (tmp_path / "s").exists()


def test_a_store_records_template_arguments_and_is_of_them(tmp_path):
    model, tokenizer = tiny_model(vocab_size=300), byte_tokenizer(chat_template=THINKING)
    options = {"neutral": "prompt", "template_arguments": {"enable_thinking": False}}
    store = collect_activations(model, tokenizer, contrast(), tmp_path, **options)
    assert store.metadata["template_arguments"] == {"enable_thinking": False}
    assert store.metadata["template_time"] is None
    assert len(collect_activations(model, tokenizer, contrast(), tmp_path, **options)) == 2
    with pytest.raises(ValueError, match=r"template_arguments is \{'enable_thinking': False\} there, None here"):
        collect_activations(model, tokenizer, contrast(), tmp_path, neutral="prompt")


def test_commands_take_template_arguments(tmp_path, capsys, monkeypatch):
    tokenizer = byte_tokenizer(chat_template=THINKING)
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Q?", "positives": ["yes"], "negatives": ["no"]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "options.yaml").write_text("template-arguments: {enable_thinking: false}\n")
    given = [str(tmp_path / "model"), str(tmp_path / "data.jsonl"), "--json", str(tmp_path / "results.json")]

    def evaluate(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-edit", "evaluate", *given, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0

    found = []
    for more in (
        [],
        ["--template-arguments", '{"enable_thinking": false}'],
        ["--config", str(tmp_path / "options.yaml")],
    ):
        assert evaluate(*more) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        found.append((results["options"]["template_arguments"], results["questions"][0]["log_likelihoods"]))
    assert found[1] == found[2] and found[1][0] == {"enable_thinking": False}
    assert found[0][0] is None and found[0][1] != found[1][1]
    for value in ("{", "3", '"a"', "[1]"):
        assert evaluate("--template-arguments", value) == 2
        assert "--template-arguments must be a dict of JSON values" in capsys.readouterr().err


# The clock


class Clock(datetime.datetime):
    """Another day at every question."""

    day = 0

    @classmethod
    def now(cls, tz=None):
        Clock.day += 1
        return datetime.datetime(2030, 1, 1) + datetime.timedelta(days=Clock.day)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(rendering, "datetime", Clock)
    monkeypatch.setattr(chat, "datetime", Clock)


def test_a_template_is_told_the_time_that_is_given(clock):
    tokenizer = byte_tokenizer(chat_template=DATED.replace("%d %b %Y", "%A %-d %B %Y, %H:%M"))
    [ids] = encode_prompts(tokenizer, ["Where?"], template_time="2024-07-26T09:05")
    assert tokenizer.decode(ids) == "Friday 26 July 2024, 09:05<U>Where?</U><A>"


@pytest.mark.parametrize(
    "call, expected",
    [
        ("strftime_now(date_format)", "2024 and 26"),
        ("strftime_now('%' ~ 'd')", "26"),
        ("strftime_now('%^a %_d %d%%')", "FRI 26 26%"),
        ("strftime_now('at %%d')", "at %d"),
    ],
)
def test_formats_of_the_time_need_not_stand_in_the_template(call, expected):
    tokenizer = byte_tokenizer(chat_template=f"{{{{ {call} }}}}{FORMS['common'][0]}")
    arguments = {"date_format": "%Y and %d"} if "date_format" in call else None
    [ids] = encode_prompts(tokenizer, ["Where?"], template_time="2024-07-26T09:05", template_arguments=arguments)
    assert tokenizer.decode(ids) == f"{expected}<U>Where?</U><A>"


def test_all_of_a_set_is_of_one_day(clock):
    tokenizer = byte_tokenizer(chat_template=DATED)
    options = settled(tokenizer, PromptOptions())
    [first, second] = encode_answers(tokenizer, ["Where?"] * 2, [["here", "there"]] * 2, **options.of_prompts)
    assert first == second


def test_a_collection_goes_on_after_midnight(tmp_path, clock, monkeypatch):
    model, tokenizer = tiny_model(vocab_size=300), byte_tokenizer(chat_template=DATED)
    with monkeypatch.context() as interrupted:
        interrupted.setattr("peft_edit.activations.neutral.batch_answers", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_activations(model, tokenizer, contrast(), tmp_path / "store")
    begun = json.loads((tmp_path / "store" / "meta.json").read_text())["template_time"]
    store = collect_activations(model, tokenizer, contrast(), tmp_path / "store")
    assert store.metadata["template_time"] == begun
    assert len(collect_activations(model, tokenizer, contrast(), tmp_path / "store")) == len(store)
    again = collect_activations(model, tokenizer, contrast(), tmp_path / "again", template_time=begun)
    assert all(store.positive(layer).equal(again.positive(layer)) for layer in store.layers)
    other = collect_activations(model, tokenizer, contrast(), tmp_path / "other")
    assert other.metadata["template_time"] != begun
    with pytest.raises(ValueError, match=r"template_time is .* there, '2024-07-26' here"):
        collect_activations(model, tokenizer, contrast(), tmp_path / "store", template_time="2024-07-26")


def test_scores_are_of_the_time_that_is_given(clock):
    model, tokenizer = tiny_model(vocab_size=300, initializer_range=0.2), byte_tokenizer(chat_template=DATED)
    scores = [
        evaluate_multiple_choice(model, tokenizer, contrast(), template_time=time).questions[0].log_likelihoods
        for time in ("2024-07-26", "2024-07-26", "2024-07-27")
    ]
    assert scores[0] == scores[1] != scores[2]


def test_a_time_that_is_none():
    with pytest.raises(ValueError, match=r"template_time must be a time in ISO format .*, got 'today'"):
        CollectArguments(template_time="today")


# One path for collection, generation and evaluation


@pytest.mark.parametrize("form", FORMS)
def test_neutral_answers_are_generated_where_answers_stand(form, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(chat_template=FORMS[form][0])
    model, asked = tiny_model(vocab_size=300), []
    original = run.batch_answers
    monkeypatch.setattr("peft_edit.activations.neutral.batch_answers", lambda *a: asked.extend(a[2]) or original(*a))
    data = contrast()
    collect_activations(model, tokenizer, data, tmp_path, max_new_tokens=2)
    [first, _] = encode_answers(tokenizer, data["prompt"], data["positives"])
    assert list(asked[0]) == first[0].prompt_ids


@pytest.mark.parametrize("form", ["channel", "content parts", "space"])
def test_evaluation_reads_the_same_tokens(form, monkeypatch):
    tokenizer, read = byte_tokenizer(chat_template=FORMS[form][0]), []
    monkeypatch.setattr(
        "peft_edit.evaluation.multiple_choice.answer_log_likelihoods",
        lambda model, encoded, **_: read.extend(encoded) or [[0.0, 0.0] for _ in encoded],
    )
    data = contrast()
    evaluate_multiple_choice(tiny_model(vocab_size=300), tokenizer, data)
    assert read == encode_answers(tokenizer, data["prompt"], [["yes, sure", "no"]] * 2)
