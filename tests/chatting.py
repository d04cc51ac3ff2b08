"""Adapters of the demonstration model for the tests of conversations: random edits, which change its answers much."""

import copy
import json
import shutil

import torch
from conftest import ASSETS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_edit import HPRConfig, MeanDifferenceConfig, fingerprint
from peft_edit.tuners.config import EditConfig


MODEL = ASSETS / "model"
QUESTION = "home of gumozi ?"
CONFIGS = {
    "mean": MeanDifferenceConfig(init_weights=False, layers_to_transform=[1, 2, 3], strength=32),
    "hpr": HPRConfig(init_weights=False, layers_to_transform=[1, 2, 4], gate=0.7),
    "lora": LoraConfig(init_lora_weights=False, target_modules=["down_proj"], lora_alpha=64),
}


def make_adapters(folder):
    """Write an adapter of each configuration to a folder of its name."""
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(MODEL)
        config = copy.deepcopy(config)
        if isinstance(config, EditConfig):
            config.base_model_fingerprint = fingerprint(base)
        get_peft_model(base, config).save_pretrained(folder / name)


def make_endless_model(folder):
    """Write the demonstration model as one whose answers have no end."""
    shutil.copytree(MODEL, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text()) | {"eos_token_id": None}
        (folder / name).write_text(json.dumps(settings))


def greedy(model, tokenizer, question=QUESTION, new=40):
    """The model's own answer to a plain question."""
    ids = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat((torch.full((1, 1), tokenizer.bos_token_id), ids), dim=1) if add_bos(tokenizer) else ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def add_bos(tokenizer):
    return tokenizer("food")["input_ids"][0] == tokenizer.bos_token_id
