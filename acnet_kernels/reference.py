"""The definition of a block of parallel branches in plain PyTorch: what every other path is tested against.

out = Σ_b BN_b(W_b * x), and of that sum a batch norm where one follows it (arXiv 1908.03930 §3.2); then a residual
is added and an activation taken, where there are such. Here each
branch's kernel is laid into an empty whole one, so the geometry follows from one convolution's rules and nothing
else. Any float dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A batch norm: γ and β, each (K,) or None, ε, and the (mean, variance) to use, None for the batch's."""

    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 1e-5
    stats: tuple[Tensor, Tensor] | None = None


class Branch(NamedTuple):
    """A kernel (K×C/groups×rows×columns), its first tap's place in the whole one, and the distance of two taps.

    Without a weight it is the identity; without a norm it adds directly.
    """

    weight: Tensor | None
    row: int = 0
    column: int = 0
    step: int = 1
    bias: Tensor | None = None
    norm: Norm | None = None


def embed(weight: Tensor, kernel: tuple[int, int], row: int, column: int, step: int = 1) -> Tensor:
    """A branch's kernel laid into a whole one of zeros."""
    spread = weight.new_zeros(*weight.shape[:2], *((n - 1) * step + 1 for n in weight.shape[2:]))
    spread[:, :, ::step, ::step] = weight
    rows, columns = spread.shape[2:]
    return F.pad(spread, (column, kernel[1] - columns - column, row, kernel[0] - rows - row))


def normalise(y: Tensor, norm: Norm, used: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The batch norm of a map; appends to used the (mean, biased variance) it took."""
    mean, var = norm.stats or (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False))
    used.append((mean, var))
    scale = 1 / torch.sqrt(var + norm.eps)
    if norm.gamma is not None:
        scale = norm.gamma * scale
    shift = -mean * scale if norm.beta is None else norm.beta - mean * scale
    return y * scale[:, None, None] + shift[:, None, None]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp(min=0),
    "relu6": lambda z: z.clamp(0, 6),
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
    "silu": lambda z: z * torch.sigmoid(z),
}


def rep_block(
    x: Tensor,
    branches: Sequence[Branch],
    kernel: tuple[int, int],
    *,
    norm: Norm | None = None,
    stride: int | tuple[int, int] = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The block's output and the (mean, biased variance) each batch norm used, the branches' first.

    Args:
        x: input, N×C×H×W.
        branches: what is summed.
        kernel: (rows, columns) of the whole kernel.
        norm: the batch norm after the sum.
        residual: a map like the sum, added to it.
        activation: one of ACTIVATIONS, taken last.
    """
    used: list[tuple[Tensor, Tensor]] = []
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2, mode)
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for weight, row, column, step, bias, own in branches:
        if weight is None:
            y = x
        else:
            y = F.conv2d(padded, embed(weight, kernel, row, column, step), bias, stride, 0, dilation, groups)
        out = out + (y if own is None else normalise(y, own, used))
    out = out if norm is None else normalise(out, norm, used)
    out = out if residual is None else out + residual
    return (out if activation is None else ACTIVATIONS[activation](out)), used
