"""Multiple-choice evaluation against one answer at a time, against the matrix products that it makes, and with an edit
against without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from peft_edit import evaluate_multiple_choice
from peft_edit.models.sites import decoder_blocks

from . import published
from .data import Subject, counted, matrix_products, products_alone, subjects
from .models import RANK, SEA_BLOCKS, last_blocks, with_sea
from .report import Bench, Case, Row
from .timing import LIMIT


OURS, ONE_AT_A_TIME, EDITED = "evaluate_multiple_choice", "one answer at a time", "with SEA"
PRODUCTS = "its products with the model's weights"


def cases(bench: Bench) -> Iterator[Case]:
    for subject in subjects(bench):
        name = f"{subject.questions} questions of TruthfulQA, {subject.name}"
        yield Case(name, partial(multiple_choice, bench, name, subject))


def multiple_choice(bench: Bench, case: str, subject: Subject) -> Iterator[Row]:
    model, tokenizer, data = subject.model(), subject.tokenizer(), subject.data()
    blocks = last_blocks(len(decoder_blocks(model)), SEA_BLOCKS)
    rank = min(RANK, model.config.hidden_size // 4)
    edited = with_sea(subject.model(), blocks, rank)

    def evaluate(of: nn.Module) -> object:
        return evaluate_multiple_choice(of, tokenizer, data)

    passed = counted(model, lambda: evaluate(model))
    timings = bench.measure(
        {
            OURS: lambda: evaluate(model),
            EDITED: lambda: evaluate(edited),
            PRODUCTS: products_alone(lambda: evaluate(model)),
            ONE_AT_A_TIME: lambda: [published.answer_scores(model, tokenizer, row) for row in data],
        },
        rounds=5,
        budget=90,
        work=matrix_products(lambda: evaluate(model), subject.dtype),
    )
    note = f"{100 * passed.padding / passed.tokens:.1f} % of the tokens are padding; the limit is all matrix products "
    note += "at the rate of large ones"
    against = {ONE_AT_A_TIME: "published", PRODUCTS: "limit", LIMIT: "limit"}
    yield from bench.rows(case, timings, OURS, against, note)
    note = f"SEA of ranks {rank} + {rank} on {len(blocks)} blocks"
    yield from bench.rows(case, timings, EDITED, {OURS: "base"}, note)
