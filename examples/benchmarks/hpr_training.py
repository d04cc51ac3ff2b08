"""Training HPR: `HPRTrainer` against a loop over the layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from peft_edit import ActivationStore, HPRConfig, HPRTrainer, HPRTrainingArguments
from peft_edit.activations.store import Shard, StoreWriter, begin, write_index
from peft_edit.tuners.hpr.train import TokenPairs

from . import published
from .models import structure
from .report import Bench, Case, Row
from .timing import LIMIT, Elapsed, Work, clocked, synchronise


PUBLISHED_BATCH = 16
BATCHES = {"cpu": (16, 64, 256), "cuda": (64,)}
LEARNING_RATE = 5e-4
# Steps in which memory is set up; not timed.
SKIPPED = 5
# Times that the optimizer and the passes touch each weight at least: three are read with the gradient, three written.
TOUCHES = 7


@dataclass(frozen=True)
class Sizes:
    """Of a training."""

    hidden: int
    layers: int
    steps: int


def cases(bench: Bench) -> Iterator[Case]:
    sizes = Sizes(1024, 8, 25)
    if bench.quick:
        sizes = Sizes(32, 2, 8)
    elif bench.device.type == "cuda":
        sizes = Sizes(4096, 32, 25)
    name = f"HPR on {sizes.layers} blocks, hidden size {sizes.hidden}"
    needs = 6 * weights(sizes) * 4 + 4 * max(batches_of(bench)) * 2 * sizes.layers * sizes.hidden * 4
    yield Case(name, partial(training, bench, name, sizes), needs=needs)


def batches_of(bench: Bench) -> tuple[int, ...]:
    """Sizes of the batches of pairs."""
    return (4, 8) if bench.quick else BATCHES[bench.device.type]


def weights(sizes: Sizes) -> int:
    """Number of weights of the probes and angle networks: d + d d/2 + d/2 d/4 + d/4 d/8 + d/8 of each block."""
    d = sizes.hidden
    return sizes.layers * (d + d * d // 2 + d * d // 8 + d * d // 32 + d // 8)


def least_work(sizes: Sizes, batch: int) -> Work:
    """Of a step: three products forwards and backwards with each weight, for both tokens of each pair."""
    number = weights(sizes)
    return Work(bytes=TOUCHES * 4 * number, flops=6 * number * 2 * batch, dtype=torch.float32)


def training(bench: Bench, case: str, sizes: Sizes) -> Iterator[Row]:
    store = token_pairs(bench.folder / "token-pairs", sizes, pairs=max(64, 8 * max(batches_of(bench))))
    loop = f"loop over the layers, batches of {PUBLISHED_BATCH}, unfused AdamW"
    for batch in batches_of(bench):
        ours = f"HPRTrainer, batches of {batch}"
        work = least_work(sizes, batch)
        # Per pair, so that batches of different sizes compare.
        per_pair = Work(work.bytes / batch, work.flops / batch, work.dtype)
        timings = bench.measure(
            {
                ours: lambda batch=batch: train(bench, sizes, store, batch),
                loop: lambda: train_loop(bench, sizes, store),
            },
            rounds=3,
            work=per_pair,
            training=True,
        )
        feeding = feeding_seconds(store, sizes, batch) / (batch * timings.spread(ours, "wall").median)
        note = f"{ours}: {1 / timings.spread(ours, 'wall').median:,.0f} pairs a second by the clock, reading the store "
        note += f"takes {100 * feeding:.1f} % of a step; times are of one pair"
        yield from bench.rows(case, timings, ours, {loop: "published", LIMIT: "limit"}, note)


def token_pairs(path: Path, sizes: Sizes, pairs: int) -> ActivationStore:
    """A store of random activations whose classes are a shift apart."""
    generator = torch.Generator().manual_seed(0)
    d, modules = sizes.hidden, {str(i): f"model.layers.{i}" for i in range(sizes.layers)}
    settings = {"sites": ["block"], "tokens": "answer", "hidden_size": d, "dtype": "float32", "model": None}
    settings |= {"fingerprint": None, "active_adapters": [], "modules": {"block": modules}}
    rows = torch.randperm(2 * pairs, generator=generator).view(2, pairs)
    shift = torch.zeros(2 * pairs, 1)
    shift[rows[1]], shift[rows[0]] = 1.0, -1.0
    path.mkdir(parents=True, exist_ok=True)
    begin(path, settings)
    places = torch.ones(1, pairs, dtype=torch.int64)
    write_index(path, {"answer_pairs": torch.cat((rows, places)).T, "question": torch.zeros(pairs, dtype=torch.int64)})
    shard = Shard(0, rows=2 * pairs, sequences=2 * pairs)
    noise = torch.randn(2 * pairs, d, generator=generator)
    activations = {
        f"block.{i}": noise.roll(i, dims=0) + shift * torch.randn(d, generator=generator) / math.sqrt(d)
        for i in range(sizes.layers)
    }
    with StoreWriter(path, [shard]) as writer:
        writer.write(shard, activations)
        writer.finish()
    return ActivationStore(path)


def fresh_model(sizes: Sizes) -> PeftModel:
    """An untrained adapter, always the same, of a model that is not in memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=sizes.hidden,
        intermediate_size=64,
        num_hidden_layers=sizes.layers,
        num_attention_heads=1,
    )
    return get_peft_model(structure(config, torch.float32), HPRConfig())


