"""What a quarter of an hour on a GPU must answer, a part a process: benchmarks/gpu_first_run.py runs them in order.

Are the Triton phases right on the device; how long does each take beside the library's; does a whole block win, a
whole network; is the fold as fast as a copy; which configuration is best. Every row is in gpu_suite.csv when it is
measured: `graph_ms` is the device's time, of a replayed CUDA graph, and `time_ms` the host's clock, with launches
from Python. A contender that fails leaves a row that says so. What the time does not reach is said, too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from acnet_kernels import Geometry, convert, doctor, tune
from acnet_kernels.backends import branches, timer
from acnet_kernels.kernels import configs
from acnet_kernels.ops import autocorrelation, triton_autocorrelation, triton_bn_sum, triton_conv
from acnet_kernels.steps import depthwise, packed

from . import ceilings, codegen, contenders, fusion, harness, network, stand_in
from .shapes import Shape

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "triton")]
from oracle import FLOORS, rel  # noqa: E402 - the tests' own rule, not a second one
from problems import DEPTHWISE, PROBLEMS, SMALL, TF32_FLOOR, Tensors, step  # noqa: E402

CSV = "gpu_suite.csv"
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp16": torch.float16, "fp32": torch.float32}


def square(N: int, C: int, H: int, **options: int) -> Shape:
    """A block that keeps its C channels, on N×C×H×H."""
    return Shape("", N, C, C, H, H, **options)


# ImageNet's stages, the CIFAR network's, and one of a small batch.
SHAPES = (
    square(32, 256, 14),
    square(32, 64, 56),
    square(128, 16, 32),
    square(32, 128, 28),
    square(128, 32, 16),
    square(128, 64, 8),
    square(32, 512, 7),
    square(8, 64, 56),
)
# MobileOne-S0's depthwise layers, one a stage.
DEPTHWISE_SHAPES = tuple(square(64, C, H, groups=C) for C, H in ((48, 56), (128, 28), (256, 14), (1024, 7)))
# Between them they launch every kernel, with and without split sums.
EQUIVALENT = ("primes", "several_tiles", "stride", "kernel_5", "no_row", "depthwise", "depthwise_5", "one_channel")
PADDINGS = ((1, 1), (0, 1), (1, 0))  # square, hor, ver as the library computes them
SIZES = ((3, 3), (1, 3), (3, 1))
# Contenders that no kernel of ours is part of.
LIBRARY = ("library", "eager", "conv+bn", "3k", "compile", "plain")


@contextlib.contextmanager
def precision(kind: str) -> Iterator[torch.dtype]:
    """The dtype that a name of DTYPES stands for, while TF32 is allowed for 'tf32' and for no other."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = kind == "tf32"
    try:
        yield DTYPES[kind]
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


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
        self.window = codegen.WINDOW._replace(groups=groups)


# The half plane of shifts that a 3×3 window's second moments need.
SHIFTS = [(row, column) for row in range(3) for column in range(-2 if row else 0, 3)]


def library_conv(i: Inputs) -> list[Tensor]:
    return [F.conv2d(i.x, w, None, 1, p, 1, i.window.groups) for w, p in zip(i.weights, PADDINGS, strict=True)]


def library_backward(i: Inputs, dys: list[Tensor], mask: list[bool]) -> list[tuple[Tensor | None, ...]]:
    """(dx, dW, None) of each branch, those that mask wants."""
    backward = torch.ops.aten.convolution_backward
    return [
        backward(dy, i.x, w, None, [1, 1], list(p), [1, 1], False, [0, 0], i.window.groups, mask)
        for dy, w, p in zip(dys, i.weights, PADDINGS, strict=True)
    ]


def library_dgrad(i: Inputs) -> Tensor:
    parts = [dx for dx, _, _ in library_backward(i, i.dys, [True, False, False]) if dx is not None]
    return parts[0].add_(parts[1]).add_(parts[2])


def library_batch_norms(i: Inputs) -> Tensor:
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
        "library": library_conv,
        "triton": lambda i: triton_conv.conv_forward(i.x, i.weights, i.window),
    },
    "dgrad": {
        "library": library_dgrad,
        "triton": lambda i: triton_conv.input_grad(i.dys, i.weights, i.window, tuple(i.x.shape[2:])),
    },
    "wgrad": {
        "library": lambda i: library_backward(i, i.dys, [False, True, False]),
        "triton": lambda i: triton_conv.weight_grads(i.x, i.dys, i.weights, i.window),
    },
}
# Phase → its contenders.
PHASES: dict[str, Contenders] = {
    **CONVOLUTIONS,
    "second moments": {
        "library": lambda i: second_moments(autocorrelation._plain, i),
        "triton": lambda i: second_moments(triton_autocorrelation.cross_correlation, i),
    },
    "batch norms": {
        "library": library_batch_norms,
        "triton": lambda i: triton_bn_sum.bn_sum_forward(i.dys, i.gammas, i.betas, i.eps, None),
    },
}


