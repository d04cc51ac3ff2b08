"""A conversation, and the answers to its next question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from ..answering.options import BASE, EDITED
from ..data.prompts import PromptOptions, encode_answers, encode_prompts, prompt_record, settled
from ..data.rows import check_encodable
from ..explaining import Explanation, explain_edit
from ..files import check_writable, write_json
from ..models.fingerprint import adapters_fingerprint, fingerprint
from .answers import check_fits, stream_answer
from .models import ChatModels
from .settings import Sampling, Settings


__all__ = ["BASE", "EDITED", "Chat", "Conversation", "Turn"]


@dataclass(frozen=True)
class Turn:
    """A question with its answers.

    Attributes:
        question: as it was typed.
        answers: who answered, `BASE` or `EDITED`, to what; what was stopped as far as it came.
        settings: of the time.
    """

    question: str
    answers: Mapping[str, str]
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"question": self.question, "answers": dict(self.answers), "settings": self.settings.to_dict()}


@dataclass
class Conversation:
    """The state of one person's conversation. Base model and edit go on each with its own answers."""

    settings: Settings
    turns: list[Turn] = field(default_factory=list)
    # What it was written to, and may be written to again.
    saved: set[Path] = field(default_factory=set)

    def begin_anew(self) -> None:
        """Forget what was said; what is set stays, and what was saved is not written to again."""
        self.turns.clear()
        self.saved.clear()


class Chat:
    """Answers conversations, any number of them.

    Args:
        models: who answers.
        prompts: how a conversation becomes tokens.

    Raises:
        ValueError: the prompt format is not possible with the tokenizer.
    """

    def __init__(self, models: ChatModels, prompts: PromptOptions | None = None):
        self.models = models
        self.prompts = settled(models.tokenizer, prompts or PromptOptions())

    @property
    def remembers(self) -> bool:
        """Whether a question follows the conversation so far, as it does with a chat template. Without one, each stands
        alone."""
        return self.prompts.prompt_format == "chat"

    def begin(self, adapter: str | None = None, sampling: Sampling | None = None) -> Conversation:
        """A new conversation."""
        settings = Settings(sampling=sampling or Sampling())
        return Conversation(self.models.with_adapter(settings, adapter))

    def answer(self, conversation: Conversation, question: str, stop: Event) -> Iterator[tuple[str, str]]:
        """The answers to a question, as pairs of who answers and the next piece, the base model's first.

        At the end the conversation has the turn.

        Args:
            conversation: grows by a turn.
            question: any text.
            stop: when it is set, the answer that is being written, or comes next, ends as it is, and it is cleared.

        Raises:
            ValueError: the question is no text, cannot be written with the chat template, or is too long for the model;
                the model gives NaN.
        """
        check_encodable(question, "the question")
        settings = conversation.settings
        prompts = {side: self.prompt_ids(conversation, question, side) for side in settings.sides}
        for ids in prompts.values():
            check_fits(self.models, ids, settings.sampling)
        answers = dict.fromkeys(prompts, "")
        for side, ids in prompts.items():
            for piece in stream_answer(self.models, settings, side, ids, stop):
                answers[side] += piece
                yield side, piece
            stop.clear()
        conversation.turns.append(Turn(question, {side: text.strip() for side, text in answers.items()}, settings))

    def prompt_ids(self, conversation: Conversation, question: str, side: str) -> list[int]:
        """The token ids of a conversation as one side has it, up to the answer to a question."""
        return encode_prompts(self.models.tokenizer, [question], **self._options(conversation.turns, question, side))[0]

    def explain(self, conversation: Conversation) -> Explanation:
        """What the edit, set as it was then, does to its last answer, from the last token before it on: what is
        expected after that one is how the answer begins.

        Raises:
            ValueError: the edit has not answered, or nothing.
        """
        place = next((i for i, turn in reversed([*enumerate(conversation.turns)]) if EDITED in turn.answers), None)
        if place is None:
            raise ValueError("the edit has given no answer yet: ask something first, with an adapter")
        turn = conversation.turns[place]
        if not turn.answers[EDITED]:
            raise ValueError("the last answer of the edit is empty: there are no tokens to show")
        options = self._options(conversation.turns[:place], turn.question, EDITED)
        ((encoded,),) = encode_answers(self.models.tokenizer, [turn.question], [[turn.answers[EDITED]]], **options)
        with self.models.answering(turn.settings, EDITED) as model:
            whole = explain_edit(model, self.models.tokenizer, encoded.input_ids)
        return whole.since(encoded.prompt_length - 1)

    def _options(self, turns: Sequence[Turn], question: str, side: str) -> dict[str, Any]:
        """How a question after some turns becomes tokens."""
        messages = [
            {"role": role, "content": text}
            for turn in turns
            if side in turn.answers
            for role, text in (("user", turn.question), ("assistant", turn.answers[side]))
        ]
        messages = [[*messages, {"role": "user", "content": question}]] if self.remembers else None
        return {**self.prompts.of_prompts, "messages": messages, "row_ids": [len(turns) + 1]}

    def record(self, conversation: Conversation) -> dict[str, Any]:
        """A conversation with all that its answers follow from, as JSON values."""
        base = self.models.base
        names = dict.fromkeys(turn.settings.adapter for turn in conversation.turns if turn.settings.adapter is not None)
        return {
            "model": base.config._name_or_path or None,
            "fingerprint": fingerprint(base),
            "dtype": str(base.dtype),
            "adapters": {name: adapters_fingerprint(self.models.adapter(name).model) for name in names},
            "prompts": prompt_record(self.models.tokenizer, self.prompts),
            "turns": [turn.to_dict() for turn in conversation.turns],
        }

    def save(self, conversation: Conversation, path: Path) -> None:
        """Write a conversation to a JSON file, see `record`.

        Raises:
            ValueError: it has no turn yet, or something is there that is not this conversation's.
        """
        if not conversation.turns:
            raise ValueError("there is nothing to save yet: ask something first")
        if path.exists() and path.resolve() not in conversation.saved:
            raise ValueError(f"{path} is there already: give another name")
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.record(conversation))
        conversation.saved.add(path.resolve())
