"""Answers to many prompts, base and edited, as rows that are written while they come.

Prompts are answered some at a time, in their order, and their rows are added to the file together. Which ones go
together follows from the prompts and the options alone, so that a run that was interrupted ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError, takes
from ..data import check_contrast_set
from ..data.prompt_files import load_prompts
from ..data.prompts import encode_prompts, listed_choices, settled
from ..evaluation.side_effects import check_active, disabled_adapters
from ..files import append_line, check_writable, locked_place
from ..json_files import digest_of
from ..models.fingerprint import active_adapters, adapters_fingerprint, fingerprint
from ..models.kind import REMEDY, can_generate, check_causal, check_vocabulary
from ..models.run import TOKEN_BAR, TokenProgress, batch_answers, check_length, inference
from ..models.sites import unwrap
from .drawing import Drawing, seed_of
from .options import BASE, EDITED, AnswerOptions
from .rows import Candidate, rows_in
from .scoring import Score, name_of, scorer, scores_of


@takes(AnswerOptions)
def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset | Iterable[str] | str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answers to prompts: of the model with its active adapters, and with them disabled.

    Samples do not depend on the size of batches but for rounding: sequences of other lengths beside one change its
    logits in the last digits, in half precision in the second or third, and a token that is nearly as likely as another
    one may then come instead.

    Args:
        model: a causal language model of Transformers, bare or in a `PeftModel`.
        tokenizer: of that model.
        prompts: a contrast set, of which the prompts are answered; a list of text; or a file of prompts, see
            `load_prompts`.
        out: a file of JSON lines, one a row, which grows while the answers come. A run that was interrupted goes on
            with it; of one that is finished the rows are read.
        options: of `AnswerOptions`.

    Returns:
        A dict for each prompt and each of the models that answer, in this order: `id` and `prompt` of the row, `model`,
        "base" or "edited", `answer`, `tokens`, their number, `finished`, whether the model ended it, `log_likelihood`,
        the mean over its tokens in nats, the end of the sequence included, and `run`, the same for all answers of one
        kind. With a function as score its `score`; with `best_of` above 1 all `candidates`, with the same of each, in
        the order in which they were drawn.

    Raises:
        ValueError: there are no prompts, one cannot be encoded, or is too long with its answer; the edited model is
            asked for and no adapter is active, or one is merged; the model gives NaN; `out` holds something else, or
            cannot be written; the score fails.
    """
    settings = AnswerOptions(**options)
    data = check_contrast_set(prompts if isinstance(prompts, Dataset) else load_prompts(prompts))
    place = None if out is None else Path(out)
    if place is not None and isinstance(prompts, (str, os.PathLike)) and place.resolve() == Path(prompts).resolve():
        raise ArgumentError(Argument("out"), f" {place} is the file of the prompts: choose another file")
    with nullcontext() if place is None else _only_writer(place):
        return Answering(model, tokenizer, data, settings, place).rows()


def _only_writer(out: Path):
    try:
        check_writable(out)
        if out.is_dir():
            raise ValueError(f"{out} is a folder: choose a file")
    except ValueError as error:
        raise ArgumentError(Argument("out"), f" {error}") from error
    return locked_place(out)


