"""An answer, piece by piece while it is generated, which may be stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from ..models.run import check_length, generating_by, input_device, stop_tokens
from ..models.sites import unwrap
from .models import ChatModels
from .settings import Sampling, Settings


class StopAtEvent(StoppingCriteria):
    """Ends the generation when any of some events is set."""

    def __init__(self, *events: Event):
        self._events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        stopped = any(event.is_set() for event in self._events)
        return torch.full((len(input_ids),), stopped, dtype=torch.bool, device=input_ids.device)


class RefuseNaN(LogitsProcessor):
    """Ends a generation with an error where the model gives NaN."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise ValueError(
                "the model gives NaN: load it in a wider dtype (bfloat16 or float32), or lower the strength of the edit"
            )
        return scores


def stream_answer(
    models: ChatModels, settings: Settings, side: str, prompt_ids: Sequence[int], stop: Event
) -> Iterator[str]:
    """The pieces of an answer while a thread of its own generates it. When the iterator is closed, the generation ends.

    Args:
        models: of which one answers.
        settings: of the conversation.
        side: who answers, `BASE` or `EDITED`.
        prompt_ids: the conversation up to the answer.
        stop: ends the answer when it is set.

    Raises:
        Whatever the model raises.
    """
    streamer = TextIteratorStreamer(models.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left, failures = Event(), []

    def run() -> None:
        try:
            with models.answering(settings, side) as model:
                _generate(unwrap(model), models.tokenizer, prompt_ids, settings.sampling, streamer, stop, left)
        except BaseException as error:  # which the reader raises
            failures.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = Thread(target=run, name=f"answer of {side}", daemon=True)
    thread.start()
    try:
        begun = False
        for piece in streamer:
            # the space between prompt and answer is of neither
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            if piece:
                yield piece
    finally:
        left.set()
        thread.join()
    if failures:
        raise failures[0]


def check_fits(models: ChatModels, prompt_ids: Sequence[int], sampling: Sampling) -> None:
    """Raise ValueError where a conversation and its answer are longer than the model takes."""
    tokens = len(prompt_ids) + sampling.max_new_tokens
    check_length(models.base, tokens, "conversation with its answer", "begin a new one, or allow shorter answers")


def _generate(model, tokenizer, prompt_ids, sampling: Sampling, streamer, stop: Event, left: Event) -> None:
    ids = torch.tensor([list(prompt_ids)], device=input_device(model))
    ends = stop_tokens(model, tokenizer)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(sampling.temperature),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **drawn,
    )
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), generating_by(model, config):
        torch.manual_seed(sampling.seed)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
            logits_processor=[RefuseNaN()],
            stopping_criteria=[StopAtEvent(stop, left)],
        )
