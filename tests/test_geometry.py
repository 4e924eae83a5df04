"""The placement of the branches, against a definition that knows nothing of it: kernels laid into k×k ones."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acnet_kernels import ACBlock
from acnet_kernels.block import taps_of
from acnet_kernels.geometry import PADDING_MODES, Geometry, Taps
from acnet_kernels.reference import embed


def branch_by_placement(g: Geometry, taps: Taps, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    place = g.placement(taps)
    x = place.apply(x, g.padding_mode)
    if g.padding_mode != "zeros" and any(place.padding):  # what nn.Conv2d does with its padding mode
        (rows, columns), padding = place.padding, 0
        x = F.pad(x, (columns, columns, rows, rows), g.padding_mode)
    else:
        padding = place.padding
    return F.conv2d(x, w, None, g.stride, padding, place.dilation, g.groups)


def branch_by_embedding(g: Geometry, taps: Taps, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(
        g.pad_input(x),
        embed(w, g.kernel, taps.row, taps.column, taps.step),
        None,
        g.stride,
        0,
        g.dilation,
        g.groups,
    )


def check(g: Geometry, size: tuple[int, int], channels: int = 4, shift=(0, 0), branches=None) -> None:
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    for taps in taps_of(g.kernel, shift).values() if branches is None else branches:
        w = torch.randn(channels, channels // g.groups, taps.rows, taps.columns, dtype=torch.float64)
        got, want = branch_by_placement(g, taps, x, w), branch_by_embedding(g, taps, x, w)
        assert got.shape[2:] == g.output_size(*size)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=f"{taps} {g}")


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_every_placement(k):
    for d, s, p, groups in itertools.product((1, 2, 3), (1, 2, 3), range(8), (1, 2, 4)):
        check(Geometry.make(k, s, p, d, groups), (23, 20))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("k", [3, 5])
def test_padding_modes_and_shifts(mode, k):
    shifts = [(0, 0), (1, 1), (-1, 1), (k // 2, 0)]
    for d, s, p, shift in itertools.product((1, 2), (1, 2), (0, 1, 2, 4), shifts):
        check(Geometry.make(k, s, p, d, 1, mode), (14, 11), shift=shift)


def test_pairs_differ_by_axis():
    check(Geometry.make(3, (2, 1), (0, 3), (1, 2)), (9, 12))
    check(Geometry.make((5, 5), (1, 3), (4, 1), (3, 1), 2), (17, 12))


RECTANGULAR = [(kernel, mode) for kernel in ((3, 5), (4, 2), (1, 3)) for mode in PADDING_MODES]


# The largest has 306 rectangles: where the padding is of zeros, and where it is of the map.
@pytest.mark.parametrize(("kernel", "mode"), [*RECTANGULAR, ((5, 5), "zeros"), ((5, 5), "reflect")])
def test_every_rectangle(kernel, mode):
    rectangles = [
        Taps(row, column, rows, columns, step)
        for row, column in itertools.product(range(kernel[0]), range(kernel[1]))
        for rows, columns in itertools.product(range(1, kernel[0] + 1), range(1, kernel[1] + 1))
        for step in (1, 2)
        if row + step * (rows - 1) < kernel[0] and column + step * (columns - 1) < kernel[1]
    ]
    for s, p, d in itertools.product((1, (2, 1)), (0, (1, 2)), (1, (2, 1))):
        check(Geometry.make(kernel, s, p, d, 1, mode), (12, 11), branches=rectangles)


@pytest.mark.parametrize(
    "taps", [Taps(0, 0, 4, 1), Taps(2, 0, 1, 4), Taps(-1, 0, 1, 1), Taps(0, 0, 0, 1), Taps(0, 0, 2, 1, 3)]
)
def test_taps_outside_of_the_kernel(taps):
    with pytest.raises(ValueError, match="branch must lie inside the 3×3 kernel, got Taps"):
        Geometry.make(3).check_taps(taps, "branch")


def test_the_centre_tap_of_maps_that_keep_their_size():
    assert Geometry.make((3, 5), padding=(1, 2)).centre == Taps(1, 2, 1, 1)
    assert Geometry.make(3, padding=2, dilation=2).centre == Taps(1, 1, 1, 1)
    for changed in ({"padding": 0}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}):
        assert Geometry.make(3, **changed).centre is None
    assert Geometry.make(2, padding=1).centre is None


def test_smallest_inputs():
    check(Geometry.make(3, padding=1), (1, 1))
    check(Geometry.make(3, padding=0), (3, 3))
    check(Geometry.make(7, padding=3), (1, 4))


def test_same_and_valid_as_conv2d():
    for k, d in itertools.product((1, 3, 5), (1, 2)):
        conv = torch.nn.Conv2d(1, 1, k, padding="same", dilation=d)
        assert (
            Geometry.make(k, padding="same", dilation=d).output_size(9, 7)
            == conv(torch.zeros(1, 1, 9, 7)).shape[2:]
        )
    assert Geometry.make(3, padding="valid").padding == (0, 0)


def test_a_negative_offset_crops_without_a_copy():
    x = torch.randn(1, 1, 8, 8)
    assert Geometry.make(3, padding=0).placement(Taps(1, 0, 1, 3)).apply(x).data_ptr() == x[:, :, 1:].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int"),
        ({"kernel_size": 3, "stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"kernel_size": 3, "stride": (1, 2, 3)}, TypeError, "stride"),
        ({"kernel_size": 3, "padding": -1}, ValueError, "padding must be at least 0"),
        ({"kernel_size": 3, "padding": "full"}, ValueError, "'same' or 'valid'"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, ValueError, "needs stride 1"),
        ({"kernel_size": 3, "dilation": True}, TypeError, "dilation"),
        ({"kernel_size": 3, "groups": 0}, ValueError, "groups"),
        ({"kernel_size": 3, "groups": 1.5}, TypeError, "groups"),
        ({"kernel_size": 3, "groups": True}, TypeError, "groups must be an int, got True"),
        ({"kernel_size": 3, "padding": np.bool_(True)}, TypeError, "padding"),
        ({"kernel_size": np.float64(3)}, TypeError, "kernel_size must be an int"),
        ({"kernel_size": (3, True)}, TypeError, "kernel_size must be an int"),
        ({"kernel_size": "33"}, TypeError, "kernel_size must be an int"),
        ({"kernel_size": [3]}, TypeError, r"kernel_size must be an int or a pair of ints, got \[3\]"),
        ({"kernel_size": 3, "padding_mode": "mirror"}, ValueError, "padding_mode"),
        ({"kernel_size": 2, "padding": "same"}, ValueError, "needs an odd kernel_size"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        Geometry.make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": (3, 5)}, ValueError, "square"),
        ({"kernel_size": 3, "shift": (2, 0)}, ValueError, "shift"),
        ({"kernel_size": 1, "shift": (0, -1)}, ValueError, "shift"),
        ({"kernel_size": 3, "line_size": 2}, ValueError, "line_size must be odd and at most kernel_size 3, got 2"),
        ({"kernel_size": 3, "line_size": 5}, ValueError, "line_size must be odd and at most kernel_size 3, got 5"),
        ({"kernel_size": 3, "line_size": 1.0}, TypeError, "line_size must be an int"),
    ],
)
def test_wrong_arguments_of_a_block(arguments, error, words):
    with pytest.raises(error, match=words):
        ACBlock(4, 4, **arguments)


def test_numpys_ints_are_ints():
    sizes = {"kernel_size": np.array([3, 3]), "stride": np.int64(2), "padding": (np.uint8(1), np.int32(0))}
    g = Geometry.make(**sizes, dilation=np.array(2), groups=np.int16(2))
    assert g == Geometry.make(3, 2, (1, 0), 2, 2)
    numbers = [*g.kernel, g.groups, *g.stride, *g.padding, *g.dilation]
    numbers += [n for taps in taps_of(np.int64(3), np.array([1, -1])).values() for n in taps]
    assert {type(number) for number in numbers} == {int}


def test_empty_output_names_the_shapes():
    with pytest.raises(ValueError, match=r"input of 2×9 pixels, kernel_size \(3, 3\)"):
        Geometry.make(3).output_size(2, 9)
