"""How the three branches of an asymmetric convolution block sit on their input: the one place that knows.

For a k×k convolution of padding p and dilation d, the 1×k (hor) and k×1 (ver) branches share the centre
row and column of the square kernel. With off = p − d·(k//2), hor is padded (off, p) and ver (p, off); a
negative off crops the input on that axis by −off (arXiv 1908.03930 §3.2; the original code lacks dilation).
A shift moves hor down and ver right of the centre (paper Fig. 6c, the border-shifted variant).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex, get_args

import torch.nn.functional as F
from torch import Tensor

BRANCHES = ("square", "hor", "ver")
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)

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
    """A branch's taps: a rectangle of the block's kernel, of rows × columns taps that are `step` apart."""

    row: int
    column: int
    rows: int
    columns: int
    step: int = 1


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
        rows, columns = dx.shape[2:]
        target = dx[:, :, max(-top, 0) : rows - max(-bottom, 0), max(-left, 0) : columns - max(-right, 0)]
        rows, columns = dview.shape[2:]
        target += dview[:, :, max(top, 0) : rows - max(bottom, 0), max(left, 0) : columns - max(right, 0)]
        return dx


def pad(x: Tensor, edges: tuple[int, int, int, int], padding_mode: PaddingMode) -> Tensor:
    """F.pad with nn.Conv2d's names of the modes; returns x itself when there is nothing to pad."""
    if not any(edges):
        return x
    return F.pad(x, edges, "constant" if padding_mode == "zeros" else padding_mode)


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding, dilation, groups, padding mode and shift of a block, validated.

    Build it with `Geometry.make`. Pairs are (rows, columns); shift is (rows hor moves down,
    columns ver moves right).
    """

    kernel: int
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    padding_mode: PaddingMode
    shift: Pair

    def __post_init__(self) -> None:
        places = {branch: self._place(branch) for branch in BRANCHES}
        object.__setattr__(self, "_placements", places)
        settings = {
            branch: (
                [*place.kernel],
                (self.stride, place.padding, place.dilation, self.groups, self.padding_mode),
            )
            for branch, place in places.items()
        }
        object.__setattr__(self, "_settings", settings)

    @functools.cached_property
    def _hash(self) -> int:
        # Kept, as every step looks something up by its geometry; not made with the geometry, which Dynamo traces:
        # that of torch 2.10 and 2.11 knows no hash of a tuple. A string's hash would differ in another process.
        mode = PADDING_MODES.index(self.padding_mode)
        return hash((self.kernel, self.stride, self.padding, self.dilation, self.groups, mode, self.shift))

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
        shift: IntOrPair = (0, 0),
    ) -> Geometry:
        """Normalises nn.Conv2d's arguments.

        Raises:
            TypeError: an argument is not an int, a pair of ints or (padding) 'same' or 'valid'.
            ValueError: an even or non-square kernel, a shift beyond the kernel, 'same' with a stride,
                an unknown padding mode, or a number out of range.
        """
        rows, columns = as_pair("kernel_size", kernel_size, 1)
        if rows != columns or rows % 2 == 0:
            raise ValueError(
                "kernel_size must be odd and square: hor and ver need one centre row and column to share, "
                f"got {kernel_size!r}"
            )
        stride = as_pair("stride", stride, 1)
        dilation = as_pair("dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
            if padding == "same" and stride != (1, 1):
                raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
            padding = (dilation[0] * (rows // 2), dilation[1] * (rows // 2)) if padding == "same" else (0, 0)
        padding = as_pair("padding", padding, 0)
        groups = as_int(groups, "groups must be an int")
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
        half = rows // 2
        shift = as_pair("shift", shift, -half)
        if max(shift) > half:
            raise ValueError(
                f"shift must keep hor and ver inside the {rows}×{rows} kernel: each between {-half} and "
                f"{half}, got {shift}"
            )
        return cls(rows, stride, padding, dilation, groups, padding_mode, shift)

    @property
    def hor_row(self) -> int:
        """The row of the square kernel that hor strengthens."""
        return self.kernel // 2 + self.shift[0]

    @property
    def ver_column(self) -> int:
        """The column of the square kernel that ver strengthens."""
        return self.kernel // 2 + self.shift[1]

    def placement(self, branch: str) -> Placement:
        """Where a branch ('square', 'hor' or 'ver') sits."""
        if branch not in BRANCHES:
            raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
        return self._placements[branch]  # type: ignore[attr-defined]

    def settings(self, branch: str) -> tuple[list[int], tuple[Pair, Pair, Pair, int, PaddingMode]]:
        """A branch's ([rows, columns], (stride, padding, dilation, groups, padding_mode)), its nn.Conv2d's."""
        return self._settings[branch]  # type: ignore[attr-defined]

    def _place(self, branch: str) -> Placement:
        k, (p_rows, p_columns) = self.kernel, self.padding
        d_rows, d_columns = self.dilation if k > 1 else (1, 1)
        if branch == "square":
            return Placement((k, k), (0, 0, 0, 0), self.padding, (d_rows, d_columns))
        if branch == "hor":
            before, after = self._offsets(0)
            if before == after >= 0:
                return Placement((1, k), (0, 0, 0, 0), (before, p_columns), (1, d_columns))
            return Placement((1, k), (0, 0, before, after), (0, p_columns), (1, d_columns))
        before, after = self._offsets(1)
        if before == after >= 0:
            return Placement((k, 1), (0, 0, 0, 0), (p_rows, before), (d_rows, 1))
        return Placement((k, 1), (before, after, 0, 0), (p_rows, 0), (d_rows, 1))

    def _offsets(self, axis: int) -> Pair:
        # Kernel row k//2+s reads input row o·stride − p + d·(k//2+s): the padding before shrinks by d·s,
        # the one after grows by as much.
        d, s = self.dilation[axis], self.shift[axis]
        off = self.padding[axis] - d * (self.kernel // 2)
        return off - d * s, off + d * s

    def explicit(self) -> Geometry:
        """The same geometry for an input that `pad_input` has padded already."""
        return replace(self, padding=(0, 0), padding_mode="zeros")

    def pad_input(self, x: Tensor) -> Tensor:
        """x padded on all sides in the block's padding mode."""
        rows, columns = self.padding
        return pad(x, (columns, columns, rows, rows), self.padding_mode)

    def output_size(self, height: int, width: int) -> Pair:
        """(rows, columns) of the output for a height×width input; ValueError if it would be empty."""
        reach = self.kernel - 1
        rows = (height + 2 * self.padding[0] - self.dilation[0] * reach - 1) // self.stride[0] + 1
        columns = (width + 2 * self.padding[1] - self.dilation[1] * reach - 1) // self.stride[1] + 1
        if rows < 1 or columns < 1:
            raise ValueError(
                f"the output would be empty: input of {height}×{width} pixels, kernel_size {self.kernel}, "
                f"stride {self.stride}, padding {self.padding}, dilation {self.dilation}"
            )
        return rows, columns
