"""Conversations -> token ids, as the chat template itself writes a prompt and its answer.

A prompt and an answer are rendered as one conversation, and the answer is taken from where the template puts it. With
many templates that is not behind the generation prompt (`add_generation_prompt=True`): some ignore the flag, some open
a block of thoughts there, and some write an empty block, a channel or a space before an answer.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from inspect import signature
from string import ascii_letters
from typing import Any

import jinja2
import jinja2.meta
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..arguments import Argument, ArgumentError


logger = logging.getLogger(__name__)

Message = dict[str, Any]

# Stands for an answer where a template is asked for its place.
_MARKER = "AnswerOfTheModel"
# Answers that begin differently: their encodings part where the answer's tokens begin.
_PROBES = ("Yes", "No")
# Tags of templates that mark what is generated, which only Transformers' own parser knows.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What `apply_chat_template` is called with here.
_RESERVED = {"messages"} | set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "tools",
    "documents",
    "kwargs",
}


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer writes conversations: it has a template that is not empty, or a method of its own."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict | None):
        raise ArgumentError(
            f"the tokenizer's chat_template must be text, got {template!r:.60}: set it to None or mend it"
        )
    return bool(template.strip() if isinstance(template, str) else template) or _has_own_method(tokenizer)


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date, so that its text changes from day to day."""
    return "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None))


def template_text(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> str | None:
    """The chat template that is used with some arguments; None for a tokenizer that has a method of its own.

    Raises:
        ValueError: there are several, and none of them is the default.
    """
    if _has_own_method(tokenizer):
        return None
    try:
        return tokenizer.get_chat_template(tools=(arguments or {}).get("tools"))
    except ValueError as error:
        raise ArgumentError(
            f"the tokenizer has no one chat template ({_one_line(error)}): set tokenizer.chat_template, or pass ",
            Argument("prompt_format", "plain"),
        ) from error


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    answers: Sequence[Sequence[str]],
    row_ids: Sequence[int],
    arguments: Mapping[str, Any] | None = None,
    time: str | None = None,
) -> list[tuple[list[int], list[list[int]]]]:
    """Encode conversations and answers to them, without what follows an answer: end of turn, end of sequence.

    Args:
        tokenizer: with a chat template.
        conversations: n, each of at least one message.
        answers: for each conversation its answers, any number of them.
        row_ids: n names of the rows for error messages.
        arguments: of the template, such as {"enable_thinking": False}.
        time: that a template which writes the date is told, in ISO format; None for today.

    Returns:
        For each conversation the ids before an answer, and for each answer the ids of both together. An answer's
        tokens are those beyond the number of the former.

    Raises:
        ValueError: the template fails, leaves out a message, or writes an answer otherwise than it stands; it reads no
            such argument.
    """
    arguments = dict(arguments or {})
    _check_arguments(tokenizer, arguments)
    if _has_own_method(tokenizer):
        return [
            _encode_by_method(tokenizer, list(conversation), of_row, row_id, arguments)
            for conversation, of_row, row_id in zip(conversations, answers, row_ids, strict=True)
        ]
    template = _Template(tokenizer, arguments, time)
    heads, texts = [], []
    rows = list(zip(conversations, answers, row_ids, strict=True))
    for conversation, of_row, row_id in tqdm(rows, desc="encoding", unit="question", leave=None, delay=2):
        head, written = template.place(conversation, of_row, row_id)
        heads.append(head)
        texts += [head.rstrip(" "), *(head + probe for probe in _PROBES), *(head + text for text in written)]
    encoded = iter(_encode(tokenizer, texts))
    return [
        (_prompt_ids(head, *(next(encoded) for _ in range(3))), [next(encoded) for _ in of_row])
        for head, of_row in zip(heads, answers, strict=True)
    ]


_REMEDY = ("set another tokenizer.chat_template, or pass ", Argument("prompt_format", "plain"))


