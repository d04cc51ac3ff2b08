"""Conversations without terminal or page: who answers what, and what is left of it."""

import json
import random
from dataclasses import replace
from threading import Event, Thread

import pytest
import torch
from chatting import MODEL, QUESTION, greedy
from peft import PeftModel
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit import edit_strength
from peft_edit.chatting import BASE, EDITED, Chat, ChatModels, Sampling
from peft_edit.chatting.commands import COMMANDS, is_command, question_of, run_command
from peft_edit.chatting.models import KEPT
from peft_edit.data.prompts import PromptOptions
from peft_edit.explaining import explain_edit


TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def adapters(chat_adapters):
    return chat_adapters


@pytest.fixture(scope="module")
def chat(demo_tokenizer):
    base = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    return Chat(ChatModels(base, demo_tokenizer), PromptOptions(prompt_format="plain"))


@pytest.fixture(scope="module")
def alone(adapters):
    """Name of an adapter to the model as PEFT loads it."""
    return {
        name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), path).eval()
        for name, path in adapters.items()
    }


def ask(chat, conversation, question=QUESTION):
    """The answers to a question, in the order in which their pieces come."""
    answers = {}
    for side, piece in chat.answer(conversation, question, Event()):
        answers[side] = answers.get(side, "") + piece
    return answers


@pytest.mark.parametrize("name", ["mean", "hpr", "lora"])
def test_answers_are_those_of_the_model_without_and_with_the_adapter(chat, adapters, alone, demo_tokenizer, name):
    with alone[name].disable_adapter():
        base = greedy(alone[name], demo_tokenizer)
    edited = greedy(alone[name], demo_tokenizer)
    conversation = chat.begin(adapters[name], Sampling(max_new_tokens=40))
    assert base != edited
    assert ask(chat, conversation) == {BASE: base, EDITED: edited}
    assert list(conversation.turns[0].answers) == [BASE, EDITED]


@pytest.mark.parametrize("name", ["mean", "hpr"])
def test_what_is_set_is_set_while_it_answers_and_for_that_conversation_alone(
    chat, adapters, alone, demo_tokenizer, name
):
    sampling, models = Sampling(max_new_tokens=40), chat.models
    conversation, other = chat.begin(adapters[name], sampling), chat.begin(adapters[name], sampling)
    conversation.settings = models.with_strength(models.with_layers(conversation.settings, [1, 2]), 0.6)
    with edit_strength(alone[name], 0.6, layers=[1, 2]):
        expected = greedy(alone[name], demo_tokenizer)
    assert ask(chat, conversation)[EDITED] == expected != greedy(alone[name], demo_tokenizer)
    assert ask(chat, other)[EDITED] == greedy(alone[name], demo_tokenizer)


@pytest.mark.parametrize("command", ["/strength 0", "/layers none", "/gate 0", "### target layers: none"])
def test_an_edit_that_is_switched_off_answers_as_the_base_model(chat, adapters, command):
    conversation = chat.begin(adapters["hpr"], Sampling(max_new_tokens=20))
    run_command(chat, conversation, command)
    answers = ask(chat, conversation)
    assert answers[EDITED] == answers[BASE]


def test_a_dial_is_the_field_of_the_configuration(chat, adapters, alone, demo_tokenizer):
    conversation = chat.begin(adapters["hpr"], Sampling(max_new_tokens=40))
    adapter = chat.models.adapter(adapters["hpr"])
    before = adapter.config
    assert "gate 0.3" in run_command(chat, conversation, "/gate 0.3")
    alone["hpr"].peft_config["default"].gate = 0.3
    expected = greedy(alone["hpr"], demo_tokenizer)
    alone["hpr"].peft_config["default"].gate = 0.7
    assert ask(chat, conversation)[EDITED] == expected != greedy(alone["hpr"], demo_tokenizer)
    assert adapter.config is before and before.gate == 0.7
    run_command(chat, conversation, "/gate 0.7")
    assert conversation.settings.dials == {}