class Suite:
    """One part's run: what to measure on, where the rows go, when to stop.

    Args:
        out: the directory of gpu_suite.csv.
        shapes, dtypes: of SHAPES and DTYPES; what comes first is measured first.
        until: seconds of the epoch after which no measurement begins.
        share: (i, n): nothing is timed; of every n-th group of contenders, from the i-th on, ours run once, so that
            all kernels are compiled.
        device: None is the GPU's, or the stand-in's.
    """

    def __init__(
        self,
        out: Path,
        shapes: Sequence[Shape] = SHAPES,
        dtypes: Sequence[str] = ("bf16", "tf32"),
        until: float = math.inf,
        share: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        # On the stand-in a call is enough; on a device a group of contenders has this long, by each clock.
        self.rehearsed = stand_in.mode() is not None
        self.slice, self.rounds = (0.0, 1) if self.rehearsed else (0.25, 5)
        self.device = device or torch.device("cpu" if self.rehearsed else "cuda")
        self.shapes, self.dtypes, self.until, self.share = shapes, dtypes, until, share
        self.groups = 0
        out.mkdir(parents=True, exist_ok=True)
        self.rows = harness.Report(self.device, out / CSV)

    def mine(self) -> bool:
        """Whether the next group of contenders is of this run's share."""
        self.groups += 1
        return self.share is None or self.groups % self.share[1] == self.share[0]

    def late(self, what: str) -> bool:
        """Whether the time is up, said for what is left out."""
        if time.time() < self.until:
            return False
        print(f"out of time: left out {what} and what follows it", flush=True)
        return True

    def attempt(self, what: tuple[str, str, str, str], call: Callable[[], object]) -> bool:
        """Whether the call returned. Otherwise a row says that `what` (contender, mode, shape, dtype) failed."""
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            self.rows.add(*what, "channels_last", "failed", math.nan)
            print("FAILED", *what, f"{type(error).__name__}: {str(error)[:500]}", flush=True)
            torch.cuda.synchronize()  # an error that stays ends this part: nothing on the device would run any more
            return False
        return True

    def measure(self, mode: str, shape: str, kind: str, calls: dict[str, list[Callable[[], object]]]) -> None:
        """Rows of each contender's two times a call; the calls of one, on an input set each, run in turn."""
        if not self.mine():
            return
        if self.share is not None:
            for name in [name for name in calls if name not in LIBRARY]:
                self.attempt((name, mode, shape, kind), calls[name][0])
            return
        walls: dict[str, harness.Calls] = {}
        graphs: dict[str, harness.Calls] = {}
        for name, each in calls.items():

            def all_sets(each: list[Callable[[], object]] = each) -> None:
                for call in each:
                    call()

            if not self.attempt((name, mode, shape, kind), all_sets):
                continue
            walls[name] = [all_sets]

            def capture(name: str = name, each: list[Callable[[], object]] = each) -> None:
                graphs[name] = [harness.graphed(*each)]

            self.attempt((f"{name}, graph", mode, shape, kind), capture)
        for metric, ways, clock in (
            ("graph_ms", graphs, harness.DeviceClock()),
            ("time_ms", walls, harness.CudaClock()),
        ):
            timing = {"warm_up": self.slice / 10, "seconds": self.slice, "least": self.rounds, "clock": clock}

            def timed(ways: dict[str, harness.Calls] = ways, metric: str = metric, timing: dict = timing) -> None:
                for name, samples in harness.measure(ways, self.device, **timing).items():
                    one = harness.Samples(tuple(t / len(calls[name]) for t in samples.values), samples.clock)
                    self.rows.add(name, mode, shape, kind, "channels_last", metric, one)

            self.attempt((f"all, {metric}", mode, shape, kind), timed)

    def problems(self, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, str, torch.dtype, int]]:
        """(shape, name of DTYPES, dtype, input sets that exceed the cache together), all within the precision."""
        for kind, shape in itertools.product(self.dtypes, shapes):
            with precision(kind) as dtype:
                nbytes = 2 * sum(t.nbytes for t in shape.tensors(dtype, "meta"))
                most = 1 if self.rehearsed else 8
                yield shape, kind, dtype, harness.sets_beyond_cache(nbytes, self.device, most)

    def first(self) -> None:
        """The machine, every kernel against float64, and how many were in Triton's cache."""
        found: Counter[bool] = Counter()
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.update([cache_hit])
        doctor.main()
        self.equivalence()
        for hit, metric in ((True, "hits"), (False, "misses")):
            print(f"Triton's cache: {found[hit]} {metric}", flush=True)
            self.rows.add("triton cache", "first", "", "", "", metric, float(found[hit]))

    def equivalence(self) -> None:
        """A row a problem and dtype: the largest error over what the tests allow; above 1 is a fault."""
        chosen = [problem for problem in (*PROBLEMS, *DEPTHWISE) if problem.name in EQUIVALENT]
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=torch.backends.cudnn.allow_tf32):
            for problem, kind in itertools.product(chosen, DTYPES):
                if self.late(f"equivalence from {problem} {kind}"):
                    return
                if not self.mine():
                    continue

                def check(problem: object = problem, kind: str = kind) -> None:
                    with precision("fp32"):
                        t = Tensors(problem, DTYPES[kind], self.device)
                        true, eager = t.truth(), t.eager()
                    with precision(kind):
                        runs = [step(t, SMALL), step(t, None), passes(t)]
                        if t.window.groups == t.x.shape[1]:
                            runs.append(depthwise_moments(t))
                    floor = TF32_FLOOR if kind == "tf32" else FLOORS[DTYPES[kind]]
                    worst = 0.0
                    for key, got in itertools.chain.from_iterable(run.items() for run in runs):
                        allowed = max(2 * rel(eager[key], true[key]), floor) if key in true else floor
                        share = (rel(got, true[key]) if key in true else rel(got, moments_of(t))) / allowed
                        worst = max(worst, share if share == share else math.inf)
                    if worst > 1:
                        print(f"FAULT {problem} {kind}: {worst:.1f} times the error allowed", flush=True)
                    self.rows.add("triton", "equivalence", str(problem), kind, "", "error_over_allowed", worst)

                self.attempt(("triton", "equivalence", str(problem), kind), check)

    def phases(self, shapes: Sequence[Shape] | None = None, table: dict[str, Contenders] | None = None) -> None:
        """The ceilings, then each phase by Triton and by the library."""
        if shapes is None and self.share is None:
            for kind in self.dtypes:
                with precision(kind):
                    self.ceiling(kind)
        for shape, kind, dtype, sets in self.problems(shapes or self.shapes):
            if self.late(f"phases from {shape} {kind}"):
                return
            depthwise = shape.groups > 1
            inputs = [
                Inputs(shape.batch, shape.channels, shape.height, dtype, self.device, depthwise)
                for _ in range(sets)
            ]
            for phase, ways in (table or PHASES).items():
                calls = {name: [functools.partial(way, i) for i in inputs] for name, way in ways.items()}
                self.measure(f"depthwise {phase}" if depthwise else phase, str(shape), kind, calls)

    def ceiling(self, kind: str) -> None:
        """What a copy and a matrix product reach, in the same precision as what is compared with them."""
        scratch = harness.Report(self.device)
        if self.attempt(
            ("ceilings", ceilings.MODE, "", kind),
            lambda: ceilings.measure(scratch, DTYPES[kind], self.device, max(self.slice, 0.01)),
        ):
            for row in scratch.rows:
                self.rows.add(row.contender, row.mode, row.shape, kind, row.layout, row.metric, row.p50)

    def blocks(self, shapes: Sequence[Shape] | None = None) -> None:
        """A block's step: eager, the library's peers, our backends, `branches` by assignment; compilations last."""
        names = ("branches", "moments", "recompute", "eager", "conv+bn", "3k")
        for chosen in (names, ("compile",)):
            if "compile" in chosen and (self.share is not None or shapes is not None):
                return
            for shape, kind, dtype, sets in self.problems(shapes or self.shapes):
                if self.late(f"{' '.join(chosen)} from {shape} {kind}"):
                    return

                def block(
                    shape: Shape = shape,
                    kind: str = kind,
                    dtype: torch.dtype = dtype,
                    sets: int = sets,
                    chosen: Sequence[str] = chosen,
                ) -> None:
                    calls: dict[str, list[Callable[[], object]]] = {}
                    for c in contenders.build(shape, dtype, self.device, sets, chosen):
                        if c.layout == "channels_last":
                            calls |= assigned(c) if c.name == "branches" else {c.name: c.calls("step")}
                    self.measure("block step", str(shape), kind, calls)

                self.attempt(("all", "block step", str(shape), kind), block)

    def depthwise(self) -> None:
        """Phases and steps of depthwise blocks."""
        self.phases(DEPTHWISE_SHAPES, CONVOLUTIONS)
        self.blocks(DEPTHWISE_SHAPES)

    def networks(self) -> None:
        """A training step of whole networks: eager, plain, and by the planner after tune()."""
        if self.rehearsed or self.share is not None:
            timer.WARM_UP, timer.ROUNDS, timer.SECONDS = 0, 1, 0.0
        for (name, (batch, size)), kind in itertools.product(NETWORKS.items(), self.dtypes):
            if self.late(f"networks from {name} {kind}"):
                return
            batch = 2 if self.rehearsed and self.share is None else batch
            what = f"{name} {batch}x3x{size}x{size}"
            if not self.mine():
                continue
            with precision(kind) as dtype:
                calls: dict[str, list[Callable[[], object]]] = {}

                def prepare(
                    contender: str,
                    name: str = name,
                    dtype: torch.dtype = dtype,
                    shape: tuple[int, ...] = (batch, 3, size, size),
                    calls: dict[str, list[Callable[[], object]]] = calls,
                ) -> None:
                    model = network_of(name, contender, self.device)
                    images = torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
                    labels = torch.randint(network.CLASSES, shape[:1], device=self.device)
                    if contender == "auto":
                        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                            print(tune(model, images), flush=True)
                    calls[contender] = [network.training_step(model, images, labels, dtype)]

                for contender in ("auto", "eager", "plain") if self.share is None else ("auto",):
                    self.attempt((contender, "tuning", what, kind), functools.partial(prepare, contender))
                if self.share is None:
                    self.measure("training step", what, kind, calls)

    def fold(self) -> None:
        """Folding all blocks of a network in one call of the CUDA operator, beside a copy."""
        options = argparse.Namespace(
            device=self.device, seconds=self.slice, least=self.rounds, contenders=[], quick=True
        )
        for name in list(fusion.NETWORKS)[: 1 if self.rehearsed else None]:
            if self.late(f"folds from {name}"):
                return
            call = functools.partial(fusion.measure, name, options, self.rows)
            self.attempt(("ours", "fold", name, "float32"), call)

    def configurations(self) -> None:
        """Every configuration of the table on every shape; the contender that `choose` takes is marked."""
        family, processors = triton_conv.device_family(torch.device(self.device))
        for shape, kind, dtype, sets in self.problems(self.shapes):
            mode = "half" if dtype != torch.float32 else {"tf32": "tf32", "fp32": "tf32x3"}[kind]
            inputs = [Inputs(shape.batch, shape.channels, shape.height, dtype, self.device) for _ in range(sets)]
            for phase, call in CONFIGURED.items():
                if self.late(f"configurations from {shape} {kind} {phase}"):
                    return
                C, M = shape.channels, shape.batch * shape.height * shape.width
                chosen = configs.choose(phase, family, mode, False, M, C, C, 1, processors)
                calls = {
                    f"{tuple(config)}{' chosen' * (config == chosen)}": [
                        functools.partial(call, i, config) for i in inputs
                    ]
                    for config in dict.fromkeys([chosen, *configs.variants(phase, family, mode)])
                }
                self.measure(f"{phase} configuration", str(shape), kind, calls)

    def warm(self) -> None:
        """Once each, every kernel that the other parts launch, so that none is left to compile."""
        self.equivalence()
        self.phases()
        self.blocks()
        self.depthwise()
        self.networks()
        self.configurations()


