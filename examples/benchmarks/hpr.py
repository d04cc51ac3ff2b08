"""Figures of HPR: parity with the published code, the edit against its dense form, training against a loop over layers,
and the demonstration.

    OMP_WAIT_POLICY=PASSIVE python examples/benchmarks/hpr.py

Every ratio is of two measurements in the same run; times are CPU seconds of the whole process unless it says otherwise.
It takes about two minutes and 2 GB. What to expect: the rotation of one token 30 times cheaper or more, of 16 x 512
tokens 5 times or more; training 5 times the samples of the loop or more in a second.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from peft_edit import ActivationStore, HPRConfig, HPRTrainer, HPRTrainingArguments
from peft_edit.activations.store import Shard, StoreWriter, begin, write_index
from peft_edit.demo import ASSETS, run
from peft_edit.tuners.angle import angle_between
from peft_edit.tuners.hpr.layer import HPRLayer, angle_network
from peft_edit.tuners.hpr.maths import edit, is_negative, loss, rotate
from peft_edit.tuners.hpr.train import TokenPairs


GOLDEN = Path(__file__).parents[2] / "tests" / "fixtures" / "hpr_edit.safetensors"


def cpu_seconds(*calls: Callable, repeats: int, in_turns: bool = False) -> list[float]:
    """Median CPU seconds of each call; each in a loop of its own, or the calls taking turns."""
    times = [[] for _ in calls]
    for call in calls:
        call()
    order = range(repeats * len(calls))
    for i in (n % len(calls) if in_turns else n // repeats for n in order):
        start = time.process_time()
        calls[i]()
        times[i].append(time.process_time() - start)
    return [sorted(of_call)[repeats // 2] for of_call in times]


def memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def extra_memory(call: Callable) -> float:
    """Megabytes by which a call raises the resident memory at its highest, its result included."""
    before, highest, done = memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (highest - before) / 1e6


def benchmark_parity() -> None:
    golden = load_file(GOLDEN)
    expected = golden["out.f64.alpha1.0"]
    print(f"Parity with the published code's float64 output, {tuple(expected.shape)}")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        state = {name: tensor.to(wide) for name, tensor in golden.items() if name.startswith("state.")}
        linear = [
            (state[f"state.angle_model.model.{i}.weight"], state[f"state.angle_model.model.{i}.bias"])
            for i in (0, 2, 4, 6)
        ]

        def angle(a: Tensor, linear=linear, wide=wide) -> Tensor:
            x = a.to(wide)
            for i, (weight, bias) in enumerate(linear):
                x = functional.linear(functional.gelu(x) if i else x, weight, bias)
            return math.pi * torch.sigmoid(x.squeeze(-1))

        out = edit(golden["activation"].to(dtype), state["state.lr_model.weight"][0], angle).double()
        relative = float((out - expected).norm() / expected.norm())
        print(
            f"  {dtype}: largest difference {float((out - expected).abs().max()):.1e}, relative error {relative:.1e}, "
            f"{'all finite' if out.isfinite().all() else 'NOT FINITE'}"
        )


def benchmark_edit(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(d, generator=generator) / math.sqrt(d)
    network = angle_network(d)
    identity = torch.eye(d)

    def angle(a: Tensor) -> Tensor:
        return math.pi * torch.sigmoid(network(a).squeeze(-1))

    def householder() -> Tensor:
        return identity - 2 * torch.outer(w, w) / w.dot(w)

    reflector = householder()

    def dense_rotate(a: Tensor, angle_rad: Tensor, reflector: Tensor) -> Tensor:
        """Equation 12 as it stands: reflect by a (d, d) matrix and combine with ratios of sines."""
        reflected = a @ reflector
        between = torch.acos(functional.cosine_similarity(a, reflected, dim=-1).clamp(-1, 1)).unsqueeze(-1)
        g = angle_rad.unsqueeze(-1)
        return torch.sin(g) / torch.sin(between) * reflected + torch.sin(between - g) / torch.sin(between) * a

    def dense_edit(a: Tensor) -> Tensor:
        return torch.where(is_negative(a, w).unsqueeze(-1), dense_rotate(a, angle(a), reflector), a)

    threads = torch.get_num_threads()
    with torch.inference_mode():
        # One thread: to wake a second one takes longer than the rotation does.
        torch.set_num_threads(1)
        token = torch.randn(1, 1, d, generator=generator)
        token = token if is_negative(token, w).item() else -token
        given = torch.full((1, 1), 0.7)
        wide = dense_rotate(token.double(), given.double(), reflector.double())
        error = float((rotate(token, w, given) - wide).norm() / wide.norm())
        print(f"Edit of one token, d = {d}, float32, one thread (relative to the dense form in float64 {error:.1e})")
        at_hand = (lambda: rotate(token, w, given), lambda: dense_rotate(token, given, reflector))
        # In turns the dense products throw what is small out of the caches, as a model's weights do.
        for how, in_turns in (("each in a loop", False), ("in turns", True)):
            thin, dense = cpu_seconds(*at_hand, repeats=201, in_turns=in_turns)
            print(
                f"  rotation by a given angle, {how}: {1e6 * thin:.0f} us; dense, its matrix at hand {1e6 * dense:.0f} "
                f"us: {dense / thin:.0f} times less"
            )
        (dense,) = cpu_seconds(lambda: dense_rotate(token, given, householder()), repeats=11)
        print(f"  dense, its matrix built for the call: {1e3 * dense:.0f} ms")
        negative, positive, dense = cpu_seconds(
            lambda: edit(token, w, angle), lambda: edit(-token, w, angle), lambda: dense_edit(token), repeats=101
        )
        print(
            f"  with probe and angle network: negative token {1e6 * negative:.0f} us, positive token "
            f"{1e6 * positive:.0f} us, dense {1e6 * dense:.0f} us: {dense / negative:.1f} and "
            f"{dense / positive:.0f} times less"
        )

        tokens = torch.randn(16, 512, d, generator=generator)
        given = torch.full((16 * 512,), 0.7)
        share = float(is_negative(tokens, w).float().mean())
        cases = (
            # At a gate of 1 every token is rotated, as the dense form does it.
            ("rotation of all by given angles", partial(edit, tokens, w, lambda a: given[: len(a)], gate=1.0),
             partial(dense_rotate, tokens, given.view(16, 512), reflector)),
            ("with probe and angle network", partial(edit, tokens, w, angle), partial(dense_edit, tokens)),
        )  # fmt: skip
        for count in (1, threads):
            torch.set_num_threads(count)
            print(f"Edit of 16 x 512 tokens, {100 * share:.0f} % negative, threads: {count}")
            for what, call, dense_call in cases:
                seconds, dense_seconds = cpu_seconds(call, dense_call, repeats=3)
                extra, dense_extra = extra_memory(call), extra_memory(dense_call)
                print(
                    f"  {what}: {seconds:.2f} s, dense {dense_seconds:.2f} s: {dense_seconds / seconds:.1f} times "
                    f"less; extra memory {extra:.0f} MB, dense {dense_extra:.0f} MB: {extra / dense_extra:.2f} of it"
                )


def token_pairs(path: Path, layers: int, d: int, pairs: int) -> ActivationStore:
    """A store of random activations whose classes are a shift apart."""
    generator = torch.Generator().manual_seed(0)
    modules = {str(i): f"model.layers.{i}" for i in range(layers)}
    settings = {"sites": ["block"], "tokens": "answer", "hidden_size": d, "dtype": "float32", "model": None}
    settings |= {"fingerprint": None, "active_adapters": [], "modules": {"block": modules}}
    rows = torch.randperm(2 * pairs, generator=generator).view(2, pairs)
    shift = torch.zeros(2 * pairs, 1)
    shift[rows[1]], shift[rows[0]] = 1.0, -1.0
    places = torch.ones(1, pairs, dtype=torch.int64)
    path.mkdir(parents=True, exist_ok=True)
    begin(path, settings)
    write_index(path, {"answer_pairs": torch.cat((rows, places)).T, "question": torch.zeros(pairs, dtype=torch.int64)})
    shard = Shard(0, rows=2 * pairs, sequences=2 * pairs)
    activations = {
        f"block.{i}": torch.randn(2 * pairs, d, generator=generator)
        + shift * torch.randn(d, generator=generator) / math.sqrt(d)
        for i in range(layers)
    }
    with StoreWriter(path, [shard]) as writer:
        writer.write(shard, activations)
        writer.finish()
    return ActivationStore(path)


class Clock(TrainerCallback):
    """Seconds since the first steps, in which memory is set up, and losses."""

    def __init__(self, skipped: int):
        self.skipped, self.losses, self.started = skipped, [], None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.skipped:
            self.started = time.perf_counter()
        if state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def make_trainer(model, store: ActivationStore, folder: Path, **options) -> tuple[HPRTrainer, Clock]:
    arguments = HPRTrainingArguments(
        str(folder), eval_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True, **options
    )
    clock = Clock(skipped=5)
    trainer = HPRTrainer(model, arguments, train_dataset=store, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def train_loop(model, batches: list[Tensor], learning_rate: float, skipped: int = 5) -> tuple[list[float], float]:
    """The same training, one layer after the other, with unfused AdamW and a constant learning rate.

    Returns:
        Mean loss over the layers at each step, and the seconds that the steps took.
    """
    layers = [block.hpr for block in model.get_base_model().model.layers]
    modules = [nn.ModuleList((layer.hpr_probe["default"], layer.hpr_angle["default"])).train() for layer in layers]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=learning_rate, weight_decay=0, foreach=False) for m in modules]
    losses = []
    for step, batch in enumerate(batches):
        if step == skipped:
            started = time.perf_counter()
        of_layers = []
        for i, (layer, module, optimizer) in enumerate(zip(layers, modules, optimizers, strict=True)):
            a = batch[:, i].transpose(0, 1)  # (2, B, d)
            terms = loss(layer.probe_logits(a, "default"), layer.angles(a, "default"), angle_between(a[1], a[0]))
            terms.total.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            of_layers.append(float(terms.total))
        losses.append(sum(of_layers) / len(of_layers))
    return losses, time.perf_counter() - started


def benchmark_training(d: int, layers: int, steps: int = 50) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=d, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=8
    )

    def fresh_model():
        torch.manual_seed(0)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        return get_peft_model(base, HPRConfig())

    with tempfile.TemporaryDirectory() as folder:
        store = token_pairs(Path(folder) / "store", layers, d, pairs=(steps + 5) * 64)
        options = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 5e-4}

        print(f"Training, d = {d}, {layers} blocks, {torch.get_num_threads()} threads")
        every_step = {"max_steps": steps, "logging_steps": 1, **options}
        trainer, _ = make_trainer(fresh_model(), store, Path(folder), **every_step)
        batches = [batch["activations"] for batch, _ in zip(trainer.get_train_dataloader(), range(steps), strict=False)]
        trainer, clock = make_trainer(fresh_model(), store, Path(folder), **every_step)
        trainer.train()
        losses, loop_seconds = train_loop(fresh_model(), batches, 5e-4)
        worst = max(abs(a - b) / b for a, b in zip(clock.losses, losses, strict=True))
        print(
            f"  loss after {steps} steps of 16 pairs: {clock.losses[-1]:.6f}, loop {losses[-1]:.6f}; largest relative "
            f"difference in {steps} steps {worst:.1e}"
        )
        loop = (steps - 5) * 16 / loop_seconds
        print(f"  loop over layers, batch 16, unfused AdamW: {loop:.0f} pairs a second")
        for batch_size in (16, 64, 256):
            count = min(steps, len(store) // batch_size)
            trainer, clock = make_trainer(
                fresh_model(),
                store,
                Path(folder),
                max_steps=count,
                logging_steps=count,
                per_device_train_batch_size=batch_size,
                **options,
            )
            trainer.train()
            speed = (count - 5) * batch_size / clock.seconds
            feed = feeding_seconds(TokenPairs(store, range(layers)), batch_size)
            step_seconds = clock.seconds / (count - 5)
            print(
                f"  HPRTrainer, batch {batch_size}: {speed:.0f} pairs a second, {speed / loop:.1f} times the loop; "
                f"feeding {1e3 * feed:.1f} of {1e3 * step_seconds:.1f} ms a step, {100 * feed / step_seconds:.1f} %"
            )


def feeding_seconds(pairs: TokenPairs, batch_size: int, repeats: int = 10) -> float:
    """Median wall-clock seconds to gather a random batch."""
    order = torch.randperm(len(pairs))
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        pairs.__getitems__(order[:batch_size].roll(i).tolist())
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


@torch.no_grad()
def norm_change(model: PeftModel) -> float:
    """Largest relative change of the norm of a token's activation by an edit, on the unrelated text."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    texts = (ASSETS / "unrelated.txt").read_text(encoding="utf-8").splitlines()
    ids = torch.tensor([tokenizer(text)["input_ids"][:48] for text in texts])
    before, changes = {}, []

    def keep(block, args, output) -> None:
        before[block] = output.norm(dim=-1)

    def compare(block, args, output) -> None:
        changes.append(float((output.norm(dim=-1) / before[block] - 1).abs().max()))

    for layer in model.modules():
        if isinstance(layer, HPRLayer):
            layer.get_base_layer().register_forward_hook(keep, prepend=True)
            layer.get_base_layer().register_forward_hook(compare)
    model(ids)
    return max(changes)


