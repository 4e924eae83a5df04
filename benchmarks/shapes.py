"""The layers that the block benchmark runs: geometry, and the batch that a CPU or a GPU trains them on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from acnet_kernels.geometry import Geometry


@dataclass(frozen=True)
class Shape:
    """A k×k block with padding dilation·(k//2), and the batch it is trained on.

    `str(shape)` is 'NxCxHxW->K', then, each after a space and only where it differs from the usual, 'k5' (kernel),
    '/2' (stride), 'g32' (groups) and 'd2' (dilation): '8x64x56x56->64 k5 /2'. `Shape.parse` is its inverse, but for
    the name.
    """

    name: str = field(compare=False)
    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    def __str__(self) -> str:
        marks = (("k", self.kernel, 3), ("/", self.stride, 1), ("g", self.groups, 1), ("d", self.dilation, 1))
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}->{self.out_channels}"
        return " ".join([size, *(f"{mark}{value}" for mark, value, usual in marks if value != usual)])

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape of such a string; ValueError where it is none."""
        pattern = r"(\d+)x(\d+)x(\d+)x(\d+)->(\d+)(?: k(\d+))?(?: /(\d+))?(?: g(\d+))?(?: d(\d+))?"
        found = re.fullmatch(pattern, text)
        if found is None:
            raise ValueError(f"shape must be like '8x64x56x56->64 k5 /2 g32 d2', got {text!r}")
        n, c, h, w, k, kernel, stride, groups, dilation = (g and int(g) for g in found.groups())
        return cls("", n, c, k, h, w, kernel or 3, stride or 1, groups or 1, dilation or 1)

    @property
    def geometry(self) -> Geometry:
        """As the block has it."""
        return Geometry.make(self.kernel, self.stride, self.padding, self.dilation, self.groups)

    @property
    def padding(self) -> int:
        """What keeps the size at stride 1."""
        return self.dilation * (self.kernel // 2)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """N, K and the output's height and width."""
        return self.batch, self.out_channels, *self.geometry.output_size(self.height, self.width)

    @property
    def in_shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        return self.batch, self.channels, self.height, self.width

    @property
    def useful_flops(self) -> int:
        """Of the three forward convolutions: k² + 2k taps, 15 for k = 3. A step does three times as many."""
        n, k, rows, columns = self.out_shape
        return 2 * n * k * rows * columns * self.channels // self.groups * (self.kernel**2 + 2 * self.kernel)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Random input and gradient of the output, contiguous."""
        return torch.randn(self.in_shape, device=device).to(dtype), torch.randn(self.out_shape, device=device).to(
            dtype
        )

    def with_batch(self, batch: int) -> Shape:
        """The same layer on another batch."""
        return replace(self, batch=batch)


# The two that the project's CPU targets are stated for.
TARGETS = (
    Shape("resnet56 stage 1", 128, 16, 16, 32, 32),
    Shape("resnet18 stage 1", 8, 64, 64, 56, 56),
)

# (layer with a CPU's batch, the batch that networks train it on). A CPU's is as large as lets an eager step take
# 10–200 ms or so on two cores.
_LAYERS: tuple[tuple[Shape, int], ...] = (
    *((shape, 128) for shape in TARGETS),
    # CIFAR
    (Shape("cifar stem", 128, 3, 16, 32, 32), 128),
    (Shape("resnet56 stage 2, first", 128, 16, 32, 32, 32, stride=2), 128),
    (Shape("resnet56 stage 2", 128, 32, 32, 16, 16), 128),
    (Shape("resnet56 stage 3", 128, 64, 64, 8, 8), 128),
    (Shape("cifar quick", 64, 32, 64, 16, 16), 128),
    (Shape("cifar quick, first", 16, 3, 32, 32, 32, kernel=5), 128),
    (Shape("vgg stage 1", 8, 64, 64, 32, 32), 128),
    (Shape("vgg stage 2", 8, 128, 128, 16, 16), 128),
    (Shape("vgg stage 3", 8, 256, 256, 8, 8), 128),
    (Shape("vgg stage 4", 32, 256, 256, 4, 4), 128),
    (Shape("wrn-16-8 stage 1", 16, 128, 128, 32, 32), 128),
    (Shape("wrn-16-8 stage 2", 4, 256, 256, 16, 16), 128),
    # ImageNet
    (Shape("resnet18 stage 2, first", 4, 64, 128, 56, 56, stride=2), 256),
    (Shape("resnet18 stage 2", 8, 128, 128, 28, 28), 256),
    (Shape("resnet18 stage 3", 8, 256, 256, 14, 14), 256),
    (Shape("resnet18 stage 4", 8, 512, 512, 7, 7), 256),
    (Shape("resnet50 stage 2, first", 4, 128, 128, 56, 56, stride=2), 256),
    (Shape("alexnet conv2", 2, 64, 192, 27, 27, kernel=5), 256),
    (Shape("alexnet conv3", 8, 256, 384, 13, 13), 256),
    (Shape("densenet121 block 1", 8, 128, 32, 56, 56), 256),
    (Shape("densenet121 block 2", 8, 128, 32, 28, 28), 256),
    (Shape("densenet121 block 3", 8, 128, 32, 14, 14), 256),
    (Shape("densenet121 block 4", 8, 128, 32, 7, 7), 256),
    (Shape("mobilenet depthwise", 8, 512, 512, 14, 14, groups=512), 256),
    (Shape("mobileone-s0 depthwise 1", 8, 48, 48, 112, 112, stride=2, groups=48), 256),
    (Shape("mobileone-s0 depthwise 2", 8, 48, 48, 56, 56, groups=48), 256),
    (Shape("mobileone-s0 depthwise 3", 8, 128, 128, 28, 28, groups=128), 256),
    (Shape("mobileone-s0 depthwise 4", 8, 256, 256, 14, 14, groups=256), 256),
    (Shape("fastvit-t8 depthwise 1", 8, 48, 48, 56, 56, kernel=7, groups=48), 256),
    (Shape("fastvit-t8 depthwise 2", 8, 96, 96, 28, 28, groups=96), 256),
    (Shape("fastvit-t8 depthwise 3", 8, 192, 192, 14, 14, groups=192), 256),
    (Shape("fastvit-t8 depthwise 4", 8, 384, 384, 7, 7, groups=384), 256),
    (Shape("resnext grouped", 4, 128, 128, 56, 56, groups=32), 256),
    # Detection, segmentation, super-resolution, speech
    (Shape("yolo 80²", 1, 128, 256, 80, 80, stride=2), 32),
    (Shape("yolo 40²", 1, 256, 512, 40, 40, stride=2), 32),
    (Shape("super-resolution 64", 1, 64, 64, 128, 128), 16),
    (Shape("super-resolution 48", 2, 48, 48, 64, 64), 16),
    (Shape("segmentation", 1, 16, 16, 513, 481), 8),
    (Shape("detection", 1, 256, 256, 100, 168), 2),
    (Shape("speech", 1, 64, 64, 80, 200), 32),
    (Shape("faceboxes", 1, 48, 64, 128, 128, kernel=5, stride=2), 32),
    # The ends of the range
    (Shape("dilated", 4, 64, 64, 28, 28, dilation=2), 16),
    (Shape("tiny", 8, 16, 16, 8, 8), 8),
    (Shape("one image", 1, 64, 64, 32, 32), 1),
)
CPU = tuple(shape for shape, _ in _LAYERS)
CUDA = tuple(shape.with_batch(batch) for shape, batch in _LAYERS)


def of_device(device: torch.device | str) -> tuple[Shape, ...]:
    """Every layer, with the batch that this kind of device is given."""
    return CUDA if torch.device(device).type == "cuda" else CPU


def select(words: list[str], among: tuple[Shape, ...]) -> list[Shape]:
    """The shapes that one of the words names: 'targets', a part of a name, or a shape's own string.

    What `Shape.parse` reads is that shape, listed or not. ValueError where a word finds nothing.
    """
    found: list[Shape] = []
    for word in words:
        if "->" in word:
            parsed = Shape.parse(word)
            hits = [shape for shape in among if shape == parsed] or [parsed]
        elif word == "targets":
            names = {shape.name for shape in TARGETS}
            hits = [shape for shape in among if shape.name in names]
        else:
            hits = [shape for shape in among if word in shape.name]
        if not hits:
            names = ", ".join(shape.name for shape in among)
            raise ValueError(f"shapes must be 'targets', a part of a name ({names}) or NxCxHxW->K, got {word!r}")
        found += [shape for shape in hits if shape not in found]
    return found
