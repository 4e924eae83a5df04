"""The paper's networks by name, with plain or asymmetric convolution layers on the same skeleton."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import imagenet
from .blocks import BLOCKS, Layer, bare_conv, constructor, conv_norm, initialise
from .cifar_quick import CifarQuick
from .densenet import DenseNet
from .resnet import ResNet
from .vgg import VGG16
from .wide_resnet import WideResNet

__all__ = ["BLOCKS", "EXAMPLES", "LARGEST", "NETWORKS", "build", "check_size"]

# Pixels a side up to which images are CIFAR's kind: the networks for them pool late, so that larger ones take more
# time and memory than anyone means to spend on a resnet20 (whose name, at resnet50, is another network's, too).
LARGEST = 64


class Family(NamedTuple):
    """Networks that one class builds from (the name's numbers, num_classes, in_channels, a layer's constructors).

    It takes one constructor for each of `reduce_gamma`.
    """

    network: Callable[..., nn.Module]
    plain: Layer = conv_norm
    reduce_gamma: tuple[bool, ...] = (True,)


# Pattern of the name, its numbers in groups → its family. ImageNet's networks have their own names.
NETWORKS: dict[str, Family] = {
    r"cifar-quick": Family(CifarQuick),
    r"vgg16": Family(VGG16),
    r"resnet(\d+)": Family(ResNet),
    r"wrn(\d+)-(\d+)": Family(WideResNet, bare_conv, reduce_gamma=(True, False)),
    r"densenet(\d+)": Family(DenseNet, bare_conv),
}
EXAMPLES = "cifar-quick, vgg16, resnet8, resnet20, resnet56 (any 6n+2), wrn16-8, densenet40, " + ", ".join(
    imagenet.NAMES
)


def build(name: str, num_classes: int, in_channels: int = 3, block: str = "acb", **block_options: Any) -> nn.Module:
    """The network, freshly initialised.

    The global CPU generator decides the weights: seeded alike, the plain and the acb network get the same
    skeleton (square kernels, shortcuts, classifier), whatever the block options.

    Args:
        name: 'cifar-quick', 'vgg16', 'resnet20' (any 6n+2), 'wrn16-8' (any 6n+4 and width), 'densenet40' (any
            3n+4); for ImageNet 'alexnet', 'resnet18', 'densenet121'.
        num_classes: number of logits.
        in_channels: C of the images.
        block: 'plain' is a convolution, with its batch norm where the network has one there; the others make
            every k×k layer (k > 1) an ACBlock with γ = 1/3 (the authors' later setting on CIFAR; 1 in a WRN
            behind its stem, as in their code, and on ImageNet, where a 7×7 or 11×11 stem stays plain): 'acb',
            with one added branch 'acb-hor' or 'acb-ver', with one batch norm after the sum 'acb-sum', with the
            branches moved to the border 'acb-border', with 1×3 and 3×1 ones beside larger kernels too 'acb-3'. 1×1
            layers are plain always.
        block_options: passed to every ACBlock (`backend`, `branches`, `norm`, `reduce_gamma`, …).

    Raises:
        ValueError: an unknown name or block, or options that ACBlock refuses.
    """
    seed = int(torch.randint(2**31, (), device="cpu"))  # a real number under the meta device, too
    with torch.random.fork_rng(devices=[]):
        if name in imagenet.NAMES:
            torch.manual_seed(seed)
            return imagenet.build(name, num_classes, in_channels, block, block_options)
        for pattern, family in NETWORKS.items():
            match = re.fullmatch(pattern, name)
            if match:
                convs = [
                    constructor(block, block_options, family.plain, reduced) for reduced in family.reduce_gamma
                ]
                model = family.network(*map(int, match.groups()), num_classes, in_channels, *convs)
                initialise(model, seed)
                return model
    raise ValueError(f"net must be {EXAMPLES}, got {name!r}")


def check_size(name: str, size: tuple[int, int]) -> None:
    """ValueError unless the network of this name is made for images of so many rows and columns."""
    pixels = f"the data has images of {size[0]}×{size[1]}"
    if name in imagenet.NAMES:
        if min(size) < imagenet.LEAST[name]:
            raise ValueError(f"net {name} takes images from {imagenet.LEAST[name]} pixels a side on, {pixels}")
    elif max(size) > LARGEST:
        raise ValueError(
            f"net {name} is one for CIFAR's images, up to {LARGEST} pixels a side, and {pixels}: for these take "
            f"{', '.join(imagenet.NAMES)}"
        )
