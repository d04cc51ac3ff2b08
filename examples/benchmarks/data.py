"""What is run through models: a small model that reads text, or a real one, and questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_edit import load_contrast_set
from peft_edit.data import CONTRAST_FEATURES
from peft_edit.demo import ASSETS

from .report import Bench
from .timing import Work


# TruthfulQA's first 40 questions.
QUESTIONS = Path(__file__).parents[2] / "tests" / "fixtures" / "truthfulqa_40.csv"
TEXTS = ASSETS / "unrelated.txt"
# Questions that a real model is asked: one sequence at a time takes minutes otherwise.
OF_REAL_MODEL = 8


@dataclass(frozen=True)
class Subject:
    """A model that reads text, and how many questions it is asked."""

    name: str
    folder: Path
    questions: int
    device: torch.device
    dtype: torch.dtype

    def model(self) -> nn.Module:
        """A fresh one, in evaluation mode."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model.eval().requires_grad_(False).to(self.device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    def data(self, times: int = 1) -> Dataset:
        """Its questions, or several times as many different ones."""
        data = load_contrast_set("truthful_qa", data_files=QUESTIONS)
        data = data.select(range(self.questions))
        rows = [
            {**row, "id": n * len(data) + i, "prompt": f"{n} {row['prompt']}" if n else row["prompt"]}
            for n in range(times)
            for i, row in enumerate(data)
        ]
        return Dataset.from_list(rows, features=CONTRAST_FEATURES)


def subjects(bench: Bench) -> list[Subject]:
    """The demonstration model, and the real model where one is given."""
    found = [Subject("the demonstration model", ASSETS / "model", 4 if bench.quick else 40, bench.device, bench.dtype)]
    if bench.model is not None:
        count = 1 if bench.quick else OF_REAL_MODEL
        found.append(Subject(bench.model.name, bench.model, count, bench.device, bench.dtype))
    return found


@dataclass
class Passed:
    """Sequences and tokens that a model was given."""

    sequences: int = 0
    tokens: int = 0
    padding: int = 0


def counted(model: nn.Module, call: Callable[[], object]) -> Passed:
    """What a call gives a model."""
    passed = Passed()

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        passed.sequences += len(ids)
        passed.tokens += ids.numel()
        if mask is not None:
            passed.padding += ids.numel() - int(mask[:, -ids.shape[1] :].sum())

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return passed


def products_alone(call: Callable[[], object]) -> Callable[[], None]:
    """Makes the matrix products with a model's weights that a call makes, in its order, and nothing else."""
    made: list[tuple[Tensor, Tensor]] = []
    inputs: dict[torch.Size, Tensor] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                x, weight = args[-2:]
                made.append((inputs.setdefault(x.shape, torch.ones_like(x)), weight))
            return func(*args, **(kwargs or {}))

    def products() -> None:
        for x, weight in made:
            x @ weight

    with Record():
        call()
    return products


def matrix_products(call: Callable[[], object], dtype: torch.dtype) -> Work:
    """The matrix products that a call makes: what bounds it."""
    with FlopCounterMode(display=False) as counter:
        call()
    return Work(flops=counter.get_total_flops(), dtype=dtype)
