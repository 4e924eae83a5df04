"""Trains a plain network and its ACNet alike, folds both, and prints how their weights take int8.

    python tools/int8_report.py [--epochs N] [--seeds N]

The data are scikit-learn's 8×8 digits (1,797 images, nothing is downloaded); 1,000 train, 797 test.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from acnet_kernels import convert, fuse
from acnet_kernels.export import WeightRange, quantise, weight_ranges

Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """(train, test), each images N×1×8×8 in [0, 1] and labels, in one shuffle of their own."""
    found = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.images, dtype=torch.float32)[:, None][order] / 16
    y = torch.tensor(found.target)[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def plain_network(width: int = 16) -> nn.Sequential:
    """Four 3×3 convolutions with batch norm, and a linear head."""
    layers: list[nn.Module] = []
    for c, k, stride in ((1, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def train(net: nn.Module, data: Data, epochs: int) -> nn.Module:
    """SGD with momentum and a cosine schedule; net in eval mode."""
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def fold_plain(net: nn.Sequential) -> nn.Sequential:
    """Every batch norm folded into the convolution before it."""
    layers = list(copy.deepcopy(net))
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            layers[i - 1], layers[i] = fuse_conv_bn_eval(layers[i - 1], layer), nn.Identity()
    return nn.Sequential(*layers)


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    """Percent right."""
    return 100 * (net(data[0]).argmax(1) == data[1]).float().mean().item()


@torch.no_grad()
def rounded(net: nn.Module, levels: int, per_channel: bool) -> nn.Module:
    """A copy whose convolutions' weights have symmetric levels, ±levels, of one scale a tensor or a channel."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            peak = module.weight.abs().amax((1, 2, 3), keepdim=True) if per_channel else module.weight.abs().max()
            module.weight.copy_(quantise(module.weight, peak / levels, levels))
    return net


def measure(seed: int, epochs: int) -> dict[str, tuple[list[WeightRange], list[float]]]:
    """'plain' and 'ACNet' → (ranges of the folded convolutions, accuracies in fp32 and rounded)."""
    torch.manual_seed(seed)
    training, test = digits()
    plain = plain_network()
    acnet = convert(plain, gamma=1 / 3)  # three branches at 1/3: the paper's start
    folded = {"plain": fold_plain(train(plain, training, epochs)), "ACNet": fuse(train(acnet, training, epochs))}
    return {
        name: (
            weight_ranges(net),
            [accuracy(net, test)]
            + [accuracy(rounded(net, levels, channel), test) for levels in (127, 7) for channel in (False, True)],
        )
        for name, net in folded.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    runs = [measure(seed, args.epochs) for seed in range(args.seeds)]
    print("| layer | network | peak | spread | crest | int8 SQNR, a scale a tensor | a channel |")
    print("|---|---|---|---|---|---|---|")
    names = [r.name for r in runs[0]["plain"][0]]
    for i, layer in enumerate(names):
        for network in ("plain", "ACNet"):
            found = [run[network][0][i] for run in runs]

            def mean(attribute: str, found: list[WeightRange] = found) -> float:
                return statistics.mean(getattr(r, attribute) for r in found)

            print(
                f"| {layer} | {network} | {mean('peak'):.2f} | {mean('spread'):.1f} | {mean('crest'):.2f} "
                f"| {mean('sqnr_tensor'):.1f} dB | {mean('sqnr_channel'):.1f} dB |"
            )
    print("\n| test accuracy | fp32 | int8, a scale a tensor | a channel | int4, a scale a tensor | a channel |")
    print("|---|---|---|---|---|---|")
    for network in ("plain", "ACNet"):
        columns = zip(*(run[network][1] for run in runs), strict=True)
        print(f"| {network} | " + " | ".join(f"{statistics.mean(c):.2f} %" for c in columns) + " |")


if __name__ == "__main__":
    main()
