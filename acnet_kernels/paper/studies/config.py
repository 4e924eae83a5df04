"""What a study computes: networks, data and numbers of repetitions; quick, or as in the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..models import LARGEST
from ..training.data import NAMES
from ..training.loop import Recipe
from ..training.presets import IMAGENET_FOLDER, PRESETS


@dataclass(frozen=True)
class StudyConfig:
    """The size of the studies. Block and seed of its recipes are the studies' to fill in.

    Attributes:
        recipe: of the network that ablation, rotation, pruning, magnitudes and shifted train.
        accuracy: of the networks of the accuracy table.
        seeds: trainings a row of a table.
        prunings: random prunings a point of a curve.
        test_limit: test on so many images only.
    """

    recipe: Recipe
    accuracy: tuple[Recipe, ...]
    seeds: int = 5
    prunings: int = 5
    test_limit: int | None = None

    def find(self, data: str, net: str, recipe: str, backend: str) -> Recipe:
        """The recipe of these coordinates of a `Network`."""
        return next(
            r
            for r in (self.recipe, *self.accuracy)
            if (r.data, r.net, self.words(r), r.backend) == (data, net, recipe, backend)
        )

    def words(self, recipe: Recipe) -> str:
        """All that decides a trained network's weights and accuracy beside data, net, backend, block and seed."""
        images = "all images" if recipe.limit is None else f"{recipe.limit:,} images"
        parts = [
            f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''} of {images}",
            f"batch {recipe.batch_size}",
            f"learning rate {recipe.lr}",
            f"weight decay {recipe.weight_decay}",
            f"biases ×{recipe.bias_lr_factor:g}",
        ]
        if recipe.data not in NAMES:
            parts.append(f"{recipe.image_size}×{recipe.image_size} pixels")
        if recipe.amp != "no":
            parts.append(recipe.amp)
        if self.test_limit is not None:
            parts.append(f"{self.test_limit:,} test images")
        return ", ".join(parts)


def _digits(net: str) -> Recipe:
    return Recipe("digits", net, epochs=12, bias_lr_factor=2.0)


# Minutes on two cores, on data that is on every machine.
QUICK = StudyConfig(
    recipe=_digits("resnet8"),
    accuracy=tuple(_digits(net) for net in ("cifar-quick", "resnet8", "resnet20", "wrn10-1", "densenet10")),
    seeds=3,
)
PAPER = StudyConfig(recipe=PRESETS["resnet56"], accuracy=tuple(r for r in PRESETS.values() if r.data == "cifar10"))
PHOTOGRAPHS = StudyConfig(
    recipe=PRESETS["resnet18"], accuracy=tuple(r for r in PRESETS.values() if r.data == IMAGENET_FOLDER)
)


def make(
    quick: bool,
    *,
    net: str | None = None,
    nets: list[str] | None = None,
    seeds: int | None = None,
    prunings: int | None = None,
    test_limit: int | None = None,
    **changes: Any,
) -> StudyConfig:
    """The quick studies or the paper's (its ImageNet ones for photographs), changed where an argument is given.

    Args:
        quick: which of the two.
        net: another network for all but the accuracy table.
        nets: the accuracy table's networks.
        seeds, prunings, test_limit: as `StudyConfig` has them.
        changes: fields of every recipe; those that are None stay.
    """
    config = QUICK if quick else PAPER
    changes = {name: value for name, value in changes.items() if value is not None}
    if not quick and changes.get("data", NAMES[0]) not in NAMES:
        # Photographs bring the networks made for them.
        image_size = changes.get("image_size", config.recipe.image_size)
        config = PHOTOGRAPHS if image_size > LARGEST else config

    def recipe(name: str) -> Recipe:
        known = None if quick else PRESETS.get(name)
        return replace(known or replace(config.recipe, net=name), **changes)

    nets = [r.net for r in config.accuracy] if nets is None else nets
    return StudyConfig(
        recipe=recipe(net or config.recipe.net),
        accuracy=tuple(recipe(name) for name in nets),
        seeds=seeds or config.seeds,
        prunings=prunings or config.prunings,
        test_limit=test_limit,
    )
