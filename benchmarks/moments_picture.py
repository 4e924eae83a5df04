"""The picture of the `moments` backend: what a step keeps, and how far its bfloat16 weight gradients are off.

    python -m benchmarks.moments_picture

Memory bars come from memory.py's CSV of this machine class; the errors are computed here, against float64.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from acnet_kernels import ACBlock
from benchmarks import harness

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPES = ((128, 16, 32), (128, 32, 16), (32, 64, 8), (16, 128, 4))
CONTENDERS = ("plain", "eager", "checkpoint", "auto", "memory_saver")


def weight_gradients(block: ACBlock, x: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    """One step's weight gradients under bfloat16 autocast, or in float64 where x is."""
    block.zero_grad()
    block.backend = backend
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        out = block(x)
    out.backward(grad)
    return [conv.weight.grad.clone() for conv in block.convs().values() if conv.weight.grad is not None]


def errors(n: int, c: int, size: int) -> dict[str, float]:
    """Backend → the largest relative error of a branch's weight gradient."""
    torch.manual_seed(0)
    block, exact = ACBlock(c, c, 3, padding=1), ACBlock(c, c, 3, padding=1).double()
    exact.load_state_dict(block.state_dict())
    x, grad = torch.randn(n, c, size, size).bfloat16(), torch.randn(n, c, size, size).bfloat16()
    truth = weight_gradients(exact, x.double(), grad.double(), "eager")
    found = {}
    for backend in ("eager", "moments"):
        got = weight_gradients(block, x, grad, backend)
        found[backend] = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True))
    return found


def saved() -> dict[str, dict[str, float]]:
    """Network → contender → saved MiB, from memory.py's last run here."""
    rows: dict[str, dict[str, float]] = {}
    for row in harness.read_csv(harness.results_dir() / "memory-bfloat16.csv"):
        if row.metric == "saved_bytes":
            rows.setdefault(row.shape, {})[row.contender] = row.p50 / 2**20
    return rows


def main() -> None:
    report = harness.Report()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    networks = saved()
    names = [name for name in CONTENDERS if any(name in bars for bars in networks.values())]
    for i, name in enumerate(names):
        places = [j + (i - len(names) / 2) * 0.8 / len(names) for j in range(len(networks))]
        left.bar(
            places, [bars.get(name, 0) for bars in networks.values()], 0.75 / len(names), label=name, align="edge"
        )
    left.set_xticks(range(len(networks)), networks)
    left.set_ylabel("MiB kept for backward")
    left.set_title("bfloat16 training step")
    left.legend(frameon=False)
    found = [errors(*shape) for shape in SHAPES]
    labels = [f"{n}×{c}×{size}²" for n, c, size in SHAPES]
    for backend in ("eager", "moments"):
        right.semilogy(labels, [error[backend] for error in found], "o-", label=backend)
        for label, error in zip(labels, found, strict=True):
            report.add(backend, "step", label, torch.bfloat16, "contiguous", "dw_error", error[backend])
    right.set_ylabel("relative error of dW against float64")
    right.set_title("bfloat16 autocast, worst branch")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs/assets/moments.png", dpi=120)
    report.write_csv(harness.results_dir() / "moments_error.csv")
    print(
        harness.table(
            ("shape", "eager", "moments"),
            [(s, e["eager"], e["moments"]) for s, e in zip(labels, found, strict=True)],
        )
    )


if __name__ == "__main__":
    main()
