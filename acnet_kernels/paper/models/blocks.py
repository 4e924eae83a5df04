"""The k×k layers a network is built from: plain, or an ACBlock in any of the paper's variants in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...block import ACBlock

# Name → the ACBlock it means: the rows of paper Table 4, and the border-shifted variant of Fig. 6c, whose
# shift depends on the kernel size. One batch norm after the sum starts at a plain layer's γ = 1.
VARIANTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "acb": lambda kernel: {},
    "acb-hor": lambda kernel: {"branches": ("square", "hor")},
    "acb-ver": lambda kernel: {"branches": ("square", "ver")},
    "acb-sum": lambda kernel: {"norm": "sum", "reduce_gamma": False},
    "acb-3": lambda kernel: {"line_size": min(kernel, 3)},
    "acb-border": lambda kernel: {"shift": (kernel // 2, kernel // 2)},
}
BLOCKS = (*VARIANTS, "plain")

# (in_channels, out_channels, kernel_size, stride=1, padding=0) → a module with a convolution's geometry.
Layer = Callable[..., nn.Module]


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
) -> nn.Sequential:
    """A bias-free convolution and its batch norm, as children `conv` and `bn`."""
    conv = bare_conv(in_channels, out_channels, kernel_size, stride, padding)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def bare_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
) -> nn.Conv2d:
    """A bias-free convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)


def constructor(block: str, options: dict[str, Any], plain: Layer = conv_norm, reduce_gamma: bool = True) -> Layer:
    """What builds the network's k×k layers (k > 1).

    Args:
        block: one of `BLOCKS`.
        options: for every ACBlock, above the variant's own.
        plain: what a plain layer is: with its batch norm, or bare where the network normalises before it.
        reduce_gamma: whether an ACBlock's γ starts at 1/3, the authors' later setting on CIFAR, so that the sum of
            three branches starts near a plain layer's scale; else at 1.

    Raises:
        ValueError: block is none of `BLOCKS`, or options are given for plain layers, which have none.
    """
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {BLOCKS}, got {block!r}")
    if block == "plain":
        if options:
            raise ValueError(f"block='plain' takes no block options, got {sorted(options)}")
        return plain

    def asymmetric(
        in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> ACBlock:
        settings = {"reduce_gamma": reduce_gamma, **VARIANTS[block](kernel_size), **options}
        return ACBlock(in_channels, out_channels, kernel_size, stride, padding, **settings)

    return asymmetric


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
