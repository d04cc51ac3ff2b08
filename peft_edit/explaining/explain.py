"""What an edit does to one text, token by token."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..arguments import Argument, ArgumentError
from ..data.rows import check_encodable
from ..evaluation.side_effects import (
    CHUNK_ELEMENTS,
    check_active,
    disabled_adapters,
    divergence,
)
from ..evaluation.texts import NotFiniteError
from ..models.fingerprint import active_adapters
from ..models.kind import check_language_model, check_vocabulary
from ..models.run import check_length, inference, input_device
from ..models.sites import layer_index, runnable, unwrap
from ..tuners.angle import angle_between
from ..tuners.layer import EditLayer, edit_layers
from ..tuners.method import names
from ..tuners.observing import edits_in_turn, observed_edits, token_rows
from .texts import shown_tokens, token_texts


@dataclass(frozen=True)
class TokenChange:
    """A token that may come next, and its probability, in [0, 1], in the base model and in the edited one."""

    token: str
    base: float
    edited: float


@dataclass(frozen=True)
class SiteExplanation:
    """What one adapter does at one site. Lists have a value for each of the s tokens.

    Attributes:
        name: of the module whose output, or input, is edited.
        layer: index of its decoder block; None where the name has none.
        adapter: its name. Each of several adapters at a site is given what the one before it made.
        touched: whether any element of the activation differs.
        gate: the probability, in [0, 1], by which the adapter decides whether it edits; None where it edits all.
        change: ||out - in|| / ||in||, how strongly; 0 where the activation was zero.
        angle_rad: the angle between in and out, in [0, pi].
        norm_ratio: ||out|| / ||in||; 1 where the activation was zero.
        cosine_to_mean_change: how far the direction of the change, out - in, is that of the other tokens: its cosine
            with the mean change of the touched tokens. 1 for an edit that adds one vector to all, 0 where a token is
            not touched.
    """

    name: str
    layer: int | None
    adapter: str
    touched: list[bool]
    gate: list[float] | None
    change: list[float]
    angle_rad: list[float]
    norm_ratio: list[float]
    cosine_to_mean_change: list[float]


@dataclass(frozen=True)
class Explanation:
    """What the active adapters do to a text of s tokens.

    Attributes:
        text: all of it, special tokens included.
        tokens: the text of each; together they are the text. Where several tokens make one character, the last has it.
        sites: the edited places, in the order in which the model runs them.
        kl: after each token KL(base || edited) in nats of the distributions of the token that comes next.
        gained, lost: after each token those that gain or lose most of their probability to come next, the first most;
            none where nothing changes.
    """

    text: str
    tokens: list[str]
    sites: list[SiteExplanation]
    kl: list[float]
    gained: list[list[TokenChange]]
    lost: list[list[TokenChange]]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def touched(self) -> list[bool]:
        """Whether each token is touched at any site."""
        return [any(values) for values in zip(*(site.touched for site in self.sites), strict=True)]

    @property
    def change(self) -> list[float]:
        """The largest change of each token at any site."""
        return [max(values) for values in zip(*(site.change for site in self.sites), strict=True)]

    def since(self, first: int) -> Explanation:
        """The same of the tokens from a place on, such as those of an answer after its prompt."""
        sites = [
            replace(site, **{name: value[first:] for name, value in vars(site).items() if isinstance(value, list)})
            for site in self.sites
        ]
        tokens = self.tokens[first:]
        changes = {name: getattr(self, name)[first:] for name in ("kl", "gained", "lost")}
        return Explanation(text="".join(tokens), tokens=tokens, sites=sites, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def explain_edit(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int], *, top: int = 5
) -> Explanation:
    """What the active adapters do to one text: which tokens they touch, where and how strongly, and how the model's
    expectation of the next token changes, against the same model with the adapters disabled.

    The text goes through the model in one pass. An edit of the last token of a pass (`token_scope="last"`) touches the
    last token of the text alone, whereas it touches each token while an answer is generated.

    Args:
        model: a causal language model with active adapters that are not merged, in a `PeftModel` or after
            Transformers' `add_adapter`. Of several adapters each has sites of its own; the distributions are those of
            all together, adapters of PEFT's own methods included.
        tokenizer: of that model.
        text: encoded as it is, with the special tokens that the tokenizer adds; or token ids, such as those of a
            conversation and its answer.
        top: how many tokens that gain, and that lose, are told.

    Raises:
        ValueError: no adapter is active, or none that edits activations; one is merged, or gives NaN; the text has no
            tokens, more than the model takes, or one without an embedding; the model is no causal one or has no LM
            head.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ArgumentError(Argument("top"), f" must be an integer of at least 1, got {top!r}")
    check_language_model(model)
    check_active(model)
    _check_edits(model)
    ids = _ids(tokenizer, text)
    if not ids:
        raise ArgumentError(Argument("text"), " has no tokens: pass some words")
    bare = unwrap(model)
    check_vocabulary(bare, [ids], "the text")
    check_length(bare, len(ids), "text", "shorten it")
    sites: list[SiteExplanation] = []

    def observe(layer: EditLayer, before: Tensor, after: Tensor) -> None:
        for adapter, h, edited in edits_in_turn(layer, before):
            gate = layer.gate_probability(h, adapter)
            h, edited = (token_rows(layer, x, len(ids)) for x in (h, edited))
            sites.append(_site(layer, adapter, h, edited, gate))

    inputs = {"input_ids": torch.tensor([ids], device=input_device(bare))}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "use_cache": False}
    with inference(model):
        with disabled_adapters(model):
            base = runnable(model)(**inputs).logits[0]
        with observed_edits(model, observe):
            edited = runnable(model)(**inputs).logits[0]
        kl, gained, lost = _next_tokens(tokenizer, base, edited, top)
    tokens = token_texts(tokenizer, ids)
    return Explanation("".join(tokens), tokens, sites, kl, gained, lost)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int]) -> list[int]:
    """Token ids of a text, or as they were given; none of an empty text."""
    if isinstance(text, str):
        check_encodable(text, "the text")
        return list(tokenizer(text)["input_ids"]) if text else []
    try:
        ids = [operator.index(i) for i in text]
    except TypeError as error:
        raise ArgumentError(Argument("text"), f" must be text or a list of token ids, got {text!r:.80}") from error
    if below := [i for i in ids if i < 0]:
        raise ArgumentError(Argument("text"), f" has the token id {below[0]}: pass ids of 0 or more")
    return ids


