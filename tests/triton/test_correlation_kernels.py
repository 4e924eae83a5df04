"""Second moments by Triton against the definition in float64, alone and where the moments backend uses them."""

import pytest
import torch
from oracle import rel
from torch import Tensor

from acnet_kernels.ops import autocorrelation, triton_autocorrelation
from acnet_kernels.ops.triton_autocorrelation import Raster, raster
from acnet_kernels.steps import moments_passes as passes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WINDOW = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
HALF_PLANE = [(i, j) for i in range(3) for j in range(-2 if i else 0, 3)]


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(shape) + 0.5).to(device, dtype).contiguous(memory_format=torch.channels_last)


def definition(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, shifts: list[tuple[int, int]], groups: int
) -> tuple[Tensor, Tensor]:
    """Σ_p ỹ[p]·x̃[p+d]ᵀ by padding and slicing, and Σ_n ỹ[n], in float64."""
    x, y = (m.double() - p.double()[:, None, None] for m, p in ((x, x_pivot), (y, y_pivot)))
    h, w = x.shape[2:]
    padded = torch.nn.functional.pad(x, (3,) * 4).unflatten(1, (groups, -1))
    moved = torch.stack([padded[..., 3 + i : 3 + i + h, 3 + j : 3 + j + w] for i, j in shifts])
    return torch.einsum("ngkhw,sngchw->sgkc", y.unflatten(1, (groups, -1)), moved), y.sum(0)


CASES = [
    ((2, 19, 5, 7), 19, 1, HALF_PLANE),  # two blocks of channels
    ((1, 5, 3, 2), 37, 1, WINDOW),  # taller than wide; more outputs than inputs
    ((3, 6, 4, 3), 8, 2, WINDOW),
    ((2, 4, 1, 9), 4, 4, [(0, j) for j in range(3)]),  # a line, one channel a group
    ((70, 3, 1, 1), 3, 1, WINDOW),  # one pixel: most shifts find nothing
    ((0, 4, 3, 3), 4, 1, WINDOW),
]


# Every shape in every dtype; with pivots and without every pair of it and either.
@pytest.mark.parametrize(
    ("shape", "K", "groups", "shifts", "centred", "dtype"),
    [(*case, (i + j) % 2 == 1, dtype) for i, case in enumerate(CASES) for j, dtype in enumerate(DTYPES)],
)
def test_matches_the_definition(
    shape: tuple[int, ...],
    K: int,
    groups: int,
    shifts: list[tuple[int, int]],
    centred: bool,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To fp32's accuracy in every dtype, with pivots that no half-precision difference holds exactly."""
    monkeypatch.setattr(triton_autocorrelation.configs, "pixel_split", lambda M, programs, block: (2, -(-M // 2)))
    x = random(*shape, dtype=dtype, device=device)
    y = x if shape[1] == K else random(shape[0], K, *shape[2:], dtype=dtype, device=device)
    x_pivot, y_pivot = (torch.randn(c, device=device) * centred for c in (shape[1], K))
    y_pivot = x_pivot if y is x else y_pivot
    rows, columns = ([shift[axis] for shift in shifts] for axis in (0, 1))
    products, total = autocorrelation.on_cuda(x, x_pivot, y, y_pivot, rows, columns, groups)
    expected = definition(x, x_pivot, y, y_pivot, shifts, groups)
    assert products.dtype == total.dtype == torch.float32
    assert products.shape == expected[0].shape
    assert rel(products, expected[0]) < 1e-6
    assert rel(total, expected[1]) < 1e-6


def test_pivots_of_one_block_of_channels_alone(device: torch.device) -> None:
    """A block without pivots takes the maps as they are, its neighbour centres them."""
    x = random(2, 80, 3, 4, dtype=torch.float16, device=device)
    x[:, 70:] += 300
    pivot = torch.zeros(80, device=device)
    pivot[70:] = 300
    products, total = triton_autocorrelation.cross_correlation(x, pivot, x, pivot, [0, 0], [0, 1], 1)
    expected = definition(x, pivot, x, pivot, [(0, 0), (0, 1)], 1)
    assert rel(products, expected[0]) < 1e-6
    assert rel(products[:, :, 70:, 70:], expected[0][:, :, 70:, 70:]) < 1e-5
    assert rel(total[70:], expected[1][70:]) < 1e-5


def test_whole_statistics_of_a_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments backend's S and G − SSᵀ/M, plane and edge strips by the kernels, are sums over patches."""
    monkeypatch.setattr(
        autocorrelation, "cross_correlation", lambda *args: triton_autocorrelation.cross_correlation(*_laid(args))
    )
    monkeypatch.setattr(passes, "FEW_PIXELS", 0)  # they would be summed in double, which has no kernel
    x = random(2, 4, 5, 4, dtype=torch.float32, device=device)
    found = passes.moments_of(x, passes.pivot_of(x), 3, 2)
    patches = torch.nn.functional.unfold(x.double(), 3, padding=1).unflatten(1, (2, 2, 9))  # N×g×Cg×taps×pixels
    patches = patches.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)
    assert rel(found.sums, patches.sum(1)) < 1e-6
    patches -= patches.mean(1, keepdim=True)
    assert rel(found.gram, patches.mT @ patches) < 1e-6


def _laid(args):
    """The arguments with the maps in channels_last, as the operator's front hands them on."""
    x, x_pivot, y, *rest = args
    last = x.contiguous(memory_format=torch.channels_last)
    return last, x_pivot, last if y is x else y.contiguous(memory_format=torch.channels_last), *rest


def test_same_bits_again(device: torch.device) -> None:
    x = random(4, 16, 9, 9, dtype=torch.float16, device=device)
    pivot = torch.zeros(16, device=device)
    first, second = (
        triton_autocorrelation.cross_correlation(x, pivot, x, pivot, [0, 0], [0, 1], 1) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [
        (HALF_PLANE, Raster(2, 0, -2, 5)),
        (WINDOW, Raster(0, -1, -1, 3)),
        ([(0, 0)], Raster(0, 0, 0, 1)),
        ([(2, 1), (2, 2)], Raster(0, 2, 1, 2)),
        ([(0, 0), (0, 2)], None),
        ([(1, 0), (0, 0)], None),
        ([], None),
    ],
)
def test_shifts_in_raster_order_are_told_from_others(
    shifts: list[tuple[int, int]], expected: Raster | None
) -> None:
    found = raster([i for i, _ in shifts], [j for _, j in shifts])
    assert found == expected
    for s, shift in enumerate(shifts if found else ()):
        row, column = divmod(found.first + s, found.width)
        assert (found.row + row, found.column + column) == shift


@pytest.mark.parametrize(
    ("dtype", "columns", "reason"),
    [
        (torch.float64, [0, 1], "torch.float64 has no kernel"),
        (torch.float32, [0, 2], "the shifts are not neighbours in raster order"),
    ],
)
def test_the_plain_form_serves_what_the_kernels_decline(
    dtype: torch.dtype, columns: list[int], reason: str, device: torch.device
) -> None:
    x = random(2, 3, 4, 5, dtype=dtype, device=device)
    pivot = torch.randn(3, device=device, dtype=torch.promote_types(dtype, torch.float32))
    args = (x, pivot, x, pivot, [0, 0], columns, 1)
    assert triton_autocorrelation.declines(x, [0, 0], columns) == reason
    with pytest.raises(ValueError, match=reason):
        triton_autocorrelation.cross_correlation(*args)
    got = autocorrelation.on_cuda(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, autocorrelation._plain(*args), strict=True))
