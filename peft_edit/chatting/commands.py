"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..answering.options import BASE, EDITED
from ..arguments import renamed
from ..explaining import Explanation
from ..places import format_layers, parse_layers
from ..tuners.method import methods
from .chat import Chat, Conversation
from .models import Dial, told_layers
from .settings import Sampling


# How the demonstration of HPR's authors is told its layers.
PUBLISHED_LAYERS = re.compile(r"###\s*target layers\s*:\s*(.*)", flags=re.IGNORECASE)
# What ends the chat at a terminal.
QUIT = ("/quit", "/exit")
# Characters of a line of the help, and those of an answer that the history shows.
WIDTH, SHOWN = 80, 60


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        usage: as it is typed, "/layers 0-3,7".
        help: one line.
        run: gives what to show, from the conversation, which it may change, and what stands after the name.
    """

    usage: str
    help: str
    run: Callable[[Chat, Conversation, str], str | Explanation]

    @property
    def name(self) -> str:
        return self.usage.split()[0]


def is_command(line: str) -> bool:
    """Whether a line is a command and no question. One that begins with two slashes is a question with one."""
    return (line.startswith("/") and not line.startswith("//")) or bool(PUBLISHED_LAYERS.fullmatch(line.strip()))


def question_of(line: str) -> str:
    """The question in a line that is no command."""
    return line.removeprefix("/") if line.startswith("//") else line


def run_command(chat: Chat, conversation: Conversation, line: str) -> str | Explanation:
    """Carry out a command, and return what to show: lines, or the tokens of an answer.

    Args:
        chat: that answers.
        conversation: which the command may change.
        line: see `is_command`.

    Raises:
        ValueError: there is no such command, the nearest being named, or it cannot take its value.
    """
    if published := PUBLISHED_LAYERS.fullmatch(line.strip()):
        line = f"/layers {published[1]}"
    name, value = [*line.strip().split(maxsplit=1), ""][:2]
    name = name.lower()
    commands = {command.name: command for command in COMMANDS}
    if name in commands:
        return commands[name].run(chat, conversation, value)
    if (dial := name.removeprefix("/")) in {dial for method in methods().values() for dial in method.config.dials}:
        return _set_dial(chat, conversation, dial, value)
    known = [*commands, *QUIT, *(f"/{dial.name}" for dial in _dials(chat, conversation))]
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(f"there is no command {name}: {f'did you mean {near[0]}?' if near else '/help lists them'}")


def told_settings(chat: Chat, conversation: Conversation) -> str:
    """What is set, in one line."""
    settings = conversation.settings
    if settings.adapter is None:
        return "base model alone"
    adapter = chat.models.adapter(settings.adapter)
    layers = told_layers(adapter)
    if settings.layers is not None:
        layers = f"layers {format_layers(list(settings.layers))}" if settings.layers else "no layer"
    dials = "".join(f", {dial.name} {settings.dials.get(dial.name, dial.own):g}" for dial in adapter.dials)
    who = {(BASE, EDITED): "", (EDITED,): ", edited answers only", (BASE,): ", base answers only"}[settings.sides]
    return f"{adapter.name} ({adapter.method}), {layers}, strength {settings.strength:g}{dials}{who}"


def told_sampling(sampling: Sampling) -> str:
    """How answers are drawn, in one line."""
    drawn = f"drawn at temperature {sampling.temperature:g}, top p {sampling.top_p:g}, seed {sampling.seed}"
    how = drawn if sampling.temperature else "of the likeliest tokens"
    return f"answers of at most {sampling.max_new_tokens} tokens, {how}"


def _dials(chat: Chat, conversation: Conversation) -> tuple[Dial, ...]:
    """What the adapter of a conversation can be set to besides its strength."""
    adapter = conversation.settings.adapter
    return () if adapter is None else chat.models.adapter(adapter).dials


def _number(name: str, value: str, kind: type = float) -> float | int:
    try:
        return kind(value)
    except ValueError:
        what = "a number" if kind is float else "an integer"
        raise ValueError(f"{name} takes {what}, got {repr(value) if value else 'nothing'}") from None


def _help(chat: Chat, conversation: Conversation, value: str) -> str:
    rows = [(command.usage, command.help) for command in COMMANDS]
    rows[3:3] = [(f"/{dial.name} {dial.own:g}", dial.help) for dial in _dials(chat, conversation)]
    rows.append(("//text", "Ask something that begins with a slash."))
    rows.append((QUIT[0], f"End the chat at a terminal, as {QUIT[1]} and Ctrl-D do."))
    room = max(len(usage) for usage, _ in rows) + 2
    lines = []
    for usage, told in rows:
        first, *more = textwrap.wrap(told, WIDTH - room)
        lines += [f"{usage:{room}}{first}", *(" " * room + line for line in more)]
    return "\n".join(lines)


def _set_dial(chat: Chat, conversation: Conversation, name: str, value: str) -> str:
    number = _number(f"/{name}", value)
    conversation.settings = chat.models.with_dial(conversation.settings, name, number)
    return told_settings(chat, conversation)


def _layers(chat: Chat, conversation: Conversation, value: str) -> str:
    named = {"all": None, "none": ()}
    layers = named[value.lower()] if value.lower() in named else parse_layers(value)
    conversation.settings = chat.models.with_layers(conversation.settings, layers)
    return told_settings(chat, conversation)


def _strength(chat: Chat, conversation: Conversation, value: str) -> str:
    conversation.settings = chat.models.with_strength(conversation.settings, _number("/strength", value))
    return told_settings(chat, conversation)


def _adapter(chat: Chat, conversation: Conversation, value: str) -> str:
    if not value:
        raise ValueError("/adapter takes a folder, or an id on the Hub")
    chat.models.forget(value)
    conversation.settings = chat.models.with_adapter(conversation.settings, value)
    return told_settings(chat, conversation)


def _base(chat: Chat, conversation: Conversation, value: str) -> str:
    edited = conversation.settings.adapter is not None
    sides = {"only": (BASE,), "on": (BASE, EDITED) if edited else (BASE,), "off": (EDITED,)}
    if (value or "only") not in sides or (value == "off" and not edited):
        raise ValueError(f"/base takes on{', off' if edited else ''} or only, got {value!r}")
    conversation.settings = replace(conversation.settings, sides=sides[value or "only"])
    return told_settings(chat, conversation)


def _sampling(name: str, field: str, kind: type) -> Callable[[Chat, Conversation, str], str]:
    def run(chat: Chat, conversation: Conversation, value: str) -> str:
        settings = conversation.settings
        with renamed(**{field: name}):
            changed = replace(settings.sampling, **{field: _number(name, value, kind)})
        conversation.settings = replace(settings, sampling=changed)
        return told_sampling(changed)

    return run


def _tokens(chat: Chat, conversation: Conversation, value: str) -> Explanation:
    return chat.explain(conversation)


def _save(chat: Chat, conversation: Conversation, value: str) -> str:
    try:
        path = Path(value or "chat.json").expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: nobody of this name has a home on this machine: give another path") from error
    chat.save(conversation, path)
    return f"Conversation: {path}"


def _history(chat: Chat, conversation: Conversation, value: str) -> str:
    lines = []
    for number, turn in enumerate(conversation.turns, start=1):
        lines.append(f"{number}. {_short(turn.question)}")
        lines += [f"   {side}: {_short(text)}" for side, text in turn.answers.items()]
    return "\n".join(lines) or "nothing was asked yet"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


def _reset(chat: Chat, conversation: Conversation, value: str) -> str:
    conversation.begin_anew()
    return "The conversation begins anew; what is set stays."


def _settings(chat: Chat, conversation: Conversation, value: str) -> str:
    return f"{told_settings(chat, conversation)}\n{told_sampling(conversation.settings.sampling)}"


COMMANDS = (
    Command("/help", "Show the commands.", _help),
    Command("/layers 0-3,7", "Decoder blocks that edit: numbers and ranges, all or none.", _layers),
    Command("/strength 0.5", "Factor on the strength of the edit: 0 is the base model, 1 the edit.", _strength),
    Command("/adapter NAME", "Edit by another adapter, as it was saved: a folder, or an id on the Hub.", _adapter),
    Command("/base", "The base model alone; /base on shows both again, /base off the edited answers alone.", _base),
    Command(
        "/temperature 0.7",
        "Draw the tokens of an answer; 0 takes the likeliest.",
        _sampling("/temperature", "temperature", float),
    ),
    Command("/seed 1", "Of the draw; base and edited answers have the same.", _sampling("/seed", "seed", int)),
    Command("/length 256", "Most tokens in an answer.", _sampling("/length", "max_new_tokens", int)),
    Command("/settings", "Show what is set.", _settings),
    Command("/tokens", "Show what the edit did to each token of its last answer.", _tokens),
    Command("/history", "Show the conversation.", _history),
    Command("/reset", "Begin the conversation anew.", _reset),
    Command("/save FILE", "Write questions, answers and settings to a JSON file, by default chat.json.", _save),
)
