"""What a first hour with a GPU must answer: `benchmarks/gpu_suite.sh`.

Are the Triton phases right on the device; how long does each take beside the vendor's, shape by shape, and at what
share of the ceilings measured in the same run; does a whole step win; which configuration is best. Writes
gpu_suite.csv and gpu_suite.md. What matters most runs first; when the time is up, what was left out is said.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from acnet_kernels.backends import phases, planner, stopwatch
from acnet_kernels.geometry import BRANCHES, Geometry
from acnet_kernels.kernels import configs
from acnet_kernels.ops import autocorrelation, triton_autocorrelation, triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import Window
from acnet_kernels.spec import Problem

from . import harness, machine

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "triton")]
from oracle import FLOORS, rel  # noqa: E402 - the tests' own rule, not a second one
from problems import DEPTHWISE, PROBLEMS, SMALL, Tensors, step  # noqa: E402

# N, C = K, H = W: the CIFAR network's stages, ImageNet's, and a few in between.
SHAPES = (
    (32, 256, 14),
    (32, 64, 56),
    (128, 16, 32),
    (32, 128, 28),
    (128, 32, 16),
    (128, 64, 8),
    (32, 512, 7),
    (8, 64, 56),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PADDINGS = ((1, 1), (0, 1), (1, 0))  # square, hor, ver as the vendor computes them
SIZES = ((3, 3), (1, 3), (3, 1))


class Inputs:
    """One input set: maps, weights and affine parameters of a 3×3 block with 'same' padding."""

    def __init__(
        self, N: int, C: int, H: int, dtype: torch.dtype, device: torch.device, depthwise: bool = False
    ) -> None:
        groups = C if depthwise else 1

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

        self.x, self.grad = random(N, C, H, H), random(N, C, H, H)
        self.weights = [random(C, C // groups, *size) / (C // groups) ** 0.5 for size in SIZES]
        self.dys = [random(N, C, H, H) for _ in SIZES]
        self.gammas = [torch.rand(C, device=device) + 0.5 for _ in SIZES]
        self.betas = [torch.randn(C, device=device) for _ in SIZES]
        self.eps = [1e-5] * 3
        self.pivot = torch.zeros(C, device=device)
        self.window = Window.of(Geometry.make(3, padding=1, groups=groups))

    @property
    def map_bytes(self) -> int:
        """Bytes of one map."""
        return self.x.numel() * self.x.element_size()


# The half plane of shifts that a 3×3 window's second moments need.
SHIFTS = [(row, column) for row in range(3) for column in range(-2 if row else 0, 3)]


def vendor_conv(i: Inputs) -> list[Tensor]:
    return [F.conv2d(i.x, w, None, 1, p, 1, i.window.groups) for w, p in zip(i.weights, PADDINGS, strict=True)]


def vendor_backward(i: Inputs, dys: list[Tensor], mask: list[bool]) -> list[tuple[Tensor | None, ...]]:
    """(dx, dW, None) of each branch, those that mask wants."""
    backward = torch.ops.aten.convolution_backward
    return [
        backward(dy, i.x, w, None, [1, 1], list(p), [1, 1], False, [0, 0], i.window.groups, mask)
        for dy, w, p in zip(dys, i.weights, PADDINGS, strict=True)
    ]


def vendor_dgrad(i: Inputs) -> Tensor:
    parts = [dx for dx, _, _ in vendor_backward(i, i.dys, [True, False, False]) if dx is not None]
    return parts[0].add_(parts[1]).add_(parts[2])


def vendor_batch_norms(i: Inputs) -> Tensor:
    first, *others = (
        F.batch_norm(y, None, None, g, b, True, 0.0, e)
        for y, g, b, e in zip(i.dys, i.gammas, i.betas, i.eps, strict=True)
    )
    return first + others[0] + others[1]


def second_moments(implementation: Callable[..., object], i: Inputs) -> object:
    rows, columns = ([shift[axis] for shift in SHIFTS] for axis in (0, 1))
    return implementation(i.x, i.pivot, i.x, i.pivot, rows, columns, 1)


Contenders = dict[str, Callable[[Inputs], object]]
CONVOLUTIONS: dict[str, Contenders] = {
    "conv": {
        "vendor": vendor_conv,
        "triton": lambda i: triton_conv.conv_forward(i.x, i.weights, i.window),
    },
    "dgrad": {
        "vendor": vendor_dgrad,
        "triton": lambda i: triton_conv.input_grad(i.dys, i.weights, i.window, tuple(i.x.shape[2:])),
    },
    "wgrad": {
        "vendor": lambda i: vendor_backward(i, i.dys, [False, True, False]),
        "triton": lambda i: triton_conv.weight_grads(i.x, i.dys, i.weights, i.window),
    },
}
# Phase → its contenders.
PHASES: dict[str, Contenders] = {
    **CONVOLUTIONS,
    "second moments": {
        "vendor": lambda i: second_moments(autocorrelation._plain, i),
        "triton": lambda i: second_moments(triton_autocorrelation.cross_correlation, i),
    },
    "batch norms": {
        "vendor": vendor_batch_norms,
        "triton": lambda i: triton_bn_sum.bn_sum_forward(i.dys, i.gammas, i.betas, i.eps, None),
    },
}

# Maps that a memory-bound phase reads and writes at the least; the others are bound by multiply-adds.
MAPS_MOVED = {"batch norms": 7, **{f"depthwise {phase}": 4 for phase in CONVOLUTIONS}}


def eager_step(i: Inputs, branches: int = 3) -> tuple[Tensor, ...]:
    """The block's definition under autograd; branches=1 is the plain convolution and batch norm."""
    x = i.x.detach().requires_grad_()
    leaves = [t.detach().requires_grad_() for ts in (i.weights, i.gammas, i.betas) for t in ts[:branches]]
    weights, gammas, betas = (leaves[n * branches : (n + 1) * branches] for n in range(3))
    out: Tensor | None = None
    for w, p, g, b, e in zip(weights, PADDINGS, gammas, betas, i.eps, strict=False):
        y = F.batch_norm(F.conv2d(x, w, None, 1, p), None, None, g, b, True, 0.0, e)
        out = y if out is None else out + y
    assert out is not None
    return torch.autograd.grad(out, [x, *leaves], i.grad)


