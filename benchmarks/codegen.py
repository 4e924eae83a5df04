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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from acnet_kernels.errors import UserError
from acnet_kernels.geometry import Taps
from acnet_kernels.kernels import (
    autocorrelation,
    bn_sum,
    configs,
    conv,
    depthwise,
    depthwise_algebra,
    depthwise_moments,
    dgrad,
    epilogue,
    rounding,
    wgrad,
)
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
PASSES = (
    depthwise_moments.autocorrelate,
    depthwise_moments.convolve,
    depthwise_moments.correlate,
    depthwise_moments.input_gradient,
)
ALGEBRA = (depthwise_algebra.prepare, depthwise_algebra.differentiate, depthwise_algebra.correct)
STREAMING = (bn_sum.statistics, bn_sum.apply, bn_sum.reduce_grad, bn_sum.apply_grad)
MERGING = (bn_sum.merge_statistics, bn_sum.merge_grad, wgrad.sum_splits)
FOLLOWING = ("", "relu", "relu6", "hardswish", "silu")  # activations; with one, a residual too
# Of a multiprocessor: registers, threads, programs, bytes of shared memory (a KB a program is the system's).
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
STREAMED = (4, 3, None)  # Triton's own warps and stages
REDUCED = (*STREAMED[:2], configs.ALL_REGISTERS)


def window_of(kernel: int) -> Window:
    """ACNet's k×k block, padded to keep its input's size: all taps, the centre row's, the centre column's."""
    half = kernel // 2
    branches = (Taps(0, 0, kernel, kernel), Taps(half, 0, 1, kernel), Taps(0, half, kernel, 1))
    return Window(kernel, kernel, 1, 1, half, half, 1, 1, 1, branches)


WINDOW = window_of(3)
ANY = dict.fromkeys(("C", "K", "CG", "KG"), "i32")
WHOLE_VECTORS = "channels in multiples of 16 bytes"
EVEN = {**ANY, "VECTOR_C": 2, "VECTOR_K": 2}
# Ways a problem may differ from the plain one (3×3, stride 1, channels in multiples of 16, channels_last weights),
# and the kernels that it makes different.
VARIATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stride 2": ({"WINDOW": WINDOW._replace(stride_h=2, stride_w=2)}, ("dgrad",)),
    "5x5": ({"WINDOW": window_of(5)}, ("conv",)),
    "contiguous weights": ({"CHANNELS_LAST": False}, ("conv", "dgrad")),
    "statistics alone": ({"STORE": False}, ("conv",)),
    "even channels": (EVEN, configs.KINDS),
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
    maps = (f"*{dtype}",) * 3
    arguments = {
        "x_ptr": f"*{dtype}",
        "dx_ptr": f"*{dtype}",
        "partial_ptr": "*fp32",
        "weights": maps,
        "ys": maps,
        "dys": maps,
        "dws": ("*fp32",) * 3,
        **dict.fromkeys(("N", "M", "TILES", "ROWS", "STRIDE", "H", "W", "OH", "OW"), "i32"),
        **dict.fromkeys(ANY, "i32:16"),
        "WINDOW": WINDOW,
        "CHANNELS_LAST": True,
        "REDUCE_K": mode == "tf32",
        "STORE": True,
        "VECTOR_C": 1,
        "VECTOR_K": 1,
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
        vectors = {**ANY, **dict.fromkeys(("VECTOR_C", "VECTOR_K"), configs.VECTORS[mode][0])}
        widest = conv_case(kind, arch, dtype, mode, table[arch][0])
        yield replace(widest, variation=WHOLE_VECTORS, arguments={**widest.arguments, **vectors})
        for other in others:
            yield conv_case(kind, arch, other, mode, table[arch][0])
        for variation, (changes, kinds) in VARIATIONS.items():
            spare = "INT64_OFFSETS" in changes or "C" in changes
            if kind in kinds and (mode == "half" or (spare and changes is not EVEN)):
                config = configs.SPARE[kind, mode] if spare else table[arch][0]
                yield conv_case(kind, arch, dtype, mode, config, variation)


def bn_cases(arch: int, count: int = 3) -> Iterator[Case]:
    """The batch-norm passes over `count` maps: every channel block in every dtype; merges."""
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
        maps |= dict.fromkeys(("g_ptr", "out_ptr", "residual_ptr", "kept_ptr", "dresidual_ptr"), f"*{dtype}")
        for kernel in STREAMING:
            for activation in FOLLOWING if "ACTIVATION" in kernel.arg_names else ("",):
                smooth = epilogue.is_smooth(activation)
                if smooth and count > configs.MOST_TOGETHER:
                    continue
                missing = {} if activation else dict.fromkeys(("residual_ptr", "kept_ptr", "dresidual_ptr"))
                for K in (16, 32, 64, 128) if dtype == "bf16" else (128,):
                    name = kernel.__name__
                    is_sum = name != "statistics"
                    tile = configs.sum_tile(name, K, count, smooth) if is_sum else configs.streaming_tile(K)
                    sizes = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "ACTIVATION": activation}
                    arguments = {**common, **maps, **sizes, **missing}
                    reduced = kernel is bn_sum.reduce_grad or (kernel is bn_sum.apply_grad and smooth)
                    options = REDUCED if reduced else STREAMED
                    yield Case(name, arch, dtype, "", (*tile, *options), activation, arguments)
    for kernel in MERGING:
        sizes = {"BLOCK_T": 1024, "BLOCK": 1024, **(configs.SPLIT_BLOCKS if kernel is wgrad.sum_splits else {})}
        dws = {"dws": ("*bf16",) * count}
        yield Case(kernel.__name__, arch, "fp32", "", STREAMED, "", {**common, **dws, **sizes})


