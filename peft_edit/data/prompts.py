"""Prompt and answer -> token ids: the one rule that collection and evaluation share.

The rule is that of lm-evaluation-harness (`TemplateLM._encode_pair`): prompt and answer are encoded once, together, and
the answer's tokens are those beyond the length of the prompt encoded alone.

- `"plain"`: trailing white space of the prompt moves to the answer. The two are joined by one space, unless either
  brings white space of its own. Special tokens that the tokenizer puts first (BOS) stand there once, also where the
  prompt spells them out; those that it puts last (EOS) are left out. A prompt without any token is stood in for by BOS,
  else by EOS, so that the answer's first token has something to follow.
- `"chat"`: the prompt is the user's turn, or `messages` are the conversation as they are; the answer follows the chat
  template's generation prompt directly, without end of turn. Only the template writes special tokens.
- `"few_shot_qa"`: plain text, with the prompt as one more question after those of `contexts.QA_PRIMER`. SEA's paper
  asks after examples too; which ones is not known here.
- `"lettered_choices"`: plain text, with the choices below the prompt, a letter before each, and `Answer:` last. The
  answer is the letter alone, so that likelihoods compare choices and not their lengths. HPR's paper lists lettered
  choices too; its wording is not known here, and this one is lm-evaluation-harness' of MMLU. All answers of a question
  are its choices; their order follows from their texts, not from which are right.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from .contexts import QA_PRIMER, Message, contexts_of, lettered, letters_of


PromptFormat = Literal["auto", "chat", "plain", "few_shot_qa", "lettered_choices"]
PROMPT_FORMATS = get_args(PromptFormat)


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
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if prompt_format == "chat" and not has_template:
        raise ArgumentError(
            Argument("prompt_format", "chat"),
            " needs a chat template and the tokenizer has none: pass 'plain', or set tokenizer.chat_template",
        )
    if prompt_format == "auto":
        return "chat" if has_template else "plain"
    return prompt_format


def prompt_record(tokenizer: PreTrainedTokenizerBase, prompt_format: str = "auto") -> dict[str, Any]:
    """What results record of how prompts become tokens, as JSON values: all that decides on the tokens beside the data
    and the tokenizer's vocabulary. Results that differ in any of it are not compared.

    Args:
        tokenizer: of the model.
        prompt_format: as for `encode_prompts`.

    Returns:
        `format`, the one that is used, never "auto"; `template`, a hash of the chat template where it is "chat";
        `examples`, those before each question where it is "few_shot_qa".

    Raises:
        ValueError: the format is not possible.
    """
    prompt_format = resolve_prompt_format(tokenizer, prompt_format)
    template = tokenizer.get_chat_template() if prompt_format == "chat" else None
    return {
        "format": prompt_format,
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
        "examples": QA_PRIMER if prompt_format == "few_shot_qa" else None,
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
    row_ids: Sequence[int] | None = None,
    choices: Sequence[Sequence[str]] | None = None,
) -> list[list[int]]:
    """Encodes prompts as they stand before an answer, with the generation prompt where there is a chat template.

    Args:
        tokenizer: of the model that will read the ids.
        prompts: n prompts.
        messages: n conversations, each of which replaces its prompt unless it is None. In the plain format its contents
            are joined by new lines.
        prompt_format: `"auto"` (chat where the tokenizer has a template, else plain), `"chat"`, `"plain"`,
            `"few_shot_qa"` or `"lettered_choices"`.
        row_ids: n names of the rows for error messages; None counts from 0.
        choices: for each prompt the 2 to 26 choices that `"lettered_choices"` lists, see `listed_choices`; other
            formats take no notice of them.

    Returns:
        The token ids of each prompt, at least one.

    Raises:
        ValueError: the format is not possible, the chat template fails, a prompt gives no tokens, or has no choices to
            list, or too many.
    """
    prompt_format = resolve_prompt_format(tokenizer, prompt_format)
    chat = prompt_format == "chat"
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    letters = letters_of(prompts, choices, row_ids) if prompt_format == "lettered_choices" else None
    contexts = contexts_of(tokenizer, prompts, messages, prompt_format, row_ids, letters)
    encoded = _encode(tokenizer, [text for text, _ in contexts], chat)
    return [ids or _stand_in(tokenizer, row_id) for row_id, ids in zip(row_ids, encoded, strict=True)]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    messages: Sequence[Sequence[Message] | None] | None = None,
    prompt_format: str = "auto",
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
        messages, prompt_format, row_ids, choices: as for `encode_prompts`. With `"lettered_choices"` an answer must be
            one of the choices, and is encoded as its letter.

    Returns:
        For each prompt a list with one `EncodedAnswer` for each of its answers.

    Raises:
        ValueError: as for `encode_prompts`, where an answer adds no tokens to its prompt, and where it is none of the
            choices.
    """
    prompt_format = resolve_prompt_format(tokenizer, prompt_format)
    chat = prompt_format == "chat"
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    letters = None
    if prompt_format == "lettered_choices":
        letters = letters_of(prompts, choices, row_ids)
        answers = [lettered(*row) for row in zip(row_ids, answers, letters, strict=True)]
    contexts = contexts_of(tokenizer, prompts, messages, prompt_format, row_ids, letters)
    joined = [
        text + _joint(text, moved, answer, chat) + answer
        for (text, moved), row in zip(contexts, answers, strict=True)
        for answer in row
    ]
    encoded = _encode(tokenizer, [text for text, _ in contexts] + joined, chat)
    prompt_encodings, answer_encodings = encoded[: len(contexts)], iter(encoded[len(contexts) :])

    return [
        [_after(tokenizer, row_id, prompt_ids, answer, next(answer_encodings)) for answer in row]
        for row_id, prompt_ids, row in zip(row_ids, prompt_encodings, answers, strict=True)
    ]


def _after(tokenizer, row_id, prompt_ids: list[int], answer: str, ids: list[int]) -> EncodedAnswer:
    """An answer whose encoding with its prompt is `ids`."""
    stand_in = [] if prompt_ids else _stand_in(tokenizer, row_id)
    # an empty answer may have the token of the white space at the joint, which is not its own
    if not answer or len(ids) <= len(prompt_ids):
        raise ValueError(f"row {row_id}: the answer {answer!r} gives no tokens after its prompt: remove it")
    return EncodedAnswer(stand_in + ids, len(stand_in) + len(prompt_ids))


def _joint(text: str, moved: str, answer: str, chat: bool) -> str:
    if chat or moved:
        return moved
    return " " if text and not answer[:1].isspace() else ""


def _encode(tokenizer, texts: list[str], chat: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    if chat:
        return encoded
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