class _Template:
    """A tokenizer's chat template with its arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], time: str | None):
        template = template_text(tokenizer, arguments)
        self._own_text = template
        self._template = _at_time(template, time) if "strftime_now" in template else template
        self._tokenizer, self._arguments = tokenizer, arguments
        self._as_parts = False
        # Roles of conversations whose messages all have a place in the text.
        self._whole: set[tuple[str, ...]] = set()

    def place(self, conversation: Sequence[Message], answers: Sequence[str], row_id: int) -> tuple[str, list[str]]:
        """The text before an answer to a conversation, and each answer as the template writes it."""
        head, tail = self._around_answer(conversation, row_id)
        self._tell_what_is_used(conversation, head, row_id)
        return head, [self._written(conversation, answer, head, tail, row_id) for answer in answers]

    def _around_answer(self, conversation: Sequence[Message], row_id: int) -> tuple[str, str]:
        """What the template writes before and after an answer.

        Some templates take a message's content as text, some as a list of parts, and print nothing of the other.
        """
        problem: Exception | None = None
        for as_parts in (self._as_parts, not self._as_parts):
            try:
                messages = [*conversation, _answer(_MARKER)]
                text = self._render(messages, as_parts, row_id)
                shown = map(_in_parts, messages) if as_parts else messages
                if any(isinstance(m.get("content"), list) and str(m["content"]) in text for m in shown):
                    problem = problem or ArgumentError(
                        f"row {row_id}: the tokenizer's chat template takes contents as text, got parts: join them"
                    )
                    continue  # it prints the list
                _check_whole(conversation, text, row_id)
                self._check_places(conversation, as_parts, row_id)
            except ValueError as error:
                problem = problem or error
                continue
            self._as_parts = as_parts
            head, _, tail = text.partition(_MARKER)
            return head, tail
        raise problem

    def _check_places(self, conversation: Sequence[Message], as_parts: bool, row_id: int) -> None:
        """Raise ArgumentError unless each message of such roles is written: its text may stand elsewhere by chance."""
        roles = tuple(str(message.get("role")) for message in conversation)
        if (as_parts, *roles) in self._whole:
            return
        markers = [f"MessageNumber{place}Of{len(roles)}" for place in range(len(roles))]
        marked = [
            {**message, "content": marker} if message.get("content") else message
            for message, marker in zip(conversation, markers, strict=True)
        ]
        head = self._render([*marked, _answer(_MARKER)], as_parts, row_id).partition(_MARKER)[0]
        for message, marker, role in zip(marked, markers, roles, strict=True):
            if message.get("content") == marker and marker not in head:
                raise ArgumentError(
                    f"row {row_id}: the tokenizer's chat template leaves out a message of the {role}: ", *_REMEDY
                )
        self._whole.add((as_parts, *roles))

    def _written(self, conversation, answer: str, head: str, tail: str, row_id: int) -> str:
        text = self._render([*conversation, _answer(answer)], self._as_parts, row_id)
        written = text[len(head) : len(text) - len(tail)]
        if head + written + tail == text and written.strip() == answer.strip():
            return written
        if answer.strip() and not (text.startswith(head) and text.endswith(tail)):
            raise ArgumentError(
                f"row {row_id}: what the tokenizer's chat template writes around an answer depends on the answer, as "
                f"with {answer!r}: ",
                *_REMEDY,
            )
        if answer.strip():
            raise ArgumentError(
                f"row {row_id}: the tokenizer's chat template writes the answer {answer!r} as {written!r}: change the "
                "answer, or pass ",
                Argument("prompt_format", "plain"),
            )
        return ""

    def _render(self, conversation: Sequence[Message], as_parts: bool, row_id: int, **options: Any) -> str:
        messages = [_in_parts(message) for message in conversation] if as_parts else list(conversation)
        options = {"tokenize": False, "chat_template": self._template, **options, **self._arguments}
        return _applied(self._tokenizer, messages, row_id, options)

    def _tell_what_is_used(self, conversation: Sequence[Message], head: str, row_id: int) -> None:
        """Say once where an answer stands, if the template can be read otherwise too."""
        told = self._own_text, json.dumps(self._arguments, sort_keys=True, default=str)
        if told in _TOLD:
            return
        _TOLD.add(told)
        try:
            open_end = self._render(conversation, self._as_parts, row_id, add_generation_prompt=True)
        except ArgumentError:  # a template that asks for no answer: there is nothing to compare with
            open_end = head
        if open_end.rstrip(" ") != head.rstrip(" "):
            same = _common(open_end, head)
            logger.warning(
                "the chat template writes %r before an answer in a conversation, and %r where it asks for one: answers "
                "stand, and are generated, as in a conversation (template arguments may change it)",
                *(head[same:], open_end[same:]),
            )
        if re.search(r"\{%-?\s*generation\s*-?%\}", self._template) and not self._marks_answer(conversation, head):
            logger.warning("the chat template marks other text as generated than the answer: the answer is used")

    def _marks_answer(self, conversation: Sequence[Message], head: str) -> bool:
        messages = [*conversation, _answer(_MARKER)]
        _, spans = render_jinja_template(
            [[_in_parts(message) for message in messages] if self._as_parts else messages],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._arguments},
        )
        return any(start <= len(head) and len(head) + len(_MARKER) <= stop for start, stop in spans[0])


# Templates, with their arguments, of which it was said where an answer stands.
_TOLD: set[tuple[str, str]] = set()


def _encode_by_method(tokenizer, conversation, answers, row_id, arguments) -> tuple[list[int], list[list[int]]]:
    """With a tokenizer that writes token ids and no text, as that of mistral-common."""

    def ids_of(answer: str) -> list[int]:
        options = {"continue_final_message": True, "tokenize": True, "return_dict": False, **arguments}
        return list(_applied(tokenizer, [*conversation, _answer(answer)], row_id, options))

    yes, no = map(ids_of, _PROBES)
    prompt = yes[: _common(yes, no)]
    _check_whole(conversation, tokenizer.decode(prompt) + _MARKER, row_id)
    return prompt, [ids_of(answer) for answer in answers]


def _prompt_ids(head: str, alone: list[int], yes: list[int], no: list[int]) -> list[int]:
    """The ids before any answer. They are not those of the text before it, encoded alone: its last characters may be
    tokens of their own only where something follows. Trailing spaces belong to the answer, as in plain text.

    Args:
        head: the text.
        alone: ids of the text without trailing spaces.
        yes, no: ids of the text with different answers.
    """
    length = _common(yes, no) if yes != no else len(alone)  # a small vocabulary may know neither
    return yes[: min(length, len(alone)) if head.endswith(" ") else length]


def _check_whole(conversation: Sequence[Message], text: str, row_id: int) -> None:
    """Raise ArgumentError unless a rendered conversation has the answer once and all that the user says.

    Earlier answers may be shortened, and system messages changed: templates leave out thoughts, and take switches such
    as "/no_think" for what they are.
    """
    before = _without_space(text.partition(_MARKER)[0])
    for message in conversation:
        contents = _in_parts(message).get("content") if message.get("role") in ("user", "tool") else None
        for content in (part["text"].strip() for part in contents or () if part.get("type") == "text"):
            if _without_space(content) not in before:
                raise ArgumentError(
                    f"row {row_id}: the tokenizer's chat template leaves out, or changes, the message {content[:60]!r} "
                    f"of the {message.get('role')}: ",
                    *_REMEDY,
                )
    if text.count(_MARKER) != 1:
        raise ArgumentError(
            f"row {row_id}: the tokenizer's chat template writes an answer {text.count(_MARKER)} times: ", *_REMEDY
        )


def _applied(tokenizer, messages: list[Message], row_id: int, options: dict[str, Any]):
    try:
        return tokenizer.apply_chat_template(messages, **options)
    # templates are programs: besides Jinja's errors they raise whatever their expressions do
    except Exception as error:
        raise ArgumentError(
            f"row {row_id}: the tokenizer's chat template fails ({type(error).__name__}: {_one_line(error)}): change "
            "the conversation, or pass ",
            Argument("prompt_format", "plain"),
        ) from error


def _check_arguments(tokenizer, arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an argument that the template does not read, or that is not the user's to give."""
    read = _arguments_of(getattr(tokenizer, "chat_template", None)) if arguments else None
    for name in arguments:
        if name in _RESERVED:
            raise ArgumentError(
                Argument("template_arguments"), f" cannot give {name!r}, which is set here: leave it out"
            )
        if read is not None and name not in read:
            near = get_close_matches(name, read, n=1)
            raise ArgumentError(
                *("the chat template reads no argument ", repr(name), " of the ", Argument("template_arguments"), ": "),
                *((f"did you mean {near[0]!r}, or ",) if near else ()),
                "leave it out",
            )


