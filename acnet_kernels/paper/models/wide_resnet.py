"""Wide residual networks WRN-d-k of 6n+4 layers (Zagoruyko and Komodakis 2016), without dropout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Layer, bare_conv

WIDTHS = (16, 32, 64)


class PreActivated(nn.Module):
    """Two 3×3 layers, each after batch norm and ReLU; where the shape changes, a 1×1 shortcut after the first."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv: Layer) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = bare_conv(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×⌈H/stride⌉×⌈W/stride⌉."""
        activated = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + residual


class WideResNet(nn.Module):
    """A 3×3 stem of 16 channels, three stages of n blocks at 16k, 32k and 64k, mean pooling, one linear layer.

    Args:
        depth: 6n+4.
        widen: k.
        num_classes: outputs of the linear layer.
        in_channels: C of the images.
        stem: builds the first 3×3 layer.
        conv: builds the others; they follow their batch norm, so a plain one has none of its own.

    Raises:
        ValueError: depth is not 6n+4 with n ≥ 1, or widen is 0.
    """

    def __init__(
        self, depth: int, widen: int, num_classes: int, in_channels: int, stem: Layer, conv: Layer
    ) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if n < 1 or rest or widen < 1:
            raise ValueError(f"a WRN-d-k has d = 6n+4 layers (10, 16, 22, …) and k ≥ 1, got {depth}-{widen}")
        self.stem = stem(in_channels, WIDTHS[0], 3, padding=1)
        stages, before = [], WIDTHS[0]
        for width in WIDTHS:
            wide, stride = width * widen, 1 if width == WIDTHS[0] else 2
            first = PreActivated(before, wide, stride, conv)
            stages.append(nn.Sequential(first, *(PreActivated(wide, wide, 1, conv) for _ in range(n - 1))))
            before = wide
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(before)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W → logits N×num_classes."""
        return self.classifier(F.relu(self.bn(self.stages(self.stem(x)))).mean((2, 3)))
