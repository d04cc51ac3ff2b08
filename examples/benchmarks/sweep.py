"""A sweep against an evaluation of each setting by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from peft import get_peft_model
from torch import nn

from peft_edit import SEAConfig, collect_activations, evaluate_multiple_choice, fit_sea, load_contrast_set, side_effects
from peft_edit import sweep as sweep_settings
from peft_edit.demo import ASSETS

from .data import TEXTS, Subject, subjects
from .report import Bench, Case, Row


OURS, ONE_BY_ONE = "sweep", "each setting fitted and evaluated by itself"
# No setting is to stop early: both do the same work.
BUDGET = {"perplexity_ratio": 1e6}
FIXED = {"centered": True, "rescale": "none"}


def cases(bench: Bench) -> Iterator[Case]:
    energies, lasts = ((0.9,), (1,)) if bench.quick else ((0.9, 0.95, 0.99, 0.998), (1, 2, 3))
    subject = subjects(bench)[0]
    name = f"{len(energies) * len(lasts)} settings of SEA, {subject.name}"
    yield Case(name, partial(of_settings, bench, name, subject, energies, lasts))


def of_settings(bench: Bench, case: str, subject: Subject, energies: tuple, lasts: tuple) -> Iterator[Row]:
    tokenizer, model = subject.tokenizer(), subject.model()
    few = 4 if bench.quick else None
    demonstrations, validation = (load_contrast_set(ASSETS / f"{n}.jsonl") for n in ("demonstrations", "validation"))
    validation = validation.select(range(few or len(validation)))
    texts = TEXTS.read_text(encoding="utf-8").splitlines()[:few]
    store = collect_activations(model, tokenizer, demonstrations, bench.folder / "sweep-store")
    axes = {"energy": list(energies), "layers": [f"last {number}" for number in lasts], **FIXED}
    saved = []

    def together() -> None:
        found = sweep_settings(
            subject.model(),
            tokenizer,
            axes,
            store=store,
            validation=validation,
            texts=texts,
            budget=BUDGET,
        )
        saved.append(found.saved)

    def one_by_one() -> None:
        for energy, number in product(energies, lasts):
            base = subject.model()
            layers = len(base.model.layers)
            adapted = fitted(base, store, energy, list(range(layers - number, layers)))
            side_effects(adapted, tokenizer, texts)
            evaluate_multiple_choice(adapted, tokenizer, validation)

    timings = bench.measure({OURS: together, ONE_BY_ONE: one_by_one}, rounds=3)
    note = f"{saved[-1]:.1f} times less passes through blocks"
    yield from bench.rows(case, timings, OURS, {ONE_BY_ONE: "other"}, note)


def fitted(base: nn.Module, store, energy: float, blocks: list[int]) -> nn.Module:
    """SEA of an energy on some blocks."""
    config = SEAConfig(positive_energy=energy, negative_energy=energy, layers_to_transform=blocks, **FIXED)
    adapted = get_peft_model(base, config)
    fit_sea(adapted, store)
    return adapted
