"""Where the branches of a block sit on their input: the one place that knows.

A block is one convolution of a k_h×k_w kernel, padding p and dilation d; each branch is a rectangle of that
kernel's taps. One that begins at `row` reads its input d·row further down, so its padding before is p − d·row, and
after it p − d·(k − 1 − its last row); along the columns alike. A negative padding crops (arXiv 1908.03930 §3.2 and,
for lines off the centre, Fig. 6c; the original code lacks dilation).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)
MOST_BRANCHES = 8  # of a block

Pair = tuple[int, int]
IntOrPair = SupportsIndex | Sequence[SupportsIndex]


def as_int(value: Any, error: str) -> int:
    """An int, NumPy's too, as Python's own; TypeError, which says error and the value, otherwise."""
    try:
        if type(value).__name__ not in ("bool", "bool_"):  # NumPy's is an index before its version 2.3
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{error}, got {value!r}")


def as_pair(name: str, value: IntOrPair, least: int) -> Pair:
    """An int or a pair of ints as a pair; TypeError or ValueError naming the argument otherwise."""
    error = f"{name} must be an int or a pair of ints"
    try:  # an int apart: Dynamo of torch 2.10 and 2.11 stops at tuple() of one, whatever is caught
        items: tuple[Any, ...] = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    except TypeError:  # no iterable
        items = (value, value)
    if len(items) != 2:
        raise TypeError(f"{error}, got {value!r}")
    pair = as_int(items[0], error), as_int(items[1], error)
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair


class Taps(NamedTuple):
    """A rectangle of a kernel's taps: rows×columns of them, `step` apart, from (row, column) on."""

    row: int
    column: int
    rows: int
    columns: int
    step: int = 1

    @property
    def last(self) -> Pair:
        """(row, column) of the last tap."""
        return last_of(self)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns of a kernel."""
        return slices_of(self)


# Functions, for what torch.compile traces: it sees no property of a named tuple (torch 2.10).
def last_of(taps: Taps) -> Pair:
    """(row, column) of the last tap."""
    return taps.row + taps.step * (taps.rows - 1), taps.column + taps.step * (taps.columns - 1)


def slices_of(taps: Taps) -> tuple[slice, slice]:
    """The taps' rows and columns of a kernel."""
    last_row, last_column = last_of(taps)
    return slice(taps.row, last_row + 1, taps.step), slice(taps.column, last_column + 1, taps.step)


@dataclass(frozen=True)
class Placement:
    """Where one branch's convolution sits.

    Attributes:
        kernel: (rows, columns) of the branch's kernel.
        edges: (left, right, top, bottom) in F.pad's order, applied to the input before the convolution;
            positive entries pad in the block's padding mode, negative ones crop.
        padding: the symmetric (rows, columns) padding left to the convolution itself.
        dilation: the convolution's; 1 along an axis of one tap, where it means nothing. Given one there, oneDNN's
            half-precision convolution crashes when all its output columns lie in the padding (torch 2.14, CPU).
    """

    kernel: Pair
    edges: tuple[int, int, int, int]
    padding: Pair
    dilation: Pair

    def apply(self, x: Tensor, padding_mode: PaddingMode = "zeros") -> Tensor:
        """The branch's view of x (N×C×H×W): padded where an edge is positive, cropped (no copy) elsewhere."""
        if self.edges == (0, 0, 0, 0):
            return x
        left, right, top, bottom = self.edges
        x = pad(x, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)), padding_mode)
        if min(self.edges) < 0:
            rows = slice(max(-top, 0), x.shape[2] - max(-bottom, 0))
            x = x[:, :, rows, max(-left, 0) : x.shape[3] - max(-right, 0)]
        return x

    def add_adjoint(self, dx: Tensor, dview: Tensor) -> Tensor:
        """Adds the gradient of apply(x) (zero padding) to dx, the gradient of x, in place; returns dx."""
        if self.edges == (0, 0, 0, 0):
            return dx.add_(dview)
        left, right, top, bottom = self.edges
        target, source = _inside(dx, -left, -right, -top, -bottom), _inside(dview, left, right, top, bottom)
        target += source
        return dx


def _inside(t: Tensor, *edges: int) -> Tensor:
    """t without as many lines at its edges; nothing of it where these are more than it has."""
    left, right, top, bottom = (max(edge, 0) for edge in edges)
    rows, columns = t.shape[2:]
    return t[:, :, top : max(rows - bottom, 0), left : max(columns - right, 0)]


