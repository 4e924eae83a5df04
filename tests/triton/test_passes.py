"""The four batch-norm passes on their own, against float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_good_as, rel
from torch import Tensor, nn

from acnet_kernels.kernels.configs import Tile
from acnet_kernels.ops import triton_bn_sum, triton_step
from acnet_kernels.ops.running import Running

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 7, 5, 3), (3, 16, 1, 1), (1, 5, 17, 19)]


def maps(B: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [
        (torch.randn(shape) * (b + 1) + b).to(device, dtype).contiguous(memory_format=torch.channels_last)
        for b in range(B)
    ]


def by_torch(
    ys: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    grad: Tensor,
) -> dict[str, Tensor]:
    """Output and gradients by F.batch_norm; float64 parameters for float64 maps, else float32."""
    params = torch.promote_types(ys[0].dtype, torch.float32)
    leaves = [y.detach().clone().requires_grad_() for y in ys]
    scales = [t.to(params).detach().requires_grad_() for t in gammas]
    shifts = [t.to(params).detach().requires_grad_() for t in betas]
    affine = list(zip(scales, shifts, strict=True)) or [(None, None)] * len(ys)
    out = sum(
        F.batch_norm(y, None, None, g, b, True, 0.0, e) for y, (g, b), e in zip(leaves, affine, eps, strict=True)
    )
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach()} | {f"dy{i}": y.grad for i, y in enumerate(leaves)}
    found |= {f"dgamma{i}": t.grad for i, t in enumerate(scales)}
    return found | {f"dbeta{i}": t.grad for i, t in enumerate(shifts)}


COUNTS = [(1, True), (2, False), (3, True), (8, True)]


# Every pair of shape, dtype and number of maps.
@pytest.mark.parametrize(
    ("B", "in_place", "shape", "dtype"),
    [(*own, shape, DTYPES[(i + j) % 3]) for i, own in enumerate(COUNTS) for j, shape in enumerate(SHAPES)],
    ids=str,
)
def test_passes(B: int, shape: tuple[int, ...], dtype: torch.dtype, in_place: bool, device: torch.device) -> None:
    ys, grad = maps(B, shape, dtype, device), maps(1, shape, dtype, device)[0]
    gammas, betas = ([torch.randn(shape[1], device=device) for _ in ys] for _ in range(2))
    if B == 2:
        gammas, betas = [], []
    eps = ([1e-5, 1e-3, 1e-4] * 3)[:B]
    eager = by_torch(ys, gammas, betas, eps, grad)
    true = by_torch([y.double() for y in ys], gammas, betas, eps, grad)
    out, means, _, rstds = triton_bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
    kept = [y.clone() for y in ys]
    needs_dy = [b != 1 for b in range(B)]  # the second map's gradient is nobody's wish
    if in_place:
        dys = [y for y, need in zip(ys, needs_dy, strict=True) if need]
        if B > 1:  # the last map is needed still
            dys[-1] = torch.full_like(ys[-1], torch.nan)
        dgammas, dbeta = triton_bn_sum.bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys)
    else:
        dys, dgammas, dbeta = triton_bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, needs_dy)
    assert all(torch.equal(y, k) for y, k in zip(ys, kept, strict=True) if not any(y is dy for dy in dys))
    got, given = {"out": out}, iter(dys)
    for i in range(B):
        got |= {f"dy{i}": next(given)} if needs_dy[i] else {}
        got |= {f"dgamma{i}": dgammas[i], f"dbeta{i}": dbeta} if gammas else {}
    wanted = got.keys()
    assert_as_good_as(got, eager, {name: t for name, t in true.items() if name in wanted})


def test_statistics_of_many_blocks_a_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks within a tile, and tiles of unequal size, merge to the statistics of the whole."""
    monkeypatch.setattr(triton_bn_sum, "streaming_tile", lambda K: Tile(16, 16))
    monkeypatch.setattr(triton_bn_sum, "row_split", lambda M, K, tile: (-(-M // 48), 48))
    y = maps(1, (3, 19, 7, 9), torch.float32, device)[0] + 5
    _, means, variances, rstds = triton_bn_sum.bn_sum_forward([y], [], [], [1e-5], None)
    assert rel(means[0], y.double().mean((0, 2, 3))) < 1e-6
    assert rel(variances[0], y.double().var((0, 2, 3), correction=0)) < 1e-6
    assert rel(rstds[0], (y.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt()) < 1e-6
    grad = maps(1, (3, 19, 7, 9), torch.float32, device)[0]
    true = by_torch([y.double()], [], [], [1e-5], grad)
    dys, _, dbeta = triton_bn_sum.bn_sum_backward(grad, [y], means, rstds, [], [True])
    assert rel(dys[0], true["dy0"]) < 1e-5
    assert rel(dbeta, grad.double().sum((0, 2, 3))) < 1e-5


def test_mean_far_above_deviation(device: torch.device) -> None:
    """Mean 1000, deviation 0.1: E[y²] − E[y]² would lose every digit of the variance."""
    y = (torch.randn(4, 5, 9, 7) * 0.1 + 1000).to(device).contiguous(memory_format=torch.channels_last)
    out, _, _, rstds = triton_bn_sum.bn_sum_forward([y], [], [], [1e-5], None)
    assert rel(rstds[0], (y.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt()) < 1e-5
    true = F.batch_norm(y.double(), None, None, training=True)
    assert rel(out, true) <= max(2 * rel(F.batch_norm(y, None, None, training=True), true), 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "shape"])
def test_maps_that_do_not_fit_are_named(layout: str, device: torch.device) -> None:
    first, second = maps(2, (2, 4, 3, 5), torch.float32, device)
    second = second.contiguous() if layout == "contiguous" else maps(1, (2, 4, 5, 3), torch.float32, device)[0]
    with pytest.raises(ValueError, match=r"ys\[1\] must"):
        triton_bn_sum.bn_sum_forward([first, second], [], [], [1e-5] * 2, None)


def test_a_channel_without_variance_where_epsilon_is_zero(device: torch.device) -> None:
    ys = maps(2, (2, 7, 5, 3), torch.float32, device)
    for y in ys:
        y[:, 2] = 3
    gammas, eps = [torch.randn(7, device=device) for _ in ys], [0.0, 1e-5]
    out, means, _, rstds = triton_bn_sum.bn_sum_forward(ys, gammas, [], eps, None)
    assert not out[:, 2].any()
    assert rstds[0, 2] == 0
    assert rel(rstds[1, 2], torch.tensor(1e-5**-0.5)) < 1e-6
    dys, dgammas, _ = triton_bn_sum.bn_sum_backward(torch.randn_like(ys[0]), ys, means, rstds, gammas, [True, True])
    assert not dys[0][:, 2].any()
    assert not dgammas[:, 2].any()
    assert all(t.isfinite().all() for t in (out, *dys, dgammas))


@pytest.mark.parametrize("momenta", [(0.1, 0.1), (0.7, None), (None, 1.0), (0.0, 1e-3)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_are_batchnorm2d_s(
    momenta: tuple[float | None, ...], shifted: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Means, unbiased variances and counters; to float64's last digits by the batch's statistics as returned."""
    shape, K = (3, 5, 4, 3), 5
    modules = [nn.BatchNorm2d(K, momentum=momentum, dtype=torch.float64).to(device) for momentum in momenta]
    for module in modules:
        nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var)
    means, variances, counters = (
        [getattr(m, name).clone() for m in modules]
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    exact = [[t.to(dtype).double().clone() for t in own] for own in (means, variances)]
    means, variances = ([t.to(dtype) for t in own] for own in (means, variances))
    shifts = [torch.randn(K, device=device) for _ in modules] if shifted else []
    for batch in range(1, 4):
        ys = maps(2, shape, torch.float32, device)
        running = Running(means, variances, counters, shifts, momenta)
        _, mean, variance, _ = triton_step.triton_bn_sum_(ys, [], [], *running.lists(), [1e-5] * 2, None, None, 0)
        for b, module in enumerate(modules):
            shift = shifts[b].double() if shifted else torch.zeros(K, dtype=torch.float64, device=device)
            module(ys[b].double() + shift[:, None, None])
            factor = 1 / batch if momenta[b] is None else momenta[b]
            for own, value in zip(exact, (mean[b] + shift, variance[b] * (36 / 35)), strict=True):
                own[b] = (1 - factor) * own[b] + factor * value
    for b, module in enumerate(modules):
        for own, exactly, wanted in (
            (means[b], exact[0][b], module.running_mean),
            (variances[b], exact[1][b], module.running_var),
        ):
            torch.testing.assert_close(own, wanted.to(dtype), rtol=1e-5, atol=1e-6)
            if dtype == torch.float64:
                torch.testing.assert_close(own, exactly, rtol=1e-13, atol=1e-13)
        assert counters[b] == module.num_batches_tracked == 3


@pytest.mark.parametrize("counter", [torch.int64, torch.int32, torch.uint8, torch.float32], ids=str)
def test_counters_of_other_dtypes(counter: torch.dtype, device: torch.device) -> None:
    (y,) = maps(1, (2, 3, 4, 5), torch.float32, device)
    mean, variance, count = (
        torch.zeros(3, device=device),
        torch.ones(3, device=device),
        torch.tensor(1, dtype=counter),
    )
    running = Running([mean], [variance], [count.to(device)], [], [None])
    triton_step.triton_bn_sum_([y], [], [], *running.lists(), [1e-5], None, None, 0)
    assert running.counters[0] == 2
    assert running.counters[0].dtype == counter
    torch.testing.assert_close(mean, y.mean((0, 2, 3)) / 2)
    torch.testing.assert_close(variance, 0.5 + y.var((0, 2, 3)) / 2)


def test_running_statistics_that_do_not_fit_are_named(device: torch.device) -> None:
    ys = maps(2, (2, 4, 3, 5), torch.float32, device)

    def call(**changes: object) -> None:
        vectors = [[torch.ones(4, device=device) for _ in ys] for _ in range(2)]
        counters = [torch.tensor(0, device=device) for _ in ys]
        running = Running(*vectors, counters, [], [0.1] * 2)._replace(**changes)
        triton_step.triton_bn_sum_(ys, [], [], *running.lists(), [1e-5] * 2, None, None, 0)

    shared = torch.ones(4, device=device)
    for changes, message in (
        ({"variances": [shared]}, "running_vars must have 2 entries, as running_means"),
        ({"means": [shared, torch.ones(5, device=device)]}, r"running_means\[1\] must have shape \(4,\)"),
        ({"means": [shared, shared]}, "must share no memory: one of them is written"),
        ({"counters": [torch.zeros(2), torch.zeros(1)]}, r"counters\[0\] must be one number of a dtype in"),
        ({"variances": [shared, torch.ones(8, device=device)[::2]]}, r"running_vars\[1\] must be contiguous"),
        ({"shifts": [torch.ones(4)]}, "shifts must have 2 entries, as running_means, or none"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
