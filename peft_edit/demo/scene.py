from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.changes import ChangeWarning
from ..adapters.save import check_adapter_folder
from ..files import write_json
from ..tuners.method import methods


ASSETS = Path(__file__).parent / "assets"
UNRELATED, RETAIN = "unrelated.txt", "retain.txt"


@dataclass
class Evidence:
    """What a method shows on the demonstration model.

    Attributes:
        row: name of the row of the table that shows its adapter, which is saved in `scene.folder / NAME`.
        results: JSON values.
        lines: to print below the table.
    """

    row: str
    results: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def run(out: Path) -> dict[str, Any]:
    """Make an adapter of each method from the demonstrations, evaluate it on the test questions, and the ways back.

    Args:
        out: folder; the folders of activations and of adapters in it are replaced, and so are `base.json` and NAME.json
            for each method, results for model cards.

    Returns:
        JSON values: one row for each model with MC1, MC2 (in [0, 1]), perplexity on unrelated text and its ratio to the
        base model's; what the methods add; `lines` to print.
    """
    from tqdm.auto import tqdm

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder for the demonstration")
    shown = {name: importlib.import_module(m.evidence) for name, m in methods().items() if m.evidence}
    for name in shown:
        check_adapter_folder(out / name.lower(), name)
    with tqdm(
        total=1 + sum(module.MODELS for module in shown.values()), desc="demonstration", unit="model"
    ) as progress:
        scene = Scene(out, progress)
        scene.evaluate("base", scene.base_model())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ChangeWarning)  # the table shows what edits do to other text
            evidence = {name: module.show(scene) for name, module in shown.items()}
    scene.write_results("base", "base")
    for name, found in evidence.items():
        scene.write_results(name.lower(), found.row)
    results = {"demonstrations": len(scene.demonstrations), "questions": len(scene.test), "rows": scene.rows}
    for found in evidence.values():
        results |= found.results
    folders = ", ".join(str((out / name.lower()).resolve()) for name in evidence)
    lines = [line for found in evidence.values() for line in found.lines]
    return {**results, "lines": [*lines, f"Adapters: {folders}"]}


class Scene:
    """Model, tokenizer and data of the demonstration, and the table of results as it grows.

    Attributes:
        folder: where activations and adapters go.
        demonstrations, validation, test: contrast sets.
        unrelated: texts for side effects.
        rows: of the table.
        records: model of the table to its results, as `evaluation.results` has them.
    """

    def __init__(self, folder: Path, progress):
        from transformers import AutoTokenizer

        from ..data import load_contrast_set

        self.folder, self.progress = folder, progress
        self.tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
        self.demonstrations, self.validation, self.test = (
            load_contrast_set(ASSETS / f"{name}.jsonl") for name in ("demonstrations", "validation", "test")
        )
        self.unrelated = (ASSETS / UNRELATED).read_text(encoding="utf-8").splitlines()
        self.rows: list[dict[str, Any]] = []
        self.records: dict[str, dict[str, Any]] = {}

    @staticmethod
    def base_model():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()

    def collect(self, name: str, data=None, **options):
        """A store of the demonstrations, or of other data, in a folder of this name, which is replaced."""
        from ..activations.collect import collect_activations

        data = self.demonstrations if data is None else data
        return collect_activations(self.base_model(), self.tokenizer, data, self.folder / name, resume=False, **options)

    @cached_property
    def retain(self):
        """A store of texts to leave alone, of the kind of the unrelated ones, at both sites."""
        texts = (ASSETS / RETAIN).read_text(encoding="utf-8").splitlines()
        return self.collect("retain-activations", texts, tokens="all")

    def evaluate(self, name: str, model) -> None:
        """Add a row to the table."""
        from ..evaluation.measuring import evaluate

        results = evaluate(model, self.tokenizer, self.test, texts={UNRELATED: self.unrelated}, batch_size=256)
        (effects,) = results["side_effects"]
        base = self.rows[0]["perplexity"] if self.rows else effects["perplexity"]
        self.rows.append(
            {
                "model": name,
                **{measure: results["measures"][measure]["value"] for measure in ("mc1", "mc2")},
                "perplexity": effects["perplexity"],
                "perplexity_ratio": effects["perplexity"] / base,
            }
        )
        self.records[name] = results
        self.progress.update()

    def difference(self, model, other) -> float:
        """Largest difference of two models' logits on unrelated text."""
        import torch

        ids = torch.tensor([self.tokenizer(text)["input_ids"][:48] for text in self.unrelated])
        with torch.no_grad():
            return float((model(ids).logits - other(ids).logits).abs().max())

    def write_results(self, name: str, row: str) -> None:
        """Write what `peft-edit evaluate --json` writes, of a model of the table. The adapter is saved under the
        name."""
        results = self.records[row]
        adapters = [{**adapter, "name": name} for adapter in results["adapters"]]
        write_json(self.folder / f"{name}.json", {**results, "adapters": adapters})
