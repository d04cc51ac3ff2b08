"""Trains on two stores in as many processes as it is launched with, and writes the adapter and the log.

torchrun --nproc_per_node 2 tests/train_hpr_processes.py TRAIN_STORE EVAL_STORE OUTPUT_FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from tiny import tiny_model

from peft_edit import HPRConfig, HPRTrainer, HPRTrainingArguments


def train(train_store, eval_store, folder):
    base = tiny_model()
    torch.manual_seed(0)
    model = get_peft_model(base, HPRConfig())
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = HPRTrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=16 // processes,
        per_device_eval_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = HPRTrainer(model, args, train_dataset=train_store, eval_dataset=eval_store)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "adapter")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*map(Path, sys.argv[1:]))
