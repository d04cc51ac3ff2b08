"""Compares models sharded over the processes that it is launched in with whole ones, and writes what it sees.

torchrun --nproc_per_node 2 tests/fsdp_processes.py OUTPUT_FOLDER
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from edits import EDITS, edited_model, refusal
from peft import get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from tiny import logits, token_ids, vivid_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from peft_edit import edit_strength
from peft_edit.tuners.frozen import FrozenWeight


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows).loss


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fully_sharded(edit, rank, dtype):
    """FSDP2: difference to the unsharded model of each thing that one does with it."""
    model, expected = edited_model(edit, dtype=dtype), edited_model(edit, dtype=dtype)
    base = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)
    rows = token_ids()[rank, None]
    generation = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seen = {"sharded": all(isinstance(p, DTensor) for p in model.parameters())}

    def compare(name, call):
        seen[name] = float((call(model).float() - call(expected).float()).abs().max())

    with torch.no_grad():
        compare("forward", lambda one: logits(one, rows))
        compare("generate", lambda one: one.generate(input_ids=rows, **generation))
        compare("mixed", lambda one: logits(one, adapter_names=["default", "__base__"]))
        for one in (model, expected):
            with one.disable_adapter():
                seen["disabled"] = float((logits(one) - logits(vivid_model(dtype=dtype))).abs().max())
        with edit_strength(model, 0.5), edit_strength(expected, 0.5):
            compare("strength", logits)
    saved = get_peft_model_state_dict(expected)
    for key, tensor in get_peft_model_state_dict(model).items():
        seen["saved"] = seen.get("saved", 0) + float((whole(tensor) - saved.pop(key)).abs().max())
    seen["saved"] += len(saved)
    seen["merge"] = refusal(model.merge_adapter)
    if any(p.requires_grad for p in expected.parameters()):
        for one in (model, expected):
            one.train()
        loss_of(model, rows).backward()
        (sum(loss_of(expected, row[None]) for row in token_ids()) / 2).backward()
        gradients = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
        seen["gradients"] = sum(
            float((whole(p.grad) - gradients.pop(name)).abs().max())
            for name, p in model.named_parameters()
            if p.requires_grad
        ) + len(gradients)
    return seen


def fsdp1(edit, rank):
    """The older FullyShardedDataParallel around whole decoder blocks."""
    model, expected = edited_model(edit), edited_model(edit)
    policy = ModuleWrapPolicy({type(model.get_base_model().model.layers[0])})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    rows = token_ids()[rank, None]
    loss = loss_of(sharded, rows)
    if loss.requires_grad:
        loss.backward()
    return {"loss": abs(float(loss) - float(loss_of(expected, rows)))}


def fsdp1_around_factors(rank):
    """Around each frozen weight of SEA by itself, whose forward pass gathers it."""
    model, expected = edited_model("SEA at the MLP"), edited_model("SEA at the MLP")
    policy = ModuleWrapPolicy({type(module) for module in model.modules() if isinstance(module, FrozenWeight)})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    rows = token_ids()[rank, None]
    with torch.no_grad():
        return float((logits(sharded, rows) - logits(expected, rows)).abs().max())


def refused_fsdp1():
    policy = fsdp_auto_wrap_policy(model := edited_model("HPR"))
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    return refusal(lambda: logits(sharded))


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {
        f"{edit}, {dtype}": fully_sharded(edit, rank, dtype)
        for edit in EDITS
        for dtype in (torch.float32, torch.bfloat16)
    }
    results |= {f"{edit}, FSDP1": fsdp1(edit, rank) for edit in EDITS}
    results["FSDP1 around factors"] = fsdp1_around_factors(rank)
    results["FSDP1 by PEFT's policy"] = refused_fsdp1()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