class Answering:
    """A model that answers prompts, see `generate_answers`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        options: AnswerOptions,
        out: Path | None,
    ):
        check_causal(model)
        self.model, self.bare, self.tokenizer = model, unwrap(model), tokenizer
        if not can_generate(model):
            raise ValueError(f"{type(self.bare).__name__} cannot generate answers: {REMEDY}")
        self.who = _who(model, options)
        self.score: Score | None = scorer(options.score)
        self.out, self.resumes, self.data = out, options.resume, data
        # Also of a file that is replaced: nothing else than answers is.
        held = [] if out is None else rows_in(out)
        held = held if options.resume else []
        # A template that writes the date is told that of the day on which the file was begun.
        self.options = settled(tokenizer, options, held[0].get("template_time") if held else None)
        self.prompts = self._encoded()
        self.run = self._digest()
        expected = [(self.run, row_id, who) for row_id in data["id"] for who in self.who]
        if [(row["run"], row.get("id"), row.get("model")) for row in held] != expected[: len(held)]:
            raise ArgumentError(
                f"{out} holds answers to other prompts, or of another model, dtype, adapter or options, or lacks some "
                "of its first: choose another file, or pass ",
                *(Argument("resume", False), " to replace it"),
            )
        self.held = held

    def _encoded(self) -> list[list[int]]:
        """Token ids of the prompts."""
        data, options = self.data, self.options
        row_ids = list(data["id"])
        prompts = encode_prompts(
            self.tokenizer,
            list(data["prompt"]),
            messages=list(data["messages"]),
            **options.of_prompts,
            row_ids=row_ids,
            choices=listed_choices(data),
        )
        for row_id, ids in zip(row_ids, prompts, strict=True):
            check_vocabulary(self.bare, [ids], f"row {row_id}")
        remedy = "leave the long prompts out, or lower max_new_tokens"
        check_length(self.bare, max(map(len, prompts)) + options.max_new_tokens, "prompt with its answer", remedy)
        return prompts

    def _digest(self) -> str:
        """Of all that the answers follow from. The size of batches is not of it, so that an interrupted run may go on
        with smaller ones."""
        options = {name: value for name, value in vars(self.options).items() if name not in ("batch_size", "resume")}
        return digest_of(
            {
                **options,
                "score": name_of(self.options.score),
                "models": self.who,
                "prompts": list(zip(self.data["id"], self.prompts, strict=True)),
                "fingerprint": fingerprint(self.bare),
                "dtype": str(self.bare.dtype),
                "adapters": adapters_fingerprint(self.bare),
            }
        )

    def rows(self) -> list[dict[str, Any]]:
        """The answers, those that are missing generated and written."""
        at_once = max(1, self.options.batch_size // self.options.best_of)
        parts = [range(i, min(i + at_once, len(self.data))) for i in range(0, len(self.data), at_once)]
        done, rows = len(self.held), list(self.held)
        left = [part for part in parts if part.stop * len(self.who) > done]
        costs = [sum(map(self._cost, some)) for some in (range(len(self.data)), (i for part in left for i in part))]
        replaced = self.out is not None and not self.resumes
        bar = tqdm(total=costs[0], initial=costs[0] - costs[1], desc="generating answers", leave=None, **TOKEN_BAR)
        with inference(self.model), bar:
            progress = TokenProgress(self.bare, bar)
            for part in left:
                found = self._answered(part, progress)[len(rows) - part.start * len(self.who) :]
                if replaced:  # only now that there is something in its place
                    self.out.unlink(missing_ok=True)
                    replaced = False
                self._write(found)
                # As they are read again: the same whether the run was interrupted or not.
                rows += [json.loads(json.dumps(row)) for row in found]
        return rows

    def _cost(self, place: int) -> int:
        """Tokens of the answers to a prompt, at their longest, and of itself as often."""
        return len(self.who) * self.options.best_of * (len(self.prompts[place]) + self.options.max_new_tokens)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.out, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))

    def _answered(self, part: range, progress: TokenProgress) -> list[dict[str, Any]]:
        """The rows of some prompts."""
        of_models = {}
        for who in self.who:
            with disabled_adapters(self.model) if who == BASE and self._has_edit else nullcontext():
                of_models[who] = list(self._candidates(part, progress))
        return [self._row(i, who, of_models[who][i - part.start]) for i in part for who in self.who]

    @property
    def _has_edit(self) -> bool:
        return bool(active_adapters(self.model))

    def _candidates(self, part: range, progress: TokenProgress) -> Iterator[list[Candidate]]:
        """The answers to each of some prompts."""
        count, size = self.options.best_of, self.options.batch_size
        wanted = [(i, number) for i in part for number in range(count)]
        batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        drawings: list[Drawing] = []

        def choosing(batch: Sequence[int]) -> Drawing:
            seeds = (seed_of(self.options.seed, self.data[i]["id"], number) for i, number in batches[len(drawings)])
            drawings.append(Drawing(self.options, list(seeds)))
            return drawings[-1]

        places = [[i for i, _ in batch] for batch in batches]
        new = self.options.max_new_tokens
        found = []
        answers = batch_answers(self.bare, self.tokenizer, self.prompts, places, new, progress, choosing)
        for batch in answers:
            steps = torch.stack(drawings[-1].log_likelihoods, dim=1).double()  # (b, steps)
            found += [self._candidate(ids, likelihoods) for ids, likelihoods in zip(batch, steps, strict=True)]
        for place, i in enumerate(part):
            yield self._scored(i, found[place * count : (place + 1) * count])

    def _candidate(self, ids: list[int], likelihoods: torch.Tensor) -> Candidate:
        finished = len(ids) < self.options.max_new_tokens
        mean = float(likelihoods[: len(ids) + finished].mean())
        if mean != mean:
            raise ValueError(
                "the model gives NaN: load it in a wider dtype (bfloat16 or float32), or lower the strength of the edit"
            )
        return Candidate(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), finished, mean)

    def _scored(self, place: int, candidates: list[Candidate]) -> list[Candidate]:
        if self.score is None:
            return candidates
        scores = scores_of(self.score, self.data[place], [candidate.answer for candidate in candidates])
        return [replace(candidate, score=score) for candidate, score in zip(candidates, scores, strict=True)]

    def _row(self, place: int, who: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
        best = max(candidates, key=lambda c: c.log_likelihood if c.score is None else c.score)
        row = {"id": self.data[place]["id"], "prompt": self.data[place]["prompt"], "model": who, **best.to_dict()}
        if self.options.best_of > 1:
            row["candidates"] = [candidate.to_dict() for candidate in candidates]
        if self.options.template_time is not None:
            row["template_time"] = self.options.template_time
        return {**row, "run": self.run}


def _who(model: nn.Module, options: AnswerOptions) -> tuple[str, ...]:
    """Who answers."""
    wanted = options.models or ("both" if active_adapters(model) else BASE)
    if wanted != BASE or active_adapters(model):
        check_active(model)
    return (BASE, EDITED) if wanted == "both" else (wanted,)