CONFIGURED: dict[str, Callable[[Inputs, configs.Config], object]] = {
    "conv": lambda i, c: triton_conv.conv_forward(i.x, i.weights, i.window, config=c),
    "dgrad": lambda i, c: triton_conv.input_grad(i.dys, i.weights, i.window, tuple(i.x.shape[2:]), config=c),
    "wgrad": lambda i, c: triton_conv.weight_grads(i.x, i.dys, i.weights, i.window, config=c),
}
# Network → batch and image size.
NETWORKS = {"resnet18": (128, 224), "resnet56": (128, 32), "mobileone_s0": (64, 224)}
PARTS: dict[str, Callable[[Suite], None]] = {
    part.__name__: part
    for part in (
        Suite.first,
        Suite.phases,
        Suite.blocks,
        Suite.depthwise,
        Suite.networks,
        Suite.fold,
        Suite.configurations,
        Suite.warm,
    )
}


def passes(t: Tensors) -> dict[str, Tensor]:
    """What `step` does not launch: the statistics of the library's maps, and second moments."""
    ys = [y.contiguous(memory_format=torch.channels_last) for name, y in t.eager().items() if name.startswith("y")]
    out = triton_bn_sum.bn_sum_forward(ys, t.gammas, t.betas, t.eps, None)[0]
    zero = torch.zeros(t.x.shape[1], device=t.x.device)
    products, _ = triton_autocorrelation.cross_correlation(t.x, zero, t.x, zero, [0, 0], [0, 1], t.window.groups)
    return {"out": out, "moments": products}


