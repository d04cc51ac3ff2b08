"""The demonstration: a small model that knows the truth but repeats myths, and an edit that changes that.

The model has read about a synthetic world (`examples/train_demo_model.py`). It ships with the package, with 400
demonstrations, 60 validation and 180 test questions about disjoint entities, and unrelated text for side effects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


ASSETS = Path(__file__).parent / "assets"


def run(out: Path) -> dict[str, Any]:
    """Fit SEA to the demonstrations, evaluate it on the test questions, reload and merge it.

    Args:
        out: folder; `activations` and `sea` in it are replaced.

    Returns:
        JSON values: one row for each model with MC1, MC2 (in [0, 1]) and perplexity on unrelated text; the largest
        differences of logits; the folder of the adapter.
    """
    import torch
    from peft import PeftModel, TaskType, get_peft_model
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..activations import collect_activations
    from ..contrast import load_contrast_set
    from ..evaluation import evaluate_multiple_choice, perplexity
    from ..fitting import fit_sea
    from ..saving import check_adapter_folder, save_adapter
    from ..tuners.sea import SEAConfig

    def base_model():
        return AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    demonstrations = load_contrast_set(ASSETS / "demonstrations.jsonl")
    test = load_contrast_set(ASSETS / "test.jsonl")
    unrelated = (ASSETS / "unrelated.txt").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []

    def evaluate(name: str, model) -> torch.Tensor:
        """Add a row to the table; returns logits on unrelated text, for comparing models."""
        result = evaluate_multiple_choice(model, tokenizer, test, batch_size=256)
        rows.append(
            {
                "model": name,
                "mc1": result.mc1,
                "mc2": result.mc2,
                "perplexity": perplexity(model, tokenizer, unrelated, batch_size=64),
            }
        )
        ids = torch.tensor([tokenizer(text)["input_ids"][:48] for text in unrelated])
        with torch.no_grad():
            return model(ids).logits

    adapter = Path(out) / "sea"
    check_adapter_folder(adapter)
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file: choose a folder for the demonstration")
    with tqdm(total=6, desc="demonstration", unit="model") as progress:
        evaluate("base", base_model())
        progress.update()

        model = base_model()
        store = collect_activations(model, tokenizer, demonstrations, Path(out) / "activations", resume=False)
        options = {"task_type": TaskType.CAUSAL_LM, "centered": True}
        model = get_peft_model(model, SEAConfig(**options))
        fit_sea(model, store)
        edited = evaluate("SEA", model)
        save_adapter(model, adapter)
        progress.update()

        exchanged = get_peft_model(base_model(), SEAConfig(**options, projections="exchanged"))
        fit_sea(exchanged, store)
        evaluate("SEA, signs exchanged (negative control)", exchanged)
        progress.update()

        reloaded = evaluate("SEA, saved and reloaded", PeftModel.from_pretrained(base_model(), adapter))
        progress.update()

        model = get_peft_model(base_model(), SEAConfig(**options, rescale="none"))
        fit_sea(model, store)
        linear = evaluate("SEA, rescale none", model)
        progress.update()

        merged = evaluate("SEA, rescale none, merged", model.merge_and_unload(safe_merge=True))
        progress.update()
    return {
        "demonstrations": len(demonstrations),
        "questions": len(test),
        "rows": rows,
        "reloaded_difference": float((reloaded - edited).abs().max()),
        "merged_difference": float((merged - linear).abs().max()),
        "adapter": str(adapter.resolve()),
    }
