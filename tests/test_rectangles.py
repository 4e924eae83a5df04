"""Rectangles of pixels hold every pixel once, with exactly the taps that read it."""

import itertools
import random

import pytest

from acnet_kernels.geometry import Geometry
from acnet_kernels.kernels import rectangles


def pixels(table: tuple[tuple[int, ...], ...], stride: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(rectangle, row, column) of all pixels."""
    return [
        (number, top + i * stride[0], left + j * stride[1])
        for number, (_, top, rows, left, columns, _) in enumerate(table)
        for i, j in itertools.product(range(rows), range(columns))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_every_pixel_once_with_the_taps_that_read_it(seed: int) -> None:
    r = random.Random(seed)
    kernel, stride, dilation = ([r.randint(1, most) for _ in range(2)] for most in (5, 3, 3))
    geometry = Geometry.make(kernel, stride, [r.randint(0, 6) for _ in range(2)], dilation)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, geometry.padding, dilation, strict=True)]
    size = tuple(n + r.randint(0, 9) for n in least)
    outputs = geometry.output_size(*size)

    def readers(q: tuple[int, int]) -> tuple[bool, ...]:
        """By the definition: whether an output's window has the tap there."""
        axes = [
            [
                any(
                    p * geometry.stride[a] + t * dilation[a] - geometry.padding[a] == q[a]
                    for p in range(outputs[a])
                )
                for t in range(kernel[a])
            ]
            for a in (0, 1)
        ]
        return tuple(i and j for i, j in itertools.product(*axes))

    for make, low, high in (
        (rectangles.inside, (0, 0), size),
        (rectangles.padded, tuple(-p for p in geometry.padding), [n + 24 for n in size]),
    ):
        found = make(geometry, 3, size, 7, 4)
        places = pixels(found.table, geometry.stride)
        assert len({(h, w) for _, h, w in places}) == len(places)
        seen = {(h, w): found.reads[number] for number, h, w in places}
        for q in itertools.product(*(range(a, b) for a, b in zip(low, high, strict=True))):
            taps = readers(q)
            if make is rectangles.inside or any(taps):
                assert seen.pop(q) == taps
        assert not seen
        first = 0
        for begin, _, rows, _, columns, tasks in found.table:
            assert begin == first
            assert (tasks - 1) * found.share < 3 * rows * columns <= tasks * found.share
            first += tasks
        assert found.tasks == first
        assert found.share % 4 == 0


def test_shares_are_no_longer_than_float32_adds_up() -> None:
    assert rectangles.share_of(2**40, 1024, 8) == 8 * rectangles.MOST_ADDED
    assert rectangles.share_of(1, 1024, 8) == rectangles.LEAST_PIXELS
