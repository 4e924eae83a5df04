"""A block's step on a device again, by its lane: the same bits as the long way, which what has changed takes."""

import copy

import pytest
import torch
from blocks import assign, block_of, on_device_path
from problems import Problem
from torch import nn

from acnet_kernels import ACBlock, lanes
from acnet_kernels.backends import node, phases
from acnet_kernels.ops import _extension
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, Phases

pytestmark = pytest.mark.skipif(node.NODE is None, reason=f"needs the C++ node: {_extension.WHY_NODE_MISSING}")
NODE = node.NODE
STEP = Problem("step", (2, 4, 4, 5), 4, conv={"padding": 1})


@pytest.fixture(params=[ALL_TRITON, ALL_LIBRARY], ids=phases.label)
def learned(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> tuple[ACBlock, torch.Tensor]:
    """A block with a lane, and its input."""
    on_device_path(monkeypatch)
    monkeypatch.setattr(node, "NODE", NODE)
    monkeypatch.setattr(node, "takes", lambda x, inputs: False)  # which is the CPU's own
    assigned: Phases = request.param
    assign(monkeypatch, assigned)
    block, x = block_of(STEP, device)
    block(x.requires_grad_())
    return block, x


def step(block: ACBlock, x: torch.Tensor, residual: torch.Tensor | None = None) -> list[torch.Tensor]:
    out = block(x, residual=residual)
    found = torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out))
    return [out, *found, *(t.clone() for t in block.buffers())]


def taken(block: ACBlock, x: torch.Tensor) -> bool:
    with torch.no_grad():
        buffers = [t.clone() for t in block.buffers()]
    found = lanes.take(block, x, block.backend)
    for t, was in zip(block.buffers(), buffers, strict=True):
        t.copy_(was)
    return found is not None


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_lane_gives_the_same_bits(activation: str | None, learned: tuple[ACBlock, torch.Tensor]) -> None:
    block, x = learned
    block.activation = activation
    twin = copy.deepcopy(block)
    assert taken(block, x)
    assert lanes._KEPT not in twin.__dict__
    for residual in (None, torch.randn_like(x)):
        for got, want in zip(step(block, x, residual), step(twin, x, residual), strict=True):
            assert torch.equal(got, want)
        twin = copy.deepcopy(block)


def strided(block: ACBlock) -> None:
    block.hor_bn.running_mean = torch.zeros(8, device=block.hor_bn.running_mean.device)[::2]


def shared(block: ACBlock) -> None:
    block.hor_bn.running_mean = block.ver_bn.running_mean


def momentum(block: ACBlock) -> None:
    block.ver_bn.momentum = None


def hook(block: ACBlock) -> None:
    block.ver_conv.register_forward_hook(lambda module, given, out: out + 1)


def frozen(block: ACBlock) -> None:
    block.square_bn.eval()


def other_norm(block: ACBlock) -> None:
    block.square_bn = nn.BatchNorm2d(4, eps=0.5).to(block.square_bn.weight.device)


CHANGES = [strided, shared, momentum, hook, frozen, other_norm]


# Each change under one assignment of the phases, by turns.
@pytest.mark.parametrize(
    ("change", "learned"),
    [(change, (ALL_TRITON, ALL_LIBRARY)[i % 2]) for i, change in enumerate(CHANGES)],
    indirect=["learned"],
    ids=[change.__name__ for change in CHANGES],
)
def test_what_has_changed_is_not_passed_over(change, learned: tuple[ACBlock, torch.Tensor]) -> None:
    block, x = learned
    change(block)
    twin = copy.deepcopy(block)
    for got, want in zip(step(block, x), step(twin, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_another_input_takes_the_long_way(learned: tuple[ACBlock, torch.Tensor]) -> None:
    block, x = learned
    assert taken(block, x)
    for other in (x.detach(), x[:1], x.contiguous(), x.double()):
        assert not taken(block, other)
    with torch.no_grad():
        assert not taken(block, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert not taken(block, x)


def test_the_planner_may_time_a_step_still(
    learned: tuple[ACBlock, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under 'auto' a step that was not timed is, once cudnn.benchmark is on."""
    block, x = learned
    block.backend = "auto"
    block(x)
    assert taken(block, x)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert not taken(block, x)