def benchmark_demonstration() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        results = run(Path(folder))
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()
        norms = norm_change(PeftModel.from_pretrained(model, results["hpr_adapter"]))
    base = results["rows"][0]
    print(f"Demonstration, {results['questions']} held-out questions, {seconds:.0f} s with SEA")
    for row in results["rows"]:
        if row["model"].startswith(("base", "HPR")):
            print(
                f"  {row['model']:<45}MC1 {100 * row['mc1']:.1f} ({100 * (row['mc1'] - base['mc1']):+.1f})  "
                f"MC2 {100 * row['mc2']:.1f} ({100 * (row['mc2'] - base['mc2']):+.1f})  "
                f"perplexity ratio {row['perplexity'] / base['perplexity']:.3f}"
            )
    for row in results["tried"]:
        print(
            f"  validation, gate {row['gate']}, alpha {row['alpha']}: MC1 {100 * row['mc1']:.1f}, perplexity ratio "
            f"{row['perplexity'] / base['perplexity']:.3f}{'  <- chosen' if row == results['chosen'] else ''}"
        )
    print(f"  largest relative change of a token's norm by an edit: {norms:.1e}")
    print(f"  logits, reloaded against edited: {results['hpr_reloaded_difference']:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="hidden size of the edit")
    parser.add_argument("--training-d", type=int, default=1024, help="hidden size of the training")
    arguments = parser.parse_args()
    benchmark_parity()
    benchmark_edit(arguments.d)
    benchmark_training(arguments.training_d, layers=8)
    benchmark_demonstration()
