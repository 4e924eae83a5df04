"""What the compiler makes of every Triton kernel, without a GPU.

Compiles each kernel × configuration × dtype ahead of time for sm_80, sm_90 and sm_100, and tabulates registers and
stack a thread, shared memory, tensor-core instructions and asynchronous copies (in PTX), and how many programs a
multiprocessor holds at once by the architecture's limits. Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from acnet_kernels.errors import UserError
from acnet_kernels.geometry import Taps
from acnet_kernels.kernels import autocorrelation, bn_sum, configs, conv, depthwise, dgrad, wgrad
from acnet_kernels.kernels.configs import Config
from acnet_kernels.kernels.window import Window

from . import harness

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "tf32x3": ("fp32",)}
MATRIX_MODES = tuple(DTYPES)
KERNELS = {"conv": conv.conv_branches, "dgrad": dgrad.conv_dgrad, "wgrad": wgrad.conv_wgrad}
DEPTHWISE = {
    "conv": depthwise.depthwise_branches,
    "dgrad": depthwise.depthwise_dgrad,
    "wgrad": depthwise.depthwise_wgrad,
}
MOMENTS = (autocorrelation.cross_correlation, autocorrelation.centred_total)
STREAMING = (bn_sum.statistics, bn_sum.apply, bn_sum.reduce_grad, bn_sum.apply_grad)
MERGING = (bn_sum.merge_statistics, bn_sum.merge_grad, wgrad.sum_splits)
# Of a multiprocessor: registers, threads, programs, bytes of shared memory (a KB a program is the system's).
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
STREAMED = (4, 3, None)  # Triton's own warps and stages


def window_of(kernel: int) -> Window:
    """ACNet's k×k block, padded to keep its input's size: all taps, the centre row's, the centre column's."""
    half = kernel // 2
    branches = (Taps(0, 0, kernel, kernel), Taps(half, 0, 1, kernel), Taps(0, half, kernel, 1))
    return Window(kernel, kernel, 1, 1, half, half, 1, 1, 1, branches)


WINDOW = window_of(3)
ANY = dict.fromkeys(("C", "K", "CG", "KG"), "i32")
# Ways a problem may differ from the plain one (3×3, stride 1, channels in multiples of 16, channels_last weights),
# and the kernels that it makes different.
VARIATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stride 2": ({"WINDOW": WINDOW._replace(stride_h=2, stride_w=2)}, ("dgrad",)),
    "5x5": ({"WINDOW": window_of(5)}, ("conv",)),
    "contiguous weights": ({"CHANNELS_LAST": False}, ("conv", "dgrad")),
    "statistics alone": ({"STORE": False}, ("conv",)),
    "any channels": (ANY, configs.KINDS),
    "64-bit": ({"INT64_OFFSETS": True}, configs.KINDS),
    "64-bit, any channels": ({"INT64_OFFSETS": True, **ANY}, configs.KINDS),
}
# Those of the depthwise kernels; KG = 2 is a channel multiplier.
DEPTHWISE_VARIATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "stride 2": VARIATIONS["stride 2"][0],
    "5x5": VARIATIONS["5x5"][0],
    "9x9": {"WINDOW": window_of(9)},
    "statistics alone": {"STORE": False},
    "multiplier": {"KG": "i32"},
    "64-bit, any channels": {"INT64_OFFSETS": True, **ANY, "KG": "i32"},
}


@dataclass(frozen=True)
class Case:
    """One compilation. `config`: the tile (rows × output channels × input channels), warps, stages, maxnreg."""

    kernel: str
    arch: int
    dtype: str
    mode: str
    config: tuple[int | None, ...]
    variation: str = ""
    arguments: dict[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def shown(self) -> str:
        """The configuration in the table's form."""
        *tile, warps, stages, maxnreg = self.config
        limit = f" r{maxnreg}" if maxnreg else ""
        return f"{'×'.join(map(str, tile))} w{warps} s{stages}{limit}".strip()

    @property
    def dot(self) -> bool:
        """Whether the kernel has matrix products for tensor cores."""
        return self.mode in MATRIX_MODES


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    kernel: str
    arch: int
    dtype: str
    mode: str
    config: str
    variation: str
    registers: int
    stack: int
    shared: int
    tensor_core: int
    async_copies: int
    programs_per_sm: int

    def faults(self, dot: bool) -> list[str]:
        """What must not be: a stack, more shared memory than can be launched, products without tensor cores."""
        limit = configs.SHARED_LIMIT[self.arch]
        return [
            *([f"{self.stack} bytes of stack"] if self.stack else []),
            *([f"{self.shared} bytes of shared memory, {limit} can be launched"] if self.shared > limit else []),
            *(["no tensor-core instruction"] if dot and not self.tensor_core else []),
        ]


