"""Token ids -> the text of each token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


# What a tokenizer gives for bytes that are no whole character.
INCOMPLETE = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; together they are the text, special tokens included.

    Where several tokens make one character, the last of them has it, and the others have none.
    """
    texts: list[str] = []
    # Each is decoded after those that made the text before it: alone, some tokenizers drop its leading space.
    first, known = 0, ""
    for i in range(len(ids)):
        text = decoded(tokenizer, ids[first : i + 1])
        if text.endswith(INCOMPLETE) and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text.removeprefix(known) if text.startswith(known) else decoded(tokenizer, ids[i : i + 1]))
        first = i
        while first > 0 and not texts[first - 1]:
            first -= 1
        known = decoded(tokenizer, ids[first : i + 1])
    return texts


def shown_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself."""
    return [decoded(tokenizer, [token]) for token in ids]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens as it is, special ones included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
