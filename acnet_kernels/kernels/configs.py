"""Launch configurations: a small table per architecture, each entry checked ahead of time by benchmarks/codegen.py.

The rule needs no warm-up and sees shapes and the number of multiprocessors alone: the same problem takes the same
configuration, and gives the same bits, in every run on one model of device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

KINDS = ("conv", "dgrad", "wgrad")
FAMILIES = (80, 90, 100)
# Bytes of shared memory one program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Config(NamedTuple):
    """Tile sizes over pixels, output channels and input channels, and how a program is compiled.

    The reduced axis is input channels in conv, output channels in dgrad, pixels in wgrad. maxnreg: registers a
    thread may have, None where ptxas chooses well.
    """

    block_m: int
    block_k: int
    block_c: int
    warps: int
    stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """How a program is compiled, as Triton names it."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.maxnreg}


class Tile(NamedTuple):
    """Tile of the memory-bound passes: rows × channels."""

    block_m: int
    block_k: int


# What a kernel computes with: fp16 or bf16; fp32 in one TF32 product; fp32 in three.
MODES = ("half", "tf32", "tf32x3")

# maxnreg's upper end. Left to itself, ptxas sometimes puts 8 to 40 bytes on the stack rather than take more
# registers and hold one program less at a time; told a limit, even the hardware's own, it takes them.
ALL_REGISTERS = _ALL = 255

_NARROW = Config(128, 16, 16, 4, 4)
_DGRAD = (Config(128, 64, 64, 8, 3), Config(128, 32, 32, 4, 4), _NARROW)
_DGRAD_WIDEST = Config(128, 64, 128, 8, 3)
_DGRAD_TF32 = (Config(128, 32, 64, 8, 3), Config(128, 32, 32, 4, 4), _NARROW)
# Warps of wgrad that every multiprocessor holds at once, of its tiles below.
WARPS = {"half": 16, "tf32": 16, "tf32x3": 12}
_WGRAD = (Config(64, 64, 64, 4, 3), Config(64, 32, 32, 4, 3), Config(64, 16, 16, 4, 4))
_WGRAD_TF32 = (Config(32, 64, 64, 4, 3), Config(64, 32, 32, 4, 3), Config(32, 16, 16, 4, 3))
_WGRAD_THIRD = (Config(32, 32, 32, 4, 3), Config(32, 16, 16, 4, 3))

# (kind, mode) → family → configurations, the widest block of output channels first.
TABLE: dict[tuple[str, str], dict[int, tuple[Config, ...]]] = {
    ("conv", "half"): {
        80: (Config(64, 64, 32, 8, 3), Config(64, 32, 64, 4, 3), _NARROW),
        90: (Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(128, 32, 32, 4, 4), _NARROW),
        100: (Config(128, 64, 64, 8, 3, _ALL), Config(64, 32, 64, 4, 3), Config(64, 16, 16, 4, 3)),
    },
    ("conv", "tf32"): {
        80: (Config(64, 32, 32, 4, 3), _NARROW),
        90: (Config(128, 64, 32, 8, 3), Config(64, 32, 32, 4, 3), _NARROW),
        100: (Config(64, 64, 32, 8, 3, _ALL), Config(64, 32, 32, 4, 3, _ALL), Config(128, 16, 16, 4, 4, _ALL)),
    },
    ("conv", "tf32x3"): {
        80: (Config(64, 32, 16, 4, 3),),
        90: (Config(64, 32, 32, 4, 3), Config(64, 16, 16, 4, 3)),
        100: (Config(64, 32, 32, 4, 3), Config(64, 16, 16, 4, 3, _ALL)),
    },
    ("dgrad", "half"): {
        80: (*_DGRAD[:2], Config(64, 16, 16, 4, 3)),
        90: (_DGRAD_WIDEST, *_DGRAD),
        100: (_DGRAD_WIDEST, Config(128, 64, 64, 8, 3, _ALL), *_DGRAD[1:]),
    },
    ("dgrad", "tf32"): {
        80: _DGRAD_TF32,
        90: _DGRAD_TF32,
        100: (_DGRAD_TF32[0], Config(128, 32, 32, 4, 3), Config(128, 16, 16, 4, 4, _ALL)),
    },
    ("dgrad", "tf32x3"): {
        80: (Config(128, 32, 32, 8, 3),),
        90: (Config(128, 32, 32, 8, 3), Config(64, 16, 16, 4, 3)),
        100: (Config(128, 32, 32, 8, 3), Config(64, 16, 16, 4, 3, _ALL)),
    },
    ("wgrad", "half"): {
        80: (Config(32, 128, 64, 8, 3), *_WGRAD),
        90: (Config(64, 128, 128, 8, 3), *_WGRAD),
        100: (Config(64, 128, 128, 8, 3), *_WGRAD),
    },
    ("wgrad", "tf32"): {
        80: _WGRAD_TF32,
        90: _WGRAD_TF32,
        100: (Config(32, 128, 128, 8, 3), *_WGRAD_TF32),
    },
    ("wgrad", "tf32x3"): {
        80: _WGRAD_THIRD,
        90: (Config(32, 64, 64, 4, 3), *_WGRAD_THIRD),
        100: (Config(32, 64, 64, 4, 3), _WGRAD_THIRD[1]),
    },
}

