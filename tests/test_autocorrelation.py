"""The cross-correlation of maps: both implementations against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from acnet_kernels.ops import _extension
from acnet_kernels.ops import autocorrelation as ops
from acnet_kernels.steps.moments_algebra import mirrored

SHIFTS = [(-2, 1), (0, -2), (0, 0), (1, 2), (2, -1), (0, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def definition(x, x_pivot, y, y_pivot, shifts, groups):
    """Σ_p ỹ[p]·x̃[p+d]ᵀ by padding and slicing, float64."""
    x, y = (m.double() - p.double()[:, None, None] for m, p in ((x, x_pivot), (y, y_pivot)))
    h, w = x.shape[2:]
    padded = F.pad(x, (4, 4, 4, 4)).unflatten(1, (groups, x.shape[1] // groups))
    moved = torch.stack([padded[..., 4 + i : 4 + i + h, 4 + j : 4 + j + w] for i, j in shifts])
    return torch.einsum("ngkhw,sngchw->sgkc", y.unflatten(1, (groups, y.shape[1] // groups)), moved), y.sum(0)


def compute(implementation, x, x_pivot, y, y_pivot, shifts, groups):
    rows, columns = [i for i, _ in shifts], [j for _, j in shifts]
    call = ops.cross_correlation if implementation == "operator" else ops._plain
    return call(x, x_pivot, y, y_pivot, rows, columns, groups)


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("implementation", ["operator", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "k", "h", "w", "groups"),
    [
        (2, 16, 16, 5, 7, 1),
        (3, 3, 5, 9, 2, 1),  # neither fills a tile; taller than wide
        (2, 21, 37, 6, 5, 1),  # full tiles and a rest
        (5, 6, 8, 3, 4, 2),
        (4, 8, 8, 4, 4, 8),  # depthwise
        (1, 20, 16, 90, 41, 1),  # cut into bands of rows
        (70, 4, 4, 1, 1, 1),  # one pixel: most shifts find nothing
        (0, 4, 4, 3, 3, 1),
    ],
)
def test_matches_the_definition(implementation, dtype, channels_last, n, c, k, h, w, groups):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(n, c, h, w) + 0.5).to(dtype).contiguous(memory_format=layout)
    y = (torch.randn(n, k, h, w) - 0.3).to(dtype).contiguous(memory_format=layout)
    sums = torch.promote_types(dtype, torch.float32)
    pivots = torch.randn(c).to(dtype).to(sums), torch.randn(k).to(dtype).to(sums)
    products, total = compute(implementation, x, pivots[0], y, pivots[1], SHIFTS, groups)
    expected = definition(x, pivots[0], y, pivots[1], SHIFTS, groups)
    assert products.dtype == total.dtype == sums
    floor = 1e-6 if sums == torch.float32 else 1e-14
    assert error(products, expected[0]) < floor
    assert error(total, expected[1]) < floor


@pytest.mark.parametrize("groups", [1, 2])
def test_half_plane_and_its_mirror_are_the_whole_plane(groups):
    x, pivot = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    half, _ = ops.autocorrelation(x, pivot, 2, 2, groups)
    shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    whole, _ = definition(x, pivot, x, pivot, shifts, groups)
    plane = mirrored(half, 5).movedim(0, 2).flatten(0, 1)
    torch.testing.assert_close(plane, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_lose_nothing_that_a_library_gradient_rounds_away(dtype):
    x = torch.randn(64, 8, 16, 16).to(dtype).to(memory_format=torch.channels_last)
    zero = torch.zeros(8)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    expected, _ = definition(x, zero, x, zero, shifts, 1)
    weight = torch.empty(8, 8, 3, 3, dtype=dtype)
    library = torch.ops.aten.convolution_backward(
        x, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    library = library.permute(2, 3, 0, 1).reshape(9, 1, 8, 8)
    ours, _ = compute("operator", x, zero, x, zero, shifts, 1)
    assert error(ours, expected) < 1e-6 < 1e-5 < error(library, expected)


@pytest.mark.skipif(not _extension.LOADED, reason=f"only the C++ kernel promises it: {_extension.WHY_MISSING}")
def test_the_number_of_threads_changes_no_bit():
    x = torch.randn(40, 16, 12, 12).to(memory_format=torch.channels_last)
    pivot = torch.randn(16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(torch.cat([t.flatten() for t in ops.autocorrelation(x, pivot, 2, 2, 1)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_opcheck():
    x = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)
    y = torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last)
    args = (x, torch.randn(4), y, torch.randn(6), [0, 1], [0, -1], 2)
    torch.library.opcheck(torch.ops.acnet_kernels.cross_correlation.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 4, 5, 4)}, r"x and y must have the same images and pixels.*\(2, 4, 5, 4\)"),
        ({"y": torch.zeros(2, 4, 5, 3, dtype=torch.float64)}, "x and y must have one dtype.*float64"),
        ({"groups": 3}, "groups=3 must divide"),
        ({"columns": [0, 1]}, "rows and columns must be as long as each other, got 1 and 2"),
        ({"x_pivot": torch.zeros(4, dtype=torch.float64)}, "x_pivot must be one torch.float32 a channel"),
        ({"y_pivot": torch.zeros(3)}, "y_pivot must be one torch.float32 a channel"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {"x": torch.zeros(2, 4, 5, 3), "x_pivot": torch.zeros(4), "y": torch.zeros(2, 4, 5, 3)}
    args |= {"y_pivot": torch.zeros(4), "rows": [0], "columns": [0], "groups": 1}
    with pytest.raises(ValueError, match=message):
        ops.cross_correlation(**(args | change))
