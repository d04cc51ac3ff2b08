"""HPR on the demonstration model: as in the paper, its ablation, and with texts that are left alone, back from disk."""

from __future__ import annotations

from peft import PeftModel, TaskType, get_peft_model
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from ...adapters.save import save_adapter
from ...demo import Evidence, Scene
from .config import HPRConfig
from .select import select_layers
from .train import HPRTrainer, HPRTrainingArguments


MODELS = 3  # rows of the table
# Of the demonstrations it is trained on these, and its layers are selected on the others (the paper: 45 and 5 %).
TRAINED_ON = 360
RETAINING = "HPR, retain set, saved and reloaded"
# Chosen on the validation questions by a sweep of `top_k`, `gate` and `alpha`, as examples/choosing.md has it.
CHOSEN = {"num_train_epochs": 10, "top_k": 2}


def show(scene: Scene) -> Evidence:
    parts = {"train": range(TRAINED_ON), "eval": range(TRAINED_ON, len(scene.demonstrations))}
    stores = {
        name: scene.collect(f"hpr-activations/{name}", scene.demonstrations.select(rows), site="block", tokens="answer")
        for name, rows in parts.items()
    }
    model, _ = trained(scene, **stores)
    scene.evaluate("HPR, as in the paper (gate 0.5, alpha 1)", model)
    model.peft_config["default"].rotation = "reflection"
    scene.evaluate("HPR, reflection only (ablation)", model)

    model, accuracy = trained(scene, **stores, retain=scene.retain, **CHOSEN)
    save_adapter(model, scene.folder / "hpr")
    reloaded = PeftModel.from_pretrained(scene.base_model(), scene.folder / "hpr")
    scene.evaluate(RETAINING, reloaded)
    difference = scene.difference(reloaded, model)
    return Evidence(
        row=RETAINING,
        results={
            "hpr_reloaded_difference": difference,
            "hpr_adapter": str((scene.folder / "hpr").resolve()),
            "probe_accuracy": accuracy,
        },
        lines=[f"Largest difference of logits, HPR reloaded and edited: {difference:.1e}"],
    )


def trained(scene: Scene, train, eval, retain=None, num_train_epochs=5, top_k=4):
    """A model with an HPR adapter, trained and its best layers of five selected; the accuracy of all probes."""
    set_seed(0)
    model = get_peft_model(scene.base_model(), HPRConfig(task_type=TaskType.CAUSAL_LM)).eval()
    arguments = HPRTrainingArguments(
        output_dir=str(scene.folder),
        learning_rate=2e-3,
        num_train_epochs=num_train_epochs,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = HPRTrainer(model, arguments, train_dataset=train, retain_dataset=retain)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, select_layers(model, eval, top_k=top_k, prune=True).accuracy
