"""SEA on the demonstration model: the fit, a negative control, the way back from disk and into the weights, and other
text that is left alone."""

from __future__ import annotations

from peft import PeftModel, TaskType, get_peft_model

from ...adapters.save import save_adapter
from ...demo import Evidence, Scene
from .config import SEAConfig
from .fit import fit_sea


MODELS = 6  # rows of the table


def show(scene: Scene) -> Evidence:
    store = scene.collect("activations")

    def fitted(retain=None, **options):
        model = get_peft_model(scene.base_model(), SEAConfig(task_type=TaskType.CAUSAL_LM, centered=True, **options))
        fit_sea(model, store, retain=retain)
        return model

    edited = fitted()
    save_adapter(edited, scene.folder / "sea")
    scene.evaluate("SEA", edited)
    scene.evaluate("SEA, signs exchanged (negative control)", fitted(projections="exchanged"))
    reloaded = PeftModel.from_pretrained(scene.base_model(), scene.folder / "sea")
    scene.evaluate("SEA, saved and reloaded", reloaded)
    linear = fitted(rescale="none")
    scene.evaluate("SEA, rescale none", linear)
    merged = fitted(rescale="none").merge_and_unload(safe_merge=True)
    scene.evaluate("SEA, rescale none, merged", merged)
    scene.evaluate("SEA, rescale none, retain set", fitted(scene.retain, rescale="none"))
    differences = scene.difference(reloaded, edited), scene.difference(merged, linear)
    return Evidence(
        row="SEA",
        results={
            "reloaded_difference": differences[0],
            "merged_difference": differences[1],
            "adapter": str((scene.folder / "sea").resolve()),
        },
        lines=[
            f"Largest difference of logits, SEA reloaded and edited: {differences[0]:.1e}",
            f"Largest difference of logits, SEA merged and edited (rescale none): {differences[1]:.1e}",
        ],
    )
