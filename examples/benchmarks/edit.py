"""The edit of SEA: alone against dense projections, and behind a linear layer against that layer and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from peft_edit.tuners.fusing import numbers_are_faster
from peft_edit.tuners.sea.layer import adding_kernel
from peft_edit.tuners.sea.maths import edit_at_once

from . import published
from .models import RANK, Shape, orthonormal, random_model, sharing, with_lora, with_sea
from .report import Bench, Case, Row
from .timing import LIMIT, Work


HIDDEN = (2048, 4096)
TOKENS = (1, 8, 512)
LINEAR = "the linear layer alone"


def cases(bench: Bench) -> Iterator[Case]:
    for d in (64,) if bench.quick else HIDDEN:
        rank = min(RANK, d // 4)
        name = f"SEA's edit of one token, hidden size {d}, ranks {rank} + {rank}"
        yield Case(name, partial(one_token, bench, name, d, rank), needs=6 * d * d * bench.element)
    for shape in bench.shapes[:2]:
        for tokens in TOKENS[:2] if bench.quick else TOKENS:
            name = f"MLP output of {shape.name}, {shape.intermediate} to {shape.hidden}, {tokens} tokens"
            needs = 6 * shape.hidden * (shape.intermediate + tokens) * bench.element
            yield Case(name, partial(linear_layer, bench, name, shape, tokens), needs=needs)


def one_token(bench: Bench, case: str, d: int, rank: int) -> Iterator[Row]:
    """In a loop, in which the factors stay in the caches, and in turns, where the dense products throw them out, as a
    model's weights do."""
    bases = [orthonormal(rank, d, seed).to(bench.device, bench.dtype) for seed in (0, 1)]
    plus, minus = published.sea_projections(*bases)
    h = torch.randn(1, 1, d, generator=torch.Generator().manual_seed(2)).to(bench.device, bench.dtype)
    as_fitted = {"mean_rescale": 1.0, "strength": 1.0, "add": adding_kernel(h), "in_python": numbers_are_faster(h)}
    # Both factors are read; each is multiplied twice.
    work = Work(bytes=2 * rank * d * bench.element, flops=8 * rank * d, dtype=bench.dtype)
    for how, in_turns in (("in a loop", False), ("in turns", True)):
        plain, token = f"rescale none, {how}", f"rescale token, {how}"
        dense, dense_token = f"two d x d products, {how}", f"two d x d products and norms, {how}"
        timings = bench.measure(
            {
                plain: lambda: edit_at_once(h, *bases, rescale="none", **as_fitted),
                token: lambda: edit_at_once(h, *bases, rescale="token", **as_fitted),
                dense: lambda: published.sea_edit(h, plus, minus, rescale=False),
                dense_token: lambda: published.sea_edit(h, plus, minus),
            },
            rounds=101 if in_turns else 21,
            in_turns=in_turns,
            work=work if in_turns else None,
        )
        yield from bench.rows(case, timings, plain, {dense: "published", **({LIMIT: "limit"} if in_turns else {})})
        yield from bench.rows(case, timings, token, {dense_token: "published"})


def linear_layer(bench: Bench, case: str, shape: Shape, tokens: int) -> Iterator[Row]:
    narrow = Shape("", shape.hidden, shape.intermediate, 1, shape.heads, 1, 8)
    base, rank = random_model(narrow, bench.device, bench.dtype), min(RANK, shape.hidden // 4)
    lora = f"LoRA of rank {2 * rank}"
    adapted = {
        f"SEA {rank} + {rank}, rescale token": with_sea(sharing(base), [0], rank),
        f"SEA {rank} + {rank}, rescale none": with_sea(sharing(base), [0], rank, rescale="none"),
        lora: with_lora(sharing(base), [0], 2 * rank),
    }
    layers = {name: model.get_base_model().model.layers[0].mlp.down_proj for name, model in adapted.items()}
    layers[LINEAR] = base.model.layers[0].mlp.down_proj
    x = torch.randn(1, tokens, shape.intermediate).to(bench.device, bench.dtype)
    timings = bench.measure(
        {name: partial(layer, x) for name, layer in layers.items()},
        rounds=21,
        budget=60,
        in_turns=True,
    )
    for name in list(adapted)[:2]:
        yield from bench.rows(case, timings, name, {LINEAR: "base", lora: "LoRA"})
