"""Collects and fits in as many processes as it is launched with.

torchrun --nproc_per_node 2 tests/collect_processes.py OUTPUT_FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from test_collect import QUESTIONS, TOKENIZER, contrast
from tiny import tiny_model

from peft_edit import SEAConfig, collect_activations, fit_sea
from peft_edit.activations import batches as schedule
from peft_edit.processes import processes


def main(folder):
    before, schedule.SHARD_SEQUENCES = schedule.SHARD_SEQUENCES, 2
    model, passes = tiny_model(), []
    model.model.register_forward_pre_hook(lambda *call: passes.append(call))
    options = {"site": ("mlp", "block"), "neutral": "generated", "answers": "all", "max_new_tokens": 3, "batch_size": 2}
    collect_activations(model, TOKENIZER, contrast(), folder / "store", **options)
    (folder / f"passes-{processes().index}.json").write_text(json.dumps(len(passes)))
    adapted = get_peft_model(tiny_model(), SEAConfig())
    fit_sea(adapted, folder / "store")
    if processes().is_main:
        adapted.save_pretrained(folder / "adapter")
    schedule.SHARD_SEQUENCES = before


def fail(folder):
    """Bad data are said by one process."""
    try:
        data = contrast([(*q[:3], None) for q in QUESTIONS])
        collect_activations(tiny_model(), TOKENIZER, data, folder / "bad", neutral="text")
    except ValueError as error:
        print(error, flush=True)
    except SystemExit:
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]))
    fail(Path(sys.argv[1]))
