"""Accuracy on the test images, as they are or turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..training.data import Data
from .lab import Lab
from .paper import data_set
from .study import Cell

BATCH = 500

# Name → how N×C×H×W images are turned (paper Table 4).
ORIENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "original": lambda images: images,
    "rotated 90°": lambda images: images.rot90(1, (2, 3)),
    "rotated 180°": lambda images: images.rot90(2, (2, 3)),
    "flipped up-down": lambda images: images.flip(2),
}


@torch.no_grad()
def accuracies(
    model: nn.Module,
    data: Data,
    *,
    turn: Callable[[Tensor], Tensor] = ORIENTATIONS["original"],
    top: Sequence[int] = (1,),
) -> list[float]:
    """For every k of top: the fraction of test images whose class is among the k largest logits.

    Args:
        model: the network; put into eval mode.
        data: whose test images.
        turn: applied to each batch of images.
        top: the ks; one beyond the number of classes counts every image.
    """
    model.eval()
    right = [0] * len(top)
    for images, labels in data.test_batches(BATCH):
        logits = model(turn(images).contiguous(memory_format=torch.channels_last))
        order = logits.topk(min(max(top), logits.shape[1])).indices == labels[:, None]
        right = [count + int(order[:, :k].any(1).sum()) for count, k in zip(right, top, strict=True)]
    return [count / data.test_images for count in right]


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    """top1 and top5 of the cell's folded network, and the data set that they are of, as `paper` calls it."""
    first, five = accuracies(lab.folded(cell), lab.data(cell), top=(1, 5))
    return {"top1": first, "top5": five, "data_set": data_set(str(cell["data"]))}