def triton_step(i: Inputs) -> object:
    """Every phase by Triton: 3 launches forward, 6 backward at most."""
    _, ys, norms = triton_conv.block_forward(i.x, i.weights, i.gammas, i.betas, i.eps, i.window)
    triton_bn_sum.bn_sum_backward_(i.grad, ys, norms.means, norms.rstds, i.gammas, [True] * 3)
    dx = triton_conv.input_grad(ys, i.weights, i.window, tuple(i.x.shape[2:]))
    return dx, triton_conv.weight_grads(i.x, ys, i.weights, i.window)


def mixed_step(i: Inputs) -> object:
    """Vendor convolutions between the Triton batch-norm passes."""
    ys = vendor_conv(i)
    _, means, _, rstds = triton_bn_sum.bn_sum_forward(ys, i.gammas, i.betas, i.eps, None)
    triton_bn_sum.bn_sum_backward_(i.grad, ys, means, rstds, i.gammas, [True] * 3)
    return vendor_backward(i, ys, [True, True, False])


STEPS: dict[str, Callable[[Inputs], object]] = {
    "eager": eager_step,
    "plain conv+bn": lambda i: eager_step(i, 1),
    "triton": triton_step,
    "vendor convs, triton bn": mixed_step,
}


class Suite:
    """One run: what to measure on, what was found, when to stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.out = torch.device(args.device), args.out
        self.shapes, self.dtypes = args.shapes, [DTYPES[name] for name in args.dtypes]
        self.end, self.slice, self.rounds = time.monotonic() + args.seconds, args.slice, args.rounds
        self.report, self.text = (
            harness.Report(self.device),
            [f"# GPU suite on {machine.device_name(self.device)}\n"],
        )
        self.out.mkdir(parents=True, exist_ok=True)

    def say(self, *lines: str) -> None:
        """Prints, and writes both files anew: an interrupted run leaves what it found."""
        print(*lines, sep="\n", flush=True)
        self.text += lines
        (self.out / "gpu_suite.md").write_text("\n".join(self.text) + "\n")
        self.report.write_csv(self.out / "gpu_suite.csv")

    def late(self, what: str) -> bool:
        """Whether the time is up, said once for what is left out."""
        if time.monotonic() < self.end:
            return False
        self.say(f"\nOut of time: left out {what} and what follows it.")
        return True

    def problems(self, depthwise: bool = False) -> Iterator[tuple[str, torch.dtype, list[Inputs]]]:
        """(name, dtype, input sets beyond the cache) of every shape; depthwise: with one channel a group."""
        for dtype in self.dtypes:
            for N, C, H in self.shapes:
                nbytes = 4 * N * C * H * H * dtype.itemsize
                sets = harness.sets_beyond_cache(nbytes, self.device, most=8 if self.device.type == "cuda" else 1)
                yield (
                    f"{N}x{C}x{H}x{H}",
                    dtype,
                    [Inputs(N, C, H, dtype, self.device, depthwise) for _ in range(sets)],
                )

    def measure(self, contenders: dict[str, Callable[[Inputs], object]], sets: list[Inputs]) -> dict[str, float]:
        """Median milliseconds; rows go to the report by the caller."""
        calls = {name: [lambda i=i, f=f: f(i) for i in sets] for name, f in contenders.items()}
        return harness.measure(calls, self.device, warm_up=self.slice / 4, seconds=self.slice, least=self.rounds)

    def equivalence(self) -> bool:
        """Every problem of the tests, in every dtype, by the tests' rule; True when all pass."""
        faults = []
        problems = [*PROBLEMS, *DEPTHWISE]
        for problem in problems:
            for dtype in DTYPES.values():
                t = Tensors(problem, dtype, self.device)
                true, eager = t.truth(), t.eager()
                for name, config in (("small tiles", SMALL), ("table", None)):
                    for key, got in step(t, config).items():
                        allowed = max(2 * rel(eager[key], true[key]), FLOORS[dtype])
                        if not (error := rel(got, true[key])) <= allowed:
                            faults.append((str(problem), str(dtype), name, key, error, allowed))
        self.say(
            "\n## Equivalence with float64\n",
            f"{len(problems)} problems × {len(DTYPES)} dtypes: {len(faults)} faults",
        )
        if faults:
            self.say(harness.table(("problem", "dtype", "tiles", "tensor", "error", "allowed"), faults))
        return not faults

    def ceilings(self) -> tuple[float, dict[torch.dtype, float]]:
        """(GB/s of a copy, TFLOP/s of a square matrix product in each dtype), measured now."""
        nbytes = 2**30 if self.device.type == "cuda" else 2**20
        n = 8192 if self.device.type == "cuda" else 64
        times = harness.measure({"copy": harness.copy_calls(nbytes, self.device)}, self.device, seconds=self.slice)
        bandwidth = nbytes / times["copy"].p50 / 1e6
        rates = {}
        for dtype in self.dtypes:
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            spent = harness.measure({"mm": [lambda a=a, b=b: a @ b]}, self.device, seconds=self.slice)["mm"].p50
            rates[dtype] = 2 * n**3 / spent / 1e9
        rows = [("copy", "GB/s", bandwidth), *((str(d), "TFLOP/s", r) for d, r in rates.items())]
        self.say("\n## Ceilings, measured in this run\n", harness.table(("what", "unit", "rate"), rows))
        return bandwidth, rates

    def steps(self) -> None:
        """Whole steps, forward and backward: ours against eager in channels_last and the plain network."""
        self.say("\n## One step, ms (channels_last, cudnn.benchmark on)\n")
        rows = []
        for shape, dtype, sets in self.problems():
            if self.late(f"steps from {shape} {dtype}"):
                break
            found = self.measure(STEPS, sets)
            for name, samples in found.items():
                self.report.add(name, "step", shape, dtype, "channels_last", "time_ms", samples)
            best = min(found["triton"].p50, found["vendor convs, triton bn"].p50)
            rows.append((shape, str(dtype), *(s.p50 for s in found.values()), found["eager"].p50 / best))
        self.say(harness.table(("shape", "dtype", *STEPS, "eager / best of ours"), rows))

    def assignments(self) -> None:
        """A block's step by every backend, and by `branches` under every assignment of its phases."""
        self.say("\n## A block's step by backend, `branches` by assignment (forward dgrad wgrad), ms\n")
        rows = []
        for (N, C, H), dtype in itertools.product(self.shapes, self.dtypes):
            name = f"{N}x{C}x{H}x{H}"
            if self.late(f"assignments from {name} {dtype}"):
                break
            norms, maps = (True,) * len(BRANCHES), (dtype, dtype, self.device.type, True, True)
            problem = Problem((N, C, H, H), C, Geometry.make(3, padding=1), BRANCHES, "branch", norms, *maps)
            scratch = stopwatch.Scratch(problem, False, self.device)
            calls = {c.NAME: [functools.partial(scratch.run, c)] for c in planner.contenders(problem)}
            found = harness.measure(
                calls, self.device, warm_up=self.slice / 4, seconds=self.slice, least=self.rounds
            )
            for contender, samples in found.items():
                self.report.add(contender, "block step", name, dtype, "channels_last", "time_ms", samples)
            chosen = phases.label(phases.predicted_best(problem))
            assigned = [phases.label(assignment) for assignment in phases.assignments(problem)]
            best = min(assigned, key=lambda label: found[label].p50)
            times = (found[label].p50 for label in (phases.label(phases.ALL_VENDOR), chosen, best))
            rows.append((name, str(dtype), found["eager"].p50, chosen, best, *times))
        header = ("shape", "dtype", "eager", "predicted best", "best", "all vendor's", "predicted's", "best's")
        self.say(harness.table(header, rows))

    def phases(self, bandwidth: float, rates: dict[torch.dtype, float]) -> None:
        """Each phase by Triton and by the vendor, and the share of the ceiling it reaches."""
        rows = []
        for depthwise, contenders in ((False, PHASES), (True, CONVOLUTIONS)):
            for shape, dtype, sets in self.problems(depthwise):
                if self.late(f"phases from {shape} {dtype}{' depthwise' * depthwise}"):
                    break
                for phase, calls in contenders.items():
                    name = f"depthwise {phase}" if depthwise else phase
                    found = self.measure(calls, sets)
                    for contender, samples in found.items():
                        self.report.add(contender, name, shape, dtype, "channels_last", "time_ms", samples)
                    vendor, spent = found["vendor"].p50, found["triton"].p50
                    if maps := MAPS_MOVED.get(name):
                        share = maps * sets[0].map_bytes / spent / 1e6 / bandwidth
                    else:
                        taps = len(SHIFTS) if phase == "second moments" else 15
                        share = 2 * taps * sets[0].x.numel() * sets[0].x.shape[1] / spent / 1e9 / rates[dtype]
                    rows.append((shape, str(dtype), name, vendor, spent, vendor / spent, share))
        header = ("shape", "dtype", "phase", "vendor", "triton", "vendor / triton", "triton / ceiling")
        self.say("\n## Phases, ms\n", harness.table(header, rows))

    def tune(self) -> None:
        """Every configuration of the table on every shape, against the one that `choose` takes."""
        self.say(
            "\n## Configurations: rows × output channels × input channels, warps, stages, registers at most; ms\n"
        )
        family = 90 if self.device.type == "cpu" else configs.family(torch.cuda.get_device_capability(self.device))
        rows = []
        for shape, dtype, sets in self.problems():
            if self.late(f"configurations from {shape} {dtype}"):
                break
            x, mode = sets[0].x, "half" if dtype != torch.float32 else "tf32"
            calls = {
                "conv": lambda i, c: triton_conv.conv_forward(i.x, i.weights, i.window, config=c),
                "dgrad": lambda i, c: triton_conv.input_grad(
                    i.dys, i.weights, i.window, tuple(i.x.shape[2:]), config=c
                ),
                "wgrad": lambda i, c: triton_conv.weight_grads(i.x, i.dys, i.weights, i.window, config=c),
            }
            for kind, call in calls.items():
                C, M = x.shape[1], x.numel() // x.shape[1]
                chosen = configs.choose(kind, family, mode, False, M, C, C, 1)
                tried = dict.fromkeys([chosen, *configs.variants(kind, family, mode)])
                contenders = {str(tuple(c)): lambda i, c=c, call=call: call(i, c) for c in tried}
                found = self.measure(contenders, sets)
                for name, samples in found.items():
                    self.report.add(
                        name, f"{kind} configuration", shape, dtype, "channels_last", "time_ms", samples
                    )
                best = min(found, key=lambda name: found[name].p50)
                times = (found[str(tuple(chosen))].p50, found[best].p50)
                rows.append((shape, str(dtype), kind, str(tuple(chosen)), times[0], best, times[1]))
        header = ("shape", "dtype", "kernel", "chosen", "chosen's", "best", "best's")
        self.say(harness.table(header, rows))


def shape(text: str) -> tuple[int, int, int]:
    """NxCxH."""
    N, C, H = map(int, text.split("x"))
    return N, C, H


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu serves to try the suite in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=500, help="stop starting measurements after this long")
    parser.add_argument("--slice", type=float, default=0.5, help="seconds a group of contenders is timed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds timed even if they take longer than that")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="NxCxH")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bf16", "fp32"))
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    suite = Suite(args)
    right = suite.equivalence()
    ceilings = suite.ceilings()
    suite.steps()
    suite.assignments()
    suite.phases(*ceilings)
    suite.tune()
    suite.say(f"\nCSV: {suite.out / 'gpu_suite.csv'}")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