# Smaller tiles, which leave fewer processors idle where there is little to do.
FEW = {
    ("conv", "half"): Config(64, 32, 64, 4, 3),
    ("dgrad", "half"): Config(64, 32, 64, 4, 3),
    ("dgrad", "tf32"): Config(64, 32, 64, 4, 3),
}

# 64-bit offsets (maps of 2³¹ elements and more), and channels that are not read 16 bytes at a time, leave registers
# for these.
SPARE = {
    ("conv", "half"): Config(64, 16, 16, 4, 3, _ALL),
    ("conv", "tf32"): Config(64, 16, 16, 4, 3, _ALL),
    ("conv", "tf32x3"): Config(64, 16, 16, 8, 3, _ALL),
    ("dgrad", "half"): Config(64, 32, 32, 8, 3),
    ("dgrad", "tf32"): Config(32, 16, 16, 4, 3, _ALL),
    ("dgrad", "tf32x3"): Config(64, 16, 16, 8, 3, _ALL),
    ("wgrad", "half"): Config(64, 16, 16, 4, 4, _ALL),
    ("wgrad", "tf32"): Config(32, 16, 16, 4, 2),
    ("wgrad", "tf32x3"): Config(16, 16, 16, 4, 2),
}


def cdiv(total: int, block: int) -> int:
    """⌈total / block⌉; triton.cdiv on the host costs several microseconds."""
    return -(-total // block)


def family(capability: tuple[int, int]) -> int:
    """The table's column for a device's compute capability; consumer Blackwell (12.x) has sm_80's instructions."""
    return {9: 90, 10: 100}.get(capability[0], 80)


def width(kind: str, config: Config) -> int:
    """Channels of the output that one program computes along its wider axis."""
    return config.block_c if kind == "dgrad" else config.block_k


def block_of(channels: int) -> int:
    """The smallest block (a power of two, 16 at the least, as tensor cores want) that holds them."""
    return max(16, 1 << (channels - 1).bit_length())


# Numbers in the 16 and in the 4 bytes that are copied at once, which asynchronous copies take; fewer they do not.
VECTORS = {"half": (8, 2), "tf32": (4, 1), "tf32x3": (4, 1)}


def vector(mode: str, channels: int) -> int:
    """How many of so many adjacent channels are copied at once."""
    return next((v for v in VECTORS[mode] if channels % v == 0), 1)


def told(mode: str, channels: int) -> int:
    """The multiple that a kernel is told of so many channels: none where Triton sees one, at fewer registers."""
    return 1 if channels % 16 == 0 else vector(mode, channels)


def choose(
    kind: str, family: int, mode: str, int64_offsets: bool, M: int, KG: int, CG: int, groups: int, processors: int
) -> Config:
    """The configuration for M output pixels and `groups` groups of KG output and CG input channels.

    int64_offsets: a map has 2³¹ elements or more. processors: the device's multiprocessors. Of the tiles that fit
    it is the one whose busiest processor loads least: so many tiles, each of nine taps of x or fifteen of dy, and
    fifteen of the weights, as in ACNet's block.
    """
    if int64_offsets or min(vector(mode, KG), vector(mode, CG)) < VECTORS[mode][0]:
        return SPARE[kind, mode]
    channels = {"conv": KG, "dgrad": CG, "wgrad": min(KG, CG)}[kind]
    options = TABLE[kind, mode][family]

    def loaded(config: Config) -> int:
        programs = groups * cdiv(M, config.block_m) * cdiv(channels, width(kind, config))
        taps = 9 if kind == "conv" else 15
        return cdiv(programs, processors) * (taps * config.block_m + 15 * width(kind, config))

    fitting = [c for c in options if width(kind, c) <= block_of(channels)] or list(options[-1:])
    few = (
        [FEW[kind, mode]] if (kind, mode) in FEW and width(kind, fitting[0]) >= width(kind, FEW[kind, mode]) else []
    )
    if kind == "wgrad":  # its pixels are split as far as it takes
        return fitting[0]
    return min(few + fitting, key=lambda c: (loaded(c), c.block_m * width(kind, c)))


def variants(kind: str, family: int, mode: str) -> list[Config]:
    """Every configuration that `choose` may return but the spare one."""
    return list(dict.fromkeys([*TABLE[kind, mode][family], FEW.get((kind, mode), TABLE[kind, mode][family][0])]))


@lru_cache(4096)
def pixel_split(M: int, programs: int, block_m: int, slots: int = 256) -> tuple[int, int]:
    """(splits, pixels of each): the fewest whose programs of equal work, `slots` at a time, end almost soonest.

    Splits are as many as fit in one wave, or 4, and of at least 4 blocks of pixels: all write their share apart.
    """
    most = max(1, min(max(slots // programs, 4), cdiv(M, 4 * block_m)))
    waves = [cdiv(programs * splits, slots) / splits for splits in range(1, most + 1)]
    wanted = next(i for i, time in enumerate(waves, 1) if time <= 1.1 * min(waves))
    rows = cdiv(max(M, 1), wanted)
    rows = cdiv(rows, block_m) * block_m
    return max(1, cdiv(M, rows)), rows


# Channels, in and out, of a tap of the weights that a program of round_to_tf32 takes.
ROUND_BLOCK = 32

# A program of wgrad.sum_splits adds so many splits' shares of so many numbers at once.
SPLIT_BLOCK = 128
SPLIT_BLOCKS = {"BLOCK_S": 16, "BLOCK": SPLIT_BLOCK}


@lru_cache(4096)
def streaming_tile(K: int) -> Tile:
    """Tile of a pass over an M×K map: a channel block that wastes few lanes yet reads long rows; 4096 elements."""
    block_k = min((128, 64, 32, 16), key=lambda b: cdiv(K, b) * b * (1 + 8 / b))
    return Tile(4096 // block_k, block_k)


MOST_TOGETHER = 3  # maps whose sums, or whose share in an activation's slope, a program's registers hold


@lru_cache(4096)
def sum_tile(kernel: str, K: int, maps: int, smooth: bool) -> Tile:
    """Tile of the pass of this name over so many M×K maps, whose registers hold several of them.

    smooth: the activation's slope is computed from all of them.
    """
    tile = streaming_tile(K)
    parts = {"apply": 1 if maps <= MOST_TOGETHER else 4, "reduce_grad": 2, "apply_grad": 2 if smooth else 1}[kernel]
    return Tile(tile.block_m // parts, tile.block_k)


@lru_cache(4096)
def row_split(M: int, K: int, tile: Tile) -> tuple[int, int]:
    """(tiles, rows of each): how a reduction over M rows is split so that about 1024 programs share it."""
    wanted = max(1, 1024 // cdiv(K, tile.block_k))
    rows = cdiv(max(M, 1), wanted)
    rows = cdiv(rows, tile.block_m) * tile.block_m
    return cdiv(M, rows), rows


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()


# Elements of a depthwise tile. conv carries six moments a channel besides; wgrad's tile has an axis of taps too.
DEPTHWISE = {"conv": 512, "dgrad": 1024, "wgrad": 2048}


def depthwise(kind: str, channels: int, columns: int) -> Config:
    """The tile of a depthwise phase over `channels` channels of what it computes; there is no block_c.

    columns: of the widest branch.
    """
    block_k = min(64, streaming_tile(channels).block_k)  # so that neighbouring pixels share a program
    elements = DEPTHWISE[kind] // (power_of_two(max(columns, 3)) if kind == "wgrad" else 1)
    return Config(max(1, elements // block_k), block_k, 1, 4, 3)


def depthwise_pass(adjacent: bool, channels: int, numbers: int) -> Tile:
    """The tile of a pass of depthwise moments: so many numbers a channel; channels adjacent in memory or not."""
    elements = next(size for most, size in ((1, 1024), (16, 512), (32, 256), (numbers, 128)) if numbers <= most)
    if not adjacent or channels == 1:
        return Tile(elements, 1)
    block_k = 32 if numbers > 16 else min(64, streaming_tile(channels).block_k)
    return Tile(elements // block_k, block_k)


class MergeBlock(NamedTuple):
    """Tile of a merge of partial results: tasks × numbers × channels."""

    tasks: int
    numbers: int
    channels: int


def merge_block(numbers: int) -> MergeBlock:
    """The tile of depthwise_algebra.merge, of about 4096 elements."""
    block = power_of_two(numbers)
    return MergeBlock(32, block, max(1, 128 // block))


def algebra_tile(taps: int) -> int:
    """Channels of a tile of taps × taps × channels in float64, taps a power of two."""
    return max(2, min(8, 1024 // taps**2))


def correction_tile(shifts: int) -> int:
    """Channels of a tile of shifts × channels in float64, shifts a power of two."""
    return max(8, min(32, 1024 // shifts))


# Tiles of second moments, widest first: tensor cores, and fp32 multiply-adds ("ieee").
CORRELATION = {
    "half": (Config(32, 64, 64, 8, 3), Config(64, 32, 32, 4, 3), Config(32, 16, 16, 4, 4)),
    "ieee": (Config(16, 32, 32, 4, 3), Config(32, 16, 16, 4, 3)),
}


def correlation(mode: str, int64_offsets: bool, KG: int, CG: int) -> Config:
    """The tile of second moments of KG with CG channels a group; the widest leaves no registers to spare."""
    widest = min(block_of(min(KG, CG)), 32 if int64_offsets or KG % 16 or CG % 16 else 64)
    return next((c for c in CORRELATION[mode] if c.block_k <= widest), CORRELATION[mode][-1])
