"""The weights that make a module's output, which a linear edit of that output merges into.

A mixture of experts puts out a weighted sum, shared experts included, and M (sum_e w_e E_e(x)) = sum_e w_e M E_e(x). So
an edit of the whole output is exact in the output weights and biases of every expert, whatever the router does.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .parts import is_linear, out_features


# Each goes to several experts, so that every kind of expert gets some.
TRIAL_TOKENS = 16
# A weight that is left out or merged along the wrong axis is off by about 1, float32 by 1e-6.
TRIAL_TOLERANCE = 1e-3
# Parameters of the trial above this number of elements repeat one row, which takes no memory.
TRIAL_NUMEL = 2**22
# Structure to what the trial of it told.
_REASONS: dict[Hashable, str | None] = {}


@dataclass(frozen=True)
class OutputTensor:
    """A parameter that makes a module's output.

    Attributes:
        module: holds the parameter.
        name: of the parameter in the module.
        axis: of the parameter that runs over the features of the output.
        stacked: whether axis 0 of the parameter runs over experts, each to be merged by itself.
    """

    module: nn.Module
    name: str
    axis: int
    stacked: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)


def linear_outputs(linear: nn.Module) -> dict[str, OutputTensor]:
    """Weight and bias of an `nn.Linear`, whose weight is (out, in), or a `Conv1D`, whose weight is (in, out)."""
    outputs = {"weight": OutputTensor(linear, "weight", 1 if isinstance(linear, Conv1D) else 0)}
    bias = getattr(linear, "bias", None)  # some of Transformers' own linear layers know none
    return outputs if bias is None else {**outputs, "bias": OutputTensor(linear, "bias", 0)}


def mixture_outputs(mixture: nn.Module, features: int) -> dict[str, OutputTensor]:
    """Output weights and biases of all experts, by their names in the mixture.

    They are found by structure: in each part of the mixture the last of its layers, or of its stacked (experts, ., .)
    parameters, that are as wide as the model. `why_inexact` tells whether that is right.
    """
    layers: list[dict[str, OutputTensor]] = []
    parts: dict[str, OutputTensor] = {}
    own = dict(mixture.named_parameters(recurse=False))
    for name, parameter in own.items():
        if parameter.dim() == 3 and features in parameter.shape[1:]:
            square = parameter.shape[1] == parameter.shape[2]
            last = getattr(mixture, "is_transposed", False) if square else parameter.shape[2] == features
            layer = {name: OutputTensor(mixture, name, 2 if last else 1, stacked=True)}
            if (bias := own.get(f"{name}_bias")) is not None and bias.shape[-1] == features:
                layer[f"{name}_bias"] = OutputTensor(mixture, f"{name}_bias", 1, stacked=True)
            layers.append(layer)
    for prefix, child in mixture.named_children():
        if isinstance(child, BaseTunerLayer):
            continue
        if not is_linear(child):
            found = mixture_outputs(child, features)
            parts |= {f"{prefix}.{name}": output for name, output in found.items()}
        elif out_features(child) == features:
            layers.append({f"{prefix}.{name}": output for name, output in linear_outputs(child).items()})
    return parts | (layers[-1] if layers else {})


def why_inexact(mixture: nn.Module, outputs: dict[str, OutputTensor]) -> str | None:
    """Why an edit of the mixture's output would not be exact in these parameters, or None if it is.

    It looks once at each structure: the mixtures of a model are alike, and a trial of a large one takes seconds.
    """
    if not outputs:
        return "no output weights of experts were found in it"
    structure = tuple(_describe(mixture))
    if structure not in _REASONS:
        _REASONS[structure] = _try(mixture, outputs)
    return _REASONS[structure]


def _describe(module: nn.Module) -> Iterator[Hashable]:
    """All that tells mixtures apart: classes, settings and shapes."""
    settings = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
    yield type(module), tuple(settings.items())
    yield from ((name, parameter.shape) for name, parameter in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if not isinstance(child, BaseTunerLayer):
            yield name
            yield from _describe(child)


def _try(module: nn.Module, outputs: dict[str, OutputTensor]) -> str | None:
    """A copy of the module with random weights, which take next to no memory, must put out M y in place of y once M is
    merged into the outputs. So experts without weights, norms after the experts and weights that were not found are
    noticed, whatever the architecture."""
    generator = torch.Generator().manual_seed(0)
    axes = {id(output.parameter): output.axis for output in outputs.values()}
    copies: dict[int, object] = {}
    for parameter in module.parameters():
        values = _random(parameter.shape, axes.get(id(parameter), parameter.dim() - 1), generator)
        copies[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    stand_ins = [copies[id(output.parameter)] for output in outputs.values()]
    # An edit refers to the module itself, and must not take part.
    copies |= {id(child): nn.Identity() for child in module.children() if isinstance(child, BaseTunerLayer)}
    trial = remove_hook_from_module(copy.deepcopy(module, copies).eval(), recurse=True)
    for part in trial.modules():
        part._forward_hooks.clear()
        config = getattr(part, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # the others make copies of all experts' weights at once
    features = stand_ins[0].shape[next(iter(outputs.values())).axis]
    x = torch.randn(1, TRIAL_TOKENS, features, generator=generator)
    try:
        with torch.no_grad():
            expected = _mix(_first(trial(x.clone())), -1)
            for values, output in zip(stand_ins, outputs.values(), strict=True):
                values.data = _mix(values.data, output.axis)
            merged = _first(trial(x.clone()))
    except Exception as error:  # any module may be there, such as one that needs more than hidden states
        return f"a trial of it alone fails ({type(error).__name__}: {' '.join(str(error).split())})"
    scale = float(expected.norm())
    if scale > 0 and float((merged - expected).norm()) <= TRIAL_TOLERANCE * scale:
        return None
    return "that is more than a weighted sum over the output weights of its experts"


def _random(shape: torch.Size, axis: int, generator: torch.Generator) -> Tensor:
    """Random values of a parameter, small as weights are. Those of a large one vary along an axis only."""
    if shape.numel() > TRIAL_NUMEL:
        varied = [length if i == axis else 1 for i, length in enumerate(shape)]
        return (0.05 * torch.randn(varied, generator=generator)).expand(shape)
    return 0.05 * torch.randn(shape, generator=generator)


def _mix(y: Tensor, axis: int) -> Tensor:
    """A linear map along an axis that commutes with no norm and no elementwise function. What repeats one row goes on
    to do so."""
    row = y[tuple(slice(1) if stride == 0 else slice(None) for stride in y.stride())]
    return (2 * row - row.flip(axis)).expand(y.shape)


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
