"""A geometry as the kernels see it."""

from __future__ import annotations

from typing import NamedTuple

from ..geometry import Geometry


class Window(NamedTuple):
    """The square's window, and the row and column of it that hor and ver are: a compile-time constant of a kernel.

    Padding is zeros and crops need nothing of their own (geometry.py): hor and ver are lines of the square's
    window, whatever falls outside.
    """

    kernel: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    hor_row: int
    ver_col: int
    groups: int

    @classmethod
    def of(cls, geometry: Geometry) -> Window:
        """The window of a zero-padded geometry; ValueError for another padding mode (see Geometry.explicit)."""
        if geometry.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {geometry.padding_mode!r}: pad the input first")
        g = geometry
        return cls(g.kernel, *g.stride, *g.padding, *g.dilation, g.hor_row, g.ver_column, g.groups)

    @property
    def constant(self) -> Window:
        """What a kernel is compiled for: the groups are among its numbers, one compilation serves all of them."""
        return self._replace(groups=1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the output of a height×width input."""
        reach_h, reach_w = self.dil_h * (self.kernel - 1) + 1, self.dil_w * (self.kernel - 1) + 1
        return (
            (height + 2 * self.pad_h - reach_h) // self.stride_h + 1,
            (width + 2 * self.pad_w - reach_w) // self.stride_w + 1,
        )
