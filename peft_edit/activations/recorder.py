"""Hooks that keep rows of what the modules of sites give, or take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from ..models.dtypes import as_written
from ..models.sites import takes_input
from ..tuners.block import BlockEditLayer
from ..tuners.layer import EditLayer


class Recorder:
    """Hooks that keep rows of the outputs of modules, or of their inputs, while rows are asked for.

    Args:
        model: the modules' model.
        names: name of the tensor, "site.layer", to name of the module.
        mean: keep the mean of the rows of each sequence instead of the rows.
    """

    def __init__(self, model: nn.Module, names: dict[str, str], mean: bool):
        self.model, self.names, self.mean = model, names, mean
        self._kept: Tensor | None = None
        self._rows: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        for name, module_name in self.names.items():
            module = self.model.get_submodule(module_name)
            # First of the hooks: the edit of a block is a hook too.
            if takes_input(name.partition(".")[0]):
                handle = module.register_forward_pre_hook(partial(self._keep_input, name), prepend=True)
            else:
                handle = _before_edit(module).register_forward_hook(partial(self._keep_output, name), prepend=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    @contextmanager
    def keeping(self, kept: Tensor) -> Iterator[dict[str, Tensor]]:
        """Keep the positions where `kept`, (b, s) bool, is true in the forward pass inside the `with` block."""
        self._kept, self._rows = kept, {}
        try:
            yield self._rows
        finally:
            self._kept, self._rows = None, {}

    def _keep_input(self, name: str, module: nn.Module, args: tuple) -> None:
        self._keep(name, args or None, "takes")

    def _keep_output(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple | list) -> None:
        self._keep(name, output, "gives")

    def _keep(self, name: str, output: Tensor | tuple | list, verb: str) -> None:
        if self._kept is None:  # a prompt, whose rows nobody wants
            return
        h = output[0] if type(output) in (tuple, list) else output
        shape = tuple(h.shape[:-1]) if isinstance(h, Tensor) else ()
        if shape not in (tuple(self._kept.shape), (self._kept.numel(),)):
            found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ArgumentError(
                f"{self.names[name]} {verb} {found} for input of shape {tuple(self._kept.shape)}, not one activation "
                "for each position of each row: choose another ",
                *(Argument("site"), " or ", Argument("target_modules")),
            )
        h = h.reshape(*self._kept.shape, -1)  # OPT flattens batch and sequence before its MLP
        kept = self._kept.to(h.device)
        if self.mean:
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            weights = kept.to(h.dtype) / kept.sum(dim=1, keepdim=True)
            with as_written(h):
                self._rows[name] = torch.einsum("bs,bsd->bd", weights, h)
        else:
            self._rows[name] = h[kept]


def _before_edit(module: nn.Module) -> nn.Module:
    """The module whose output the first edit of a site receives: what the edit wraps, or whose child it is.

    Adapters of other methods may lie around the edit: the innermost edit acts first.
    """
    found = inner = module
    while True:
        if any(isinstance(child, BlockEditLayer) and not child.of_input for child in inner.children()):
            found = inner
        if not isinstance(inner, BaseTunerLayer):
            return found
        if isinstance(inner, EditLayer):
            found = inner.base_layer
        inner = inner.base_layer
