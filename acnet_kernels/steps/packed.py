"""A step's geometry and branches as the numbers an operator takes, and what it asks of them."""

from __future__ import annotations

from collections.abc import Sequence

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


NUMBERS = 6  # of a branch
Branches = tuple[tuple[Taps, bool], ...]  # of each branch its taps, and whether it is a convolution or the identity


def pack_taps(branches: Branches, normed: Sequence[bool]) -> list[int]:
    """Branches as six numbers each: their taps', with a step of 0 for the identity; whether one is normed.

    `normed` says which have a batch norm of their own. Where there is one batch norm more, it follows their sum.
    """
    packed = []
    for (taps, convolved), own in zip(branches, normed, strict=True):
        packed += [*taps[:4], taps.step if convolved else 0, int(own)]
    return packed


def unpack_taps(numbers: list[int]) -> Branches:
    """The branches that `pack_taps` was given."""
    found = []
    for i in range(0, len(numbers), NUMBERS):
        row, column, rows, columns, step, _ = numbers[i : i + NUMBERS]
        found.append((Taps(row, column, rows, columns, step or 1), step != 0))
    return tuple(found)


def without_normed(numbers: Sequence[int]) -> tuple[int, ...]:
    """The five numbers of each branch that say where it is, as Triton's kernels take them."""
    return tuple([n for i, n in enumerate(numbers) if i % NUMBERS != NUMBERS - 1])


def unpack_normed(numbers: Sequence[int]) -> tuple[bool, ...]:
    """Which branches have a batch norm of their own."""
    return tuple([bool(own) for own in numbers[NUMBERS - 1 :: NUMBERS]])


def is_nested(norms: int, taps: list[int]) -> bool:
    """Whether a batch norm follows the sum of branches of which some have their own."""
    return 0 < sum(unpack_normed(taps)) < norms


def numbers_of(norms: int, taps: list[int], geometry: list[int]) -> int:
    """How many taps all batch norms' kernels have: a branch's, and for that of the sum all of them."""
    normed = unpack_normed(taps)
    own = sum(t.rows * t.columns for (t, _), has in zip(unpack_taps(taps), normed, strict=True) if has)
    return own + (geometry[0] * geometry[1] if norms > sum(normed) else 0)


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
    nests: bool = False,
) -> tuple[int, ...]:
    """The shape of the output; ValueError where one of these arguments of a step does not fit the others.

    `nests`: whether the operator takes a batch norm after the sum of branches that have their own.
    """
    check.maps(x=x)
    if not NUMBERS <= len(taps) <= NUMBERS * MOST_BRANCHES or len(taps) % NUMBERS:
        raise ValueError(f"taps must hold 1 to {MOST_BRANCHES} branches, six numbers each, got {len(taps)} numbers")
    check.length(9, "as pack() makes them", geometry=geometry)
    *rest, groups = geometry
    if max(rest[:2]) > check.MOST_TAPS:
        raise ValueError(f"geometry must have a kernel of at most {check.MOST_TAPS} a side, got {rest[:2]}")
    check.addressable(geometry=geometry, taps=taps)
    known = Geometry.make(rest[:2], rest[2:4], rest[4:6], rest[6:], groups, "zeros")
    branches = unpack_taps(taps)
    check.length(sum(convolved for _, convolved in branches), "one a convolution", weights=weights)
    normed = sum(unpack_normed(taps))
    if norms != normed + 1 and not norms == normed == len(branches):
        raise ValueError(
            f"eps must have an entry for each of the {normed} batch norms that taps has, and one for that of the "
            f"sum, without which every branch has its own, got {norms}"
        )
    if normed and not nests and norms != normed:
        raise ValueError("taps must have a batch norm for each of the branches, or for none of them")
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