class Clock(TrainerCallback):
    """Times the steps of a training after the first ones, and keeps the losses."""

    def __init__(self, device: torch.device):
        self.device, self.losses = device, []
        self.begun = self.ended = Elapsed(0, 0)

    def now(self) -> Elapsed:
        synchronise(self.device)
        return Elapsed(time.perf_counter(), time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SKIPPED:
            self.begun = self.now()
        if state.global_step == state.max_steps:
            self.ended = self.now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def of_each(self, pairs: int) -> Elapsed:
        """Of each of the pairs in the steps that were timed."""
        wall, cpu = self.ended.wall - self.begun.wall, self.ended.cpu - self.begun.cpu
        return Elapsed(wall / pairs, cpu / pairs)


def make_trainer(bench: Bench, sizes: Sizes, store: ActivationStore, batch: int, logging: int) -> HPRTrainer:
    """As in the paper but for a constant learning rate; its first callback is a `Clock`."""
    arguments = HPRTrainingArguments(
        str(bench.folder / "training"),
        max_steps=sizes.steps,
        per_device_train_batch_size=batch,
        logging_steps=logging,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=bench.device.type == "cpu",
        report_to=[],
    )
    trainer = HPRTrainer(fresh_model(sizes), arguments, train_dataset=store, callbacks=[Clock(bench.device)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def clock_of(trainer: HPRTrainer) -> Clock:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))


def train(bench: Bench, sizes: Sizes, store: ActivationStore, batch: int) -> Elapsed:
    """Train for some steps; of each pair after the first steps."""
    trainer = make_trainer(bench, sizes, store, batch, logging=sizes.steps)
    trainer.train()
    return clock_of(trainer).of_each((sizes.steps - SKIPPED) * batch)


def loop_batches(bench: Bench, sizes: Sizes, store: ActivationStore, batch: int) -> list[Tensor]:
    """What the Trainer would be given, (B, layers, 2, d) each."""
    loader = make_trainer(bench, sizes, store, batch, logging=1).get_train_dataloader()
    repeated = (item["activations"] for _ in range(sizes.steps) for item in loader)
    return [next(repeated) for _ in range(sizes.steps)]


def train_loop(
    bench: Bench, sizes: Sizes, store: ActivationStore, keep: Callable[[list[float]], None] = lambda losses: None
) -> Elapsed:
    """The same training in the plain form; of each pair after the first steps."""
    batches = loop_batches(bench, sizes, store, PUBLISHED_BATCH)
    layers = [block.hpr for block in fresh_model(sizes).get_base_model().model.layers]
    probes, networks = ([getattr(layer, part)["default"] for layer in layers] for part in ("hpr_probe", "hpr_angle"))
    for module in (*probes, *networks):
        module.to(bench.device)
    clock = Clock(bench.device)

    def begun(step: int) -> None:
        if step == SKIPPED:
            clock.begun = clock.now()

    keep(published.hpr_train(probes, networks, batches, LEARNING_RATE, begun))
    clock.ended = clock.now()
    return clock.of_each((sizes.steps - SKIPPED) * PUBLISHED_BATCH)


def feeding_seconds(store: ActivationStore, sizes: Sizes, batch: int) -> float:
    """Median seconds of the wall clock to gather a random batch."""
    pairs = TokenPairs(store, range(sizes.layers))
    order, times = torch.randperm(len(pairs)), []
    for number in range(10):
        with clocked(torch.device("cpu")) as elapsed:
            pairs.__getitems__(order[:batch].roll(number).tolist())
        times.append(elapsed().wall)
    return sorted(times)[len(times) // 2]