def depthwise_moments(t: Tensors) -> dict[str, Tensor]:
    """What Tensors.eager gives but for the branches' maps, by the kernels of a depthwise `moments` step."""
    p, every = t.problem, [True] * len(t.weights)
    taps = packed.pack_taps(tuple((own, True) for own in p.branches), every)
    numbers = taps, packed.pack(Geometry.make(p.kernel, **p.conv))
    of_norms = t.weights, t.gammas
    out, means, _, *kept = depthwise.on_cuda["depthwise_step"](t.x, *of_norms, t.betas, t.eps, *numbers, True)
    args = t.grad, t.x, *of_norms, [], means, *kept, None, *numbers, True, every, True
    dx, dws, dgammas, dbeta, _ = depthwise.on_cuda["depthwise_step_backward"](*args)
    found = {"out": out, "x": dx}
    for b, (dw, dgamma) in enumerate(zip(dws, dgammas, strict=True)):
        found |= {f"w{b}": dw, f"gamma{b}": dgamma, f"beta{b}": dbeta}
    return found


def moments_of(t: Tensors) -> Tensor:
    """The second moments of `passes` in float64."""
    x, zero = t.x.double(), torch.zeros(t.x.shape[1], device=t.x.device, dtype=torch.float64)
    return autocorrelation._plain(x, zero, x, zero, [0, 0], [0, 1], t.window.groups)[0]