def _check_edits(model: nn.Module) -> None:
    """Raise ValueError unless an active adapter edits activations."""
    if not any(layer.active_here for layer in edit_layers(model) if not layer.disable_adapters):
        active = ", ".join(map(repr, active_adapters(model)))
        raise ValueError(
            f"of the active adapters ({active}) none edits activations, so that there is no edit to explain: load one "
            f"of {names()}, or make one active with set_adapter"
        )


def _site(layer: EditLayer, adapter: str, before: Tensor, after: Tensor, gate: Tensor | None) -> SiteExplanation:
    """What an adapter does to activations, (s, d), of one site."""
    touched = (before != after).any(dim=-1)
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    change, norm = after - before, before.norm(dim=-1)
    defined = norm > 0
    mean = change[touched].mean(dim=0) if touched.any() else torch.zeros_like(change[0])
    return SiteExplanation(
        name=layer.site,
        layer=layer_index(layer.site),
        adapter=adapter,
        touched=touched.tolist(),
        gate=None if gate is None else gate.flatten().tolist(),
        change=torch.where(defined, change.norm(dim=-1) / norm, 0.0).tolist(),
        angle_rad=angle_between(before, after).tolist(),
        norm_ratio=torch.where(defined, after.norm(dim=-1) / norm, 1.0).tolist(),
        cosine_to_mean_change=functional.cosine_similarity(change, mean.expand_as(change), dim=-1).tolist(),
    )


Changes = list[list[TokenChange]]


def _next_tokens(
    tokenizer: PreTrainedTokenizerBase, base: Tensor, edited: Tensor, top: int
) -> tuple[list[float], Changes, Changes]:
    """Divergence after each token, and the tokens that gain and lose most, from logits (s, V)."""
    kl: list[float] = []
    gained: Changes = []
    lost: Changes = []
    rows, top = max(1, CHUNK_ELEMENTS // base.shape[1]), min(top, base.shape[1])
    for p, q in zip(base.split(rows), edited.to(base.device).split(rows), strict=True):
        log_p, log_q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
        found = divergence(log_p, log_q)
        if not found.isfinite().all():
            raise NotFiniteError
        kl += found.tolist()
        p, q = log_p.exp(), log_q.exp()
        for changes, difference in ((gained, q - p), (lost, p - q)):
            values, tokens = difference.topk(top, dim=-1)
            shown = shown_tokens(tokenizer, tokens.flatten().tolist())
            before, after = (x.gather(1, tokens).tolist() for x in (p, q))
            for row, moved in enumerate(values.tolist()):
                of_row = zip(shown[row * top : (row + 1) * top], before[row], after[row], moved, strict=True)
                changes.append([TokenChange(token, b, e) for token, b, e, by in of_row if by > 0])
    return kl, gained, lost