def test_conversations_that_ask_at_once_do_not_change_each_other(chat, adapters):
    strengths = [0.0, 0.5, 1.0]
    conversations = [chat.begin(adapters["mean"], Sampling(max_new_tokens=30)) for _ in strengths]
    for conversation, strength in zip(conversations, strengths, strict=True):
        conversation.settings = chat.models.with_strength(conversation.settings, strength)
    expected = [ask(chat, conversation) for conversation in conversations]
    assert len({answers[EDITED] for answers in expected}) == len(strengths)
    found = [None] * len(strengths)

    def run(i):
        found[i] = [ask(chat, conversations[i]) for _ in range(2)]

    threads = [Thread(target=run, args=(i,)) for i in range(len(strengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[answers, answers] for answers in expected]


def test_adapters_share_the_weights_of_the_base_model(chat, adapters):
    base = {tensor.data_ptr() for tensor in chat.models.base.parameters()}
    for name in ("mean", "hpr", "lora"):
        model = chat.models.adapter(adapters[name]).model
        assert base <= {tensor.data_ptr() for tensor in model.parameters()}
    assert not any("mean" in name or "hpr" in name or "lora" in name for name, _ in chat.models.base.named_modules())


def test_adapters_that_were_not_used_for_long_are_read_again(demo_model, demo_tokenizer, adapters, tmp_path):
    models = ChatModels(demo_model, demo_tokenizer)
    (tmp_path / "links").mkdir()
    paths = [tmp_path / "links" / str(i) for i in range(KEPT)]
    for path in paths:
        path.symlink_to(adapters["mean"])
    first = models.adapter(adapters["hpr"])
    for path in paths[:-1]:
        models.adapter(str(path))
    assert models.adapter(adapters["hpr"]) is first
    for path in reversed(paths):
        models.adapter(str(path))
    assert models.adapter(adapters["hpr"]) is not first


# The conversation


@pytest.fixture
def templated(demo_model, demo_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    return Chat(ChatModels(demo_model, tokenizer))


def test_each_side_goes_on_with_its_own_answers(templated, adapters):
    conversation = templated.begin(adapters["mean"], Sampling(max_new_tokens=5))
    first = ask(templated, conversation, "food of koge ?")
    assert first[BASE] != first[EDITED]
    for side in (BASE, EDITED):
        ids = templated.prompt_ids(conversation, "and ?", side)
        text = templated.models.tokenizer.decode(ids)
        expected = f"user : food of koge ? assistant : {first[side].strip()} user : and ? assistant :"
        assert (
            text.split()
            == templated.models.tokenizer.decode(
                templated.models.tokenizer(expected, add_special_tokens=False)["input_ids"]
            ).split()
        )
    run_command(templated, conversation, "/reset")
    assert templated.prompt_ids(conversation, "and ?", BASE) == templated.prompt_ids(conversation, "and ?", EDITED)


def test_without_a_template_each_question_stands_alone(chat, adapters):
    conversation = chat.begin(adapters["mean"], Sampling(max_new_tokens=20))
    assert ask(chat, conversation) == ask(chat, conversation)
    assert not chat.remembers


def test_what_is_too_long_is_refused_before_anything_is_answered(chat):
    conversation = chat.begin(None, Sampling(max_new_tokens=4096))
    with pytest.raises(ValueError, match=r"has 41\d\d tokens, the model takes 4096: begin a new one, or allow shorter"):
        ask(chat, conversation)
    assert conversation.turns == []


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(chat, adapters):
    conversation = chat.begin(adapters["mean"], Sampling(max_new_tokens=3000))
    stop, pieces = Event(), {}
    for side, piece in chat.answer(conversation, "food", stop):
        pieces.setdefault(side, []).append(piece)
        stop.set()
    assert set(pieces) == {BASE, EDITED}  # each is stopped by itself
    assert all(len(of_side) < 20 for of_side in pieces.values())
    (turn,) = conversation.turns
    assert turn.answers == {side: "".join(of_side).strip() for side, of_side in pieces.items()}


def test_an_answer_that_nobody_waits_for_ends(chat, adapters):
    conversation = chat.begin(adapters["hpr"], Sampling(max_new_tokens=3000))
    answer = chat.answer(conversation, "food", Event())
    next(answer)
    answer.close()
    assert conversation.turns == []
    assert ask(chat, chat.begin(adapters["hpr"], Sampling(max_new_tokens=2)))


def test_what_the_model_raises_reaches_who_reads(chat, adapters, monkeypatch):
    conversation = chat.begin(adapters["mean"])
    model = chat.models.adapter(adapters["mean"]).model
    monkeypatch.setattr(model.get_base_model(), "generate", lambda **options: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        ask(chat, conversation)
    assert conversation.turns == []


def test_draws_follow_from_the_seed_alone(chat):
    def drawn(seed):
        return ask(chat, chat.begin(None, Sampling(temperature=2.0, seed=seed, max_new_tokens=30)))[BASE]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    answers = [drawn(seed) for seed in (0, 0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert answers[0] == answers[1] and len(set(answers)) == 3
    narrow = Sampling(temperature=2.0, top_p=1e-9, max_new_tokens=30)
    assert ask(chat, chat.begin(None, narrow)) == ask(chat, chat.begin(None, Sampling(max_new_tokens=30)))


def test_tokens_are_those_of_the_last_answer_with_what_was_set_then(chat, adapters, alone, demo_tokenizer):
    conversation = chat.begin(adapters["mean"], Sampling(max_new_tokens=40))
    run_command(chat, conversation, "/layers 1")
    answer = ask(chat, conversation)[EDITED]
    run_command(chat, conversation, "/layers none")
    run_command(chat, conversation, "/base")
    ask(chat, conversation, "food of pola ?")
    shown = run_command(chat, conversation, "/tokens")
    assert "".join(shown.tokens[1:]).strip() == answer
    prompt = chat.prompt_ids(conversation, QUESTION, EDITED)
    with edit_strength(alone["mean"], layers=[1]):
        ids = prompt + demo_tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        expected = explain_edit(alone["mean"], demo_tokenizer, ids)
    assert shown.kl == pytest.approx(expected.kl[len(prompt) - 1 :], abs=1e-5)
    assert [site.layer for site in shown.sites if any(site.touched)] == [1]


# Commands


def test_every_command_is_explained_and_the_help_fits_80_columns(chat, adapters):
    lines = run_command(chat, chat.begin(adapters["hpr"]), "/help").splitlines()
    assert all(len(line) <= 80 for line in lines)
    told = {line.split()[0] for line in lines if not line.startswith(" ")}
    assert told == {command.name for command in COMMANDS} | {"/gate", "//text", "/quit"}
    assert {"/layers", "/strength", "/adapter", "/base", "/seed", "/tokens", "/save", "/history"} <= told


@pytest.mark.parametrize(
    "line, part",
    [
        ("/layrs 1", "there is no command /layrs: did you mean /layers?"),
        ("/qut", "there is no command /qut: did you mean /quit?"),
        ("/LAYRS\t1", "there is no command /layrs: did you mean /layers?"),
        ("/layers 0-99999999999", "layers must be block indices below 10000, got '0-99999999999'"),
        ("/save ~nobody-of-this-name/x.json", "nobody of this name has a home on this machine"),
        ("/gaet 1", "there is no command /gaet: did you mean /gate?"),
        ("/xyzxyz", "there is no command /xyzxyz: /help lists them"),
        ("/layers 9", "layers 9 have no edit: "),
        ("/layers 3", "edits layers 1-2,4"),
        ("/layers", "must be numbers and rising ranges such as 0-3,7, got ''"),
        ("### target layers: x", "must be numbers and rising ranges such as 0-3,7, got 'x'"),
        ("/strength", "/strength takes a number, got nothing"),
        ("/strength much", "/strength takes a number, got 'much'"),
        ("/strength -1", "strength must be a number of 0 or more and finite, got -1.0"),
        ("/strength nan", "strength must be a number of 0 or more and finite, got nan"),
        ("/gate 1.5", "gate must be a number in [0, 1], a probability, got 1.5"),
        ("/alpha 2", "has no alpha to set: the strength multiplies it"),
        ("/seed 1.5", "/seed takes an integer, got '1.5'"),
        ("/seed -1", "/seed must be an integer of at least 0, got -1"),
        ("/length 0", "/length must be an integer of at least 1, got 0"),
        ("/temperature -1", "/temperature must be a number in [0, 100], got -1.0"),
        ("/adapter", "/adapter takes a folder, or an id on the Hub"),
        ("/adapter /nowhere", "there is no folder /nowhere"),
        ("/base maybe", "/base takes on, off or only, got 'maybe'"),
        ("/tokens", "the edit has given no answer yet: ask something first, with an adapter"),
        ("/save", "there is nothing to save yet: ask something first"),
    ],
)
def test_what_commands_refuse(chat, adapters, line, part):
    conversation = chat.begin(adapters["hpr"])
    before = replace(conversation.settings)
    assert is_command(line)
    with pytest.raises(ValueError) as refused:
        run_command(chat, conversation, line)
    assert part in str(refused.value) and "\n" not in str(refused.value)
    assert conversation.settings == before and conversation.turns == []


@pytest.mark.parametrize(
    "name, line, part",
    [
        (None, "/strength 1", "the base model alone has nothing to set: choose an adapter first"),
        (None, "/base off", "/base takes on or only, got 'off'"),
        ("mean", "/gate 0.5", "an adapter of mean-difference, has no gate to set: set its strength"),
        ("lora", "/strength 0.5", "is an adapter of LORA, which has no edit that could be set"),
        ("lora", "/layers 1", "is an adapter of LORA, which has no edit that could be set"),
    ],
)
def test_what_other_adapters_cannot_be_set_to(chat, adapters, name, line, part):
    with pytest.raises(ValueError) as refused:
        run_command(chat, chat.begin(adapters.get(name)), line)
    assert part in str(refused.value)


def test_an_adapter_of_another_model_is_refused_and_the_one_before_stays(adapters, demo_tokenizer):
    other = tiny_model("llama", hidden_size=96, intermediate_size=256, num_hidden_layers=5, vocab_size=992, head_dim=24)
    chat = Chat(ChatModels(other, demo_tokenizer))
    conversation = chat.begin()
    for name in ("mean", "hpr"):
        with pytest.raises(ValueError, match="was fitted on another model"):
            run_command(chat, conversation, f"/adapter {adapters[name]}")
    assert conversation.settings.adapter is None


def test_layers_are_named_in_every_way(chat, adapters):
    conversation = chat.begin(adapters["hpr"])
    for line, layers in (
        ("/layers 1,2", (1, 2)),
        ("/layers 4", (4,)),
        ("/layers none", ()),
        ("/layers all", None),
        ("### Target layers: 2,4", (2, 4)),
        ("###target layers:1-2", (1, 2)),
        ("### target layers: ALL", None),
        ("/layers 1-2,4", None),
    ):
        assert is_command(line)
        run_command(chat, conversation, line)
        assert conversation.settings.layers == layers


def test_another_adapter_edits_as_it_was_saved(chat, adapters):
    conversation = chat.begin(adapters["hpr"])
    for line in ("/strength 0.5", "/layers 1", "/gate 0.1", "/seed 7", "/base"):
        run_command(chat, conversation, line)
    assert (
        run_command(chat, conversation, f"/adapter {adapters['mean']}")
        == f"{adapters['mean']} (mean-difference), layers 1-3, strength 1"
    )
    settings = conversation.settings
    assert (settings.strength, settings.layers, settings.dials, settings.sides) == (1.0, None, {}, (BASE, EDITED))
    assert settings.sampling.seed == 7


def test_who_answers(chat, adapters):
    conversation = chat.begin(adapters["mean"], Sampling(max_new_tokens=3))
    for line, sides in (("/base off", {EDITED}), ("/base", {BASE}), ("/base on", {BASE, EDITED})):
        run_command(chat, conversation, line)
        assert set(ask(chat, conversation)) == sides
    assert [line.split(":")[0].strip() for line in run_command(chat, conversation, "/history").splitlines()] == [
        *("1. home of gumozi ?", "edited", "2. home of gumozi ?", "base", "3. home of gumozi ?", "base", "edited"),
    ]


def test_questions_may_begin_with_a_slash_or_look_like_a_heading():
    assert not is_command("//etc is what ?") and question_of("//etc is what ?") == "/etc is what ?"
    assert not is_command("### heading") and question_of("### heading") == "### heading"
    assert not is_command("and/or") and is_command("/and")


def test_a_conversation_is_saved_with_what_its_answers_follow_from(chat, adapters, tmp_path):
    conversation = chat.begin(adapters["hpr"], Sampling(max_new_tokens=5, seed=random.randrange(9)))
    run_command(chat, conversation, "/gate 0.4")
    answers = ask(chat, conversation)
    path = tmp_path / "new" / "talk.json"
    run_command(chat, conversation, f"/save {path}")
    saved = json.loads(path.read_text())
    assert saved["model"] == str(MODEL) and saved["prompts"]["format"] == "plain"
    assert saved["fingerprint"] and saved["dtype"] == "torch.float32" and list(saved["adapters"]) == [adapters["hpr"]]
    (turn,) = saved["turns"]
    assert turn["question"] == QUESTION and turn["answers"] == {side: text.strip() for side, text in answers.items()}
    assert turn["settings"]["adapter"] == adapters["hpr"] and turn["settings"]["dials"] == {"gate": 0.4}
    assert turn["settings"]["sampling"]["seed"] == conversation.settings.sampling.seed
    ask(chat, conversation)
    run_command(chat, conversation, f"/save {path}")  # its own file may grow
    assert len(json.loads(path.read_text())["turns"]) == 2
    run_command(chat, conversation, "/reset")
    ask(chat, conversation)
    with pytest.raises(ValueError, match="is there already: give another name"):  # another conversation now
        run_command(chat, conversation, f"/save {path}")
    with pytest.raises(ValueError, match="is there already: give another name"):
        other = chat.begin(None, Sampling(max_new_tokens=2))
        ask(chat, other)
        run_command(chat, other, f"/save {path}")
    assert len(json.loads(path.read_text())["turns"]) == 2
