"""CIFAR DenseNets of 3n+4 layers (Huang et al. 2017), without bottlenecks or compression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Layer, bare_conv

GROWTH = 12
STEM = 16


class DenseLayer(nn.Module):
    """Appends 12 channels to its input: batch norm, ReLU, a 3×3 layer."""

    def __init__(self, in_channels: int, conv: Layer) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = conv(in_channels, GROWTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×(C+12)×H×W."""
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), 1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1×1 convolution, and mean pooling to half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = bare_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×C×⌊H/2⌋×⌊W/2⌋."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A 3×3 stem of 16 channels, three dense blocks of n layers with growth 12, mean pooling, one linear layer.

    Args:
        depth: 3n+4.
        num_classes: outputs of the linear layer.
        in_channels: C of the images.
        conv: builds the 3×3 layers; they follow their batch norm, so a plain one has none of its own.

    Raises:
        ValueError: depth is not 3n+4 with n ≥ 1.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int, conv: Layer) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 3)
        if n < 1 or rest:
            raise ValueError(f"a CIFAR DenseNet has 3n+4 layers (7, 10, …, 22, …, 40, …), got {depth}")
        self.stem = conv(in_channels, STEM, 3, padding=1)
        layers: list[nn.Module] = []
        channels = STEM
        for block in range(3):
            if block:
                layers.append(Transition(channels))
            for _ in range(n):
                layers.append(DenseLayer(channels, conv))
                channels += GROWTH
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W → logits N×num_classes."""
        return self.classifier(F.relu(self.bn(self.layers(self.stem(x)))).mean((2, 3)))
