from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Annotated

from ..chatting.settings import Sampling
from ..data.options import PromptOptions
from . import common
from .explain import PROMPTS
from .options import Run


if TYPE_CHECKING:
    from ..chatting import Chat, Conversation
    from .screen import Screen

Prompts = Annotated[PromptOptions, PROMPTS]
ASKED = "> "
HELLO = "Type a question, or /help. Ctrl-C stops an answer, Ctrl-D or /quit the chat."


def chat(
    model: common.LoadedModelOptions,
    sampling: Sampling,
    prompts: Prompts,
    run: Run,
    adapter: common.Adapter = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Talk to a base model and its edit side by side, also from a pipe. Only /save writes a file.

    Example: peft-edit chat meta-llama/Llama-2-7b-chat-hf --adapter sea-truthful
    """
    from ..chatting import Chat, ChatModels
    from .screen import Screen

    base, tokenizer = common.load_model(model)
    chat = Chat(ChatModels(base, tokenizer, allow_fingerprint_mismatch), prompts)
    Talk(chat, chat.begin(adapter, sampling), Screen(), run).go_on()


@dataclass
class Talk:
    """A conversation at the terminal, or from a pipe: of that the first line that cannot be carried out is the last."""

    chat: Chat
    conversation: Conversation
    screen: Screen
    run: Run

    def go_on(self) -> None:
        """Take lines until there is none."""
        from ..chatting.commands import QUIT, told_settings
        from .screen import at_keyboard, read_line

        self.screen.tell(told_settings(self.chat, self.conversation))
        if at_keyboard():
            self.screen.tell(HELLO)
        while True:
            try:
                line = read_line(ASKED)
                if line is None or line.strip().lower() in QUIT:
                    return
                if not at_keyboard():
                    self.screen.tell(f"{ASKED}{line}")
                self._take(line.strip())
            except KeyboardInterrupt:
                if not at_keyboard():
                    raise
                self.screen.tell("")
            # RuntimeError is what torch raises, such as where memory ends.
            except (ValueError, OSError, RuntimeError) as error:
                if not at_keyboard():
                    raise
                self.screen.tell(common.told_error(error, self.run.spell))

    def _take(self, line: str) -> None:
        """Answer a question, or carry out a command."""
        from ..chatting.commands import is_command, question_of, run_command

        if is_command(line):
            shown = run_command(self.chat, self.conversation, line)
            self.screen.tell(shown) if isinstance(shown, str) else self.screen.show_tokens(shown)
        elif line:
            stop = Event()
            with _interrupts(stop.set):
                pieces = self.chat.answer(self.conversation, question_of(line), stop)
                self.screen.show(self.conversation.settings.sides, pieces)


@contextmanager
def _interrupts(call: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C call a function inside the `with` block, and nothing else."""
    before = signal.signal(signal.SIGINT, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


COMMANDS = [chat]
