"""Cifar-quick (Snoek et al. 2012; Caffe's cifar10_quick): three 5×5 layers, with the ACNet code's batch norms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Layer


class CifarQuick(nn.Module):
    """5×5 layers of 32, 32 and 64 channels, each pooled to half the size, and linear layers of 64 and num_classes.

    Pooling windows are 3×3, stride 2, rounded up as in Caffe: a 32×32 image ends as 4×4 (other sizes are
    averaged to that).

    Args:
        num_classes: outputs of the last layer.
        in_channels: C of the images.
        conv: builds the 5×5 layers.
    """

    def __init__(self, num_classes: int, in_channels: int, conv: Layer) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 32, 5, padding=2)
        self.conv2 = conv(32, 32, 5, padding=2)
        self.conv3 = conv(32, 64, 5, padding=2)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W → logits N×num_classes."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(F.relu(self.conv3(x)), 3, 2, ceil_mode=True)
        x = F.adaptive_avg_pool2d(x, 4)
        return self.classifier(F.relu(self.hidden(x.flatten(1))))
