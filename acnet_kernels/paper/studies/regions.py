"""The parts of a k×k kernel that the studies tell apart."""

from __future__ import annotations

from functools import cache

import torch

from .. import models
from ..training.report import kernel_magnitudes

Position = tuple[int, int]


@cache
def regions(kernel: int) -> dict[str, frozenset[Position]]:
    """Name → (row, column) of its positions, of an odd kernel size from 3 on.

    'skeleton' is the centre row and column, where ACNet's branches lie, 'corners' the rest; 'border' is the bottom
    row and right column, where the border-shifted branches lie, 'top left' the rest.
    """
    anywhere = frozenset((row, column) for row in range(kernel) for column in range(kernel))
    skeleton = frozenset(position for position in anywhere if kernel // 2 in position)
    border = frozenset(position for position in anywhere if kernel - 1 in position)
    return {
        "corners": anywhere - skeleton,
        "skeleton": skeleton,
        "anywhere": anywhere,
        "border": border,
        "top left": anywhere - border,
    }


@cache
def kernel_of(net: str) -> int:
    """The kernel size that the studies look at in a network: the commonest one above 1×1."""
    with torch.random.fork_rng(devices=[]):
        model = models.build(net, 10, block="plain")
    return len(next(iter(kernel_magnitudes(model).values())))