def conv_case(kind: str, arch: int, dtype: str, mode: str, config: Config, variation: str = "") -> Case:
    """A convolution kernel's compilation; pointers are aligned as the allocator aligns them."""
    maps, scalars = (f"*{dtype}",) * 3, dict.fromkeys(("C", "K", "CG", "KG"), "i32:16")
    arguments = {
        "x_ptr": f"*{dtype}",
        "dx_ptr": f"*{dtype}",
        "partial_ptr": "*fp32",
        "weights": maps,
        "ys": maps,
        "dys": maps,
        "dws": ("*fp32",) * 3,
        **dict.fromkeys(("N", "M", "TILES", "ROWS", "STRIDE", "H", "W", "OH", "OW"), "i32"),
        **scalars,
        "WINDOW": WINDOW,
        "CHANNELS_LAST": True,
        "STORE": True,
        "INT64_OFFSETS": False,
        "PRECISION": "tf32x3" if mode == "tf32x3" else "tf32",
        "INTERPRETER_FP32": False,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c,
        **(VARIATIONS[variation][0] if variation else {}),
    }
    if not arguments["STORE"]:
        arguments["ys"] = (None,) * 3
    return Case(KERNELS[kind].__name__, arch, dtype, mode, tuple(config), variation, arguments)


def conv_cases(arch: int) -> Iterator[Case]:
    """Every configuration that can be chosen, and variations on the largest tile.

    fp16 is bf16's code but for the instruction's type, so the largest tile stands for it; fp32 varies in what has a
    configuration of its own.
    """
    for (kind, mode), table in configs.TABLE.items():
        dtype, *others = DTYPES[mode]
        for config in configs.variants(kind, arch, mode):
            yield conv_case(kind, arch, dtype, mode, config)
        for other in others:
            yield conv_case(kind, arch, other, mode, table[arch][0])
        for variation, (changes, kinds) in VARIATIONS.items():
            spare = "INT64_OFFSETS" in changes or "C" in changes
            if kind in kinds and (mode == "half" or spare):
                config = configs.SPARE[kind, mode] if spare else table[arch][0]
                yield conv_case(kind, arch, dtype, mode, config, variation)


def bn_cases(arch: int, count: int = 3) -> Iterator[Case]:
    """The batch-norm passes over `count` maps: every channel block in every dtype, and the merges."""
    scalars = dict.fromkeys(("M", "TILES", "ROWS", "SPLITS", "STRIDE"), "i32")
    scalars |= {"K": "i32:16", "B": count}
    names = ("partial", "scale", "bias", "coefficient", "dgamma", "dbeta")
    vectors = dict.fromkeys((f"{name}_ptr" for name in names), "*fp32")
    vectors |= dict.fromkeys(("mean_ptr", "var_ptr", "rstd_ptr"), "*fp64")
    tuples = dict.fromkeys(("gammas", "betas", "partials"), ("*fp32",) * count)
    tuples |= dict.fromkeys(("running_means", "running_vars"), ("*fp32",) * count)
    tuples |= dict.fromkeys(("eps", "momenta", "momenta_rest"), ("fp32",) * count)
    tuples |= {"counters": ("*i64",) * count, "shifts": (None,) * count, "sizes": ("i32",) * count}
    common = {**scalars, **vectors, **tuples}
    for dtype in ("bf16", "fp16", "fp32"):
        maps = dict.fromkeys(("ys", "dys", "dws"), (f"*{dtype}",) * count)
        maps |= dict.fromkeys(("g_ptr", "out_ptr"), f"*{dtype}")
        for kernel in STREAMING:
            for K in (16, 32, 64, 128) if dtype == "bf16" else (128,):
                tile = configs.streaming_tile(K)
                sizes = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
                yield Case(kernel.__name__, arch, dtype, "", (*tile, *STREAMED), "", {**common, **maps, **sizes})
    for kernel in MERGING:
        sizes = {"BLOCK_T": 256, "BLOCK": 1024}
        dws = {"dws": ("*bf16",) * count}
        yield Case(kernel.__name__, arch, "fp32", "", STREAMED, "", {**common, **dws, **sizes})


def depthwise_case(kind: str, arch: int, dtype: str, channels: int, variation: str = "") -> Case:
    """A depthwise kernel's compilation on `channels` channels; `variation` is one of DEPTHWISE_VARIATIONS."""
    changes = DEPTHWISE_VARIATIONS[variation]
    config = configs.depthwise(kind, channels, changes.get("WINDOW", WINDOW).kernel_w)
    plain = conv_case(kind, arch, dtype, "half", config).arguments
    arguments = {**plain, "KG": 1, **changes}
    if not arguments["STORE"]:
        arguments["ys"] = (None,) * 3
    without_c = (*config[:2], *config[3:])
    return Case(DEPTHWISE[kind].__name__, arch, dtype, "", without_c, variation, arguments)


def depthwise_cases(arch: int) -> Iterator[Case]:
    """Every channel block and window of the depthwise kernels, and other variations on the widest block."""
    for kind in DEPTHWISE:
        for channels in (16, 32, 64):
            for window in ("", "5x5", "9x9"):
                yield depthwise_case(kind, arch, "bf16", channels, window)
        for dtype in ("fp16", "fp32"):
            yield depthwise_case(kind, arch, dtype, 64)
        for variation in ("stride 2", "multiplier", "64-bit, any channels"):
            yield depthwise_case(kind, arch, "bf16", 64, variation)
    yield depthwise_case("conv", arch, "bf16", 64, "statistics alone")


