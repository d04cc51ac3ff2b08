"""The edit of HPR against its dense form: the rotation alone, and with probe and angle network."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_edit.tuners.fusing import numbers_are_faster
from peft_edit.tuners.hpr.layer import angle_network
from peft_edit.tuners.hpr.maths import edit, is_negative, rotate

from . import published
from .report import Bench, Case, Row
from .timing import LIMIT, Work


HIDDEN = 4096
TOKENS = (16, 512)
ANGLE_RAD = 0.7
COMPILERS = ("c++", "g++", "clang++", "cl")


def cases(bench: Bench) -> Iterator[Case]:
    d, shape = (64, (4, 8)) if bench.quick else (HIDDEN, TOKENS)
    name = f"HPR's edit of one token, hidden size {d}"
    yield Case(name, partial(one_token, bench, name, d), needs=8 * d * d * bench.element)
    name = f"HPR's rotation of one token, compiled, hidden size {d}"
    yield Case(name, partial(compiled, bench, name, d), needs=4 * d * d * bench.element)
    name = f"HPR's edit of {shape[0]} x {shape[1]} tokens, hidden size {d}"
    needs = (8 * d * d + 12 * math.prod(shape) * d) * bench.element
    yield Case(name, partial(many_tokens, bench, name, d, shape), needs=needs)


def rotate_all(a: Tensor, w: Tensor, angle_rad: Tensor) -> Tensor:
    """Every token by a given angle, as a layer without a kernel does it."""
    angles = angle_rad.reshape(-1)
    return edit(a, w, lambda tokens: angles[: len(tokens)], gate=1.0, in_python=numbers_are_faster(a))


class Edit:
    """A probe, an angle network and what the dense form needs of them."""

    def __init__(self, bench: Bench, d: int):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.w = (torch.randn(d, generator=generator) / math.sqrt(d)).to(bench.device, bench.dtype)
        self.network = angle_network(d).to(bench.device, bench.dtype).requires_grad_(False)
        self.reflection = published.householder(self.w)

    def angle(self, a: Tensor) -> Tensor:
        return math.pi * torch.sigmoid(self.network(a).squeeze(-1))

    def thin(self, a: Tensor) -> Tensor:
        return edit(a, self.w, self.angle, in_python=numbers_are_faster(a))

    def rotate(self, a: Tensor, angle_rad: Tensor) -> Tensor:
        """Every token, by given angles."""
        return rotate_all(a, self.w, angle_rad)

    def dense(self, a: Tensor) -> Tensor:
        return published.hpr_edit(a, self.w, self.angle, self.reflection)


def one_token(bench: Bench, case: str, d: int) -> Iterator[Row]:
    made = Edit(bench, d)
    token = torch.randn(1, 1, d, generator=torch.Generator().manual_seed(1)).to(bench.device, bench.dtype)
    token = token if is_negative(token, made.w).item() else -token
    given = torch.full((1, 1), ANGLE_RAD, device=bench.device, dtype=bench.dtype)
    # A token and the normal are read, a token is written.
    work = Work(bytes=3 * d * bench.element)
    ours, plain = "rotation by a given angle", "the same, by tensors alone"
    dense, built = "dense, its matrix at hand", "dense, its matrix built for the call"
    timings = bench.measure(
        {
            ours: lambda: made.rotate(token, given),
            plain: lambda: rotate(token, made.w, given),
            dense: lambda: published.hpr_rotate(token, given, made.reflection),
        },
        rounds=21,
    )
    yield from bench.rows(case, timings, ours, {dense: "published", plain: "other"})
    ours = "rotation by a given angle, in turns"
    timings = bench.measure(
        {
            ours: lambda: made.rotate(token, given),
            dense: lambda: published.hpr_rotate(token, given, made.reflection),
        },
        rounds=101,
        in_turns=True,
        work=work,
    )
    yield from bench.rows(case, timings, ours, {dense: "published", LIMIT: "limit"})
    ours = "rotation by a given angle"
    timings = bench.measure(
        {
            ours: lambda: made.rotate(token, given),
            built: lambda: published.hpr_rotate(token, given, published.householder(made.w)),
        },
        rounds=11,
    )
    yield from bench.rows(case, timings, ours, {built: "published"})
    negative, positive = "negative token, with probe and network", "positive token"
    dense = "dense, with probe and network"
    timings = bench.measure(
        {negative: lambda: made.thin(token), positive: lambda: made.thin(-token), dense: lambda: made.dense(token)},
        rounds=21,
    )
    for name in (negative, positive):
        yield from bench.rows(case, timings, name, {dense: "published"})


def compiled(bench: Bench, case: str, d: int) -> Iterator[Row]:
    """The pure function, compiled: a case of its own, as that needs a compiler of C++."""
    if bench.device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        yield Row(bench.name, case, skipped=f"needs a compiler of C++: {', '.join(COMPILERS)}")
        return
    made, by_compiler = Edit(bench, d), torch.compile(rotate, backend="eager" if bench.quick else "inductor")
    token = torch.randn(1, d, generator=torch.Generator().manual_seed(1)).to(bench.device, bench.dtype)
    given = torch.full((1,), ANGLE_RAD, device=bench.device, dtype=bench.dtype)
    what, ours, plain = "torch.compile(rotate)", "rotation by a given angle", "the same, by tensors alone"
    timings = bench.measure(
        {
            what: lambda: by_compiler(token, made.w, given),
            ours: lambda: made.rotate(token, given),
            plain: lambda: rotate(token, made.w, given),
        },
        rounds=21,
    )
    yield from bench.rows(case, timings, what, {ours: "other", plain: "other"})


def many_tokens(bench: Bench, case: str, d: int, shape: tuple[int, int]) -> Iterator[Row]:
    made = Edit(bench, d)
    tokens = torch.randn(*shape, d, generator=torch.Generator().manual_seed(1)).to(bench.device, bench.dtype)
    given = torch.full((math.prod(shape),), ANGLE_RAD, device=bench.device, dtype=bench.dtype)
    share = float(is_negative(tokens, made.w).float().mean())
    rotation, dense_rotation = "rotation of all by given angles", "dense, its matrix at hand"
    whole, dense_whole = "with probe and network", "dense, with probe and network"
    timings = bench.measure(
        {
            # At a gate of 1 every token is rotated, as the dense form does it.
            rotation: lambda: made.rotate(tokens, given),
            dense_rotation: lambda: published.hpr_rotate(tokens, given.view(shape), made.reflection),
            whole: lambda: made.thin(tokens),
            dense_whole: lambda: made.dense(tokens),
        },
        rounds=5,
        budget=60,
        work=Work(bytes=2 * tokens.nbytes),
    )
    for ours, dense, other in ((rotation, dense_rotation, {LIMIT: "limit"}), (whole, dense_whole, {})):
        extra, dense_extra = (timings.samples[name].peak / 1e6 for name in (ours, dense))
        note = f"{ours} takes {extra:,.0f} MB more, the dense form {dense_extra:,.0f} MB"
        note += f"; {100 * share:.0f} % of the tokens are negative" if ours == whole else ""
        yield from bench.rows(case, timings, ours, {dense: "published", **other}, note)
