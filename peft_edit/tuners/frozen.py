"""Weights that come from a fit and are never trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..models.dtypes import dtype_name, is_quantised


# Addresses at which PyTorch allocates on the CPU are multiples of this.
ALIGNMENT = 64


def no_weight(tensor: Tensor) -> str | None:
    """What a tensor holds that is no weight of an adapter, or None."""
    if not tensor.is_floating_point():
        return f"values of {tensor.dtype}, which are no weights"
    return None if tensor.isfinite().all() else "NaN or infinite values"


class FrozenWeight(nn.Module):
    """A weight of an adapter that stays frozen, in a module of its own: so it survives offloading, and PEFT's casts.

    It is checked when it is loaded, or else at the first use: a weight that the file lacks is NaN, or on meta, and must
    not pass for an edit.

    Args:
        weight: (..., d).
        label: what it is, for messages: "positive factor of SEA adapter 'default' at model.layers.0.mlp.down_proj".
        checked: whether it needs no check, as it comes from a fit.
    """

    # What the configuration says of the shape, for messages.
    shape_source = "the model"

    def __init__(self, weight: Tensor, label: str, checked: bool = False):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.label = label
        self.checked = checked

    def register_parameter(self, name: str, param: nn.Parameter) -> None:
        """Take the weight, copied where it lies in memory that PyTorch has not allocated.

        Transformers' load_adapter and PEFT's low_cpu_mem_usage hand over tensors that lie in the mapped file, at any
        multiple of 8 bytes. On some processors products round as their operands are aligned: the loaded edit would be
        the saved one to rounding only.
        """
        start = param.data_ptr() - param.storage_offset() * param.element_size()
        if start % ALIGNMENT:
            param.data = param.data.clone()
        super().register_parameter(name, param)

    def check(self) -> None:
        """Raise ValueError, naming the site, for a weight that is missing or damaged. Looks once, and in a graph that
        is compiled while it is made."""
        if self.checked and not torch.compiler.is_compiling():
            return
        problem = self._look()
        # Read after the look: a graph then holds for weights that were looked at, and is made anew for others.
        if not self.checked and problem:
            raise ValueError(problem)

    @torch.compiler.assume_constant_result
    def _look(self) -> str | None:
        """What is wrong with the weight, or None. Runs on the weight itself also where `check` is traced."""
        offloaded = self.weight.is_meta and hasattr(self, "_hf_hook")  # as it is between two uses
        if self.checked or offloaded:
            return None
        if isinstance(self.weight, FakeTensor):  # torch.export traces with these in place of the weights
            return f"the {self.label} was not looked at yet: call the model once before it is exported"
        problem = self.problem(self.weight)
        self.checked = problem is None
        return problem

    def problem(self, weight: Tensor) -> str | None:
        """What is wrong with a weight and what to do, or None."""
        # Still on meta where the model was loaded with low_cpu_mem_usage, else still NaN.
        computes = not is_quantised(weight.dtype)
        if weight.is_meta or (computes and weight.numel() and weight.isnan().all()):
            return (
                f"the {self.label} was not loaded: the adapter file lacks it, or load_adapter was given an offloaded "
                "model; load the complete adapter with PeftModel.from_pretrained or fit again"
            )
        return self.damage(weight)

    def damage(self, weight: Tensor) -> str | None:
        """What is wrong with a weight that a file holds and what to do, or None."""
        if weight.is_floating_point() and is_quantised(weight.dtype):
            return (
                f"the {self.label} is of {dtype_name(weight.dtype)}, in which nothing can be computed: save the "
                "adapter in float32, float16 or bfloat16"
            )
        held = no_weight(weight)
        return held and f"the {self.label} holds {held}: the adapter file is damaged; load it again or fit again"

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape != self.weight.shape:
            errors.append(
                f"size mismatch for the {self.label}: {tuple(weight.shape)} in the file, {tuple(self.weight.shape)} by "
                f"{self.shape_source}; load the adapter's own configuration and model, or fit again"
            )
            return
        present = weight is not None and not weight.is_meta
        if present and (damage := self.damage(weight)):
            errors.append(damage)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if present:
            # Copying into a weight on meta does nothing, so that one is still to be looked at.
            self.checked = not self.weight.is_meta

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"
