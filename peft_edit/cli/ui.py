from __future__ import annotations

from contextlib import suppress
from threading import Event
from typing import Annotated

from ..chatting.serving import ServingOptions
from ..chatting.settings import Sampling
from . import common
from .chat import Prompts


def ui(
    model: common.LoadedModelOptions,
    sampling: Sampling,
    serving: ServingOptions,
    prompts: Prompts,
    adapter: Annotated[
        list[str] | None,
        {"help": "Adapter to choose from, the first of which edits at first. May be repeated.", "repeated": True},
    ] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Talk to a base model and its edit side by side on a page in the browser.

    Example: peft-edit ui meta-llama/Llama-2-7b-chat-hf --adapter sea-truthful --adapter hpr-truthful
    """
    from ..chatting import Chat, ChatModels
    from ..chatting.page import ChatPage, launch

    serving.check_free()
    base, tokenizer = common.load_model(model)
    chat = Chat(ChatModels(base, tokenizer, allow_fingerprint_mismatch), prompts)
    page = ChatPage(chat, adapter or (), sampling, any_folder=serving.is_private).build()
    url = launch(page, serving)
    print(f"Page: {url} (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        wait()
    page.close(verbose=False)


def wait() -> None:
    """Wait for Ctrl-C."""
    Event().wait()


COMMANDS = [ui]
