"""Rectangles of pixels that the same taps read: what the depthwise passes that know the border go by.

Along an axis, tap t of a kernel reads position q for some output where q = p·stride + t·dilation − padding, p of
the outputs: every stride-th position from one on to another. So positions fall into runs of one step that the same
taps read, a few at each end and one or more between; a run of rows by one of columns is a rectangle, in all images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..geometry import Geometry, Pair
from .configs import cdiv

FIELDS = 6  # of a rectangle: its first task, row and rows, column and columns, tasks
LEAST_PIXELS = 64  # of a task, which leaves a number behind for each of its sums
MOST_ADDED = 4096  # pixels that one accumulator of a task adds up in float32


class Run(NamedTuple):
    """Positions first, first + stride, … of one axis, `length` of them, and which taps read them."""

    first: int
    length: int
    reads: tuple[bool, ...]


class Rectangles(NamedTuple):
    """All rectangles of a map, and how programs share them.

    `table` has FIELDS numbers for each; a task takes `share` of a rectangle's pixels, image by image, row by row.
    `reads` says of each rectangle which of the kernel's taps read it, in raster order.
    """

    table: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[bool, ...], ...]
    share: int

    @property
    def tasks(self) -> int:
        """Those of all rectangles."""
        return self.table[-1][0] + self.table[-1][-1]


def runs(low: int, high: int, taps: int, stride: int, padding: int, dilation: int, outputs: int) -> list[Run]:
    """Positions low, low + 1 … below high of one axis."""
    starts = [t * dilation - padding for t in range(taps)]
    found = []
    for first in range(low, min(low + stride, high)):
        own = [(start - first) % stride == 0 for start in starts]
        ends = [
            q
            for start, is_own in zip(starts, own, strict=True)
            if is_own
            for q in (start, start + outputs * stride)
        ]
        cuts = [*sorted({first, *(q for q in ends if first < q < high)}), high]
        for begin, end in itertools.pairwise(cuts):
            reads = (
                is_own and start <= begin < start + outputs * stride
                for start, is_own in zip(starts, own, strict=True)
            )
            found.append(Run(begin, cdiv(end - begin, stride), tuple(reads)))
    return found


def _axes(geometry: Geometry, size: Pair) -> list[tuple[int, ...]]:
    # Of rows and columns: size, outputs, taps, stride, padding, dilation.
    g = geometry
    return list(zip(size, g.output_size(*size), g.kernel, g.stride, g.padding, g.dilation, strict=True))


@lru_cache(1024)
def padded(geometry: Geometry, images: int, size: Pair, programs: int, block: int) -> Rectangles:
    """Of an image and its padding, what taps read: every tap finds as many pixels as there are outputs."""
    axes = []
    for _, outputs, taps, stride, padding, dilation in _axes(geometry, size):
        high = (outputs - 1) * stride + (taps - 1) * dilation - padding + 1
        axes.append(
            [run for run in runs(-padding, high, taps, stride, padding, dilation, outputs) if any(run.reads)]
        )
    return _divided(axes[0], axes[1], images, programs, block)


@lru_cache(1024)
def inside(geometry: Geometry, images: int, size: Pair, programs: int, block: int) -> Rectangles:
    """Of an image, every pixel."""
    axes = [
        runs(0, length, taps, stride, padding, dilation, outputs)
        for length, outputs, taps, stride, padding, dilation in _axes(geometry, size)
    ]
    return _divided(axes[0], axes[1], images, programs, block)


def share_of(pixels: int, programs: int, block: int) -> int:
    """A task's pixels where about `programs` tasks share all: a multiple of `block`."""
    return min(cdiv(max(cdiv(pixels, programs), LEAST_PIXELS), block), MOST_ADDED) * block


def _divided(rows: Sequence[Run], columns: Sequence[Run], images: int, programs: int, block: int) -> Rectangles:
    pixels = images * sum(row.length for row in rows) * sum(column.length for column in columns)
    share = share_of(pixels, programs, block)
    table, reads, first = [], [], 0
    for row, column in itertools.product(rows, columns):
        tasks = cdiv(images * row.length * column.length, share)
        table.append((first, row.first, row.length, column.first, column.length, tasks))
        reads.append(tuple(i and j for i in row.reads for j in column.reads))
        first += tasks
    return Rectangles(tuple(table), tuple(reads), share)
