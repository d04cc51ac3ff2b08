"""DPO of TRL around an edit, in the ways that examples/together.md names: the reference is the edited model."""

import pytest
import torch
from conftest import ASSETS
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peft_edit import SEAConfig


PREFERENCES = [{"prompt": "colour of sidi ? they say it is", "chosen": " pink", "rejected": " brown"}] * 2


def base():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sea")
    torch.manual_seed(0)
    get_peft_model(base(), SEAConfig(init_weights=False, rescale="none")).save_pretrained(path)
    return path


def edited(folder):
    """The bare model of an edit that is called "sea"."""
    return PeftModel.from_pretrained(base(), folder, adapter_name="sea").get_base_model()


def lora():
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


WAYS = {
    "merged": lambda folder: {
        "model": PeftModel.from_pretrained(base(), folder).merge_and_unload(),
        "peft_config": lora(),
    },
    "second model": lambda folder: {
        "model": get_peft_model(edited(folder), lora()),
        "ref_model": edited(folder),
    },
    'LoRA named "default"': lambda folder: {"model": get_peft_model(edited(folder), lora(), adapter_name="default")},
    "switched off": lambda folder: {"model": edited(folder), "peft_config": lora()},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_of_dpo_is_the_edited_model(folder, tmp_path, demo_tokenizer, way):
    arguments = DPOConfig(
        tmp_path, max_steps=1, logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = DPOTrainer(
        **WAYS[way](folder),
        args=arguments,
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=demo_tokenizer,
    )
    trainer.train()
    (first,) = (entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    # Before the first step LoRA does nothing: policy and reference are one model, or the reference lacks the edit.
    margin = first["rewards/margins"]
    assert abs(margin) > 1e-3 if way == "switched off" else margin == pytest.approx(0, abs=1e-6)


def test_the_baseline_of_lora_trains_an_adapter_that_is_evaluated(tmp_path, monkeypatch, capsys):
    from examples import lora_baseline
    from peft_edit import evaluate, load_contrast_set

    arguments = ["lora_baseline.py", ASSETS / "model", ASSETS / "demonstrations.jsonl", tmp_path / "lora"]
    options = ["--limit", 8, "--max-steps", 2, "--batch-size", 4, "--rank", 2, "--cpu"]
    monkeypatch.setattr("sys.argv", list(map(str, [*arguments, *options])))
    lora_baseline.main()
    assert "LoRA adapter, 2 steps on 8 answers" in capsys.readouterr().out
    data = load_contrast_set(ASSETS / "test.jsonl", ids=None).select(range(4))
    model = PeftModel.from_pretrained(base(), tmp_path / "lora")
    found = evaluate(model, AutoTokenizer.from_pretrained(ASSETS / "model"), data)
    assert found["adapters"][0]["method"] == "LORA" and found["measures"]["mc2"]["difference"] != 0
