"""A step's geometry and branches as the numbers an operator takes, and what it asks of them."""

from __future__ import annotations

from torch import Tensor

from ..geometry import MOST_BRANCHES, Geometry, Taps
from ..ops import check


def pack(geometry: Geometry) -> list[int]:
    """A zero-padded geometry as numbers, for an operator's arguments."""
    g = geometry
    return [*g.kernel, *g.stride, *g.padding, *g.dilation, g.groups]


def unpack(numbers: list[int]) -> Geometry:
    """The geometry that `pack` was given."""
    rows, columns, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups = numbers
    return Geometry((rows, columns), (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), groups, "zeros")


Branches = tuple[tuple[Taps, bool], ...]  # of each branch its taps, and whether it is a convolution or the identity


def pack_taps(branches: Branches) -> list[int]:
    """Branches as five numbers each: their taps', with a step of 0 for the identity."""
    return [n for taps, convolved in branches for n in (*taps[:4], taps.step if convolved else 0)]


def unpack_taps(numbers: list[int]) -> Branches:
    """The branches that `pack_taps` was given."""
    found = []
    for i in range(0, len(numbers), 5):
        row, column, rows, columns, step = numbers[i : i + 5]
        found.append((Taps(row, column, rows, columns, step or 1), step != 0))
    return tuple(found)


def numbers_of(norms: int, taps: list[int], geometry: list[int]) -> int:
    """How many taps all batch norms' kernels have: one a branch, or one of all."""
    branches = unpack_taps(taps)
    if norms < len(branches):
        return geometry[0] * geometry[1]
    return sum(own.rows * own.columns for own, _ in branches)


def check_affine(weights: list[Tensor], norms: int, **lists: list[Tensor]) -> None:
    """ValueError unless each list is empty or has one vector of K numbers a batch norm."""
    for name, values in lists.items():
        if values:
            check.length(norms, "one a batch norm, or none", **{name: values})
    check.shape(weights[0].shape[:1], **lists)
    check.floats(**lists)


def check_problem(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    norms: int,
    taps: list[int],
    geometry: list[int],
) -> tuple[int, ...]:
    """The shape of the output; ValueError where one of these arguments of a step does not fit the others."""
    check.maps(x=x)
    if not 5 <= len(taps) <= 5 * MOST_BRANCHES or len(taps) % 5:
        raise ValueError(
            f"taps must hold 1 to {MOST_BRANCHES} branches, five numbers each, got {len(taps)} numbers"
        )
    check.length(9, "as pack() makes them", geometry=geometry)
    *rest, groups = geometry
    if max(rest[:2]) > check.MOST_TAPS:
        raise ValueError(f"geometry must have a kernel of at most {check.MOST_TAPS} a side, got {rest[:2]}")
    check.addressable(geometry=geometry, taps=taps)
    known = Geometry.make(rest[:2], rest[2:4], rest[4:6], rest[6:], groups, "zeros")
    branches = unpack_taps(taps)
    check.length(sum(convolved for _, convolved in branches), "one a convolution", weights=weights)
    if norms not in (1, len(branches)):
        raise ValueError(f"eps must have {len(branches)} entries, one a branch, or 1, got {norms}")
    if not weights or weights[0].dim() != 4 or weights[0].shape[0] < 1:
        raise ValueError(f"weights[0] must be K×C/groups×rows×columns, got {[tuple(w.shape) for w in weights[:1]]}")
    K, C = weights[0].shape[0], x.shape[1]
    check.group_count(groups, x=C, out=K)
    given = iter(enumerate(weights))
    for own, convolved in branches:
        known.check_taps(own, "taps")
        if convolved:
            i, weight = next(given)
            check.shape((K, C // groups, own.rows, own.columns), **{f"weights[{i}]": weight})
        elif (own.rows, own.columns) != (1, 1) or known.stride != (1, 1) or C != K:
            raise ValueError(
                f"taps must have the identity on one tap, of maps of {K} channels at stride 1, got {own}"
            )
    check.floats(weights=weights)
    check_affine(weights, norms, gammas=gammas)
    return (x.shape[0], K, *known.output_size(x.shape[2], x.shape[3]))
