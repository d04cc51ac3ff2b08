"""Householder Pseudo-Rotation: the rotation in closed form, the edit, the reflection ablation and the loss.

Source: "Householder Pseudo-Rotation: A Novel Approach to Activation Editing in LLMs with Direction-Magnitude
Perspective" (HPR), EMNLP 2024, 2024.emnlp-main.761. d is the hidden size; w, (d,), is the normal of the probe's
hyperplane; an activation a is positive where w . a is large. Angles are in radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


# Below this sine of the angle between an activation and the normal there is no plane to rotate in.
NO_DIRECTION = 1e-6
# Cosine of that angle up to which the sine that follows from it is off by few roundings: by that of the cosine times
# c / (1 - c^2), 5.
MOST_COSINE = 0.9
# Without gradients, tokens are edited so many elements at a time, those of the angle network's input and those that are
# rotated: what is computed on the way then takes little memory, and on a CPU that of the rotation stays in the cache.
# Elsewhere chunks are larger, as each one waits for the device.
CHUNK_ELEMENTS = {"cpu": (2**21, 2**18)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, elementwise: of a matrix product autocast would round the cosines and the probe's decisions to half
    precision."""
    return (a * b).sum(dim=-1)


def _sizes(a: Tensor) -> tuple[Tensor, Tensor]:
    """|a|, (..., 1), moved to where its square has a place in the dtype, and whether it was there already."""
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    limits = torch.finfo(a.dtype)
    size = norm.clamp(math.sqrt(limits.tiny), math.sqrt(limits.max))
    return size, size == norm


def _normal(w: Tensor, dtype: torch.dtype) -> Tensor:
    """n = w / |w|; 0 for w = 0."""
    w = w.to(dtype)
    return w / torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def _cosine(v: Tensor, a: Tensor, size: Tensor) -> Tensor:
    """v . a / |a|, (..., 1), for |v| <= 1."""
    return ((v * a).sum(dim=-1, keepdim=True) / size).clamp(-1, 1)


def rotate(a: Tensor, w: Tensor, angle_rad: Tensor) -> Tensor:
    """Rotate a towards the normal n = w / |w| by an angle, in the plane of the two.

    out = cos(g) a + sin(g) |a| t,  t = (n - c a^) / |n - c a^|,  c = n . a^. Equal to equation 12 of the paper
    (reflect by the Householder matrix I - 2 n n^T and combine with ratios of sines), in O(d) and without its division
    by a vanishing sine.

    Args:
        a: (..., d), any floating dtype; not changed.
        w: (d,).
        angle_rad: (...) or broadcast to it.

    Returns:
        (..., d), a's dtype. Norms are kept. Where a is parallel to n, or a or w is zero, there is no direction to
        rotate in, and a comes back unchanged; so it does where the square of |a| or |w| overflows or underflows. A
        token with an element that is not finite becomes NaN.
    """
    x = a.to(_wide(a.dtype))
    angle_rad = angle_rad.to(x.dtype).unsqueeze(-1)
    size, usable = _sizes(x)
    t = _normal(w, x.dtype)
    # a^ is never in memory: c a^ = (c / |a|) a.
    t = torch.addcmul(t, _cosine(t, x, size) / size, x, value=-1)
    sine = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    # Once more: near a parallel to n the difference has lost its leading digits.
    t = torch.addcmul(t, _cosine(t, x, size) / size, x, value=-1)
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(NO_DIRECTION / 2)
    angle_rad = angle_rad * ((sine >= NO_DIRECTION) & usable)
    return torch.addcmul(torch.cos(angle_rad) * x, torch.sin(angle_rad) * size / length, t).to(a.dtype)


def reflection_angle(a: Tensor, w: Tensor) -> Tensor:
    """Angle between a and its reflection a - 2 (n . a) n, in [0, pi]. a is (..., d), the result (...).

    By 2 atan2(|c|, |n - c a^|), which unlike 2 asin |c| is accurate where a is nearly parallel to n.
    """
    x = a.to(_wide(a.dtype))
    size, _ = _sizes(x)
    n = _normal(w, x.dtype)
    cosine = _cosine(n, x, size)
    across = torch.addcmul(n, cosine / size, x, value=-1)
    return 2 * torch.atan2(cosine.squeeze(-1).abs(), torch.linalg.vector_norm(across, dim=-1))


