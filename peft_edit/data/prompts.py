"""Prompt and answer -> token ids: the one rule that collection and evaluation share.

The rule is that of lm-evaluation-harness (`TemplateLM._encode_pair`): prompt and answer are encoded once, together, and
the answer's tokens are those beyond the length of the prompt encoded alone.

- `"plain"`: trailing white space of the prompt moves to the answer. The two are joined by one space, unless either
  brings white space of its own. Special tokens that the tokenizer puts first (BOS) stand there once, also where the
  prompt spells them out; those that it puts last (EOS) are left out. A prompt without any token is stood in for by BOS,
  else by EOS, so that the answer's first token has something to follow.
- `"chat"`: the prompt is the user's turn, or `messages` are the conversation as they are; the answer is the assistant's
  turn, where and as the chat template writes it in a conversation, without end of turn; see `chat`. The tokenizer adds
  no special tokens to those of the template.
- `"few_shot_qa"`: plain text, with the prompt as one more question after those of `contexts.QA_PRIMER`. SEA's paper
  asks after examples too; which ones is not known here.
- `"lettered_choices"`: plain text, with the choices below the prompt, a letter before each, and `Answer:` last. The
  answer is the letter alone, so that likelihoods compare choices and not their lengths. HPR's paper lists lettered
  choices too; its wording is not known here, and this one is lm-evaluation-harness' of MMLU. All answers of a question
  are its choices; their order follows from their texts, not from which are right.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from .chat import Message, encode_conversations, has_chat_template, reads_clock, template_text, today
from .contexts import QA_PRIMER, contexts_of, lettered, letters_of
from .options import PROMPT_FORMATS, PromptOptions


Options = TypeVar("Options", bound=PromptOptions)


def settled(tokenizer: PreTrainedTokenizerBase, options: Options, time: str | None = None) -> Options:
    """The options as they are used with a tokenizer: another format than "auto", and a time where the template reads
    the clock.

    Args:
        tokenizer: of the model.
        options: as given.
        time: where the options give none; None for today.

    Raises:
        ValueError: the format is not possible, or arguments or a time are given to a template that takes none.
    """
    prompt_format = resolve_prompt_format(tokenizer, options.prompt_format)
    chat = prompt_format == "chat"
    if options.template_arguments and not chat:
        raise ArgumentError(
            *(Argument("template_arguments"), " need ", Argument("prompt_format", "chat")),
            f", which is {prompt_format!r}: leave them out, or load a tokenizer that has a chat template",
        )
    dated = chat and reads_clock(tokenizer)
    if options.template_time and not dated:
        raise ArgumentError(
            *(Argument("template_time", options.template_time), " has no meaning: "),
            f"{'the chat template writes no date' if chat else f'the prompt format is {prompt_format}'}; leave it out",
        )
    time = options.template_time or time or today()
    return replace(options, prompt_format=prompt_format, template_time=time if dated else None)


@dataclass(frozen=True)
class EncodedAnswer:
    """A prompt and one answer to it.

    Attributes:
        input_ids: the encoding of prompt and answer together.
        prompt_length: how many of them belong to the prompt, at least 1 and less than `len(input_ids)`.
    """

    input_ids: list[int]
    prompt_length: int

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: self.prompt_length]

    @property
    def answer_ids(self) -> list[int]:
        return self.input_ids[self.prompt_length :]


def resolve_prompt_format(tokenizer: PreTrainedTokenizerBase, prompt_format: str = "auto") -> str:
    """Says which format `prompt_format` is for this tokenizer: for `"auto"` it is `"chat"` or `"plain"`.

    Raises:
        ValueError: the format is unknown, or it is `"chat"` and the tokenizer has no chat template.
    """
    if prompt_format not in PROMPT_FORMATS:
        choices = ", ".join(PROMPT_FORMATS)
        raise ArgumentError(Argument("prompt_format"), f" must be one of {choices}, got {prompt_format!r}")
    has_template = has_chat_template(tokenizer)
    if prompt_format == "chat" and not has_template:
        raise ArgumentError(
            Argument("prompt_format", "chat"),
            " needs a chat template and the tokenizer has none: pass 'plain', or set tokenizer.chat_template",
        )
    if prompt_format == "auto":
        return "chat" if has_template else "plain"
    return prompt_format


def prompt_record(tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> dict[str, Any]:
    """What results record of how prompts become tokens, as JSON values: all that decides on the tokens beside the data
    and the tokenizer's vocabulary. Results that differ in any of it are not compared.

    Args:
        tokenizer: of the model.
        options: as given.

    Returns:
        `format`, the one that is used, never "auto"; `template`, a hash of the chat template where the format is "chat"
        and the tokenizer has one as text; `template_arguments` and `template_time`, where it takes them; `examples`,
        those before each question where the format is "few_shot_qa".

    Raises:
        ValueError: as for `settled`.
    """
    used = settled(tokenizer, options)
    template = template_text(tokenizer, used.template_arguments) if used.prompt_format == "chat" else None
    return {
        "format": used.prompt_format,
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
        "template_arguments": used.template_arguments or None,
        "template_time": used.template_time,
        "examples": QA_PRIMER if used.prompt_format == "few_shot_qa" else None,
    }


def listed_choices(data: Dataset) -> list[list[str]]:
    """All answers of each question of a contrast set: the `choices` of `encode_prompts` and `encode_answers`."""
    columns = (data["positives"], data["negatives"], data["mc1_choices"])
    return [list(dict.fromkeys((*good, *bad, *(mc1 or ())))) for good, bad, mc1 in zip(*columns, strict=True)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    messages: Sequence[Sequence[Message] | None] | None = None,
    prompt_format: str = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    template_time: str | None = None,
    row_ids: Sequence[int] | None = None,
    choices: Sequence[Sequence[str]] | None = None,
) -> list[list[int]]:
    """Encodes prompts as they stand before an answer.

    Args:
        tokenizer: of the model that will read the ids.
        prompts: n prompts.
        messages: n conversations, each of which replaces its prompt unless it is None. In the plain format its contents
            are joined by new lines.
        prompt_format: `"auto"` (chat where the tokenizer has a template, else plain), `"chat"`, `"plain"`,
            `"few_shot_qa"` or `"lettered_choices"`.
        template_arguments: of the chat template, such as {"enable_thinking": False}; other formats take no notice.
        template_time: that a chat template which writes the date is told, in ISO format; None for today.
        row_ids: n names of the rows for error messages; None counts from 0.
        choices: for each prompt the 2 to 26 choices that `"lettered_choices"` lists, see `listed_choices`; other
            formats take no notice of them.

    Returns:
        The token ids of each prompt, at least one.

    Raises:
        ValueError: the format is not possible, the chat template fails or leaves out a message, a prompt gives no
            tokens, or has no choices to list, or too many.
    """
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    options = messages, prompt_format, template_arguments, template_time, row_ids, choices
    rows = _encode_rows(tokenizer, prompts, [[] for _ in prompts], *options)
    return [ids or _stand_in(tokenizer, row_id) for row_id, (ids, _) in zip(row_ids, rows, strict=True)]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    messages: Sequence[Sequence[Message] | None] | None = None,
    prompt_format: str = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    template_time: str | None = None,
    row_ids: Sequence[int] | None = None,
    choices: Sequence[Sequence[str]] | None = None,
) -> list[list[EncodedAnswer]]:
    """Encodes every answer with its prompt, all of them in one call of the tokenizer.

    A tokenizer may merge the end of a prompt with the beginning of an answer. The cut is made at the length of the
    prompt encoded alone all the same, so `prompt_ids` can differ from answer to answer; `prompt_length` cannot.

    Args:
        tokenizer: of the model that will read the ids.
        prompts: n prompts.
        answers: for each prompt its answers, any number of them.
        messages, prompt_format, template_arguments, template_time, row_ids, choices: as for `encode_prompts`. With
            `"lettered_choices"` an answer must be one of the choices, and is encoded as its letter.

    Returns:
        For each prompt a list with one `EncodedAnswer` for each of its answers.

    Raises:
        ValueError: as for `encode_prompts`, where an answer adds no tokens to its prompt, where the chat template
            writes another text in its place, and where it is none of the choices.
    """
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    options = messages, prompt_format, template_arguments, template_time, row_ids, choices
    rows = _encode_rows(tokenizer, prompts, answers, *options)
    return [
        [_after(tokenizer, row_id, prompt_ids, answer, ids) for answer, ids in zip(of_row, encoded, strict=True)]
        for row_id, of_row, (prompt_ids, encoded) in zip(row_ids, answers, rows, strict=True)
    ]


def _encode_rows(
    tokenizer, prompts, answers, messages, prompt_format, template_arguments, template_time, row_ids, choices
) -> list[tuple[list[int], list[list[int]]]]:
    """For each prompt its ids, none where it has no text, and those of each answer with it."""
    prompt_format = resolve_prompt_format(tokenizer, prompt_format)
    messages = [None] * len(prompts) if messages is None else messages
    if prompt_format == "chat":
        turns = zip(prompts, messages, strict=True)
        conversations = [messages or [{"role": "user", "content": prompt}] for prompt, messages in turns]
        return encode_conversations(tokenizer, conversations, answers, row_ids, template_arguments, template_time)
    letters = None
    if prompt_format == "lettered_choices":
        letters = letters_of(prompts, choices, row_ids)
        answers = [lettered(*row) for row in zip(row_ids, answers, letters, strict=True)]
    contexts = contexts_of(prompts, messages, prompt_format, letters)
    joined = [
        text + _joint(text, moved, answer) + answer
        for (text, moved), of_row in zip(contexts, answers, strict=True)
        for answer in of_row
    ]
    encoded = _encode(tokenizer, [text for text, _ in contexts] + joined)
    with_answers = iter(encoded[len(contexts) :])
    return [
        (ids, [next(with_answers) for _ in of_row])
        for ids, of_row in zip(encoded[: len(contexts)], answers, strict=True)
    ]


def _after(tokenizer, row_id, prompt_ids: list[int], answer: str, ids: list[int]) -> EncodedAnswer:
    """An answer whose encoding with its prompt is `ids`."""
    stand_in = [] if prompt_ids else _stand_in(tokenizer, row_id)
    # an empty answer may have the token of the white space at the joint, which is not its own
    if not answer or len(ids) <= len(prompt_ids):
        raise ValueError(f"row {row_id}: the answer {answer!r} gives no tokens after its prompt: remove it")
    return EncodedAnswer(stand_in + ids, len(stand_in) + len(prompt_ids))


def _joint(text: str, moved: str, answer: str) -> str:
    if moved:
        return moved
    return " " if text and not answer[:1].isspace() else ""


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    first = _leading_special_ids(tokenizer, texts, encoded)
    return [ids if ids[: len(first)] == first else first + ids for ids in encoded]


def _leading_special_ids(tokenizer, texts: list[str], encoded: list[list[int]]) -> list[int]:
    """The ids that the tokenizer puts before every text: mostly [BOS] or none.

    They are read off one text encoded both ways, because the attributes that tell (`add_bos_token`) are missing or
    wrong for tokenizers whose post-processor decides.
    """
    for text, bare in zip(texts, encoded, strict=True):
        if bare:
            full = tokenizer(text, return_attention_mask=False)["input_ids"]
            starts = range(len(full) - len(bare) + 1)
            return full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)]
    return []


def _stand_in(tokenizer, row_id) -> list[int]:
    """One id in place of a prompt that has none, as in lm-evaluation-harness (`prefix_token_id`)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return [token_id]
    raise ValueError(
        f"row {row_id}: the prompt gives no tokens and the tokenizer has neither BOS nor EOS: add a prompt"
    )
