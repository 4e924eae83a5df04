"""The phases of a `branches` step by Triton's operators: what they want of layouts is seen to here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import BRANCHES
from ..ops import triton_block

Names = Sequence[str]
Window = Sequence[int]  # a kernels.window.Window's numbers


def forward(
    x: Tensor,
    names: Names,
    weights: Sequence[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: Sequence[float],
    window: Window,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """(out, ys, means, variances, rstds) of the named branches, in x's dtype; differentiable."""
    square, hor, ver = _by_branch(names, _alike(weights))
    assert square is not None
    return triton_block.triton_forward(_last(x), square, hor, ver, gammas, betas, list(eps), window)


def input_grad(
    dys: Sequence[Tensor], names: Names, weights: Sequence[Tensor], window: Window, size: Sequence[int]
) -> Tensor:
    """dx (rows × columns: size) from every branch's dy."""
    return triton_block.triton_input_grad(
        [_last(dy) for dy in dys], _by_branch(names, _alike(weights)), window, list(size)
    )


def weight_grads(
    x: Tensor,
    dys: Sequence[Any],
    names: Names,
    weights: Sequence[Tensor],
    window: Window,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dW_b of each branch that needs one, and has a dy, None of the others; the square needs one."""
    wanted = [i for i, need in enumerate(needs) if need]
    by_branch = _by_branch([names[i] for i in wanted], _alike([weights[i] for i in wanted]))
    found = triton_block.triton_weight_grads(_last(x), [_last(dys[i]) for i in wanted], by_branch, window)
    given = iter(found)
    return [next(given) if need else None for need in needs]


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _alike(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights in one memory format: their own if that is one, else channels_last."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if all(weight.is_contiguous(memory_format=layout) for weight in weights):
            return weights
    return [_last(weight) for weight in weights]


def _by_branch(names: Names, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """(square, hor, ver), None for a branch that is not among the names."""
    given = dict(zip(names, tensors, strict=True))
    return [given.get(name) for name in BRANCHES]
