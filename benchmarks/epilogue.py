"""Times what follows a block, in the block's own passes and apart, and counts what a step keeps for backward.

    python -m benchmarks.epilogue [--network NAME] [--compile] [--seconds 20] [--out FILE.csv]

Without --network: one ACBlock of 64 channels, a residual and a ReLU, 8×64×56×56, in channels_last. Contenders, all
in turn: the block's plain modules and PyTorch's addition and ReLU ('eager'; 'compile' is torch.compile of that);
our block and the same two operators ('apart'); our block with both of its own ('fused').
With --network: a training step of one of acnet_kernels.paper's networks, of plain modules ('eager') and of our
blocks ('fused', whose residual layers add and clamp within them; 'apart', where they do not). With --compile
networks of both are compiled. Half precision is autocast. CSV: the benchmarks' one schema.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acnet_kernels import ACBlock

from . import harness, network
from .contenders import Modules

SHAPE = (8, 64, 56, 56)
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = {"resnet56": 16, "resnet18": 8}


class Follows(nn.Module):
    """A layer, and after it PyTorch's addition and ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.layer(x) + residual)


class Apart(nn.Module):
    """A block that nothing can see to be one."""

    def __init__(self, block: ACBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def blocks(compiled: bool) -> dict[str, nn.Module]:
    """Contender → its module of (x, residual)."""
    made = {}
    for name in ("eager", *(("compile",) if compiled else ()), "apart", "fused"):
        torch.manual_seed(0)
        block = ACBlock(SHAPE[1], SHAPE[1], 3, padding=1, activation="relu" if name == "fused" else None)
        block.to(memory_format=torch.channels_last)
        module = block if name == "fused" else Follows(block if name == "apart" else Modules(block))
        if name == "compile":
            module.compile()
        made[name] = module
    return made


def block_step(
    module: nn.Module, dtype: torch.dtype, grad: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The forward and the step of a module on fresh inputs."""
    x, residual = (torch.randn(SHAPE).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_(), residual.requires_grad_()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return module(x, residual)

    def step() -> None:
        forward().backward(grad)
        for t in (x, residual, *module.parameters()):
            t.grad = None

    return forward, step


def measure_block(options: argparse.Namespace, report: harness.Report) -> None:
    """One block's rows."""
    for dtype in DTYPES:
        grad, calls = torch.randn(SHAPE).to(dtype).to(memory_format=torch.channels_last), {}
        for name, module in blocks(options.compile).items():
            forward, step = block_step(module, dtype, grad)
            calls[name] = [step]
            saved = harness.saved_bytes(forward, module.parameters())
            report.add(name, "step", "block 8x64x56x56", dtype, "channels_last", "saved_bytes", float(saved))
        tell(report, harness.measure(calls, seconds=options.seconds), "block 8x64x56x56", dtype)


def measure_network(options: argparse.Namespace, report: harness.Report) -> None:
    """A network's rows."""
    found, device = network.NETWORKS[options.network], torch.device("cpu")
    batch = BATCHES.get(options.network, found.cpu_batch)
    for dtype in DTYPES:
        images, labels = network.batch_of(found, batch, device)
        calls = {}
        for name in ("eager", "apart", "fused"):
            model = network.build(found.name, "eager" if name == "eager" else "auto", device)
            if name == "apart":
                network.with_blocks(model, Apart)
            known = [*model.parameters(), *model.buffers()]
            if options.compile:
                torch.compiler.reset()
                model.compile()
            else:
                kept = harness.saved_bytes(functools.partial(network.loss_of, model, images, labels, dtype), known)
                report.add(name, "step", found.shape(batch), dtype, "channels_last", "saved_bytes", float(kept))
            calls[name] = [network.training_step(model, images, labels, dtype)]
        mode = "compiled" if options.compile else "step"
        tell(report, harness.measure(calls, seconds=options.seconds, least=5), found.shape(batch), dtype, mode)


def tell(
    report: harness.Report,
    samples: dict[str, harness.Samples],
    shape: str,
    dtype: torch.dtype,
    mode: str = "step",
) -> None:
    """Adds the times, and prints them as shares of eager's."""
    for name, found in samples.items():
        report.add(name, mode, shape, dtype, "channels_last", "time_ms", found)
    times = ", ".join(
        f"{name} {found.p50:.2f} ms ({samples['eager'].p50 / found.p50:.2f})" for name, found in samples.items()
    )
    print(f"{shape} {harness.dtype_name(dtype)}, {mode}: {times}", flush=True)


def main(argv: list[str]) -> int:
    """Measures; writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(network.NETWORKS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    report = harness.Report("cpu", options.out)
    measure_network(options, report) if options.network else measure_block(options, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