def assigned(contender: contenders.Contender) -> dict[str, list[Callable[[], object]]]:
    """The step of a block of backend 'branches' under every assignment of its phases, by label."""

    def under(phases: object, call: Callable[[], object]) -> object:
        chosen, branches.phases_of = branches.phases_of, lambda *_: phases
        try:
            return call()
        finally:
            branches.phases_of = chosen

    with contender.autocasting():
        problem = contender.module.plan(contender.sets[0][0])[0]
    return {
        variant.NAME: [functools.partial(under, variant.phases, call) for call in contender.calls("step")]
        for variant in branches.variants(problem)
    }


def network_of(name: str, contender: str, device: torch.device) -> nn.Module:
    """A network of ours, or timm's with its 3×3 convolutions converted; 'plain' as it is without blocks."""
    if name in network.NETWORKS:
        return network.build(name, contender, device)
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=network.CLASSES)
    if contender != "plain":
        model = convert(model, backend=contender)
    if contender == "eager":
        model = network.with_blocks(model, contenders.Modules)
    return model.to(device, memory_format=torch.channels_last)


def warm_together(processes: int, rest: list[str]) -> int:
    """Runs the part `warm` in so many processes, a share each; 0, or the exit status of one that failed."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "warm", *rest]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "--share", str(i), str(processes)], env=environment) for i in range(processes)
    ]
    return max(process.wait() for process in running)


def main(argv: list[str] | None = None) -> int:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--until", type=float, default=math.inf, help="begin no measurement later (epoch)")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="NxCxHxW->K")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bf16", "tf32"))
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="of warm: every N-th group from I")
    parser.add_argument("--processes", type=int, help="of warm: share the work among so many")
    args = parser.parse_args(argv)
    if args.processes:
        return warm_together(args.processes, ["--out", str(args.out), "--until", str(args.until)])
    if (how := stand_in.mode()) is not None:
        stand_in.install(how)
    share = (args.share or [0, 1]) if args.part == "warm" else None
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        PARTS[args.part](Suite(args.out, args.shapes, args.dtypes, args.until, share and tuple(share)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
