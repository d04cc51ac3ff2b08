"""Activation store of attention heads -> fitted ITI adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...activations.store import ActivationStore, Store, open_store
from ...adapters.changes import relative_change, warn_of_change
from ...adapters.match import check_store, check_unmerged, describe_data, find_adapter, replace_config
from ...arguments import Argument, ArgumentError, check_options, takes
from ...models.heads import attention_heads
from .config import ITIConfig
from .layer import ITILayer
from .maths import accuracy, fit_probes, mass_mean_shift


@dataclass(kw_only=True)
class ITIFitArguments:
    """
    Options of [`fit_iti`].

    Args:
        held_out (`float`):
            Share of the questions on which the probes are scored and not fitted, in (0, 1). The paper's is a fifth.
        l2 (`float`):
            Penalty of the probes' weights, see `maths.fit_probes`; 1 is that of scikit-learn.
        seed (`int`):
            Of the choice of these questions.
    """

    held_out: float = field(
        default=0.2,
        metadata={
            "help": "Share of the questions on which probes are scored.",
            "above": 0,
            "maximum": 0.99,
            "allowed": "above 0 and at most 0.99",
        },
    )
    l2: float = field(
        default=1.0, metadata={"help": "Penalty of the probes' weights.", "above": 0, "allowed": "above 0 and finite"}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice of these questions."})

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class SiteFit:
    """What the fit found at the attention of one block.

    Attributes:
        layer: index of the decoder block.
        site: name of the attention's output projection.
        accuracy: of the probe of each head on held-out questions, in [0, 1].
        heads: those that are edited, in increasing order.
        sigma: standard deviation of the activations along the direction of each of these.
        change: mean over the answers of the length of what is added over that of the activations of all heads.
    """

    layer: int
    site: str
    accuracy: list[float]
    heads: list[int]
    sigma: list[float]
    change: float


@dataclass(frozen=True)
class ITIFit:
    """Result of `fit_iti`: one `SiteFit` for each layer, in increasing order.

    Attributes:
        adapter_name: the adapter that was fitted.
        demonstrations: number of demonstrations in the store.
        answers: number of different answers in them, each of which counts once.
        held_out_questions: on how many questions the probes were scored.
        layers: the sites.
    """

    adapter_name: str
    demonstrations: int
    answers: int
    held_out_questions: int
    layers: list[SiteFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """The different answers of a store.

    Attributes:
        rows: their rows in the store, (n,).
        labels: 1 for positive and 0 for negative ones, (n,).
        held_out: whether they are of a question that is held out, (n,) bool.
        held_out_questions: number of these questions.
    """

    rows: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_questions: int


@takes(ITIFitArguments)
def fit_iti(
    model: nn.Module,
    store: Store,
    adapter_name: str | None = None,
    allow_fingerprint_mismatch: bool = False,
    **options: Any,
) -> ITIFit:
    """Fit an ITI adapter to stored activations of attention heads (ITI, section 4).

    A logistic probe of each head learns from the answers of most questions which are positive, and is scored on the
    others. The heads with the most accurate probes are edited: theta is the normalised difference of the means of all
    positive and all negative answers (mass mean shift), sigma the standard deviation of all of them along it, and
    sigma theta the head's part of the layer's vector.

    Afterwards the adapter edits, its vectors are ready to be saved and its configuration says what it was fitted on.
    Nothing changes when the fit fails. Fitting again replaces the fit.

    Args:
        model: a model with an ITI adapter: from `get_peft_model`, or a Transformers model after `add_adapter`.
        store: activations of `site="attention"`, one row an answer; or their folder. The paper's are
            `collect_activations(..., site="attention", answers="all", neutral=None)`: the last tokens of all answers.
        adapter_name: which adapter; None for the active one.
        allow_fingerprint_mismatch: fit although the store says that it was collected from another model.
        options: see `ITIFitArguments`.

    Raises:
        ValueError: the store does not fit the adapter (model, site, layers, width), has fewer than two questions or
            activations that are not finite; the model has fewer heads than are to be edited, or none that can be told
            apart; the adapter is merged, missing or of another method.
    """
    arguments, store = ITIFitArguments(**options), open_store(store)
    adapter_name, config, layers = find_adapter(model, adapter_name, ITIConfig, ITILayer)
    check_unmerged(layers.values(), "fit")
    store = check_store(model, store, config.site, layers, allow_fingerprint_mismatch)
    heads, _ = attention_heads(model, store.hidden_size)
    if config.num_heads > (total := heads * len(layers)):
        raise ArgumentError(
            *(Argument("num_heads", config.num_heads), f" and the adapter's {len(layers)} layers have {total} heads: "),
            *("lower ", Argument("num_heads")),
        )
    answers = _answers(store, arguments)
    progress = tqdm(layers, desc="fitting", unit="layer", leave=None)
    scores = {index: _score(_heads_of(store, index, answers, heads), answers, arguments.l2) for index in progress}
    chosen = most_accurate(scores, config.num_heads)
    vectors = {index: torch.zeros(store.hidden_size) for index in layers}
    sigmas: dict[int, list[float]] = {index: [] for index in layers}
    for index in sorted(chosen):
        vectors[index], sigmas[index] = _vector(store, index, answers, heads, chosen[index])
    changes = dict.fromkeys(layers, 0.0)
    for index in chosen:
        added = config.alpha * vectors[index]
        changes[index] = relative_change([store.gather(answers.rows, [index])[0].float()], partial(torch.add, added))
    fits = [
        SiteFit(index, layer.site, scores[index].tolist(), chosen.get(index, []), sigmas[index], changes[index])
        for index, layer in layers.items()
    ]
    for index, layer in layers.items():
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        layer.set_vector(adapter_name, vectors[index].to(device), checked=True)
    replace_config(
        model,
        adapter_name,
        fit_statistics={
            fit.site: {name: getattr(fit, name) for name in ("accuracy", "heads", "sigma")} for fit in fits
        },
        base_model_fingerprint=store.metadata["fingerprint"],
        fitted_on={**describe_data(store), "demonstrations": len(store)},
    )
    warn_of_change(changes, "activations")
    return ITIFit(adapter_name, len(store), len(answers.rows), answers.held_out_questions, fits)


def _answers(store: ActivationStore, arguments: ITIFitArguments) -> Answers:
    """The different answers of a store, of questions that are held out or not."""
    questions = store.questions()
    asked = questions.unique()
    if len(asked) < 2:
        raise ValueError(
            f"{store.path} holds demonstrations of {len(asked)} questions, and probes are scored on others than they "
            "are fitted on: collect more"
        )
    count = min(max(1, round(arguments.held_out * len(asked))), len(asked) - 1)
    generator = torch.Generator().manual_seed(arguments.seed)
    held_out_questions = asked[torch.randperm(len(asked), generator=generator)[:count]]
    rows, labels, held_out = [], [], []
    for label, sign in enumerate(("negative", "positive")):
        # An answer that stands in several demonstrations counts once, as in the paper.
        unique, place = store.rows(sign).unique(return_inverse=True)
        of = torch.zeros_like(unique).scatter_reduce(0, place, questions, "amin", include_self=False)
        rows.append(unique)
        labels.append(torch.full_like(unique, label))
        held_out.append(torch.isin(of, held_out_questions))
    return Answers(torch.cat(rows), torch.cat(labels), torch.cat(held_out), count)


def _heads_of(store: ActivationStore, layer: int, answers: Answers, heads: int) -> Tensor:
    """Activations of the heads of a layer, (heads, n, d)."""
    found = store.gather(answers.rows, [layer])[0]
    if not found.isfinite().all():
        raise ValueError(
            f"layer {layer}: the activations of {store.path} are not finite: collect them in a wider dtype, or leave "
            "the questions with such ones out"
        )
    return found.unflatten(1, (heads, -1)).transpose(0, 1)


def _score(x: Tensor, answers: Answers, l2: float) -> Tensor:
    """Held-out accuracy of the probe of each head, (heads,)."""
    learnt, scored = ~answers.held_out, answers.held_out
    weight, bias = fit_probes(x[:, learnt], answers.labels[learnt], l2)
    return accuracy(x[:, scored], answers.labels[scored], weight, bias)


def most_accurate(scores: dict[int, Tensor], count: int) -> dict[int, list[int]]:
    """Layer to its heads, in increasing order, among the `count` most accurate ones of all layers. Of equally accurate
    heads the first ones are taken."""
    ranked = sorted((-score, layer, head) for layer, of in scores.items() for head, score in enumerate(of.tolist()))
    chosen: dict[int, list[int]] = {}
    for _, layer, head in ranked[:count]:
        chosen.setdefault(layer, []).append(head)
    return {layer: sorted(of) for layer, of in chosen.items()}


def _vector(
    store: ActivationStore, layer: int, answers: Answers, heads: int, chosen: Iterable[int]
) -> tuple[Tensor, list[float]]:
    """sigma theta of the chosen heads and zero of the others, (heads d,), and their sigmas."""
    chosen = list(chosen)
    x = _heads_of(store, layer, answers, heads)
    theta, sigma = mass_mean_shift(x[chosen], answers.labels)
    for head, direction in zip(chosen, theta, strict=True):
        if not direction.any():
            raise ValueError(
                f"layer {layer}, head {head}: positive and negative activations have the same mean, so that there is "
                "nothing to add: check the data, or lower num_heads"
            )
    vector = torch.zeros(heads, x.shape[-1])
    vector[chosen] = (sigma[:, None] * theta).float()
    return vector.flatten(), sigma.tolist()
