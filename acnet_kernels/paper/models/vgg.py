"""VGG-16 for CIFAR: the 13 convolution layers of Simonyan and Zisserman with batch norm, and a small head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Layer

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Five stages of 3×3 layers, each halved by max pooling, then linear layers of 512 and num_classes.

    Args:
        num_classes: outputs of the last layer.
        in_channels: C of the images.
        conv: builds the 3×3 layers.
    """

    def __init__(self, num_classes: int, in_channels: int, conv: Layer) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for widths in STAGES:
            for width in widths:
                layers += [conv(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            # 32×32 images halve without remainder; rounding up lets smaller ones through.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(before, 512)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W → logits N×num_classes."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(F.relu(self.hidden(x)))
