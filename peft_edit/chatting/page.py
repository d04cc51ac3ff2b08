"""The chat as a page, for gradio, which the extra `ui` brings."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from ..answering.options import BASE, EDITED
from ..arguments import one_line
from ..explaining.showing import token_view_html
from ..explaining.style import TOKEN_VIEW_CSS
from ..extras import import_extra
from ..tuners.method import methods
from .chat import Chat, Conversation
from .models import LoadedAdapter
from .serving import ServingOptions
from .settings import Sampling, Settings


# Nothing is told of the use of a page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gr = import_extra("gradio", "ui", "the page")

# What the page calls the base model alone, where an adapter is chosen.
NONE = "none (the base model alone)"
# An id on the Hub, with a revision or without.
ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
# The largest strength that its slider gives, and the largest value of a dial without a bound.
STRONGEST, LARGEST = 3.0, 10.0
# Seconds between two looks of an answer that grows: each sends the conversation as a whole.
REFRESH = 0.1
# Of a column, in pixels.
HEIGHTS = {"height": None, "min_height": 180, "max_height": 480}
# How listeners are called: those that only change what is shown wait for nobody.
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
SLOW = {"show_progress": "minimal", "api_visibility": "private"}


def _on_hub(name: str) -> bool:
    """Whether a name is an id on the Hub, and no folder of this machine."""
    return ON_HUB.fullmatch(name) is not None and not Path(name.partition("@")[0]).exists()


@dataclass
class ChatPage:
    """A page with two columns of answers, and what may be set beside them. Each person who opens it has a conversation
    and settings of their own, which are in force while their answer is made.

    Args:
        chat: that answers.
        adapters: folders, or ids on the Hub, to choose from, the first of which edits at the beginning.
        sampling: how answers are drawn at the beginning.
        any_folder: whether any folder of this machine may be named as an adapter, beside ids on the Hub. Not where
            others than its user may open the page.
    """

    chat: Chat
    adapters: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    any_folder: bool = False
    # What stops the answer of each session.
    _stops: dict[str, Event] = field(default_factory=dict, init=False, repr=False)

    @property
    def _dials(self) -> int:
        """Most dials of an adapter of any method."""
        return max(len(method.config.dials) for method in methods().values()) - 1

    def build(self) -> gr.Blocks:
        """The page, for `launch`."""
        first = self.adapters[0] if self.adapters else None
        name = Path(self.chat.models.base.config._name_or_path or "model").name
        with gr.Blocks(title=f"{name}: base and edited", analytics_enabled=False, fill_width=True) as page:
            conversation = gr.State(self.chat.begin(first, self.sampling))
            gr.Markdown(f"# {name}: base and edited\n{self._told()}")
            columns = self._columns()
            question = gr.Textbox(label="Question", elem_id="question", lines=1, max_lines=8, autofocus=True)
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send")
                stop = gr.Button("Stop", elem_id="stop")
                reset = gr.Button("New conversation", elem_id="reset")
                tokens = gr.Button("Tokens of the last answer", elem_id="tokens")
            view = gr.HTML(elem_id="view")
            settings = self._settings(first)
            asked = {"fn": self._answer, "inputs": [conversation, question, *settings], "outputs": [question, *columns]}
            send.click(**asked, **SLOW)
            question.submit(**asked, **SLOW)
            stop.click(self._stop, None, None, **QUICK)
            for begin_anew in (reset.click, *(column.clear for column in columns)):
                begin_anew(self._reset, conversation, [*columns, view], **QUICK)
            tokens.click(self._tokens, conversation, view, **SLOW)
            settings[0].input(self._chosen, [conversation, settings[0]], settings, **SLOW)
            page.unload(self._left)
        return page

    def _told(self) -> str:
        remembers = "follows the conversation so far" if self.chat.remembers else "is asked by itself"
        return f"Each question {remembers}, and is answered by the base model and by the edited one."

    def _columns(self) -> list[gr.Chatbot]:
        shown = {"render_markdown": False, "buttons": [], "feedback_options": None, **HEIGHTS}
        with gr.Row():
            return [
                gr.Chatbot(label=label, elem_id=side, **shown) for side, label in ((BASE, "Base"), (EDITED, "Edited"))
            ]

    def _settings(self, first: str | None) -> list[gr.components.Component]:
        """What may be set: adapter, layers, strength, dials, and how answers are drawn."""
        sampling = self.sampling
        adapter = None if first is None else self.chat.models.adapter(first)
        where = "folder, or id on the Hub" if self.any_folder else "id on the Hub"
        with gr.Row():
            with gr.Column():
                chosen = gr.Dropdown(
                    [NONE, *self.adapters],
                    value=first or NONE,
                    label=f"Adapter (type another: {where})",
                    elem_id="adapter",
                    allow_custom_value=True,
                )
                layers = gr.CheckboxGroup(label="Layers that edit", elem_id="layers", **_of_layers(adapter))
            with gr.Column():
                strength = gr.Slider(0, STRONGEST, elem_id="strength", step=0.05, **_of_strength(adapter))
                dials = [gr.Slider(elem_id=f"dial{i}", step=0.01, **_of_dial(adapter, i)) for i in range(self._dials)]
            with gr.Column():
                drawn = [
                    gr.Slider(
                        0, max(2, sampling.temperature), value=sampling.temperature, step=0.05, label="Temperature"
                    ),
                    gr.Number(value=sampling.seed, label="Seed", precision=0, minimum=0),
                    gr.Number(value=sampling.max_new_tokens, label="Most tokens", precision=0, minimum=1),
                ]
        return [chosen, layers, strength, *dials, *drawn]

    def _answer(
        self, request: gr.Request, conversation: Conversation, question: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answers to a question with what the page shows as set."""
        if not question.strip():
            raise gr.Error("type a question first", print_exception=False)
        with _told_errors():
            conversation.settings = self._set(*values)
            stop = self._stops[request.session_hash] = Event()
            answers = dict.fromkeys(conversation.settings.sides, "")
            yield "", *self._shown(conversation, question, answers)  # the next question may be typed from here on
            shown = time.monotonic()
            for side, piece in self.chat.answer(conversation, question, stop):
                if self._stops.get(request.session_hash) is not stop:  # who asked has left
                    return
                answers[side] += piece
                if time.monotonic() > shown + REFRESH:
                    yield gr.skip(), *self._shown(conversation, question, answers)
                    shown = time.monotonic()
            yield gr.skip(), *self._shown(conversation)

    def _set(self, name: str, layers: list[str], strength: float, *more: Any) -> Settings:
        """The settings that the page shows."""
        models, (*dials, temperature, seed, length) = self.chat.models, more
        sampling = replace(self.sampling, temperature=temperature, seed=seed, max_new_tokens=length)
        settings = models.with_adapter(Settings(sampling=sampling), self._adapter(name))
        if settings.adapter is None or not (adapter := models.adapter(settings.adapter)).edits:
            return settings
        settings = models.with_strength(models.with_layers(settings, map(int, layers)), strength)
        for dial, value in zip(adapter.dials, dials, strict=False):
            settings = models.with_dial(settings, dial.name, value)
        return settings

    def _adapter(self, name: str | None) -> str | None:
        """The adapter that a name means; raises ValueError for one that may not be loaded."""
        name = (name or NONE).strip()
        if name == NONE:
            return None
        if name not in self.adapters and not self.any_folder and not _on_hub(name):
            raise ValueError(f"{name} is no id on the Hub: choose one of the list, or type user/name")
        return name

    def _chosen(self, conversation: Conversation, name: str):
        """What the page shows of another adapter; the one before where it cannot be loaded."""
        before, sampling = conversation.settings, conversation.settings.sampling
        try:
            conversation.settings = self.chat.models.with_adapter(Settings(sampling=sampling), self._adapter(name))
        except (ValueError, OSError) as error:
            gr.Warning(one_line(error))
            conversation.settings = before
        name = conversation.settings.adapter
        adapter = None if name is None else self.chat.models.adapter(name)
        return (
            gr.update(value=name or NONE),
            gr.update(**_of_layers(adapter)),
            gr.update(**_of_strength(adapter)),
            *(gr.update(**_of_dial(adapter, i)) for i in range(self._dials)),
            *(gr.skip() for _ in range(3)),
        )

    def _stop(self, request: gr.Request) -> None:
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    def _left(self, request: gr.Request) -> None:
        """Stop what is answered to somebody who has closed the page."""
        if (stop := self._stops.pop(request.session_hash, None)) is not None:
            stop.set()

    def _reset(self, conversation: Conversation):
        conversation.begin_anew()
        return [], [], ""

    def _tokens(self, conversation: Conversation) -> str:
        with _told_errors():
            return token_view_html(self.chat.explain(conversation))

    def _shown(
        self, conversation: Conversation, question: str | None = None, answers: dict[str, str] | None = None
    ) -> tuple[list[dict[str, str]], ...]:
        """The messages of both columns; a question that is being answered comes last."""
        turns = [(turn.question, turn.answers) for turn in conversation.turns]
        turns += [] if question is None else [(question, answers)]
        return tuple(
            [
                {"role": role, "content": text}
                for asked, told in turns
                if side in told
                for role, text in (("user", asked), ("assistant", told[side]))
            ]
            for side in (BASE, EDITED)
        )


