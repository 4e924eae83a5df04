"""Folding branches and batch norms into one k×k convolution: the arithmetic, in PyTorch.

W = Σ_b s_b·embed(W_b), bias = Σ_b (β_b + s_b·(conv_bias_b − μ_b)), s_b = γ_b/√(σ²_b + ε_b)
(arXiv 1908.03930 §3.3). Differentiable in every weight, conv bias, γ and β.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry
from ..spec import Branch, Norm, Step


def add_branches(kernels: dict[str, Tensor], geometry: Geometry) -> Tensor:
    """hor (K×C×1×k) and ver (K×C×k×1) added into their row and column of square (K×C×k×k), as a new tensor."""
    total = kernels["square"].clone()
    if "hor" in kernels:
        total[:, :, geometry.hor_row : geometry.hor_row + 1] += kernels["hor"]
    if "ver" in kernels:
        total[:, :, :, geometry.ver_column : geometry.ver_column + 1] += kernels["ver"]
    return total


def scale_shift(norm: Norm, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s, β + s·(bias − μ)) of a batch norm in eval, both (K,) of dtype."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.gamma is not None:
        scale = norm.gamma.to(dtype) * scale
    mean = norm.running_mean.to(dtype)
    shift = -mean * scale if bias is None else (bias.to(dtype) - mean) * scale
    return scale, shift if norm.beta is None else norm.beta.to(dtype) + shift


def _sum_bias(branches: dict[str, Branch]) -> Tensor | None:
    biases = [branch.bias for branch in branches.values() if branch.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


def fold(step: Step) -> tuple[Tensor, Tensor]:
    """(weight K×C/groups×k×k, bias K) of the one convolution that equals the block in eval.

    Computed in float32 or better, returned in the square weight's dtype.
    """
    square = step.branches["square"].weight
    dtype = torch.promote_types(square.dtype, torch.float32)
    kernels = {name: branch.weight.to(dtype) for name, branch in step.branches.items()}
    if step.norm is not None:
        scale, shift = scale_shift(step.norm, _sum_bias(step.branches), dtype)
        weight = add_branches(kernels, step.geometry) * scale[:, None, None, None]
    else:
        shift = torch.zeros((), dtype=dtype, device=square.device)
        for name, branch in step.branches.items():
            assert branch.norm is not None
            scale, part = scale_shift(branch.norm, branch.bias, dtype)
            kernels[name] = kernels[name] * scale[:, None, None, None]
            shift = shift + part
        weight = add_branches(kernels, step.geometry)
    return weight.to(square.dtype), shift.to(square.dtype)


def fold_steps(
    steps: Sequence[Step], out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """fold() of several blocks; out, one (weight, bias) a block, is written in place and returned."""
    folded = [fold(step) for step in steps]
    if out is None:
        return folded
    with torch.no_grad():
        for target, source in zip(out, folded, strict=True):
            for t, s in zip(target, source, strict=True):
                t.copy_(s)
    return list(out)
