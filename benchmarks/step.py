"""How long one training step of a block takes, and what it keeps for its backward.

    python -m benchmarks.step [--dtype float32 bfloat16] [--shapes targets|all] [--compile] [--threads N]

Contenders, interleaved on the same inputs: eager (three convolutions, three batch norms, two additions) in both
layouts, torch.compile of the channels_last one, every backend of this package in both layouts, and the plain
convolution + batch norm that the block replaces. bfloat16 is autocast with float32 parameters. 'forward' builds the
graph, 'step' runs backward too; backward alone is their difference. Writes step-<dtype>.csv and step-<dtype>.png
under benchmarks/results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from acnet_kernels import ACBlock
from acnet_kernels.backends import planner

from . import harness, shapes

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Contender:
    """A module with what it runs on: callables for the forward and for the step."""

    def __init__(self, module: nn.Module, layout: str, x: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
        self.module, self.layout, self.dtype = module.to(memory_format=LAYOUTS[layout]), layout, dtype
        self.x = x.to(memory_format=LAYOUTS[layout]).detach().requires_grad_()
        self.grad = grad.to(dtype).to(memory_format=LAYOUTS[layout])

    def forward(self) -> Tensor:
        """The output, with its graph."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.module(self.x)

    def step(self) -> None:
        """Forward and backward; gradients add up, as without zero_grad()."""
        self.forward().backward(self.grad)


def contenders(shape: shapes.Shape, dtype: torch.dtype, compiled: bool) -> dict[str, Contender]:
    """Name → contender, all with the same weights and input."""
    torch.manual_seed(0)
    args = (shape.channels, shape.out_channels, 3, shape.stride, 1)
    source = ACBlock(*args, backend="eager")
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size)
    grad = torch.randn(source(x).shape)

    def block(backend: str, layout: str, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> Contender:
        module = ACBlock(*args, backend=backend)
        module.load_state_dict(source.state_dict())
        return Contender(wrap(module), layout, x, grad, dtype)

    found = {f"eager {layout}": block("eager", layout) for layout in LAYOUTS}
    if compiled:
        found["compile channels_last"] = block("eager", "channels_last", torch.compile)
    ours = [name for name in planner.BACKENDS if name not in ("eager", "folded")]
    found |= {f"{name} {layout}": block(name, layout) for name in ours for layout in LAYOUTS}
    plain = nn.Sequential(nn.Conv2d(*args, bias=False), nn.BatchNorm2d(shape.out_channels))
    found["conv+bn channels_last"] = Contender(plain, "channels_last", x, grad, dtype)
    return found


def run(shape: shapes.Shape, dtype: torch.dtype, compiled: bool, seconds: float, report: harness.Report) -> dict:
    """Measures one shape; returns contender → median milliseconds of the step."""
    all_of_them = contenders(shape, dtype, compiled)
    medians = {}
    for mode in ("forward", "step"):
        samples = harness.measure(
            {name: [getattr(c, mode)] for name, c in all_of_them.items()}, warm_up=0.1, seconds=seconds, least=7
        )
        for name, sample in samples.items():
            contender = all_of_them[name]
            report.add(name.split()[0], mode, str(shape), dtype, contender.layout, "time_ms", sample)
            medians[name] = sample.p50
    for name, contender in all_of_them.items():
        if not name.startswith("compile"):
            kept = harness.saved_bytes(contender.forward, but=contender.module.parameters())
            report.add(name.split()[0], "forward", str(shape), dtype, contender.layout, "saved_bytes", float(kept))
    return medians


def plot(results: dict[shapes.Shape, dict[str, float]], path: Path, title: str) -> None:
    """Speed of the step relative to the better eager layout, a bar a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in next(iter(results.values())) if not name.startswith("eager")]
    figure, axes = pyplot.subplots(figsize=(12, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [best_eager(times) / times[name] for times in results.values()]
        axes.bar([j + (i - len(names) / 2 + 0.5) * width for j in range(len(results))], heights, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [str(shape) for shape in results], rotation=35, ha="right")
    axes.set(ylabel="× the better eager layout", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)


def best_eager(times: dict[str, float]) -> float:
    """The faster of eager's two layouts."""
    return min(times[f"eager {layout}"] for layout in LAYOUTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--shapes", default="all", choices=["all", "targets"])
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (minutes of compilation)")
    parser.add_argument("--seconds", type=float, default=1.5, help="timed part of each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.dtype:
        dtype, report, results = getattr(torch, name), harness.Report(), {}
        for shape in shapes.ALL if args.shapes == "all" else shapes.TARGETS:
            results[shape] = run(shape, dtype, args.compile, args.seconds, report)
        names = list(next(iter(results.values())))
        lines = [
            (shape, *(times[name] for name in names), f"{best_eager(times) / times['branches channels_last']:.2f}")
            for shape, times in results.items()
        ]
        header = (f"step, ms ({name})", *names, "eager / branches")
        print(harness.table(header, lines), flush=True)
        suffix = "" if args.shapes == "all" else "-targets"
        path = harness.results_dir() / f"step-{name}{suffix}.csv"
        report.write_csv(path)
        plot(results, path.with_suffix(".png"), f"Training step of one block, {name}, {harness.device_name()}")


if __name__ == "__main__":
    main()
