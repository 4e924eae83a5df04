"""The four batch-norm passes on their own, against float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_good_as, rel
from torch import Tensor

from acnet_kernels.kernels.configs import Tile
from acnet_kernels.ops import triton_bn_sum

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 7, 5, 3), (3, 16, 1, 1), (1, 5, 17, 19)]


def maps(B: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [
        (torch.randn(shape) * (b + 1) + b).to(device, dtype).contiguous(memory_format=torch.channels_last)
        for b in range(B)
    ]


def by_torch(
    ys: list[Tensor], gammas: list[Tensor | None], betas: list[Tensor | None], eps: list[float], grad: Tensor
) -> dict[str, Tensor]:
    """Output and gradients by F.batch_norm; float64 parameters for float64 maps, else float32."""
    params = torch.promote_types(ys[0].dtype, torch.float32)
    leaves = [y.detach().clone().requires_grad_() for y in ys]
    scales, shifts = (
        [None if p is None else p.to(params).detach().requires_grad_() for p in ps] for ps in (gammas, betas)
    )
    out = sum(
        F.batch_norm(y, None, None, g, b, True, 0.0, e)
        for y, g, b, e in zip(leaves, scales, shifts, eps, strict=True)
    )
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach()}
    for i, (y, g, b) in enumerate(zip(leaves, scales, shifts, strict=True)):
        found |= {f"dy{i}": y.grad} | ({} if g is None else {f"dgamma{i}": g.grad})
        found |= {} if b is None else {f"dbeta{i}": b.grad}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("B", "in_place"), [(1, True), (2, False), (3, True), (3, False)])
def test_passes(B: int, shape: tuple[int, ...], dtype: torch.dtype, in_place: bool, device: torch.device) -> None:
    ys, grad = maps(B, shape, dtype, device), maps(1, shape, dtype, device)[0]
    gammas, betas = ([torch.randn(shape[1], device=device) for _ in ys] for _ in range(2))
    if B == 2:
        gammas[1], betas[0] = None, None
    eps = [1e-5, 1e-3, 1e-4][:B]
    eager = by_torch(ys, gammas, betas, eps, grad)
    true = by_torch([y.double() for y in ys], gammas, betas, eps, grad)
    out, norms = triton_bn_sum.bn_sum_forward(ys, gammas, betas, eps)
    kept = [y.clone() for y in ys]
    dys, dgamma, dbeta = triton_bn_sum.bn_sum_backward(grad, ys, norms.mean, norms.rstd, gammas, in_place=in_place)
    got = {"out": out}
    for i in range(B):
        assert (dys[i] is ys[i]) == in_place
        assert in_place or torch.equal(ys[i], kept[i])
        got |= {f"dy{i}": dys[i]} | ({} if gammas[i] is None else {f"dgamma{i}": dgamma[i]})
        got |= {} if betas[i] is None else {f"dbeta{i}": dbeta[i]}
    assert_as_good_as(got, eager, true)


def test_statistics_of_many_blocks_a_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks within a tile, and tiles of unequal size, merge to the statistics of the whole."""
    monkeypatch.setattr(triton_bn_sum, "streaming_tile", lambda K: Tile(16, 16))
    monkeypatch.setattr(triton_bn_sum, "row_split", lambda M, K, tile: (-(-M // 48), 48))
    y = maps(1, (3, 19, 7, 9), torch.float32, device)[0] + 5
    norms = triton_bn_sum.merge_statistics(triton_bn_sum.statistics([y]), [None], [None], [1e-5])
    assert rel(norms.mean[0], y.double().mean((0, 2, 3))) < 1e-6
    assert rel(norms.var[0], y.double().var((0, 2, 3), correction=0)) < 1e-6
    grad = maps(1, (3, 19, 7, 9), torch.float32, device)[0]
    true = by_torch([y.double()], [None], [None], [1e-5], grad)
    dys, _, dbeta = triton_bn_sum.bn_sum_backward(grad, [y], norms.mean, norms.rstd, [None], in_place=False)
    assert rel(dys[0], true["dy0"]) < 1e-5
    assert rel(dbeta[0], grad.double().sum((0, 2, 3))) < 1e-5


def test_mean_far_above_deviation(device: torch.device) -> None:
    """Mean 1000, deviation 0.1: E[y²] − E[y]² would lose every digit of the variance."""
    y = (torch.randn(4, 5, 9, 7) * 0.1 + 1000).to(device).contiguous(memory_format=torch.channels_last)
    out, norms = triton_bn_sum.bn_sum_forward([y], [None], [None], [1e-5])
    assert rel(norms.var[0], y.double().var((0, 2, 3), correction=0)) < 1e-5
    true = F.batch_norm(y.double(), None, None, training=True)
    assert rel(out, true) <= max(2 * rel(F.batch_norm(y, None, None, training=True), true), 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "shape"])
def test_maps_that_do_not_fit_are_named(layout: str, device: torch.device) -> None:
    first, second = maps(2, (2, 4, 3, 5), torch.float32, device)
    second = second.contiguous() if layout == "contiguous" else maps(1, (2, 4, 5, 3), torch.float32, device)[0]
    with pytest.raises(ValueError, match=r"ys\[1\] must"):
        triton_bn_sum.bn_sum_forward([first, second], [None] * 2, [None] * 2, [1e-5] * 2)
