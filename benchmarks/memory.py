"""What a training step keeps in memory: plain networks, their ACNets, and the ways to make those smaller.

    python -m benchmarks.memory [--networks resnet56 resnet18 vgg16] [--batch 32] [--dtype bfloat16] [--compile]

Each contender runs in a process of its own. `saved_bytes` is what autograd keeps for backward, counted by
`harness.saved_bytes`; `peak_bytes` is the growth of the process's resident memory over a step (CPU) or the
allocator's peak (CUDA); `largest_batch` is the batch whose saved bytes fit --budget, from two batch sizes.
Saved bytes grow by the same amount with every image, so a small batch shows all of it. `compile` (--compile) is
eager under torch.compile with Inductor's partitioner, which decides what is saved, but without its code generation,
which decides the speed alone and takes minutes a network on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import acnet_kernels
from acnet_kernels.backends import planner
from benchmarks import harness

CLASSES = 10


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, as CIFAR's ResNets have them."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(c, k, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×H/stride×W/stride."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet56() -> nn.Module:
    """CIFAR's ResNet-56."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
    ]
    for c, k in ((16, 16), (16, 32), (32, 64)):
        layers += [Residual(c, k, 1 if c == k else 2), *(Residual(k, k, 1) for _ in range(8))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def resnet18() -> nn.Module:
    """torchvision's ResNet-18."""
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def vgg16() -> nn.Module:
    """torchvision's VGG-16 with batch norm, its classifier one linear layer as on CIFAR."""
    from torchvision.models import vgg16_bn

    features = vgg16_bn().features
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet56": (resnet56, 32),
    "resnet18": (resnet18, 64),
    "vgg16": (vgg16, 32),
}


class Checkpointed(nn.Module):
    """A block that keeps its input and computes itself again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """As the block's."""
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """model with every ACBlock checkpointed, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, acnet_kernels.ACBlock) and not isinstance(parent, Checkpointed):
                setattr(parent, name, Checkpointed(child))
    return model


def build(network: str, contender: str) -> nn.Module:
    """The contender's network in training mode."""
    model = NETWORKS[network][0]()
    if contender == "plain":
        return model
    backends = {"eager": "eager", "compile": "eager", "checkpoint": "eager", "memory_saver": "memory_saver"}
    model = acnet_kernels.convert(model, backend=backends.get(contender, contender))
    if contender == "checkpoint":
        return checkpointed(model)
    return torch.compile(model, backend="aot_eager_decomp_partition") if contender == "compile" else model


def contenders(with_compile: bool) -> list[str]:
    """The names build() takes; 'branches' where this version has that backend."""
    names = ["plain", "eager", *(["compile"] if with_compile else []), "checkpoint", "memory_saver"]
    return names + [name for name in planner.CHOICES if name == "branches"]


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(network: str, contender: str, batch: int, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """(saved bytes, peak bytes) of one training step; meant for a process of its own."""
    torch.manual_seed(0)
    model, size = build(network, contender).to(device, memory_format=torch.channels_last), NETWORKS[network][1]
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (batch,), device=device)

    def loss() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(model(x), target)

    known = [*model.parameters(), *model.buffers()]
    saved = harness.saved_bytes(loss, known)
    if device == "cuda":
        return saved, harness.peak_bytes(lambda: loss().backward(), device)
    before = resident_bytes()
    loss().backward()
    return saved, max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process, so that one contender's peak is not another's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--budget", type=int, default=2**30, help="bytes for `largest_batch`")
    parser.add_argument("--compile", action="store_true", help="torch.compile of eager too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    dtype, report, lines = getattr(torch, args.dtype), harness.Report(args.device), []
    for network in args.networks:
        size = NETWORKS[network][1]
        for contender in contenders(args.compile):
            saved, peak = isolated(measure, network, contender, args.batch, dtype, args.device)
            half, _ = isolated(measure, network, contender, args.batch // 2, dtype, args.device)
            per_image = (saved - half) / (args.batch - args.batch // 2)
            largest = int((args.budget - (saved - per_image * args.batch)) / per_image)
            shape = f"{network} {args.batch}×3×{size}×{size}"
            values = {"saved_bytes": saved, "peak_bytes": peak, "largest_batch": largest}
            for metric, value in values.items():
                report.add(contender, "step", shape, dtype, "channels_last", metric, float(value))
            lines.append((shape, contender, saved / 2**20, peak / 2**20, largest))
    print(harness.table(("network", "contender", "saved MiB", "peak MiB", f"batch in {args.budget:,} B"), lines))
    report.write_csv(harness.results_dir(args.device) / f"memory_{args.dtype}.csv")


if __name__ == "__main__":
    main()
