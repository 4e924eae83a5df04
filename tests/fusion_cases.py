"""Blocks to fold, and their fold in float64 from the definition."""

from __future__ import annotations

import copy

import torch
from torch import nn

import acnet_kernels as ak
from acnet_kernels.ops.fuse_blocks import Arguments
from acnet_kernels.reference import embed

# One list for every test: shapes that differ, with primes, groups, and all that may be absent.
CONFIGS = (
    {"in_channels": 16, "out_channels": 16, "kernel_size": 3},
    {"in_channels": 7, "out_channels": 5, "kernel_size": 3, "shift": (1, -1)},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 5, "groups": 4},
    {"in_channels": 23, "out_channels": 3, "kernel_size": 7, "shift": (-3, 2)},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6},
    {"in_channels": 3, "out_channels": 5, "kernel_size": 1},
    {"in_channels": 5, "out_channels": 4, "kernel_size": 9},
    {"in_channels": 300, "out_channels": 2, "kernel_size": 3},
    {"in_channels": 9, "out_channels": 4, "kernel_size": 3, "use_affine": False},
    {"in_channels": 9, "out_channels": 4, "kernel_size": 3, "branches": ("square", "hor"), "eps": 1e-2},
    {"in_channels": 9, "out_channels": 4, "kernel_size": 5, "branches": ("square", "ver")},
    {"in_channels": 9, "out_channels": 4, "kernel_size": 3, "branches": ("square",)},
    {"in_channels": 9, "out_channels": 4, "kernel_size": 3, "norm": "sum", "shift": (-1, 0)},
)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_block(dtype=torch.float32, norm_dtype=None, conv_bias=False, **config) -> ak.ACBlock:
    block = ak.ACBlock(**config, dtype=torch.float64).eval()
    for i, bn in enumerate(block.norms().values()):
        bn.eps *= 1 + i  # one ε a branch
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.2, 2)
        if bn.affine:
            nn.init.uniform_(bn.weight, -1.5, 1.5)
            nn.init.normal_(bn.bias)
    if conv_bias:
        for conv in block.convs().values():
            conv.bias = nn.Parameter(torch.randn(block.out_channels, dtype=torch.float64))
    block.to(dtype)
    for bn in block.norms().values():
        bn.to(norm_dtype or dtype)
    return block


def truth(block: ak.ACBlock) -> tuple[torch.Tensor, torch.Tensor]:
    """The fold in float64, from the definition."""
    step = copy.deepcopy(block).double().cpu().step()
    k, shift = step.geometry.kernel, step.geometry.shift
    weight, bias = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for branch in step.branches.values():
        norm = branch.norm or step.norm
        scale = (1.0 if norm.gamma is None else norm.gamma) / torch.sqrt(norm.running_var + norm.eps)
        weight = weight + scale[:, None, None, None] * embed(branch.weight, k, shift)
        bias = bias + (0 if branch.bias is None else branch.bias) * scale
        if branch.norm is not None:
            bias = bias - norm.running_mean * scale + (0 if norm.beta is None else norm.beta)
    if step.norm is not None:
        bias = bias - step.norm.running_mean * scale + step.norm.beta
    return weight.detach(), bias.detach()


def assert_close(got, expected, dtype) -> None:
    floor = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for g, e, what in zip(got, expected, ("weight", "bias"), strict=True):
        g = g.detach().cpu()
        assert g.dtype == dtype
        # A bias is a sum of terms around 1 that may cancel: its error is measured against them.
        size = e.norm() if what == "weight" else max(e.norm().item(), len(e) ** 0.5)
        error = float((g.double() - e).norm() / size)
        assert error <= floor, f"{what}: relative error {error:.1e} > {floor:.0e}"
        assert (g.double() - e).abs().max() <= 4 * floor * max(e.abs().max().item(), what == "bias"), what


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values at every second place of a larger tensor, every dimension."""
    larger = torch.full([2 * n + 1 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def arguments(blocks):
    """The fold operator's lists, as `fold` fills them."""
    lists = Arguments.empty()
    for block in blocks:
        block.append_fold(lists)
    return lists