def _arguments_of(template: str | dict[str, str] | None) -> set[str] | None:
    """Names that a chat template, or any of several, takes from outside; None where that cannot be told."""
    if template is None:
        return None
    texts = template.values() if isinstance(template, dict) else [template]
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = [environment.parse(_GENERATION.sub("", text)) for text in texts]
    except jinja2.TemplateSyntaxError:  # which rendering it tells
        return None
    return set().union(*map(jinja2.meta.find_undeclared_variables, parsed))


def _at_time(template: str, time: str | None) -> str:
    """A template that takes its clock from a macro: the sandbox lets no function in."""
    moment = datetime.fromisoformat(time or today())
    letters = (f"%{flag}{letter}" for flag in ("-", "_", "^", "#", "0", "") for letter in ascii_letters)
    told = {directive: moment.strftime(directive) for directive in letters}
    pairs = json.dumps([["%%", "\0"], *([d, text] for d, text in told.items() if text != d), ["\0", "%"]])
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set written = namespace(text=format) -%}}"
        f"{{%- for directive, text in {pairs} -%}}"
        "{%- set written.text = written.text | replace(directive, text) -%}"
        f"{{%- endfor -%}}{{{{ written.text }}}}{{%- endmacro %}}\n{template}"
    )


def today() -> str:
    """The date, in the ISO format of template times: whatever is run on one day has the same prompts."""
    return datetime.now().date().isoformat()


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _in_parts(message: Message) -> Message:
    """A message whose content is a list of parts."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _without_space(text: str) -> str:
    """Without white space, and without the mark that SentencePiece tokenizers leave in its place."""
    return re.sub(r"[\s\u2581]+", "", text)


def _has_own_method(tokenizer) -> bool:
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _common(first: Sequence, second: Sequence) -> int:
    """How many elements two sequences begin with alike."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
