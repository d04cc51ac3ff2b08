"""The demonstration: a small model that knows the truth but repeats myths, and edits that change that.

The model has read about a synthetic world (`examples/train_demo_model.py`). It ships with the package, with 400
demonstrations, 60 validation and 180 test questions about disjoint entities, and unrelated text for side effects.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

from ..files import write_json


ASSETS = Path(__file__).parent / "assets"

# Of the demonstrations HPR is trained on these, and its layers are selected on the others (the paper: 45 and 5 %).
TRAINED_ON = 360
# Settings that are tried on the validation questions. The paper's is the first.
GATES, ALPHAS = (0.5, 0.1, 0.01), (1.0, 0.75)
HPR_CHOSEN = "HPR, gate and alpha by validation, reloaded"


def run(out: Path) -> dict[str, Any]:
    """Fit SEA and train HPR on the demonstrations, evaluate them on the test questions, reload both, merge SEA.

    Args:
        out: folder; `activations`, `hpr-activations`, `sea` and `hpr` in it are replaced, and so are `base.json`,
            `sea.json` and `hpr.json`, results for model cards.

    Returns:
        JSON values: one row for each model with MC1, MC2 (in [0, 1]) and perplexity on unrelated text; the largest
        differences of logits; what was tried on the validation questions; the folders of the adapters.
    """
    from tqdm.auto import tqdm

    from ..adapters.save import check_adapter_folder

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder for the demonstration")
    for name in ("sea", "hpr"):
        check_adapter_folder(out / name, name.upper())
    with tqdm(total=9, desc="demonstration", unit="model") as progress:
        scene = _Scene(progress)
        scene.evaluate("base", scene.base_model())
        sea = _sea(scene, out)
        hpr = _hpr(scene, out)
    for name, row, adapter in (("base", "base", None), ("sea", "SEA", "sea"), ("hpr", HPR_CHOSEN, "hpr")):
        _write_results(out / f"{name}.json", scene, row, adapter)
    return {
        "demonstrations": len(scene.demonstrations),
        "questions": len(scene.test),
        "rows": scene.rows,
        **sea,
        **hpr,
    }


def _write_results(path: Path, scene: _Scene, row: str, adapter: str | None) -> None:
    """What `peft-edit evaluate --json` writes, without the scores of each question."""
    measures = next(r for r in scene.rows if r["model"] == row)
    results = {"model": "model", "adapter": adapter, "strength": 1.0, "data": {"name": "test.jsonl"}}
    results |= {"questions": len(scene.test), **{name: measures[name] for name in ("mc1", "mc2", "perplexity")}}
    write_json(path, results)


class _Scene:
    """Model, tokenizer and data, and the table of results as it grows."""

    def __init__(self, progress):
        from transformers import AutoTokenizer

        from ..data import load_contrast_set

        self.progress = progress
        self.tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
        self.demonstrations, self.validation, self.test = (
            load_contrast_set(ASSETS / f"{name}.jsonl") for name in ("demonstrations", "validation", "test")
        )
        self.unrelated = (ASSETS / "unrelated.txt").read_text(encoding="utf-8").splitlines()
        self.rows: list[dict[str, Any]] = []

    @staticmethod
    def base_model():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()

    def mc(self, model, data):
        from ..evaluation import evaluate_multiple_choice

        return evaluate_multiple_choice(model, self.tokenizer, data, batch_size=256)

    def perplexity(self, model) -> float:
        from ..evaluation import perplexity

        return perplexity(model, self.tokenizer, self.unrelated, batch_size=64)

    def evaluate(self, name: str, model) -> None:
        """Add a row to the table."""
        result = self.mc(model, self.test)
        self.rows.append(
            {"model": name, "mc1": result.mc1, "mc2": result.mc2, "perplexity": self.perplexity(model)},
        )
        self.progress.update()

    def difference(self, model, other) -> float:
        """Largest difference of two models' logits on unrelated text."""
        import torch

        ids = torch.tensor([self.tokenizer(text)["input_ids"][:48] for text in self.unrelated])
        with torch.no_grad():
            return float((model(ids).logits - other(ids).logits).abs().max())


