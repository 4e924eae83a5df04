"""Does a network learn the same with every training backend? Ten epochs on scikit-learn's digits, three seeds.

    python -m benchmarks.digits [--epochs 10] [--seeds 3]

A residual network of three stages, every 3×3 convolution an ACBlock, is trained with each of BACKENDS from the
same weights on the same batches (`moments` leaves the two strided blocks to eager). Writes digits.csv (accuracy
on the held-out third after every epoch) under benchmarks/results, digits.png under runs/, prints the last epoch's
accuracies.
"""

from __future__ import annotations

import argparse
import csv

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acnet_kernels import ACBlock

from . import harness

BACKENDS = ("eager", "branches", "moments")


class Residual(nn.Module):
    """Two blocks and a shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int, backend: str) -> None:
        super().__init__()
        self.first = ACBlock(channels, out_channels, 3, stride, 1, reduce_gamma=True, backend=backend)
        self.second = ACBlock(out_channels, out_channels, 3, 1, 1, reduce_gamma=True, backend=backend)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×H/stride×W/stride."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet8(backend: str) -> nn.Sequential:
    """Stem, three residual stages of 16, 32 and 64 channels, a linear classifier."""
    return nn.Sequential(
        ACBlock(1, 16, 3, 1, 1, backend=backend),
        nn.ReLU(),
        Residual(16, 16, 1, backend),
        Residual(16, 32, 2, backend),
        Residual(32, 64, 2, backend),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(backend: str, seed: int, epochs: int) -> list[float]:
    """Held-out accuracy after each epoch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    held_out, training = order[: len(order) // 3], order[len(order) // 3 :]
    net = resnet8(backend)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    accuracies = []
    for _ in range(epochs):
        net.train()
        for batch in training[torch.randperm(len(training))].split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimiser.step()
        schedule.step()
        net.eval()
        with torch.no_grad():
            accuracies.append((net(images[held_out]).argmax(1) == labels[held_out]).float().mean().item())
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    curves = {(b, seed): train(b, seed, args.epochs) for seed in range(args.seeds) for b in BACKENDS}
    with (harness.results_dir() / "digits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["backend", "seed", "epoch", "accuracy"])
        for (backend, seed), curve in curves.items():
            writer.writerows([backend, seed, epoch, round(a, 5)] for epoch, a in enumerate(curve, 1))
    lines = [(seed, *(f"{curves[b, seed][-1]:.4f}" for b in BACKENDS)) for seed in range(args.seeds)]
    print(harness.table(("seed", *BACKENDS), lines))

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (backend, seed), curve in curves.items():
        style = {"eager": "--", "branches": "-", "moments": ":"}[backend]
        axes.plot(range(1, args.epochs + 1), curve, style, color=f"C{seed}", label=f"{backend}, seed {seed}")
    axes.set(xlabel="epoch", ylabel="held-out accuracy", title="Digits, the same weights and batches")
    axes.legend()
    figure.savefig("runs/digits.png", dpi=110)


if __name__ == "__main__":
    main()
