"""Whether a folded network still predicts what the trained one does."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...conversion import blocks_of
from .data import Data


class FoldCheck(NamedTuple):
    """Folded against unfolded over the test images.

    `max_relative_difference` is max over images of ‖folded − unfolded‖∞ / ‖unfolded‖∞ of the logits.
    """

    images: int
    max_relative_difference: float
    differing_predictions: int
    accuracy_unfolded: float
    accuracy_folded: float


def branchwise(model: nn.Module) -> nn.Module:
    """A copy in eval whose blocks compute branch by branch, where they would else fold on the fly."""
    model = copy.deepcopy(model).eval()
    for block in blocks_of(model).values():
        block.backend = "eager"
    return model


@torch.no_grad()
def check_fold(model: nn.Module, folded: nn.Module, data: Data, batch_size: int) -> FoldCheck:
    """Compares in float32."""
    model, folded = branchwise(model), folded.eval()
    worst, differing, right = 0.0, 0, [0, 0]
    for images, labels in data.test_batches(batch_size):
        ours, theirs = folded(images), model(images)
        worst = max(worst, _relative(ours, theirs))
        predictions = ours.argmax(1), theirs.argmax(1)
        differing += int((predictions[0] != predictions[1]).sum())
        right = [r + int((p == labels).sum()) for r, p in zip(right, predictions, strict=True)]
    n = data.test_images
    return FoldCheck(n, worst, differing, right[1] / n, right[0] / n)


def _relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().amax(1) / b.abs().amax(1)).max())
