"""A convolution's window and its branches, as the kernels see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..geometry import Geometry, Pair, Taps

MOST_BRANCHES = 3  # accumulators that one program has registers for
_NUMBERS, _OF_A_BRANCH = 9, len(Taps._fields)


class Window(NamedTuple):
    """A kernel_h×kernel_w window, and the taps of it that each branch has: a compile-time constant of a kernel.

    Padding is zeros and crops need nothing of their own: a branch is taps of the window, whatever falls outside.
    Branches may share taps, and need not cover the window.
    """

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int
    branches: tuple[Taps, ...]

    @classmethod
    def of(cls, geometry: Geometry, branches: Iterable[Taps]) -> Window:
        """The window of a zero-padded geometry; ValueError for another padding mode (see Geometry.explicit)."""
        if geometry.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {geometry.padding_mode!r}: pad the input first")
        g = geometry
        return cls(*g.kernel, *g.stride, *g.padding, *g.dilation, g.groups, tuple(branches))

    @classmethod
    def unflatten(cls, numbers: Sequence[int]) -> Window:
        """The window that `flatten` made these numbers of; ValueError where there are too few or too many."""
        count, rest = divmod(len(numbers) - _NUMBERS, _OF_A_BRANCH)
        if rest or not 1 <= count <= MOST_BRANCHES:
            raise ValueError(
                f"window must have {_NUMBERS} numbers and {_OF_A_BRANCH} for each of 1 to {MOST_BRANCHES} "
                f"branches, got {len(numbers)}"
            )
        starts = range(_NUMBERS, len(numbers), _OF_A_BRANCH)
        branches = tuple([Taps(*numbers[i : i + _OF_A_BRANCH]) for i in starts])
        return cls._make((*numbers[:_NUMBERS], branches))

    def flatten(self) -> list[int]:
        """The window as operators take it."""
        *numbers, branches = self
        return [*numbers, *(number for taps in branches for number in taps)]

    def only(self, chosen: Iterable[int]) -> Window:
        """The same window with these of its branches."""
        return self._replace(branches=tuple([self.branches[b] for b in chosen]))

    @property
    def constant(self) -> Window:
        """What a kernel is compiled for: the groups are among its numbers, one compilation serves all of them."""
        return self._replace(groups=1)

    def output_size(self, height: int, width: int) -> Pair:
        """(rows, columns) of the output of a height×width input."""
        reach_h, reach_w = self.dil_h * (self.kernel_h - 1) + 1, self.dil_w * (self.kernel_w - 1) + 1
        return (
            (height + 2 * self.pad_h - reach_h) // self.stride_h + 1,
            (width + 2 * self.pad_w - reach_w) // self.stride_w + 1,
        )
