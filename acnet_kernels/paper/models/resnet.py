"""CIFAR-style residual networks of 6n+2 layers (He et al. 2015, §4.2), as the ACNet paper trains them."""

from __future__ import annotations

from torch import Tensor, nn

from ...residual import finished
from .blocks import Layer, conv_norm

WIDTHS = (16, 32, 64)


class Residual(nn.Module):
    """Two 3×3 layers and a shortcut: identity, or a plain 1×1 convolution + batch norm where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv: Layer) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = conv_norm(in_channels, out_channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×⌈H/stride⌉×⌈W/stride⌉."""
        return finished(self.conv2, finished(self.conv1, x, "relu"), "relu", self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 stem, three stages of n residual blocks at 16, 32 and 64 channels, mean pooling, one linear layer.

    Args:
        depth: 6n+2.
        num_classes: outputs of the linear layer.
        in_channels: C of the images.
        conv: builds the 3×3 layers.

    Raises:
        ValueError: depth is not 6n+2 with n ≥ 1.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int, conv: Layer) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, 26, 32, …), got {depth}")
        self.stem = conv(in_channels, WIDTHS[0], 3, padding=1)
        stages, before = [], WIDTHS[0]
        for width in WIDTHS:
            stride = 1 if width == WIDTHS[0] else 2
            first = Residual(before, width, stride, conv)
            stages.append(nn.Sequential(first, *(Residual(width, width, 1, conv) for _ in range(n - 1))))
            before = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W → logits N×num_classes."""
        return self.classifier(self.stages(finished(self.stem, x, "relu")).mean((2, 3)))
