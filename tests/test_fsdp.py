"""Models sharded over two processes on the CPU, by both of PyTorch's FSDPs, edit as the whole ones do."""

import json

import pytest
import torch
from edits import EDITS, merges, trains
from launching import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch(folder / "printed", "fsdp_processes", 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_fully_shard(results, edit, dtype):
    """Also with float32 adapters of a half-precision model."""
    for seen in (result[f"{edit}, {dtype}"] for result in results):
        assert seen.pop("sharded") is True
        reason = seen.pop("merge")
        assert "'default' cannot be merged" in reason and "\n" not in reason
        assert ("are quantised or sharded (DTensor)" in reason) == merges(edit)
        names = {"forward", "generate", "mixed", "disabled", "strength", "saved"}
        assert set(seen) == names | ({"gradients"} if trains(edit) else set())
        assert all(difference < (1e-5 if dtype == torch.float32 else 0.05) for difference in seen.values()), seen


@pytest.mark.parametrize("edit", EDITS)
def test_fsdp1_around_blocks(results, edit):
    assert all(result[f"{edit}, FSDP1"]["loss"] < 1e-5 for result in results)


def test_fsdp1_around_frozen_weights(results):
    assert all(result["FSDP1 around factors"] < 1e-5 for result in results)


def test_fsdp1_around_the_modules_of_an_adapter_is_refused(results):
    """They run where tokens are negative, on one process and not on the other: both would wait for ever."""
    for result in results:
        message = result["FSDP1 by PEFT's policy"]
        assert (
            "wrap whole decoder blocks" in message and "\n" not in message and "'default' at model.layers.0" in message
        )
