"""The paper's ImageNet networks: torchvision's, whose 3×3 and 5×5 layers `convert` makes ACBlocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...block import ACBlock
from ...conversion import blocks_of, convert
from ...errors import require
from .blocks import VARIANTS, constructor

# Name → the smallest images, in pixels a side, that leave something to the last layer.
LEAST = {"alexnet": 63, "alexnet-bn": 63, "resnet18": 1, "densenet121": 29}
NAMES = tuple(LEAST)


def build(name: str, num_classes: int, in_channels: int, block: str, options: dict[str, Any]) -> nn.Module:
    """torchvision's network with its own initialisation; its ACNets on the same square kernels, with γ = 1.

    AlexNet's conv4 has 384 channels, as in the TensorFlow benchmark that the paper's experiments were built on;
    torchvision's has 256. It has no batch norm: the ACNet's blocks bring theirs, the plain network stays without.
    'alexnet-bn' has one after each convolution in both forms, for a comparison of the branches alone.

    Args:
        name: one of `NAMES`.
        num_classes: number of logits.
        in_channels: 3.
        block: one of `BLOCKS`.
        options: for every ACBlock, above the variant's own.

    Raises:
        ValueError: in_channels, block or options these networks do not have.
        UserError: torchvision is not installed.
    """
    require(f"net {name}", torchvision="torchvision")
    from torchvision import models

    if in_channels != 3:
        raise ValueError(f"net {name} takes images of 3 channels, the data has {in_channels}")
    constructor(block, options)  # says what is wrong with them before anything is built
    model = models.get_model(name.removesuffix("-bn"), weights=None, num_classes=num_classes)
    if name.startswith("alexnet"):
        model.features[8], model.features[10] = nn.Conv2d(384, 384, 3, padding=1), nn.Conv2d(384, 256, 3, padding=1)
    if name == "alexnet-bn":
        model.features = _normalised(model.features)
    if block == "plain":
        return model
    squares = {key: m.weight for key, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    model = convert(model)
    for key, found in blocks_of(model).items():
        assert isinstance(found, ACBlock)
        kernel = found.kernel_size[0]
        settings = {**VARIANTS[block](kernel), **options}
        shape = (found.in_channels, found.out_channels, kernel, found.stride, found.padding)
        variant = ACBlock(*shape, found.dilation, found.groups, found.padding_mode, eps=found.eps, **settings)
        with torch.no_grad():
            variant.square_conv.weight.copy_(squares[key])
        model.set_submodule(key, variant)
    return model


def _normalised(features: nn.Sequential) -> nn.Sequential:
    """The same layers with a batch norm after every convolution."""
    layers: list[nn.Module] = []
    for layer in features:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)
