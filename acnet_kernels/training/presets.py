"""How the paper trains each of its networks (§4.1; the authors' code where the paper is silent), by name.

What the recipes share is elsewhere: the cosine to zero and the weight decay on all parameters in the loop, pad-4
crops and flips (CIFAR) or crops of random scale and flips (ImageNet) in the data set, γ = 1/3 (CIFAR) or 1
(ImageNet) in the network.
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