def pad(x: Tensor, edges: tuple[int, int, int, int], padding_mode: PaddingMode) -> Tensor:
    """F.pad with nn.Conv2d's names of the modes; returns x itself when there is nothing to pad."""
    if not any(edges):
        return x
    return F.pad(x, edges, "constant" if padding_mode == "zeros" else padding_mode)


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding, dilation, groups and padding mode of a block, validated.

    Build it with `Geometry.make`. Pairs are (rows, columns).
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    padding_mode: PaddingMode

    @functools.cached_property
    def _hash(self) -> int:
        # Kept, as every step looks something up by its geometry; not made with the geometry, which Dynamo traces:
        # that of torch 2.10 and 2.11 knows no hash of a tuple. A string's hash would differ in another process.
        mode = PADDING_MODES.index(self.padding_mode)
        return hash((self.kernel, self.stride, self.padding, self.dilation, self.groups, mode))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def make(
        cls,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: SupportsIndex = 1,
        padding_mode: PaddingMode = "zeros",
    ) -> Geometry:
        """Normalises nn.Conv2d's arguments.

        Raises:
            TypeError: an argument is not an int, a pair of ints or (padding) 'same' or 'valid'.
            ValueError: 'same' with a stride or an even kernel, an unknown padding mode, or a number out of range.
        """
        kernel = as_pair("kernel_size", kernel_size, 1)
        stride = as_pair("stride", stride, 1)
        dilation = as_pair("dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
            if padding == "same" and stride != (1, 1):
                raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
            if padding == "same" and (kernel[0] % 2 == 0 or kernel[1] % 2 == 0):
                raise ValueError(f"padding='same' needs an odd kernel_size, got {kernel_size!r}")
            same = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
            padding = same if padding == "same" else (0, 0)
        padding = as_pair("padding", padding, 0)
        groups = as_int(groups, "groups must be an int")
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
        return cls(kernel, stride, padding, dilation, groups, padding_mode)

    def parts(self) -> tuple[Pair, Pair, Pair, Pair, int, PaddingMode]:
        """What Geometry(*parts) is made of."""
        return self.kernel, self.stride, self.padding, self.dilation, self.groups, self.padding_mode

    @property
    def whole(self) -> Taps:
        """All taps of the kernel."""
        return Taps(0, 0, *self.kernel)

    @property
    def centre(self) -> Taps | None:
        """The tap that reads the pixel it writes, in maps that keep the input's size; None where there is none."""
        rows, columns = self.kernel
        padding = (self.dilation[0] * (rows - 1), self.dilation[1] * (columns - 1))
        same = padding == (2 * self.padding[0], 2 * self.padding[1])
        odd = rows % 2 == columns % 2 == 1
        return Taps(rows // 2, columns // 2, 1, 1) if self.stride == (1, 1) and same and odd else None

    def check_taps(self, taps: Taps, name: str) -> None:
        """ValueError unless taps are a rectangle inside the kernel."""
        last = last_of(taps)
        if min(taps) < 0 or min(taps[2:]) < 1 or last[0] >= self.kernel[0] or last[1] >= self.kernel[1]:
            raise ValueError(f"{name} must lie inside the {self.kernel[0]}×{self.kernel[1]} kernel, got {taps}")

    def placement(self, taps: Taps) -> Placement:
        """Where the convolution of these taps sits."""
        # Dynamo looks through a cache, and warns.
        return _place(self, taps) if torch.compiler.is_compiling() else _cached_place(self, taps)

    def explicit(self) -> Geometry:
        """The same geometry for an input that `pad_input` has padded already."""
        return replace(self, padding=(0, 0), padding_mode="zeros")

    def pad_input(self, x: Tensor) -> Tensor:
        """x padded on all sides in the block's padding mode."""
        rows, columns = self.padding
        return pad(x, (columns, columns, rows, rows), self.padding_mode)

    def output_size(self, height: int, width: int) -> Pair:
        """(rows, columns) of the output for a height×width input; ValueError if it would be empty."""
        (k_rows, k_columns), padding, dilation, stride = self.kernel, self.padding, self.dilation, self.stride
        rows = (height + 2 * padding[0] - dilation[0] * (k_rows - 1) - 1) // stride[0] + 1
        columns = (width + 2 * padding[1] - dilation[1] * (k_columns - 1) - 1) // stride[1] + 1
        if rows < 1 or columns < 1:
            raise ValueError(
                f"the output would be empty: input of {height}×{width} pixels, kernel_size {self.kernel}, "
                f"stride {self.stride}, padding {self.padding}, dilation {self.dilation}"
            )
        return rows, columns


def _place(geometry: Geometry, taps: Taps) -> Placement:
    rows, last = geometry.kernel, last_of(taps)
    edges: list[Pair] = []
    inner: list[int] = []
    for k, p, d, first, end in zip(rows, geometry.padding, geometry.dilation, taps[:2], last, strict=True):
        before, after = p - d * first, p - d * (k - 1 - end)
        even = before == after >= 0  # which the convolution itself can pad
        edges.append((0, 0) if even else (before, after))
        inner.append(before if even else 0)
    dilation = [d * taps.step if n > 1 else 1 for d, n in zip(geometry.dilation, taps[2:4], strict=True)]
    return Placement(taps[2:4], (*edges[1], *edges[0]), (inner[0], inner[1]), (dilation[0], dilation[1]))


_cached_place = functools.lru_cache(4096)(_place)
