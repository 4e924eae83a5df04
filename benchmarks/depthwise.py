"""Times a step of depthwise blocks against eager modules, a plain layer and, with --compile, torch.compile.

    python -m benchmarks.depthwise [--compile] [--repeats 15] [--out FILE.csv]

A block is n k×k convolutions, a 1×1 one and, at stride 1, the identity, each with its batch norm, and a ReLU
after their sum, as in MobileOne; a plain layer is one convolution with a batch norm and a ReLU. All
contenders run in turn on the same input, in both layouts. CSV: shape, kernel, n, stride, dtype, contender,
layout, median milliseconds of forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acnet_kernels import Branch, Geometry, Norm, Taps, acblock

# (N, C, H, W), kernel, n, stride: the layers that the figures are stated for, then MobileOne-s0's, then others'.
LAYERS = [
    ((8, 64, 56, 56), 3, 1, 1),
    ((8, 64, 56, 56), 3, 4, 1),
    ((4, 128, 28, 28), 3, 1, 1),
    ((8, 512, 14, 14), 3, 1, 1),
    ((8, 48, 112, 112), 3, 4, 2),
    ((8, 128, 28, 28), 3, 4, 1),
    ((8, 256, 14, 14), 3, 4, 1),
    ((8, 64, 56, 56), 5, 1, 1),
    ((8, 64, 56, 56), 7, 1, 1),
    ((8, 64, 56, 56), 7, 4, 1),
    ((2, 16, 8, 8), 3, 1, 1),
]
COLUMNS = ("shape", "kernel", "n", "stride", "dtype", "contender", "layout", "milliseconds")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Modules(nn.Module):
    """The block of plain modules."""

    def __init__(self, channels: int, kernel: int, n: int, stride: int) -> None:
        super().__init__()
        sizes = [kernel] * n + [1]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, k, stride, k // 2, groups=channels, bias=False) for k in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(n + 1 + (stride == 1)))
        self.geometry = Geometry.make(kernel, stride, kernel // 2, 1, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = None
        for i, norm in enumerate(self.norms):
            y = norm(self.convs[i](x) if i < len(self.convs) else x)
            out = y if out is None else out + y
        assert out is not None
        return F.relu(out)


class Block(Modules):
    """The same by acblock(), by this backend."""

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        middle, branches = self.geometry.kernel[0] // 2, []
        for i, bn in enumerate(self.norms):
            assert isinstance(bn, nn.BatchNorm2d)
            buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
            norm = Norm(bn.weight, bn.bias, *buffers, bn.eps, bn.momentum, True)
            weight = getattr(self.convs[i], "weight", None) if i < len(self.convs) else None
            whole = weight is not None and weight.shape[2] > 1
            taps = self.geometry.whole if whole else Taps(middle, middle, 1, 1)
            branches.append(Branch(taps, weight, None, norm))
        return acblock(x, branches, self.geometry, backend=self.backend, activation="relu")


class Plain(nn.Sequential):
    """One convolution, one batch norm and a ReLU."""

    def __init__(self, channels: int, kernel: int, n: int, stride: int) -> None:
        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU())


def stepper(module: nn.Module, x: Tensor, layout: torch.memory_format, dtype: torch.dtype) -> Callable[[], None]:
    """One step of the module on x, forward and backward."""
    module, x = module.to(memory_format=layout), x.to(dtype).contiguous(memory_format=layout)
    parameters = list(module.parameters())
    half = dtype == torch.bfloat16

    def forward(given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            return module(given)

    grad = torch.randn_like(forward(x))

    def step() -> None:
        for p in parameters:
            p.grad = None
        forward(x.detach().requires_grad_()).backward(grad)

    return step


def measure(
    shape: tuple[int, ...], kernel: int, n: int, stride: int, dtype: torch.dtype, compiled: bool, repeats: int
) -> dict[tuple[str, str], float]:
    """(contender, layout) → median milliseconds of a step, all in turn."""
    torch.compiler.reset()  # Dynamo compiles a function so often and no more
    x, arguments = torch.randn(shape), (shape[1], kernel, n, stride)
    modules: dict[str, nn.Module] = {"eager": Modules(*arguments), "plain": Plain(*arguments)}
    for backend in ("auto", "branches", "moments") if kernel > 5 else ("auto",):
        modules[backend] = Block(*arguments)
        modules[backend].backend = backend  # type: ignore[assignment]
    steps = {}
    for name, module in modules.items():
        for layout, form in LAYOUTS.items():
            steps[name, layout] = stepper(copy.deepcopy(module), x, form, dtype)
            if compiled and name == "eager":
                other = torch.compile(copy.deepcopy(module))
                steps["compile", layout] = stepper(other, x, form, dtype)  # type: ignore[arg-type]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for i in range(repeats + 2):
        for key, step in steps.items():
            begin = time.perf_counter()
            step()
            if i >= 2:
                times[key].append(1e3 * (time.perf_counter() - begin))
    return {key: statistics.median(found) for key, found in times.items()}


def main(argv: list[str]) -> int:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layer", type=int, action="append", help="of LAYERS, by number: these alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    rows = []
    for i in options.layer if options.layer is not None else range(len(LAYERS)):
        shape, kernel, n, stride = LAYERS[i]
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(shape, kernel, n, stride, dtype, options.compile, options.repeats)
            names = ("x".join(map(str, shape)), kernel, n, stride, str(dtype).removeprefix("torch."))
            rows += [(*names, *key, f"{ms:.3f}") for key, ms in found.items()]
            best: dict[str, float] = {}
            for (name, _), ms in found.items():
                best[name] = min(ms, best.get(name, ms))
            print(*names, *(f"{name} {ms:.2f}" for name, ms in best.items()), flush=True)
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
