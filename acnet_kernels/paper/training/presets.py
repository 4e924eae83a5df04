"""Recipes of the paper's networks by name, as the authors' code trains them today.

The learning rate falls along a cosine to zero and weight decay is on all parameters (both in the loop), γ starts
at 1/3 on CIFAR and at 1 on ImageNet (in the network), images are cropped from 4 pixels of padding and flipped
(CIFAR) or cropped at random scales and flipped (ImageNet; both in the data set). Neither the cosine nor γ = 1/3 is
the paper's: the code's first version lowered the rate in steps, from γ = 1. The accuracies that the authors report
of these recipes are `studies.paper.AUTHORS_COSINE`. ResNet-20, DenseNet-40, AlexNet and DenseNet-121 are not in
that code: they have the recipe of the other networks of their data set.
"""

from __future__ import annotations

from .loop import Recipe

IMAGENET_FOLDER = "data/imagenet"


def _cifar(net: str, epochs: int = 400, lr: float = 0.1, weight_decay: float = 1e-4) -> Recipe:
    return Recipe("cifar10", net, epochs=epochs, lr=lr, weight_decay=weight_decay, bias_lr_factor=2.0)


def _imagenet(net: str) -> Recipe:
    return Recipe(IMAGENET_FOLDER, net, epochs=100, batch_size=256, bias_lr_factor=2.0)


PRESETS = {
    recipe.net: recipe
    for recipe in (
        _cifar("cifar-quick", epochs=150),
        _cifar("vgg16"),
        _cifar("resnet20"),
        _cifar("resnet56", lr=0.2),
        _cifar("wrn16-8", weight_decay=5e-4),
        _cifar("densenet40"),
        _imagenet("alexnet-bn"),
        _imagenet("resnet18"),
        _imagenet("densenet121"),
    )
}
