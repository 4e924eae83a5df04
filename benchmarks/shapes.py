"""The shapes that step benchmarks run: (name, N, C, K, H=W, stride) of a 3×3 block with padding 1."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A block and the batch it is trained on."""

    name: str
    batch: int
    channels: int
    out_channels: int
    size: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}->{self.out_channels}{stride}"


# The two that the project's CPU targets are stated for.
TARGETS = (Shape("resnet56 stage 1", 128, 16, 16, 32), Shape("resnet18 stage 1", 8, 64, 64, 56))

# The 3×3 layers of the networks in the paper, by stage, and the ends of the range.
NETWORKS = (
    Shape("cifar stem", 128, 3, 16, 32),
    Shape("resnet56 stage 2, first", 128, 16, 32, 32, 2),
    Shape("resnet56 stage 2", 128, 32, 32, 16),
    Shape("resnet56 stage 3", 128, 64, 64, 8),
    Shape("cifar quick", 64, 32, 64, 16),
    Shape("vgg stage 4", 32, 256, 256, 4),
    Shape("wrn-16-8 stage 1", 16, 128, 128, 32),
    Shape("resnet18 stage 2", 8, 128, 128, 28),
    Shape("resnet18 stage 3", 8, 256, 256, 14),
    Shape("resnet18 stage 4", 8, 512, 512, 7),
    Shape("alexnet conv3", 8, 256, 384, 13),
    Shape("densenet121 layer", 8, 128, 32, 28),
    Shape("tiny", 8, 16, 16, 8),
    Shape("one image", 1, 64, 64, 32),
)

ALL = TARGETS + NETWORKS