def rounding_cases(arch: int) -> Iterator[Case]:
    """Weights rounded for each kernel that takes them so, in both memory formats; then with odd channels."""
    tensors, numbers = dict.fromkeys(("weights", "rounded"), ("*fp32",) * 3), dict.fromkeys(("CG", "KG"), "i32:16")
    common = {**tensors, **numbers, "WINDOW": WINDOW, "CHANNELS_LAST": True, "BLOCK": configs.ROUND_BLOCK}
    for variation, changes in {
        "conv": {"REDUCE_K": False},
        "conv, contiguous weights": {"REDUCE_K": False, "CHANNELS_LAST": False},
        "dgrad": {"REDUCE_K": True},
        "dgrad, contiguous weights": {"REDUCE_K": True, "CHANNELS_LAST": False},
        "dgrad, any channels": {"REDUCE_K": True, **ANY},
    }.items():
        yield Case("round_to_tf32", arch, "fp32", "", STREAMED, variation, {**common, **changes})


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


# Ways a depthwise block may differ from the plain one: 3×3, stride 1, channels_last, channels in multiples of 16.
PASS_VARIATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "NCHW": {},
    "stride 2": {"WINDOW": WINDOW._replace(stride_h=2, stride_w=2, branches=())},
    "4x4": {"WINDOW": window_of(4)._replace(branches=())},
    "5x5": {"WINDOW": window_of(5)._replace(branches=())},
    "5x5, NCHW": {"WINDOW": window_of(5)._replace(branches=())},
    "5x5, float64": {"WINDOW": window_of(5)._replace(branches=()), "WIDE": True},
    "multiplier": {"KG": "i32"},
    "relu6": {"ACTIVATION": "relu6"},
    "silu": {"ACTIVATION": "silu"},
    "silu, NCHW": {"ACTIVATION": "silu"},
    "5x5, silu": {"ACTIVATION": "silu", "WINDOW": window_of(5)._replace(branches=())},
    "64-bit, any channels": {"INT64_OFFSETS": True, **ANY, "KG": "i32"},
}
# How many sums a channel has, of the passes that have any, by the side of a kernel.
SUMS = {"autocorrelate": lambda side: (2 * side - 1) ** 2 // 2 + 2, "correlate": lambda side: side**2 + 1}


def pass_case(kernel: Any, arch: int, dtype: str, channels: int, variation: str = "") -> Case:
    """A pass over a depthwise block's maps; `variation` is one of PASS_VARIATIONS."""
    name, changes = kernel.__name__, PASS_VARIATIONS[variation]
    adjacent = channels > 1 and not variation.endswith("NCHW")
    window = changes.get("WINDOW", WINDOW._replace(branches=()))
    numbers = SUMS[name](window.kernel_w) if name in SUMS else 1
    tile = configs.depthwise_pass(adjacent, channels, numbers)
    far = "i64" if changes.get("INT64_OFFSETS") else "i32"
    strides: dict[str, Any] = {}
    for image, channel, row, column in (
        ("SN", "SC", "SH", "SW"),
        ("GN", "GC", "GH", "GW"),
        ("ON", "OC", "OROW", "OCOL"),
        ("DN", "DC", "DH", "DW"),
    ):
        multiple = "" if "C" in changes else ":16"
        strides |= {image: f"{far}{multiple}", row: f"i32{multiple}", column: f"i32{multiple}", channel: 1}
        if not adjacent:
            strides |= {row: "i32", column: 1, channel: "i32"}
    maps = dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr", "dx_ptr"), f"*{dtype}")
    doubles = dict.fromkeys(("pivot_ptr", "partial_ptr"), "*fp64")
    singles = dict.fromkeys(("folded_ptr", "corrections_ptr"), "*fp32")
    sizes = dict.fromkeys(("N", "M", "RECTS", "SHARE", "H", "W", "OH", "OW"), "i32")
    after = f"*{dtype}" if "ACTIVATION" in changes else None
    arguments = {
        **maps,
        **dict.fromkeys(("residual_ptr", "kept_ptr", "sloped_ptr"), after),
        "ACTIVATION": "",
        **doubles,
        **singles,
        **sizes,
        **strides,
        "rects_ptr": "*i32",
        **dict.fromkeys(("C", "K"), "i32:16"),
        "KG": 1,
        "WINDOW": window,
        "WIDE": False,
        "INT64_OFFSETS": False,
        "MOST_RECTS": 128 if window.kernel_w == 5 else 32,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        **changes,
    }
    return Case(name, arch, dtype, "", (*tile, *REDUCED), variation, arguments)


def pass_cases(arch: int) -> Iterator[Case]:
    """Every tile of the passes, and variations on the widest."""
    for kernel in PASSES:
        name = kernel.__name__
        sums = {"autocorrelate": ("", "4x4", "5x5"), "correlate": ("", "5x5")}.get(name, ("",))
        for variation in sums:
            for channels in (1, 64) if variation else (1, 16, 32, 64):
                yield pass_case(kernel, arch, "bf16", channels, variation)
        for dtype in ("fp16", "fp32"):
            yield pass_case(kernel, arch, dtype, 64)
        others = {"NCHW", "stride 2", "5x5", "5x5, NCHW", "multiplier", "64-bit, any channels"}
        if name == "autocorrelate":
            others |= {"5x5, float64"}
        if name in ("convolve", "correlate"):
            others |= {"relu6", "silu", "silu, NCHW", "5x5, silu"}
        for variation in sorted(others.difference(sums)):
            yield pass_case(kernel, arch, "fp32" if "NCHW" in variation else "bf16", 64, variation)


BRANCHES = {
    3: (0, 0, 3, 3, 1) * 4 + (1, 1, 1, 1, 1, 1, 1, 1, 1, 0),
    5: (0, 0, 5, 5, 1) * 4 + (2, 2, 1, 1, 1, 2, 2, 1, 1, 0),
}


def algebra_cases(arch: int) -> Iterator[Case]:
    """MobileOne's algebra, of four kernels, a 1×1 and the identity; the pivots and the merge."""
    doubles = ("pivot", "means", "variances", "rstds", "patch_sums", "sums", "products", "squares", "partial")
    common: dict[str, Any] = dict.fromkeys((f"{name}_ptr" for name in doubles), "*fp64")
    common |= dict.fromkeys(("centred_ptr", "folded_ptr", "corrections_ptr", "dgammas_ptr", "dbeta_ptr"), "*fp32")
    common |= {"x_ptr": "*bf16", "rects_ptr": "*i32", "reads_ptr": "*i32", "averages_ptr": None}
    common |= dict.fromkeys(("RECTS", "TASKS", "NUMBERS", "N", "H", "W", "SN", "SH", "SW"), "i32") | {"SC": 1}
    common |= {"M": "i32", "C": "i32:16", "K": "i32:16", "KG": 1, "eps": ("fp32",) * 6}
    vectors = dict.fromkeys(("gammas", "betas"), ("*fp32",) * 6) | dict.fromkeys(("weights", "dws"), ("*fp32",) * 5)
    switches = {"NORMED": (True,) * 6, "TOTAL": False, "STATISTICS": True, "FOLD": True, "INPUT": True}
    # RepViT's: a kernel with a batch norm of its own, another and the identity, and a batch norm after their sum.
    nested = {"NORMED": (True, False, False), "TOTAL": True, "eps": ("fp32",) * 2}
    nested |= dict.fromkeys(("gammas", "betas"), ("*fp32",) * 2)
    nested |= dict.fromkeys(("weights", "dws"), ("*fp32",) * 2)
    tile = configs.algebra_tile(1)
    pivots = {"ROWS": 16, "COLUMNS": 32, "BLOCK_K": tile}
    yield Case("channel_pivots", arch, "bf16", "", (tile, *STREAMED), "", {**common, **pivots})
    for side, variation in ((3, ""), (5, "5x5")):
        taps, shifts = configs.power_of_two(side**2), configs.power_of_two((2 * side - 1) ** 2)
        numbers = (2 * side - 1) ** 2 // 2 + 2
        block = configs.merge_block(numbers)
        sizes = {"BLOCK_T": block.tasks, "BLOCK_N": block.numbers, "BLOCK_C": block.channels}
        yield Case("merge", arch, "fp64", "", (*block, *STREAMED), variation, {**common, **sizes})
        for kernel in ALGEBRA:
            tile = configs.algebra_tile(taps)
            if kernel is depthwise_algebra.correct:
                tile = configs.correction_tile(shifts)
            sizes = {"ROWS": side, "COLUMNS": side, "TAPS": taps, "SHIFTS": shifts, "BLOCK": tile}
            arguments = {**common, **vectors, **switches, **sizes, "BRANCHES": BRANCHES[side]}
            yield Case(kernel.__name__, arch, "fp64", "", (tile, *STREAMED), variation, arguments)
            if kernel is not depthwise_algebra.correct:
                branches = BRANCHES[side][:5] + BRANCHES[side][-10:]
                arguments = {**arguments, **nested, "BRANCHES": branches}
                names = "5x5, nested" if variation else "nested"
                yield Case(kernel.__name__, arch, "fp64", "", (tile, *STREAMED), names, arguments)


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
    return [
        *conv_cases(arch),
        *rounding_cases(arch),
        *depthwise_cases(arch),
        *moments_cases(arch),
        *pass_cases(arch),
        *algebra_cases(arch),
        *bn_cases(arch),
    ]


def kernel_of(case: Case) -> Any:
    """The case's kernel."""
    small = (depthwise_moments.channel_pivots, depthwise_algebra.merge, rounding.round_to_tf32)
    kernels = (*KERNELS.values(), *DEPTHWISE.values(), *MOMENTS, *PASSES, *ALGEBRA, *small, *STREAMING, *MERGING)
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
