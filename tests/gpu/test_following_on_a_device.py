"""What follows a block's sum on the device, in Triton's passes and after them, by the rule of the CPU's tests."""

from __future__ import annotations

import pytest
import test_epilogue as following
import torch
from graphs import assert_replays
from oracle import scramble

from acnet_kernels import ACBlock, explain
from acnet_kernels.backends import branches
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases

DEVICE = "cuda"
ASSIGNMENTS = [ALL_LIBRARY, ALL_TRITON, Phases(TRITON, LIBRARY, LIBRARY)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("assigned", ASSIGNMENTS, ids="-".join)
@pytest.mark.parametrize(("activation", "adds"), following.FOLLOWS)
def test_steps(
    activation: str | None,
    adds: bool,
    assigned: Phases,
    layout: torch.memory_format,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = layout == torch.channels_last
    monkeypatch.setattr(branches, "phases_of", lambda step, x: assigned if last else ALL_LIBRARY)
    block = scramble(ACBlock(32, 48, 3, padding=1, activation=activation, backend="branches")).to(DEVICE, dtype)
    x = torch.randn(3, 32, 15, 13, device=DEVICE).to(dtype, memory_format=layout)
    residual = torch.randn(3, 48, 15, 13, device=DEVICE).to(dtype) if adds else None
    following.judge(block, x, residual)
    if activation is not None:
        assert explain(block, x).blocks[0].reason.endswith("in the sum's own passes") == last


def test_a_graph_replays_a_step() -> None:
    block = scramble(ACBlock(32, 32, 3, padding=1, activation="silu", backend="branches")).to(DEVICE)
    x = torch.randn(4, 32, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> list[torch.Tensor]:
        out = block(x, residual=x)
        return [out, *torch.autograd.grad(out, [x, *block.parameters()], grad)]

    assert_replays(step, x)
