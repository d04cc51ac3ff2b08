"""First stage of a collection: texts -> tokens. What cannot be collected is refused before anything is written."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data.prompts import EncodedAnswer, encode_answers, encode_prompts, listed_choices
from ..models.kind import check_vocabulary
from ..models.run import length_limit
from .arguments import CollectArguments
from .sequences import Encoded


# Questions that are encoded at once.
CHUNK = 256


@dataclass
class _Question:
    """A row of the contrast set in tokens; `neutral` has its neutral text, or nothing."""

    row_id: int
    prompt: list[int]
    positives: list[EncodedAnswer]
    negatives: list[EncodedAnswer]
    neutral: list[EncodedAnswer]

    @property
    def answers(self) -> list[EncodedAnswer]:
        return [*self.positives, *self.negatives, *self.neutral]


def encode(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Dataset, arguments: CollectArguments) -> Encoded:
    """Encode a contrast set, or plain texts.

    Args:
        model: that will run the tokens, without a `PeftModel` around it.
        tokenizer: of the model.
        data: the contrast set or the texts.
        arguments: which tokens of which answers are kept.

    Raises:
        ValueError: a row cannot be encoded, has no neutral text that is asked for, or is longer than the model takes;
            there is nothing to collect.
    """
    if arguments.of_texts:
        return _encode_texts(model, tokenizer, data, arguments)
    encoded = Encoded(neutral=None if arguments.neutral is None else {})
    chooser, numbers = random.Random(arguments.seed), {}
    limit = length_limit(model)
    for first in tqdm(
        range(0, len(data), CHUNK), desc="encoding", unit_scale=CHUNK, unit="question", leave=None, delay=2
    ):
        for question in _questions(tokenizer, data[first : first + CHUNK], arguments):
            ids = (question.prompt, *(answer.input_ids for answer in question.answers))
            check_vocabulary(model, ids, f"row {question.row_id}")
            if limit is not None:
                _fit(question, tokenizer, arguments, limit)
            _add(encoded, question, arguments, chooser, numbers)
    if arguments.tokens == "answer" and not any(encoded.places[1::2]):
        raise ValueError("no pair of answers differs in any token that both have: nothing to collect")
    return encoded


def _encode_texts(model, tokenizer, data: Dataset, arguments: CollectArguments) -> Encoded:
    """Texts as they are, with the special tokens that the tokenizer puts around them; each text once."""
    encoded = Encoded()
    limit = length_limit(model)
    for first in tqdm(range(0, len(data), CHUNK), desc="encoding", unit_scale=CHUNK, unit="text", leave=None, delay=2):
        rows = data[first : first + CHUNK]
        for row_id, ids in zip(rows["id"], tokenizer(rows["text"])["input_ids"], strict=True):
            if limit is not None and len(ids) > limit and not arguments.truncate:
                raise ArgumentError(
                    f"row {row_id}: the text has {len(ids)} tokens, the model takes {limit}: leave it out, or pass ",
                    *(Argument("truncate", True), " to cut it at the end"),
                )
            ids = ids[:limit]
            if not ids:
                raise ValueError(f"row {row_id}: the text gives no tokens: leave the row out")
            check_vocabulary(model, [ids], f"row {row_id}")
            encoded.row_ids.append(row_id)
            encoded.pairs.append(encoded.table.add(ids, 0, len(ids), len(encoded.row_ids) - 1))
    return encoded


def _questions(tokenizer, rows: dict[str, list], arguments: CollectArguments) -> Iterator[_Question]:
    """Some rows in tokens."""
    texts = [[] for _ in rows["id"]]
    if arguments.neutral in ("auto", "text"):
        texts = [[] if text is None else [text] for text in rows["neutral"]]
        if arguments.neutral == "text" and [] in texts:
            raise ArgumentError(
                f"row {rows['id'][texts.index([])]} has no neutral text: fill the column, or pass ",
                *(Argument("neutral", "generated"), " or 'prompt'"),
            )
    columns = {"messages": rows["messages"], "row_ids": rows["id"], **arguments.of_prompts}
    columns["choices"] = listed_choices(rows)
    prompts = encode_prompts(tokenizer, rows["prompt"], **columns)
    sides = list(zip(rows["positives"], rows["negatives"], texts, strict=True))
    together = encode_answers(tokenizer, rows["prompt"], [list(itertools.chain(*row)) for row in sides], **columns)
    for row_id, prompt, row, encoded in zip(rows["id"], prompts, sides, together, strict=True):
        answers = iter(encoded)
        yield _Question(row_id, prompt, *(list(itertools.islice(answers, len(side))) for side in row))


def _fit(question: _Question, tokenizer, arguments: CollectArguments, limit: int) -> None:
    """Cut the prompt on the left where that is asked for and the longest answer is more than the model takes."""
    answered = arguments.neutral in ("auto", "generated") and not question.neutral
    cut = _excess(question, answered, arguments, limit)
    if not cut:
        return
    begins = [*(answer.prompt_ids for answer in question.answers), question.prompt]
    kept = int(all(ids[0] in tokenizer.all_special_ids for ids in begins))  # BOS, if there is one
    if any(len(ids) <= kept + cut for ids in begins):
        lower = ("lower ", Argument("max_new_tokens"), ", or ") if answered else ()
        raise ArgumentError(
            f"row {question.row_id}: without a prompt its longest answer is still more than the {limit} tokens that "
            "the model takes: ",
            *(*lower, "leave the row out"),
        )
    question.prompt = _shortened(question.prompt, kept, cut)
    for side in (question.positives, question.negatives, question.neutral):
        side[:] = [
            EncodedAnswer(_shortened(answer.input_ids, kept, cut), answer.prompt_length - cut) for answer in side
        ]


def _excess(question: _Question, answered: bool, arguments: CollectArguments, limit: int) -> int:
    """How many tokens of a question's prompt have to go, so that its longest answer fits."""
    prompt = len(question.prompt)
    lengths = {"prompt and answer": max((len(answer.input_ids) for answer in question.answers), default=prompt)}
    if answered:
        lengths["prompt and generated answer"] = prompt + arguments.max_new_tokens
    what, length = max(lengths.items(), key=lambda item: item[1])
    if length > limit and not arguments.truncate:
        lowers = answered and lengths["prompt and answer"] <= limit
        raise ArgumentError(
            f"row {question.row_id}: {what} has {length} tokens, the model takes {limit}: ",
            *(("lower ", Argument("max_new_tokens"), ", ") if lowers else ()),
            *("leave the row out, or pass ", Argument("truncate", True), " to cut its prompt on the left"),
        )
    return max(0, length - limit)


