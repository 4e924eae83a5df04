"""What the tests of training stacks share: the backends, and the same network through its submodules."""

from __future__ import annotations

import copy

import torch
from torch import nn

from acnet_kernels import ACBlock
from acnet_kernels.backends import planner


def backends(training: bool) -> list[str]:
    """'auto' and every backend that this machine runs on a block of 4→6 channels in that mode."""
    x = torch.randn(2, 4, 8, 8)

    def runs(name: str) -> bool:
        b = ACBlock(4, 6, 3, padding=1, backend=name).train(training)
        return b.plan(x)[1].reason == "requested"

    return ["auto", *(name for name in planner.BACKENDS if runs(name))]


TRAINING, EVALUATING = backends(True), backends(False)
MODES = [(name, True) for name in TRAINING] + [(name, False) for name in EVALUATING]


def _nothing(*_: object) -> None:
    pass


def through_modules(module: nn.Module) -> nn.Module:
    """A copy of module whose blocks call nn.Conv2d and nn.BatchNorm2d themselves: hooks force that path."""
    module = copy.deepcopy(module)
    for b in module.modules():
        if isinstance(b, ACBlock):
            b.square_conv.register_forward_hook(_nothing)
    return module


class Net(nn.Module):
    """Two blocks, one of stride 2, and a linear head: 4×C×H×W → 4×3; second: that block's other options."""

    def __init__(self, backend: str = "auto", second: dict[str, object] | None = None, **options: object):
        super().__init__()
        self.first = ACBlock(4, 6, 3, padding=1, backend=backend, **options)
        self.second = ACBlock(6, 6, 3, stride=2, padding=1, backend=backend, **options | (second or {}))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def assert_same_state(got: nn.Module, want: nn.Module, **tolerance: float) -> None:
    """Every parameter and buffer of got is close to want's."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    state = want.state_dict()
    assert got.state_dict().keys() == state.keys()
    for name, t in got.state_dict().items():
        torch.testing.assert_close(t, state[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
