"""Squeeze-and-excitation, which RepVGG's and MobileOne's blocks may have after their sum (arXiv 1709.01507)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

RATIO = 16  # channels to squeezed ones, in both


class SqueezeExcite(nn.Module):
    """x·σ(W₂·ReLU(W₁·(x's mean over its pixels))), with biases; N×K×H×W → the same.

    Args:
        channels: K.
        names: of the two 1×1 convolutions in state dicts, the squeezing one first.
        factory: device and dtype.

    Raises:
        ValueError: there are too few channels to squeeze.
    """

    def __init__(self, channels: int, names: tuple[str, str], factory: dict[str, Any]) -> None:
        super().__init__()
        if channels < RATIO:
            raise ValueError(f"use_se needs out_channels of {RATIO} at least, got {channels}")
        self.names = names
        sizes = channels, channels // RATIO
        for name, (wide, narrow) in zip(names, (sizes, sizes[::-1]), strict=True):
            self.add_module(name, nn.Conv2d(wide, narrow, 1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        squeeze, excite = (self.get_submodule(name) for name in self.names)
        return x * excite(squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
