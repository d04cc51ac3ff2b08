"""Decoding and prefill of whole models with and without each edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from peft_edit.models.sites import decoder_blocks
from peft_edit.tuners.layer import edit_layers

from .machine import USABLE, free_memory
from .models import (
    HPR_BLOCKS,
    RANK,
    SEA_BLOCKS,
    Shape,
    last_blocks,
    other_edits,
    random_model,
    sharing,
    with_hooks,
    with_hpr,
    with_lora,
    with_sea,
)
from .report import Bench, Case, Row
from .timing import LIMIT, Work


BASE = "the model without an edit"
# Tokens in the cache of each row before the first that is decoded: each edit has a cache of its own.
PROMPT = 64
# Tokens of the prefill.
PREFILL = {"cpu": 64, "cuda": 512}
BATCHES = {"cpu": (1, 8), "cuda": (1, 32)}
# Blocks of a model that does not fit.
PART_LAYERS = 4
# A gate with which no token is rotated: the probe alone is run.
CLOSED = 1e-30
SECONDS = 90
# Blocks of a model that is compiled: to compile takes most of a minute for each model of 32 blocks.
COMPILED_LAYERS = 8


def cases(bench: Bench) -> Iterator[Case]:
    for shape in bench.shapes:
        yield from cases_of_shape(bench, shape)
        if not bench.quick and needed(bench, shape) > USABLE * free_memory(bench.device):
            yield from cases_of_shape(bench, shape.of_layers(PART_LAYERS))
    for shape in bench.shapes[:2][-1:] if bench.device.type == "cuda" else ():
        part = shape if bench.quick else shape.of_layers(COMPILED_LAYERS)
        case = f"compiled decoding, batch 1, {part.name}"
        make = partial(random_model, part, bench.device, bench.dtype)
        yield Case(case, partial(compiled_decoding, bench, case, make, PROMPT), needed(bench, part))
    if bench.model is not None:
        load = partial(load_model, bench)
        yield from cases_of_model(bench, bench.model.name, load, needs=4 * size_of(bench))


def needed(bench: Bench, shape: Shape) -> float:
    """Bytes of a model of a shape, of its merged copy's own weights and of what a forward pass takes."""
    merged = shape.layers * shape.hidden * shape.intermediate
    return (shape.parameters + merged + 8 * max(BATCHES[bench.device.type]) * shape.vocabulary) * bench.element + 1e9


def cases_of_shape(bench: Bench, shape: Shape) -> Iterator[Case]:
    make = partial(random_model, shape, bench.device, bench.dtype)
    needs = 0 if bench.quick else needed(bench, shape)
    yield from cases_of_model(bench, shape.name, make, needs)


def cases_of_model(bench: Bench, name: str, make: Callable[[], nn.Module], needs: float) -> Iterator[Case]:
    device, prompt = bench.device.type, 8 if bench.quick else PROMPT
    for batch in (2,) if bench.quick else BATCHES[device]:
        case = f"decoding, batch {batch}, {name}"
        yield Case(case, partial(decoding, bench, case, make, batch, prompt), needs)
    length = 8 if bench.quick else PREFILL[device]
    case = f"prefill of {length} tokens, {name}"
    yield Case(case, partial(prefill, bench, case, make, length), needs)


def size_of(bench: Bench) -> int:
    """Bytes of the files of the real model."""
    return sum(file.stat().st_size for file in bench.model.glob("*.safetensors"))


def load_model(bench: Bench) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=bench.dtype)
    return model.eval().requires_grad_(False).to(bench.device)


@dataclass(frozen=True)
class Edited:
    """A model without an edit, and the same weights with each.

    Attributes:
        models: name to model, the unedited one last.
        sea, merged, lora: names of these among them.
    """

    models: Mapping[str, nn.Module]
    sea: str
    merged: str
    lora: str


