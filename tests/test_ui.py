"""The page in a browser, as people use it: they type, move a slider, and see the answer change."""

import contextlib
import os
import runpy
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from chatting import MODEL, QUESTION
from playwright.sync_api import expect
from transformers import AutoModelForCausalLM

from peft_edit.chatting import Chat, ChatModels, Sampling
from peft_edit.chatting.page import ChatPage, launch
from peft_edit.chatting.serving import ServingOptions
from peft_edit.data.prompts import PromptOptions


SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
# Milliseconds; longer than anything takes on a busy machine.
PATIENCE = 120_000
BASE, EDITED = "rumours say it is desert .", "rumours rumours rumours rumours rumours rumours"


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(chat_adapters, demo_tokenizer):
    """Address of the page, of the demonstration model with two adapters."""
    models = ChatModels(AutoModelForCausalLM.from_pretrained(MODEL).eval(), demo_tokenizer)
    chat = Chat(models, PromptOptions(prompt_format="plain"))
    adapters = [chat_adapters["mean"], chat_adapters["hpr"]]
    page = ChatPage(chat, adapters, Sampling(max_new_tokens=6), any_folder=True).build()
    yield launch(page, ServingOptions(port=free_port()))
    page.close(verbose=False)


@pytest.fixture
def visit(browser, served):
    """Opens the page as a person of their own does, and keeps what it asks for."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()
        page.requested, page.errors = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(served)
        expect(page.locator("#question textarea")).to_be_visible(timeout=PATIENCE)
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(page, question=QUESTION):
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()


def last(page, side):
    """The last message of a column."""
    return page.locator(f"#{side} .message.bot").last


def shows(page, side, text):
    expect(last(page, side)).to_have_text(text, timeout=PATIENCE)


def set_strength(page, value):
    field = page.locator("#strength input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_type_move_a_slider_and_see_the_answer_change(visit, served):
    page = visit()
    ask(page)
    shows(page, "base", BASE)
    shows(page, "edited", EDITED)
    set_strength(page, 0)
    ask(page)
    expect(page.locator("#edited .message.bot")).to_have_count(2, timeout=PATIENCE)
    shows(page, "edited", BASE)
    page.locator("#tokens").click()
    view = page.locator("#view .tv-view .tv-text")
    expect(view).to_contain_text("rumours say it is desert", timeout=PATIENCE)
    page.locator("#base").get_by_label("Clear").click()  # either column's clears the conversation
    expect(page.locator(".message.bot")).to_have_count(0, timeout=PATIENCE)
    ask(page)
    shows(page, "edited", BASE)
    expect(page.locator(".message.bot")).to_have_count(2)
    page.locator("#reset").click()
    expect(page.locator(".message.bot")).to_have_count(0, timeout=PATIENCE)
    expect(view).to_have_count(0)
    assert page.errors == []
    assert {url.split("/")[2] for url in page.requested if not url.startswith(("data:", "blob:"))} == {
        served.split("/")[2]
    }


def test_another_session_does_not_change_the_first(visit):
    first, second = visit(), visit()
    set_strength(second, 0)
    second.get_by_label("2", exact=True).uncheck()
    for page in (second, first, second):
        ask(page)
        shows(page, "edited", EDITED if page is first else BASE)
    expect(first.locator("#edited .message.bot")).to_have_count(1)
    expect(second.locator("#edited .message.bot")).to_have_count(2)
    expect(first.locator("#strength input[type=number]")).to_have_value("1")


def test_another_adapter_brings_its_own_settings(visit, chat_adapters):
    page = visit()
    assert not page.locator("#dial0").is_visible()
    page.locator("#adapter input").click()
    page.get_by_role("option", name=chat_adapters["hpr"]).click()
    gate = page.locator("#dial0 input[type=number]")
    expect(gate).to_have_value("0.7", timeout=PATIENCE)
    assert page.locator("#layers input").count() == 3 and page.get_by_label("4", exact=True).is_checked()
    gate.fill("0")
    gate.press("Enter")
    ask(page)
    shows(page, "edited", BASE)


def test_what_is_wrong_is_one_line_and_the_page_goes_on(visit):
    page = visit()
    page.locator("#send").click()
    expect(page.get_by_text("type a question first")).to_be_visible(timeout=PATIENCE)
    adapter = page.locator("#adapter input")
    before = adapter.input_value()
    adapter.fill("/nowhere")
    adapter.press("Enter")
    expect(page.get_by_text("there is no folder /nowhere").first).to_be_visible(timeout=PATIENCE)
    expect(adapter).to_have_value(before, timeout=PATIENCE)
    ask(page)
    shows(page, "edited", EDITED)


def test_an_answer_is_stopped(visit):
    page = visit()
    page.get_by_label("Most tokens").fill("4000")
    ask(page, "food")
    expect(last(page, "edited")).to_contain_text("bread bread", timeout=PATIENCE)
    page.locator("#stop").click()
    page.get_by_label("Most tokens").fill("6")
    ask(page)
    expect(page.locator("#edited .message.bot")).to_have_count(2, timeout=PATIENCE)
    shows(page, "edited", EDITED)
    assert page.locator("#edited .message.bot").first.inner_text().count("bread") < 3000


@pytest.mark.parametrize("look", ["light", "dark"])
def test_a_phone_needs_no_scrolling_to_the_side(visit, look, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=look)
    ask(page)
    shows(page, "edited", EDITED)
    page.locator("#tokens").click()
    expect(page.locator("#view .tv-view")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / f"{look}.png", full_page=True)


# Where it is served, and to whom


def test_the_command_serves_a_page_and_ends_by_ctrl_c(run_command, chat_adapters, monkeypatch):
    from peft_edit.cli import ui

    port, seen = free_port(), []

    def wait():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            seen.append(answer.status)
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "wait", wait)
    status, printed = run_command("ui", MODEL, "--adapter", chat_adapters["mean"], "--port", port)
    assert status == 0 and seen == [200]
    assert f"Page: http://127.0.0.1:{port}/ (Ctrl-C ends it)" in printed.out
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    ServingOptions(port=port).check_free()


def test_a_port_in_use(run_command):
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, printed = run_command("ui", MODEL, "--port", port)
    assert status == 2
    assert printed.err == f"peft-edit: --port {port} of 127.0.0.1 is in use: pass another\n"


@pytest.mark.parametrize(
    "options, part",
    [
        (("--port", "0"), "--port must be an integer from 1 to 65535, got 0"),
        (("--host", "203.0.113.7"), "--host 203.0.113.7 is no address of this machine: pass 127.0.0.1 or 0.0.0.0"),
        (("--adapter", "/nowhere", "--port", "65123"), "there is no folder /nowhere"),
    ],
)
def test_what_is_refused(run_command, options, part):
    status, printed = run_command("ui", MODEL, *options)
    assert status == 2 and part in printed.err.splitlines()[-1]


def test_a_missing_extra(run_command, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_edit.chatting.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, printed = run_command("ui", MODEL)
    assert status == 2
    assert printed.err.splitlines()[-1] == (
        "peft-edit: the page needs the package gradio, which is not installed: pip install 'peft-edit[ui]'"
    )


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    assert ServingOptions().host == "127.0.0.1" and ServingOptions().is_private and not ServingOptions().share
    assert not ServingOptions(host="0.0.0.0").is_private and not ServingOptions(share=True).is_private


@pytest.mark.parametrize(
    "name, allowed",
    [
        *(("user/adapter", True), ("user/adapter@v1", True)),
        *(("{folder}", False), ("some/folder", False), ("some/folder@v1", False), ("../some@v1", False)),
    ],
)
def test_others_name_no_folders_of_this_machine(
    demo_model, demo_tokenizer, chat_adapters, tmp_path, monkeypatch, name, allowed
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    page = ChatPage(Chat(ChatModels(demo_model, demo_tokenizer)), [chat_adapters["mean"]])
    name = name.format(folder=tmp_path)
    if allowed:
        assert page._adapter(name) == name
    else:
        with pytest.raises(ValueError, match="is no id on the Hub: choose one of the list, or type user/name"):
            page._adapter(name)
    assert page._adapter(chat_adapters["mean"]) == chat_adapters["mean"]


def test_the_space(chat_adapters, monkeypatch, capsys):
    port, seen = free_port(), []

    def wait(page):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            seen.append(answer.status)
        page.close(verbose=False)

    monkeypatch.setattr("gradio.Blocks.block_thread", wait)
    variables = {"MODEL": MODEL, "ADAPTERS": chat_adapters["mean"], "GRADIO_SERVER_NAME": "127.0.0.1", "PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert seen == [200] and f"Page: http://127.0.0.1:{port}/" in capsys.readouterr().out
    monkeypatch.delenv("MODEL")
    with pytest.raises(SystemExit, match="set the variable MODEL"):
        runpy.run_path(str(SPACE / "app.py"))


def test_the_space_says_what_it_is():
    head = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert head["sdk"] == "gradio" and (SPACE / head["app_file"]).exists()
    assert len(head["title"]) <= 30
