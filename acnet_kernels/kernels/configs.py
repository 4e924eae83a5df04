"""Launch configurations: a small table per architecture, each entry checked ahead of time by benchmarks/codegen.py.

The rule needs no warm-up and sees shapes alone: the same problem takes the same configuration, and gives the same
bits, in every run on one architecture.
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("conv", "dgrad", "wgrad")
FAMILIES = (80, 90, 100)
# Bytes of shared memory one program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Config(NamedTuple):
    """Tile sizes over pixels, output channels and input channels, and how a program is compiled.

    The reduced axis is input channels in conv, output channels in dgrad, pixels in wgrad.
    """

    block_m: int
    block_k: int
    block_c: int
    warps: int
    stages: int


class Tile(NamedTuple):
    """Tile of the memory-bound passes: rows × channels."""

    block_m: int
    block_k: int


# (kind, mode) → family → configurations by width of the output's channels, widest first: the first whose block is no wider
# than the channels, rounded up to a power of two, is taken. Modes: half (fp16, bf16), tf32, tf32x3 (three TF32 products).
TABLE: dict[tuple[str, str], dict[int, tuple[Config, ...]]] = {
    ("conv", "half"): {90: (Config(128, 64, 64, 8, 3), Config(128, 32, 32, 4, 4), Config(128, 16, 16, 4, 4))},
    ("dgrad", "half"): {90: (Config(128, 64, 64, 8, 3), Config(128, 32, 32, 4, 4), Config(128, 16, 16, 4, 4))},
    ("wgrad", "half"): {90: (Config(64, 64, 64, 4, 3), Config(64, 32, 32, 4, 3), Config(64, 16, 16, 4, 4))},
    ("conv", "tf32"): {90: (Config(128, 64, 32, 8, 3), Config(128, 32, 32, 4, 4), Config(128, 16, 16, 4, 4))},
    ("dgrad", "tf32"): {90: (Config(128, 32, 64, 8, 3), Config(128, 32, 32, 4, 4), Config(128, 16, 16, 4, 4))},
    ("wgrad", "tf32"): {90: (Config(32, 64, 64, 4, 3), Config(32, 32, 32, 4, 3), Config(32, 16, 16, 4, 4))},
}


def family(capability: tuple[int, int]) -> int:
    """The table's column for a device's compute capability."""
    major = capability[0]
    return {9: 90, 10: 100}.get(major, 80)


def choose(kind: str, family: int, mode: str, M: int, KG: int, CG: int) -> Config:
    """The configuration for M output pixels, KG output and CG input channels in a group."""
    return TABLE[kind, mode][family][0]


def pixel_split(M: int, programs: int, block_m: int) -> tuple[int, int]:
    """(splits, pixels of each) of wgrad: about 256 programs in all, and at least 4 blocks of pixels in each."""
    wanted = max(1, min(256 // programs, -(-M // (4 * block_m))))
    rows = -(-max(M, 1) // wanted)
    rows = -(-rows // block_m) * block_m
    return max(1, -(-M // rows)), rows


def streaming_tile(K: int) -> Tile:
    """Tile of a pass over an M×K map: a channel block that wastes few lanes yet reads long rows; 4096 elements."""
    block_k = min((128, 64, 32, 16), key=lambda b: -(-K // b) * b * (1 + 8 / b))
    return Tile(4096 // block_k, block_k)


def row_split(M: int, K: int, tile: Tile) -> tuple[int, int]:
    """(tiles, rows of each): how a reduction over M rows is split so that about 1024 programs share it."""
    wanted = max(1, 1024 // -(-K // tile.block_k))
    rows = -(-max(M, 1) // wanted)
    rows = -(-rows // tile.block_m) * tile.block_m
    return -(-M // rows), rows