def edited(base: nn.Module, only: bool = False) -> Edited:
    """The edits of a model; `only` those that can be merged or are the papers'."""
    layers, d = len(decoder_blocks(base)), base.config.hidden_size
    sea_blocks, hpr_blocks = last_blocks(layers, SEA_BLOCKS), last_blocks(layers, HPR_BLOCKS)
    rank = min(RANK, d // 4)
    sea = f"SEA {rank} + {rank} on {len(sea_blocks)} blocks"
    hpr = f"HPR on {len(hpr_blocks)} blocks"
    lora = f"LoRA of rank {2 * rank} on {len(sea_blocks)} blocks"
    models = {
        sea: with_sea(sharing(base), sea_blocks, rank),
        f"{hpr}, every token rotated": with_hpr(sharing(base), hpr_blocks, gate=1.0),
    }
    merged, hooks = f"{sea}, merged", "the products of SEA alone, in plain hooks"
    if not only:
        plain = with_sea(sharing(base), sea_blocks, rank, rescale="none")
        own = with_sea(sharing(base, own="down_proj"), sea_blocks, rank, rescale="none")
        models |= {
            f"{sea}, rescale none": plain,
            hooks: with_hooks(sharing(base), [layer.site for layer in edit_layers(plain)], rank),
            merged: own.merge_and_unload(),
            f"{hpr}, no token rotated": with_hpr(sharing(base), hpr_blocks, gate=CLOSED),
        }
        for name, make in other_edits().items():
            blocks = hpr_blocks if name == "Diff" else sea_blocks
            models[f"{name} on {len(blocks)} blocks"] = make(sharing(base), blocks)
        models[lora] = with_lora(sharing(base), sea_blocks, 2 * rank)
    return Edited({**models, BASE: sharing(base)}, sea, merged, lora)


def run_as_generate(model: nn.Module) -> nn.Module:
    """What `generate` calls for each token: the model inside a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def prompt_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def decoder(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A function that decodes one token more for each row, after a prompt that it runs at once."""
    model = run_as_generate(model)
    cache = DynamicCache(config=model.config)

    def step(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    with torch.no_grad():
        last = step(ids)

    def decode() -> Tensor:
        nonlocal last
        last = step(last)
        return last

    return decode


def compiled_decoder(model: nn.Module, ids: Tensor, length: int) -> Callable[[], Tensor]:
    """The like, with a static cache for so many tokens and, on a GPU, in CUDA graphs."""
    model = run_as_generate(model)
    cache = StaticCache(config=model.config, max_cache_len=length)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        last = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)

    def decode() -> Tensor:
        nonlocal last
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(input_ids=last, past_key_values=cache, use_cache=True).logits
        last = logits[:, -1].argmax(dim=-1, keepdim=True)
        return last

    return decode


def least_work(model: nn.Module, tokens: int) -> Work:
    """Every weight is read once, but for the embeddings that are only looked up, and multiplied with every token."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    looked_up = 0 if tied else embeddings.numel()
    number = sum(p.numel() for p in model.parameters()) - looked_up
    return Work(bytes=number * model.dtype.itemsize, flops=2 * number * tokens, dtype=model.dtype)


def decoding(bench: Bench, case: str, make: Callable[[], nn.Module], batch: int, prompt: int) -> Iterator[Row]:
    base = make()
    found, ids = edited(base), prompt_ids(base, batch, prompt)
    decoders = {name: decoder(model, ids) for name, model in found.models.items()}
    timings = bench.measure(
        decoders,
        rounds=31,
        budget=SECONDS,
        in_turns=True,
        work=least_work(base, batch),
    )
    seconds = timings.spread(BASE, "wall").median
    note = f"{batch / seconds:,.1f} tokens a second by the clock without an edit"
    yield from rows_against_base(bench, case, timings, found, note)


def prefill(bench: Bench, case: str, make: Callable[[], nn.Module], length: int) -> Iterator[Row]:
    base = make()
    found, ids = edited(base), prompt_ids(base, 1, length)
    calls = {
        name: partial(run_as_generate(model), input_ids=ids, use_cache=True, logits_to_keep=1)
        for name, model in found.models.items()
    }
    timings = bench.measure(calls, rounds=9, budget=SECONDS, in_turns=True, work=least_work(base, length))
    yield from rows_against_base(bench, case, timings, found)


def compiled_decoding(bench: Bench, case: str, make: Callable[[], nn.Module], prompt: int) -> Iterator[Row]:
    base, rounds = make(), 31
    found, ids = edited(base, only=True), prompt_ids(base, 1, prompt)
    length = prompt + rounds + 8
    decoders = {name: compiled_decoder(model, ids, length) for name, model in found.models.items()}
    timings = bench.measure(decoders, rounds=rounds, in_turns=True, work=least_work(base, 1))
    yield from rows_against_base(bench, case, timings, found)


def rows_against_base(bench: Bench, case: str, timings, found: Edited, note: str = "") -> Iterator[Row]:
    for name in found.models:
        if name != BASE:
            yield from bench.rows(case, timings, name, {BASE: "base"}, note)
    if found.lora in found.models:
        yield from bench.rows(case, timings, found.sea, {found.lora: "LoRA"}, note)
    yield from bench.rows(case, timings, BASE, {LIMIT: "limit"}, note)
