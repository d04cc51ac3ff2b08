"""Plain re-implementations of what is published, as its equations stand: dense matrices, and loops over sequences.

They are what the package is compared with, in time here and in results in the tests. SEA is arXiv 2405.09719, HPR is
2024.emnlp-main.761. n is the number of demonstrations, d the hidden size. None of this is the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from peft_edit.data.prompts import EncodedAnswer, encode_answers


# SEA


def sea_bases(neutral: Tensor, positive: Tensor, negative: Tensor, energy: float = 0.998) -> list[Tensor]:
    """Leading left singular vectors of both (d, d) cross-covariances, whose squared singular values have a share of the
    energy: (k+, d) and (k-, d). Activations are (n, d) each, float64."""
    bases = []
    for answers in (positive, negative):
        u, s, _ = torch.linalg.svd(neutral.T @ answers / len(neutral))
        share = s.square().cumsum(dim=0) / s.square().sum()
        bases.append(u[:, : int((share < energy).sum()) + 1].T)
    return bases


def sea_projections(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """P+ = U+ U+^T and P- = I - U- U-^T, (d, d) each, of bases (k, d)."""
    identity = torch.eye(positive.shape[1], dtype=positive.dtype, device=positive.device)
    return positive.T @ positive, identity - negative.T @ negative


def sea_edit(h: Tensor, plus: Tensor, minus: Tensor, rescale: bool = True) -> Tensor:
    """P+ h + P- h of h, (..., d), with the norm of each token restored.

    The published code takes that norm over all tokens of a batch for each feature. Here it is each token's, so that the
    results can be compared; it costs as much.
    """
    y = h @ plus + h @ minus
    return y * (h.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)) if rescale else y


def sea_merge(weight: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """(P+ + P-) W of a weight (d, m)."""
    return (plus + minus) @ weight


# HPR


def householder(w: Tensor) -> Tensor:
    """The reflection I - 2 w w^T / (w . w), (d, d)."""
    return torch.eye(len(w), dtype=w.dtype, device=w.device) - 2 * torch.outer(w, w) / w.dot(w)


def hpr_rotate(a: Tensor, angle_rad: Tensor, reflection: Tensor) -> Tensor:
    """Equation 12: reflect a, (..., d), by a (d, d) matrix, and combine the two by ratios of sines so that a is rotated
    by an angle, (...)."""
    reflected = a @ reflection
    between = torch.acos(functional.cosine_similarity(a, reflected, dim=-1).clamp(-1, 1)).unsqueeze(-1)
    g = angle_rad.unsqueeze(-1)
    return torch.sin(g) / torch.sin(between) * reflected + torch.sin(between - g) / torch.sin(between) * a


def hpr_edit(a: Tensor, w: Tensor, angle: Callable[[Tensor], Tensor], reflection: Tensor) -> Tensor:
    """Predict the angle of every token and rotate every token; keep that of the negative ones."""
    return torch.where((a @ w <= 0).unsqueeze(-1), hpr_rotate(a, angle(a), reflection), a)


def hpr_train(
    probes: Sequence[nn.Module],
    networks: Sequence[nn.Module],
    batches: Iterable[Tensor],
    learning_rate: float,
    begun: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train the probe and the angle network of each layer, one layer after the other (equations 8 to 10).

    Args:
        probes: of each layer, (..., d) -> (..., 1).
        networks: of each layer, of the same shapes.
        batches: (B, layers, 2, d), the positive token of each pair first.
        learning_rate: constant, of AdamW.
        begun: is called with the number of each step before it.

    Returns:
        Mean loss over the layers at each step.
    """
    modules = [nn.ModuleList(pair).train() for pair in zip(probes, networks, strict=True)]
    optimizers = [torch.optim.AdamW(m.parameters(), learning_rate, weight_decay=0, foreach=False) for m in modules]
    losses = []
    for step, batch in enumerate(batches):
        begun(step)
        of_layers = []
        for layer, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            probe, network = module
            positive, negative = batch[:, layer, 0], batch[:, layer, 1]
            x = torch.cat((positive, negative))
            labels = torch.cat((torch.ones(len(positive)), torch.zeros(len(negative)))).to(x)
            theta = torch.acos(functional.cosine_similarity(positive, negative, dim=-1).clamp(-1, 1))
            targets = torch.cat((torch.zeros_like(theta), theta))
            angles = math.pi * torch.sigmoid(network(x).squeeze(-1))
            loss = functional.binary_cross_entropy_with_logits(probe(x).squeeze(-1), labels)
            loss = loss + functional.mse_loss(angles, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            of_layers.append(float(loss.detach()))
        losses.append(sum(of_layers) / len(of_layers))
    return losses


# Running the model


def encoded(tokenizer: PreTrainedTokenizerBase, row: dict, column: str) -> list[EncodedAnswer]:
    """The answers of a question in a column, after its prompt."""
    (answers,) = encode_answers(tokenizer, [row["prompt"]], [row[column]])
    return answers


@torch.no_grad()
def answer_states(model: nn.Module, answer: EncodedAnswer) -> list[Tensor]:
    """Hidden states of an answer's tokens, (t, d) of each layer, by a forward pass of its own."""
    ids = torch.tensor([answer.input_ids], device=model.device)
    states = model(ids, output_hidden_states=True).hidden_states
    return [layer[0, answer.prompt_length :].clone() for layer in states]


def collect_pairs(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Dataset, once: bool = False) -> int:
    """Run both members of each pair of a positive and a negative answer, one sequence at a time.

    Args:
        model, tokenizer: of the activations.
        data: a contrast set.
        once: run each answer once, however many pairs it is in.

    Returns:
        Number of answers that were run.
    """
    count = 0
    for row in data:
        positives, negatives = encoded(tokenizer, row, "positives"), encoded(tokenizer, row, "negatives")
        pairs = [answer for p in positives for n in negatives for answer in (p, n)]
        for answer in [*positives, *negatives] if once else pairs:
            answer_states(model, answer)
            count += 1
    return count


@torch.no_grad()
def answer_scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, row: dict) -> dict[str, float]:
    """Each answer of a question to its log-likelihood given the prompt, in nats, by a forward pass of its own."""
    scores = {}
    for column in ("positives", "negatives"):
        for text, answer in zip(row[column], encoded(tokenizer, row, column), strict=True):
            ids = torch.tensor([answer.input_ids], device=model.device)
            log_probabilities = model(ids, use_cache=False).logits[0].float().log_softmax(dim=-1)
            targets = ids[0, answer.prompt_length :]
            taken = log_probabilities[answer.prompt_length - 1 : -1].gather(1, targets.unsqueeze(1))
            scores[text] = float(taken.sum())
    return scores


@torch.no_grad()
def texts_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[Tensor]:
    """Logits of each text, (s, V), by a forward pass of its own."""
    ids = (torch.tensor([tokenizer(text)["input_ids"]], device=model.device) for text in texts)
    return [model(one, use_cache=False).logits[0] for one in ids]
