"""The convolution + batch norm a network is built from: plain, or an ACBlock in its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..block import ACBlock

BLOCKS = ("acb", "plain")

# (in_channels, out_channels, kernel_size, stride=1, padding=0) → a module with a convolution's geometry.
ConvNorm = Callable[..., nn.Module]


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
) -> nn.Sequential:
    """A bias-free convolution and its batch norm, as children `conv` and `bn`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def constructor(block: str, block_options: dict[str, Any]) -> ConvNorm:
    """What builds the network's k×k layers (k > 1).

    Raises:
        ValueError: block is none of `BLOCKS`, or options are given for plain layers, which have none.
    """
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {BLOCKS}, got {block!r}")
    if block == "plain":
        if block_options:
            raise ValueError(f"block='plain' takes no block options, got {sorted(block_options)}")
        return conv_norm
    # γ = 1/3: the paper's CIFAR setting, so that the sum of three branches starts at a plain layer's scale.
    return partial(ACBlock, **{"reduce_gamma": True, **block_options})


def initialise(model: nn.Module, seed: int) -> None:
    """nn.Conv2d's and nn.Linear's own initialisation; the skeleton first, then what ACBlocks add to it.

    So the same seed gives a plain network and its ACNet the same square kernels, shortcuts and classifier.
    Uses the CPU generator, leaves it seeded.
    """
    added = {
        id(conv)
        for block in model.modules()
        if isinstance(block, ACBlock)
        for name, conv in block.convs().items()
        if name != "square"
    }
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    torch.manual_seed(seed)
    for layer in sorted(layers, key=lambda layer: id(layer) in added):
        layer.reset_parameters()
