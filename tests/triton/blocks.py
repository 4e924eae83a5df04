"""Blocks of backend 'branches' whose phases are assigned by hand."""

from __future__ import annotations

import pytest
import torch
from oracle import scramble
from problems import Problem

from acnet_kernels import ACBlock
from acnet_kernels.backends import branches, convolution
from acnet_kernels.backends.phases import Phases
from acnet_kernels.geometry import Geometry
from acnet_kernels.ops import bn_sum
from acnet_kernels.ops.triton_conv import INTERPRETED


def on_device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, CPU tensors go the way of CUDA's: the same dtypes, and Triton's batch-norm passes."""
    if INTERPRETED:
        monkeypatch.setattr(convolution, "_SLOW_HALF_TYPES", frozenset())
        for name, kernel in bn_sum.on_cuda.items():
            monkeypatch.setattr(bn_sum, name, kernel)


def assign(monkeypatch: pytest.MonkeyPatch, phases: Phases) -> None:
    """Every step of `branches` from now on runs its phases like this."""
    monkeypatch.setattr(branches, "phases_of", lambda step, x: phases)


def names_of(problem: Problem) -> tuple[str, ...]:
    """ACNet's names of the problem's branches."""
    k, _ = problem.kernel
    names = {(k, 1): "ver", (1, k): "hor", (k, k): "square"}
    return tuple(names[taps.rows, taps.columns] for taps in problem.branches)


def shift_of(problem: Problem) -> tuple[int, int]:
    """How far ACNet's row and column are from the kernel's centre."""
    places = dict(zip(names_of(problem), problem.branches, strict=True))
    half = problem.kernel[0] // 2
    return (
        places["hor"].row - half if "hor" in places else 0,
        places["ver"].column - half if "ver" in places else 0,
    )


def geometry_of(problem: Problem) -> Geometry:
    """The problem's geometry."""
    return Geometry.make(problem.kernel, shift=shift_of(problem), **problem.conv)


def block_of(problem: Problem, device: torch.device) -> tuple[ACBlock, torch.Tensor]:
    """A block that computes the problem, and its input in channels_last."""
    N, C, H, W = problem.shape
    options = {"branches": names_of(problem), "backend": "branches", "shift": shift_of(problem)}
    block = scramble(ACBlock(C, problem.K, problem.kernel, **(options | problem.conv)))
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    x = (torch.randn(N, C, H, W) + 0.3).to(device, memory_format=torch.channels_last)
    return block.to(device, memory_format=layout), x
