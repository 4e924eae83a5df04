"""Blocks of backend 'branches' whose phases are assigned by hand."""

from __future__ import annotations

import pytest
import torch
from oracle import scramble
from problems import Problem

from acnet_kernels import ACBlock
from acnet_kernels.backends import branches, node
from acnet_kernels.block import BRANCHES
from acnet_kernels.geometry import Taps
from acnet_kernels.ops import bn_sum, epilogue
from acnet_kernels.ops.triton_conv import INTERPRETED
from acnet_kernels.steps import assignment, convolution
from acnet_kernels.steps.assignment import Phases


def on_device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, CPU tensors go the way of CUDA's: the same dtypes, and Triton's batch-norm passes."""
    if INTERPRETED:
        monkeypatch.setattr(convolution, "_SLOW_HALF_TYPES", frozenset())
        monkeypatch.setattr(assignment, "DEVICE", "cpu")
        monkeypatch.setattr(node, "NODE", None)  # which is for what the CPU does for itself
        for module in (bn_sum, epilogue):
            for name, kernel in module.on_cuda.items():
                monkeypatch.setattr(module, name, kernel)


def assign(monkeypatch: pytest.MonkeyPatch, assigned: Phases) -> None:
    """Every step of `branches` from now on runs its phases like this."""
    monkeypatch.setattr(branches, "phases_of", lambda step, x: assigned)


def block_of(problem: Problem, device: torch.device) -> tuple[ACBlock, torch.Tensor]:
    """A block that computes the problem, and its input in channels_last."""
    N, C, H, W = problem.shape
    k = problem.kernel[0]
    # Which of ACNet's branches these are: all taps, those of a row, those of a column.
    kinds = [0 if t == Taps(0, 0, k, k) else 1 if (t.rows, t.columns) == (1, k) else 2 for t in problem.branches]
    kinds = kinds if k > 1 else list(range(len(kinds)))
    lines = dict(zip(kinds, problem.branches, strict=True))
    shift = tuple(lines[i][i - 1] - k // 2 if i in lines and k > 1 else 0 for i in (1, 2))
    options = {"branches": tuple(BRANCHES[i] for i in kinds), "backend": "branches", "shift": shift, **problem.conv}
    block = scramble(ACBlock(C, problem.K, k, **options))
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    x = (torch.randn(N, C, H, W) + 0.3).to(device, memory_format=torch.channels_last)
    return block.to(device, memory_format=layout), x
