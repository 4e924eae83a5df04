"""The convolution kernels and the whole step against float64."""

import pytest
import torch
from oracle import FLOORS, assert_as_good_as, border, rel
from problems import BRANCHES, PROBLEMS, SMALL, Problem, Tensors

from acnet_kernels.ops import triton_bn_sum, triton_conv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def step(t: Tensors, config=SMALL) -> dict[str, torch.Tensor]:
    """Everything Tensors.eager gives, all phases by Triton."""
    weights, (H, W) = t.by_branch(), t.x.shape[2:]
    maps, moments = triton_conv.conv_forward(t.x, weights, t.window, config=config)
    norms = triton_bn_sum.merge_statistics(moments, t.gammas, t.betas, t.eps)
    ys = [y for y in maps if y is not None]
    out = triton_bn_sum.apply(ys, norms)
    found = {"out": out} | {f"y_{b}": y.clone() for b, y in zip(t.branches, ys, strict=True)}
    dys, dgamma, dbeta = triton_bn_sum.bn_sum_backward(t.grad, ys, norms.mean, norms.rstd, t.gammas, in_place=True)
    by_branch = t.by_branch(dict(zip(t.branches, dys, strict=True)))
    found["x"] = triton_conv.input_grad(by_branch, weights, t.window, (H, W), config=config)
    dws = triton_conv.weight_grads(t.x, by_branch, weights, t.window, config=config)
    for i, b in enumerate(t.branches):
        dw = dws[BRANCHES.index(b)]
        assert dw is not None
        assert dw.stride() == t.weights[b].stride()
        found |= {b: dw, f"gamma_{b}": dgamma[i], f"beta_{b}": dbeta[i]}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_step_is_as_exact_as_eager(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    t = Tensors(problem, dtype, device)
    got, eager, true = step(t), t.eager(), t.truth()
    assert_as_good_as(got, eager, true)
    for name in got.keys() & {f"y_{b}" for b in BRANCHES}:
        assert rel(border(got[name]), border(true[name])) <= FLOORS[dtype]