def positive_probability(a: Tensor, w: Tensor) -> Tensor:
    """sigmoid(w . a), the probe's probability that activations are positive, (..., d) -> (...), as `is_negative`
    compares it with the gate."""
    wide = _wide(a.dtype)
    return torch.sigmoid(_dot(a.to(wide), w.to(wide)))


def is_negative(a: Tensor, w: Tensor, gate: float = 0.5) -> Tensor:
    """Whether the probe's probability sigmoid(w . a) of a positive activation is at most the gate; (..., d) -> (...)
    bool.

    Args:
        gate: in [0, 1]; 0 is below every probability, 1 above, the paper's is 1/2.
    """
    if gate == 0:
        return torch.zeros(a.shape[:-1], dtype=torch.bool, device=a.device)
    wide = _wide(a.dtype)
    return _dot(a.to(wide), w.to(wide)) <= gate_logit(gate)


def gate_logit(gate: float) -> float:
    """The largest w . a at which a token is negative, see `is_negative`, for a gate above 0."""
    return math.inf if gate == 1 else math.log(gate) - math.log1p(-gate)


def edit(
    a: Tensor,
    w: Tensor,
    angle: Callable[[Tensor], Tensor],
    *,
    gate: float = 0.5,
    alpha: float = 1.0,
    in_python: bool = False,
) -> Tensor:
    """Rotate the negative activations towards the positive side and leave the others as they are, bit for bit.

    Args:
        a: (..., d), any floating dtype; not changed.
        w: (d,).
        angle: maps negative activations, (m, d), to angles in [0, pi], (m,). It sees no others.
        gate: see `is_negative`.
        alpha: factor on the angle, which is then cut off at pi.
        in_python: whether to compute what is one number for each token in Python, of a few tokens on a CPU, and for
            values alone: it is not differentiable.

    Returns:
        (..., d), a's dtype; norms are kept. Computed in float32 or wider.
    """
    if gate == 0 or alpha == 0:
        return a

    def angles(tokens: Tensor) -> Tensor:
        return (alpha * angle(tokens)).clamp_max(math.pi)

    flat = a.reshape(-1, a.shape[-1])
    if in_python and (edited := _edited_in_python(flat, w, angle, gate, alpha)) is not None:
        return edited.reshape(a.shape)
    if torch.compiler.is_compiling():
        # Shapes must not depend on the data inside a compiled graph.
        negative = is_negative(flat, w, gate).unsqueeze(-1)
        return torch.where(negative, rotate(flat, w, angles(flat)), flat).reshape(a.shape)
    out = flat.clone()
    if torch.is_grad_enabled():
        predicted_at_once = rotated_at_once = max(1, len(flat))
    else:
        predicted_at_once, rotated_at_once = (
            max(1, elements // a.shape[-1]) for elements in CHUNK_ELEMENTS.get(a.device.type, (2**26, 2**26))
        )
    for start in range(0, len(flat), predicted_at_once):
        tokens = flat[start : start + predicted_at_once]
        negative = is_negative(tokens, w, gate).nonzero().squeeze(1)
        if len(negative) == 0:
            continue
        chosen = tokens if len(negative) == len(tokens) else tokens[negative]
        angle_rad = angles(chosen)
        negative = negative + start
        for i in range(0, len(chosen), rotated_at_once):
            part = slice(i, i + rotated_at_once)
            out.index_copy_(0, negative[part], rotate(chosen[part], w, angle_rad[part]))
    return out.reshape(a.shape)


def _edited_in_python(
    a: Tensor, w: Tensor, angle: Callable[[Tensor], Tensor], gate: float, alpha: float
) -> Tensor | None:
    """`edit` of a few tokens, (m, d), with a third of its operators: what is one number for each, or for w, is computed
    in Python.

    In the plane of a^ and n the rotation is cos(g) a + sin(g) |a| (n - c a^) / s, c = n . a^ and s = sqrt(1 - c^2): a
    multiple of a and one of w.

    Returns:
        (m, d); None where s is so small that digits are lost, and where a or w is zero, too large or not finite.
    """
    x, n = a.to(_wide(a.dtype)), w.to(_wide(a.dtype))
    # The threshold as a tensor is compared with it.
    products, threshold = _dot(x, n).tolist(), x.new_tensor(gate_logit(gate)).item()
    negative = [i for i, product in enumerate(products) if product <= threshold]
    if not negative:
        return a
    norms, w_norm = torch.linalg.vector_norm(x, dim=-1).tolist(), float(torch.linalg.vector_norm(n))
    limits = torch.finfo(x.dtype)
    least, most = math.sqrt(limits.tiny), math.sqrt(limits.max)
    # No comparison with NaN is true.
    if not least <= w_norm <= most or not all(
        least <= norms[i] <= most and abs(products[i]) <= MOST_COSINE * norms[i] * w_norm for i in negative
    ):
        return None
    every = len(negative) == len(a)
    angles = angle(a if every else a[negative]).tolist()
    factors = []
    for i, angle_rad in zip(negative, angles, strict=True):
        angle_rad = min(alpha * angle_rad, math.pi)
        cosine = products[i] / (norms[i] * w_norm)
        ratio = math.sin(angle_rad) / math.sqrt(1 - cosine * cosine)
        factors.append((math.cos(angle_rad) - ratio * cosine, ratio * norms[i] / w_norm))
    if len(a) == 1:
        return torch.add(x * factors[0][0], n, alpha=factors[0][1]).to(a.dtype)
    of_x, of_n = x.new_tensor(factors).unsqueeze(-1).unbind(dim=1)
    rotated = torch.addcmul((x if every else x[negative]) * of_x, of_n, n).to(a.dtype)
    return rotated if every else a.index_copy(0, a.new_tensor(negative, dtype=torch.int64), rotated)


@dataclass(frozen=True)
class Loss:
    """Terms of the loss, each of the leading shape of the pairs' batch.

    Attributes:
        probe, angle: of the pairs and, where there are any, of the tokens to leave alone.
    """

    probe: Tensor
    angle: Tensor

    @property
    def total(self) -> Tensor:
        return self.probe + self.angle


def loss(
    probe_logits: Tensor,
    angles_rad: Tensor,
    target_rad: Tensor,
    *,
    retained_logits: Tensor | None = None,
    retained_angles_rad: Tensor | None = None,
    retain_weight: float = 1.0,
) -> Loss:
    """Loss of probe and angle network over pairs of a positive and a negative activation (equations 8 to 10 of the
    paper).

    mean BCE(sigmoid(w . x), y) + mean (g(x) - theta(x))^2 over the 2 B rows x = [a+; a-], with y = [1; 0],
    theta(a+) = 0 and theta(a-) the angle between a- and a+. On logits: on probabilities the gradient vanishes as soon
    as float32 saturates.

    Tokens r to leave alone (ours; the paper has none) count as positive ones: retain_weight (BCE(p(r), 1) + g(r)^2) is
    added, of as many as there are pairs with the weight of a row x.

    Args:
        probe_logits: (..., 2, B), of the positive and of the negative activations.
        angles_rad: (..., 2, B), predicted.
        target_rad: (..., B), angle between the two activations of a pair.
        retained_logits, retained_angles_rad: (..., R), of the tokens to leave alone; None for none.
        retain_weight: their weight, 0 or more.
    """
    labels = torch.zeros_like(probe_logits)
    labels[..., 0, :] = 1
    targets = torch.stack((torch.zeros_like(target_rad), target_rad), dim=-2)
    bce = functional.binary_cross_entropy_with_logits(probe_logits, labels, reduction="none")
    probe, angle = bce.mean(dim=(-2, -1)), (angles_rad - targets).square().mean(dim=(-2, -1))
    if retained_logits is not None:
        # Half: the means above are over two rows for each pair.
        probe = probe + retain_weight / 2 * functional.softplus(-retained_logits).mean(dim=-1)
        angle = angle + retain_weight / 2 * retained_angles_rad.square().mean(dim=-1)
    return Loss(probe=probe, angle=angle)
