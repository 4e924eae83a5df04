"""What the paper reports (arXiv 1908.03930, Tables 1 to 4 and §4.4): top-1 accuracy in percent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..training.data import NAMES
from .study import Measured

T = TypeVar("T")


class Published(NamedTuple):
    """Top-1 accuracy (%) of the plain network and of its ACNet."""

    plain: float
    acb: float


TABLES = {
    ("cifar10", "cifar-quick"): Published(83.13, 84.24),
    ("cifar10", "vgg16"): Published(94.12, 94.47),
    ("cifar10", "resnet56"): Published(94.31, 95.09),
    ("cifar10", "wrn16-8"): Published(95.56, 96.15),
    ("cifar10", "densenet40"): Published(94.29, 94.84),
    ("imagenet", "alexnet-bn"): Published(55.92, 57.44),
    ("imagenet", "resnet18"): Published(70.36, 71.14),
    ("imagenet", "densenet121"): Published(75.15, 75.82),
}

# Table 4's rows without branches, with both and one batch norm after the sum, and with both.
ABLATION = {
    ("imagenet", "alexnet-bn"): {"plain": "55.92", "acb-sum": "56.18", "acb": "57.44"},
    ("imagenet", "resnet18"): {"plain": "70.36", "acb-sum": "70.82", "acb": "71.14"},
}

# The authors' PyTorch code as its README of today reports it, by the cosine schedule and γ = 1/3 on CIFAR-10, γ = 1
# on ImageNet ('around'): what `training.presets` follow. Cifar-quick and VGG have batch norm there when plain, too.
AUTHORS_COSINE = {
    ("cifar10", "cifar-quick"): Published(86.20, 86.87),
    ("cifar10", "vgg16"): Published(93.99, 94.54),
    ("cifar10", "resnet56"): Published(94.55, 95.06),
    ("cifar10", "wrn16-8"): Published(95.89, 96.33),
    ("imagenet", "resnet18"): Published(70.6, 71.2),
}

# The same README's first version: the rate falls in steps, γ = 1, and Cifar-quick's 5×5 layers have 1×3 and 3×1
# branches.
AUTHORS_STEPS = {
    ("cifar10", "cifar-quick"): Published(86.249, 87.102),
    ("cifar10", "vgg16"): Published(94.250, 94.862),
    ("cifar10", "resnet56"): Published(94.573, 94.864),
    ("cifar10", "wrn16-8"): Published(95.582, 95.920),
}

# ResNet-56 on CIFAR-10 (§4.4); 'acb-border': its added branches strengthen the border instead of the skeleton.
SHIFTED = {("cifar10", "resnet56"): {"plain": "94.31", "acb": "95.09", "acb-border": "94.67"}}


def find(tables: Mapping[tuple[str, str], T], results: Sequence[Measured]) -> T | None:
    """What a table above has for the network and data set of results that are all of one; None for others."""
    return tables.get((results[0].values["data_set"], str(results[0].cell["net"])))


def data_set(data: str) -> str:
    """What the figures above call the data: by its name, 'imagenet' by its folders; '' for other directories."""
    if data in NAMES:
        return data
    classes = [folder.name for folder in (Path(data) / "train").iterdir() if folder.is_dir()]
    imagenet = len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)
    return "imagenet" if imagenet else ""