def _shortened(ids: list[int], kept: int, cut: int) -> list[int]:
    return ids[:kept] + ids[kept + cut :]


def _add(
    encoded: Encoded, question: _Question, arguments: CollectArguments, chooser, numbers: dict[bytes, int]
) -> None:
    """Add a question; `numbers` are those of the prompts that the model has to answer."""
    group = len(encoded.row_ids)
    encoded.row_ids.append(question.row_id)
    for positive, negative in _demonstrations(question, arguments, chooser):
        found = (encoded.table.add(a.input_ids, *_span(a, arguments), group) for a in (negative, positive))
        encoded.pairs.extend((group, *found))
        if arguments.tokens == "answer":
            first, shorter = _first_difference(positive, negative), _shorter(positive, negative)
            encoded.places.extend((first, shorter - first))
    if question.neutral:
        encoded.add_neutral(group, question.neutral[0].input_ids)
    elif arguments.neutral == "prompt":
        encoded.add_neutral(group, question.prompt)
    elif arguments.neutral is not None:
        content = array("i", question.prompt)
        number = numbers.setdefault(content.tobytes(), len(encoded.prompts))
        if number == len(encoded.prompts):
            encoded.prompts.append(content)
        encoded.waiting.extend((group, number))


def _demonstrations(question: _Question, arguments: CollectArguments, chooser: random.Random):
    """Pairs of a positive and a negative answer."""
    good, bad = question.positives, question.negatives
    if arguments.answers == "first":
        return [(good[0], bad[0])]
    if arguments.answers == "random":
        return [(chooser.choice(good), chooser.choice(bad))]
    return itertools.product(good, bad)


def _span(answer: EncodedAnswer, arguments: CollectArguments) -> tuple[int, int]:
    """First position of a sequence that is kept, and the one behind the last."""
    start, stop = answer.prompt_length, len(answer.input_ids)
    if arguments.tokens == "last":
        return stop - 1, stop
    if arguments.tokens == "random":
        # Seeded by the answer itself, so that an answer which demonstrates twice is run once.
        position = random.Random(f"{arguments.seed} {answer.input_ids}").randrange(start, stop)
        return position, position + 1
    return start, stop


def _first_difference(positive: EncodedAnswer, negative: EncodedAnswer) -> int:
    """Place within the answers of the first token that differs: before it activations are identical."""
    same = next(
        (i for i, (a, b) in enumerate(zip(positive.input_ids, negative.input_ids, strict=False)) if a != b),
        min(len(positive.input_ids), len(negative.input_ids)),
    )
    return max(0, same - positive.prompt_length)


def _shorter(positive: EncodedAnswer, negative: EncodedAnswer) -> int:
    return min(len(positive.input_ids) - positive.prompt_length, len(negative.input_ids) - negative.prompt_length)
