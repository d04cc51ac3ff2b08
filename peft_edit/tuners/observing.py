"""What edits do to activations at their sites, seen while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..arguments import Argument, ArgumentError
from .angle import angle_between
from .layer import EditLayer, edit_layers


@contextmanager
def observed_edits(model: nn.Module, observer: Callable[[EditLayer, Tensor, Tensor], None]) -> Iterator[None]:
    """Let a function see what each edit is given and gives, in every forward pass inside the `with` block.

    Args:
        model: a model with adapters of editing methods, also of several at a time. Edits that are disabled are not
            seen.
        observer: is called with the layer, whose `site` names the place, the activations before and those after, all
            of a site's in one tensor: (b, s, d), or (b s, d) where the model flattens them (OPT). It must not change
            them.

    Raises:
        ValueError: another `with` block observes the model already.
    """
    layers = edit_layers(model)
    if any(layer.observer is not None for layer in layers):
        raise ValueError("the edits of this model are observed already: end that block first")
    try:
        for layer in layers:
            layer.observer = observer
        yield
    finally:
        for layer in layers:
            layer.observer = None


def edits_in_turn(layer: EditLayer, before: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What each active adapter of a layer does to activations, (..., d): its name, those before and those after. An
    observer of several adapters sees them as one edit."""
    for name in layer.active_here:
        after = layer.edit_scope(before, name)
        yield name, before, after
        before = after


def token_rows(layer: EditLayer, activations: Tensor, tokens: int) -> Tensor:
    """What an observer was given as (t, d), a row for each token; raises ArgumentError where they are not as many."""
    rows = activations.reshape(-1, activations.shape[-1])
    if len(rows) != tokens:
        raise ArgumentError(
            f"the edit at {layer.site} sees {len(rows)} activations of {tokens} tokens, so that none can be told to be "
            "a token: choose another ",
            Argument("target_modules"),
        )
    return rows


@dataclass(frozen=True)
class Change:
    """What an edit does to some activations, (n, d).

    Attributes:
        touched: (n,) bool, whether any element differs.
        norm: (m,), | ||out|| / ||in|| - 1 | of those that are touched; those with a norm of 0 before are left out.
        angle_rad: (m,), the angle between in and out of the same.
    """

    touched: Tensor
    norm: Tensor
    angle_rad: Tensor


def change_of(before: Tensor, after: Tensor) -> Change:
    """The change from `before` to `after`, (n, d) each, in float32 or wider."""
    touched = (before != after).any(dim=-1)
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before[touched].to(wide), after[touched].to(wide)
    norm = before.norm(dim=-1)
    defined = norm > 0
    ratio = after[defined].norm(dim=-1) / norm[defined]
    return Change(touched, (ratio - 1).abs(), angle_between(before[defined], after[defined]))