def _sea(scene: _Scene, out: Path) -> dict[str, Any]:
    from peft import PeftModel, TaskType, get_peft_model

    from ..activations.collect import collect_activations
    from ..adapters.save import save_adapter
    from ..tuners.sea import SEAConfig
    from ..tuners.sea.fit import fit_sea

    store = collect_activations(
        scene.base_model(), scene.tokenizer, scene.demonstrations, out / "activations", resume=False
    )

    def fitted(**options):
        model = get_peft_model(scene.base_model(), SEAConfig(task_type=TaskType.CAUSAL_LM, centered=True, **options))
        fit_sea(model, store)
        return model

    edited = fitted()
    save_adapter(edited, out / "sea")
    scene.evaluate("SEA", edited)
    scene.evaluate("SEA, signs exchanged (negative control)", fitted(projections="exchanged"))
    reloaded = PeftModel.from_pretrained(scene.base_model(), out / "sea")
    scene.evaluate("SEA, saved and reloaded", reloaded)
    linear = fitted(rescale="none")
    scene.evaluate("SEA, rescale none", linear)
    merged = fitted(rescale="none").merge_and_unload(safe_merge=True)
    scene.evaluate("SEA, rescale none, merged", merged)
    return {
        "reloaded_difference": scene.difference(reloaded, edited),
        "merged_difference": scene.difference(merged, linear),
        "adapter": str((out / "sea").resolve()),
    }


def _hpr(scene: _Scene, out: Path) -> dict[str, Any]:
    from peft import PeftModel

    from ..adapters.save import save_adapter

    model, accuracy = _trained_hpr(scene, out)
    config = model.peft_config["default"]
    scene.evaluate("HPR, as in the paper (gate 0.5, alpha 1)", model)

    config.rotation = "reflection"
    scene.evaluate("HPR, reflection only (ablation)", model)
    config.rotation = "angle"

    tried = []
    for config.gate, config.alpha in product(GATES, ALPHAS):
        tried.append(
            {
                "gate": config.gate,
                "alpha": config.alpha,
                "mc1": scene.mc(model, scene.validation).mc1,
                "perplexity": scene.perplexity(model),
            }
        )
    best = _mildest(tried, len(scene.validation))
    config.gate, config.alpha = best["gate"], best["alpha"]
    save_adapter(model, out / "hpr")
    reloaded = PeftModel.from_pretrained(scene.base_model(), out / "hpr")
    scene.evaluate(HPR_CHOSEN, reloaded)
    return {
        "hpr_reloaded_difference": scene.difference(reloaded, model),
        "hpr_adapter": str((out / "hpr").resolve()),
        "probe_accuracy": accuracy,
        "tried": tried,
        "chosen": best,
    }


def _mildest(tried: list[dict[str, float]], questions: int) -> dict[str, float]:
    """The setting with the least perplexity of those whose MC1 is within one standard error of the best."""
    best = max(row["mc1"] for row in tried)
    error = math.sqrt(best * (1 - best) / questions)
    return min((row for row in tried if row["mc1"] >= best - error), key=lambda row: row["perplexity"])


def _trained_hpr(scene: _Scene, out: Path):
    """A model with an HPR adapter, trained and its four best layers of five selected; the accuracy of all probes."""
    from peft import TaskType, get_peft_model
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from ..activations.collect import collect_activations
    from ..tuners.hpr import HPRConfig
    from ..tuners.hpr.select import select_layers
    from ..tuners.hpr.train import HPRTrainer, HPRTrainingArguments

    options = {"site": "block", "tokens": "answer", "resume": False}
    parts = {"train": range(TRAINED_ON), "eval": range(TRAINED_ON, len(scene.demonstrations))}
    stores = {}
    for name, rows in parts.items():
        part, folder = scene.demonstrations.select(rows), out / "hpr-activations" / name
        stores[name] = collect_activations(scene.base_model(), scene.tokenizer, part, folder, **options)
    set_seed(0)
    model = get_peft_model(scene.base_model(), HPRConfig(task_type=TaskType.CAUSAL_LM)).eval()
    arguments = HPRTrainingArguments(
        output_dir=str(out),
        learning_rate=2e-3,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = HPRTrainer(model, arguments, train_dataset=stores["train"])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, select_layers(model, stores["eval"], top_k=4, prune=True).accuracy
