"""The paper's networks by name, with plain or asymmetric convolution layers on the same skeleton."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .blocks import BLOCKS, ConvNorm, constructor, initialise
from .resnet import ResNet

__all__ = ["BLOCKS", "NETWORKS", "build"]

# Pattern of the name → (its number, num_classes, in_channels, conv) → network. One line a family.
NETWORKS: dict[str, Callable[[int, int, int, ConvNorm], nn.Module]] = {r"resnet(\d+)": ResNet}


def build(name: str, num_classes: int, in_channels: int = 3, block: str = "acb", **block_options: Any) -> nn.Module:
    """The network, freshly initialised.

    The global CPU generator decides the weights: seeded alike, the plain and the acb network get the same
    skeleton (square kernels, shortcuts, classifier), whatever the block options.

    Args:
        name: 'resnet8', 'resnet20', 'resnet32', 'resnet56', any 6n+2.
        num_classes: number of logits.
        in_channels: C of the images.
        block: 'acb' makes every k×k layer (k > 1) an ACBlock with γ = 1/3 (the paper's CIFAR setting);
            'plain' is convolution + batch norm. 1×1 layers are plain in both.
        block_options: passed to every ACBlock (`backend`, `branches`, `norm`, `reduce_gamma`, …).

    Raises:
        ValueError: an unknown name or block, or options that ACBlock refuses.
    """
    conv = constructor(block, block_options)
    for pattern, network in NETWORKS.items():
        match = re.fullmatch(pattern, name)
        if match:
            seed = int(torch.randint(2**31, ()))
            with torch.random.fork_rng(devices=[]):
                model = network(int(match[1]), num_classes, in_channels, conv)
                initialise(model, seed)
            return model
    raise ValueError(f"net must be resnet8, resnet20, resnet32, resnet56 or another resnet<6n+2>, got {name!r}")
