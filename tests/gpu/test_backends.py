"""A block's step on the device by `moments` and `recompute`, by the rule of the CPU's tests."""

from __future__ import annotations

import pytest
import torch
from graphs import assert_replays
from oracle import scramble
from steps import LEVELS, check, check_levels
from torch import nn

from acnet_kernels import ACBlock, MobileOneBlock, RepVGGBlock

DEVICE = "cuda"
# Blocks and the size of their input; those of one channel a group have kernels of their own in `moments`.
BLOCKS = {
    "dense": (lambda: ACBlock(48, 64, 3, padding=1), (48, 28, 27)),
    "kernel_5": (lambda: ACBlock(19, 21, 5, padding=2), (19, 14, 15)),
    "groups": (lambda: ACBlock(32, 64, 3, padding=1, groups=2), (32, 14, 14)),
    "few_pixels": (lambda: ACBlock(32, 32, 3, padding=1), (32, 2, 3)),
    "repvgg": (lambda: RepVGGBlock(64, 64, 3, padding=1), (64, 14, 14)),
    "depthwise": (lambda: ACBlock(96, 96, 3, padding=1, groups=96), (96, 28, 27)),
    "depthwise_stride": (lambda: ACBlock(40, 80, 5, stride=2, padding=2, groups=40), (40, 29, 31)),
    "mobileone": (lambda: MobileOneBlock(64, 64, 3, padding=1, groups=64), (64, 14, 14)),
}


def block_of(name: str, backend: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = BLOCKS[name]
    block = scramble(make()).to(DEVICE, memory_format=torch.channels_last)
    block.backend = backend
    return block, torch.randn(4, *shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["moments", "recompute"])
@pytest.mark.parametrize("name", BLOCKS)
def test_step(name: str, backend: str, dtype: torch.dtype | None) -> None:
    block, x = block_of(name, backend)
    assert block.plan(x)[1].reason == "requested"
    check(block, x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mean", "std"), LEVELS)
@pytest.mark.parametrize("groups", [1, 8])
def test_a_mean_far_above_the_spread(groups: int, mean: float, std: float, dtype: torch.dtype) -> None:
    block = scramble(ACBlock(8, 8, 3, padding=1, groups=groups, backend="moments")).to(DEVICE)
    check_levels(block, dtype, mean, std, pointwise=True)


@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
@pytest.mark.parametrize("name", ["dense", "depthwise", "mobileone"])
def test_a_graph_replays_a_step(name: str, backend: str) -> None:
    """Nothing is copied from the host, and no table is made within the capture."""
    block, x = block_of(name, backend)
    x.requires_grad_()
    grad = torch.randn_like(block(x))

    def step() -> list[torch.Tensor]:
        out = block(x)
        return [out, *torch.autograd.grad(out, [x, *block.parameters()], grad)]

    assert_replays(step, x)