@contextmanager
def _told_errors() -> Iterator[None]:
    """Show what is wrong with what was asked for, in one line; what else fails is a fault, and goes to the log too."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(one_line(error), print_exception=False) from error


def _of_layers(adapter: LoadedAdapter | None) -> dict[str, Any]:
    """How the choice of layers is shown of an adapter."""
    layers = [] if adapter is None else [str(layer) for layer in adapter.layers]
    return {"choices": layers, "value": layers, "visible": bool(layers)}


def _of_strength(adapter: LoadedAdapter | None) -> dict[str, Any]:
    """How the slider of the strength is shown of an adapter, as it was saved."""
    told = "Strength: 0 is the base model, 1 the edit as saved"
    return {"label": told, "value": 1.0, "visible": adapter is not None and adapter.edits}


def _of_dial(adapter: LoadedAdapter | None, place: int) -> dict[str, Any]:
    """How the slider of a dial is shown of an adapter, as it was saved."""
    if adapter is None or place >= len(adapter.dials):
        return {"visible": False, "value": 0.0}
    dial = adapter.dials[place]
    most = max(LARGEST, dial.own) if dial.maximum is None else dial.maximum
    bounds = {"minimum": dial.minimum or 0.0, "maximum": most}
    return {"label": f"{dial.name}: {dial.help}", "value": dial.own, "visible": True, **bounds}


def launch(page: gr.Blocks, serving: ServingOptions) -> str:
    """Serve a page from a thread of its own, and return its address. Fonts are those of the reader's machine, so that
    the page asks no other server for anything.

    Args:
        page: see `ChatPage.build`.
        serving: where.
    """
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    _, local, shared = page.launch(
        server_name=serving.host,
        server_port=serving.port,
        share=serving.share,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        css=TOKEN_VIEW_CSS,
        theme=gr.themes.Default(font=sans, font_mono=mono),
    )
    return shared or local