def moments_cases(arch: int) -> Iterator[Case]:
    """Second moments: every configuration in its dtypes, with odd channels and 64-bit offsets too."""
    numbers = ("M", "ROWS", "STRIDE", "FIRST", "ROW", "COL", "WIDTH", "H", "W", "N", "PIXELS")
    pointers = ("x_pivot_ptr", "y_pivot_ptr", "pivot_ptr", "products_ptr", "total_ptr")
    common = {**dict.fromkeys(numbers, "i32"), **dict.fromkeys(pointers, "*fp32")}
    common |= {**dict.fromkeys(("C", "K", "CG", "KG"), "i32:16"), "BLOCK": 1024}
    common |= {"INT64_OFFSETS": False, "INTERPRETER_FP32": False}
    for mode, table in configs.CORRELATION.items():
        for dtype in ("bf16", "fp16") if mode == "half" else ("fp32",):
            maps = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            for config in table:
                blocks = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_C": config.block_c}
                odd = {name: VARIATIONS[name][0] for name in ("any channels", "64-bit, any channels")}
                spare = dtype != "fp16" and config in (configs.correlation(mode, True, c, c) for c in (16, 64))
                for variation, changes in {"": {}, **(odd if spare else {})}.items():
                    arguments = {**common, **maps, **blocks, **changes}
                    yield Case("cross_correlation", arch, dtype, mode, tuple(config), variation, arguments)
            yield Case("centred_total", arch, dtype, "", (1024, *STREAMED), "", {**common, **maps})


def cases(arch: int) -> list[Case]:
    """Everything compiled for an architecture."""
    return [*conv_cases(arch), *depthwise_cases(arch), *moments_cases(arch), *bn_cases(arch)]


def kernel_of(case: Case) -> Any:
    """The case's kernel."""
    kernels = (*KERNELS.values(), *DEPTHWISE.values(), *MOMENTS, *STREAMING, *MERGING)
    return next(f for f in kernels if f.__name__ == case.kernel)


def source(case: Case) -> ASTSource:
    """The case as Triton's compiler takes it: types, compile-time constants, alignments."""
    kernel = kernel_of(case)
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    compile_time = {p.name for p in kernel.params if p.is_constexpr}

    def signature(name: str, path: tuple[int, ...], value: Any) -> Any:
        if value is None or name in compile_time or value == 1:  # a launch makes a number of 1 a constant
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(signature(name, (*path, i), v) for i, v in enumerate(value))
        if value.startswith("*") or value.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix(":16")

    types = {n: signature(n, (i,), case.arguments[n]) for i, n in enumerate(kernel.arg_names)}
    return ASTSource(kernel, types, constants, attributes)


def compile_case(case: Case) -> Report:
    """Compiles a case and reads the result."""
    target = GPUTarget("cuda", case.arch, 32)
    options = dict(zip(("num_warps", "num_stages", "maxnreg"), case.config[-3:], strict=True))
    made = triton.compile(source(case), target=target, options=options)
    registers, stack = resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    shared, threads = made.metadata.shared, made.metadata.num_warps * 32
    fit = [
        PROGRAMS,
        THREADS // threads,
        REGISTERS // (-(-registers // 8) * 8 * threads),
        SHARED[case.arch] // (shared + 1024),
    ]
    return Report(
        case.kernel,
        case.arch,
        case.dtype,
        case.mode,
        case.shown,
        case.variation,
        registers,
        stack,
        shared,
        len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", ptx)),
        min(fit),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread, by the cuobjdump that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", text)[0]), int(re.findall(r"STACK:(\d+)", text)[0])


def compile_all(chosen: list[Case], jobs: int) -> list[Report]:
    """compile_case of each, in processes of their own."""
    if jobs == 1:
        return [compile_case(case) for case in chosen]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.map(compile_case, chosen, chunksize=1)


def write(reports: list[Report], path: Path) -> None:
    """The table as CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Report)])
        table.writeheader()
        table.writerows(asdict(r) for r in reports)


def run(options: argparse.Namespace) -> list[Path]:
    """Compiles what the options choose, prints and writes the table; UserError where one has a fault."""
    chosen = [
        c
        for arch in options.arch or configs.FAMILIES
        for c in cases(arch)
        if options.kernel in (None, c.kernel) and options.variation in (None, c.variation)
    ]
    reports = compile_all(chosen, options.jobs)
    rows = [[str(value) for value in asdict(report).values()] for report in reports]
    print(f"Triton {triton.__version__}: {len(reports)} compilations")
    print(harness.table([f.name for f in fields(Report)], rows))
    path = options.out / f"codegen-triton-{'.'.join(triton.__version__.split('.')[:2])}.csv"
    write(reports, path)
    faulty = [(r, f) for c, r in zip(chosen, reports, strict=True) if (f := r.faults(c.dot))]
    for report, faults in faulty:
        print("FAULT", report, "; ".join(faults))
    if faulty:
        raise UserError(f"{len(faulty)} of {len(reports)} compilations have a fault: see {path}")
    return [path]
