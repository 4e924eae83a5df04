"""Batch-norm sums as tensor expressions around their reductions, eagerly and under Inductor, against float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import rel
from test_bn_sum import LAYOUTS, TOLERANCES, definition, make
from torch._inductor import metrics

from acnet_kernels.ops import bn_sum
from acnet_kernels.ops import bn_sum_coefficients as coefficients
from acnet_kernels.ops.bn_sum_coefficients import bn_sum_affine, bn_sum_slopes
from acnet_kernels.steps.open_sum import open_sum


def gradients(ys, gammas, betas, eps, grad, dtype):
    """(out, dys, dgammas, dbetas, means, variances)."""
    tensors = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (*ys, *gammas, *betas)
    ]
    n = len(ys)
    of_gammas, of_betas = tensors[n : n + len(gammas)], tensors[n + len(gammas) :]
    out, means, variances = open_sum(tensors[:n], of_gammas, of_betas, eps, dtype)
    found = torch.autograd.grad(out, tensors, grad.to(dtype))
    return out, found[:n], found[n : n + len(gammas)], found[n + len(gammas) :], means, variances


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_is_the_definition(layout, dtype, count):
    for shape in ((2, 3, 5, 7), (3, 17, 9, 5), (5, 70, 1, 1)):
        ys, gammas, betas, eps, grad = make(shape, dtype, layout, count)
        true_out, true_dys, true_dgammas, true_dbeta = definition(ys, gammas, betas, eps, grad)
        out, dys, dgammas, dbetas, means, variances = gradients(ys, gammas, betas, eps, grad, dtype)
        of_maps, of_sums = TOLERANCES[dtype]
        for got, true in zip((out, *dys), (true_out, *true_dys), strict=True):
            assert (got.dtype, got.stride()) == (dtype, ys[0].stride())
            assert rel(got, true) < of_maps
        assert (torch.stack(dgammas).double() - true_dgammas).norm() < of_sums * true_dgammas.norm().clamp_min(1)
        for dbeta in dbetas:
            assert rel(dbeta, true_dbeta) < of_sums
        _, sealed_means, sealed_variances, _ = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
        assert torch.equal(means, sealed_means)
        assert torch.equal(variances, sealed_variances)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mean_far_above_the_spread(layout):
    ys, gammas, betas, eps, grad = make((4, 6, 16, 16), torch.float32, layout, 2, mean=1e4, deviation=1.0)
    true_out, true_dys, *_ = definition(ys, gammas, betas, eps, grad)
    out, dys, *_ = gradients(ys, gammas, betas, eps, grad, torch.float32)
    for got, true in zip((out, *dys), (true_out, *true_dys), strict=True):
        assert rel(got, true) < 2e-6


def test_without_affine_and_into_a_narrower_dtype():
    ys, _, _, eps, grad = make((3, 5, 6, 4))
    ones, zeros = [torch.ones(5)] * 3, [torch.zeros(5)] * 3
    true_out, true_dys, *_ = definition(ys, ones, zeros, eps, grad)
    out, dys, *_ = gradients(ys, [], [], eps, grad, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert all(dy.dtype == torch.float32 for dy in dys)
    for got, true in zip((out, *dys), (true_out, *true_dys), strict=True):
        assert rel(got, true) < 4e-3


def test_only_the_wanted_gradients():
    ys, gammas, betas, eps, grad = make((3, 5, 6, 4))
    want = gradients(ys, gammas, betas, eps, grad, torch.float32)
    y, gamma = ys[1].clone().requires_grad_(), gammas[2].clone().requires_grad_()
    out, _, _ = open_sum([ys[0], y, ys[2]], [gammas[0], gammas[1], gamma], betas, eps, torch.float32)
    out.backward(grad)
    assert torch.equal(y.grad, want[1][1])
    assert torch.equal(gamma.grad, want[2][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_computes_what_follows_in_the_same_pass(dtype):
    """An activation and a residual add no kernel to the sum's own, forward or backward."""
    ys, gammas, betas, eps, _ = make((2, 16, 8, 8), dtype, torch.channels_last, 2)
    residual = torch.randn(2, 16, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)

    def plain(ys, residual):
        return open_sum(ys, gammas, betas, eps, dtype)[0] + 0 * residual

    def followed(ys, residual):
        return F.relu(open_sum(ys, gammas, betas, eps, dtype)[0] + residual)

    def run(function):
        torch.compiler.reset()
        metrics.reset()
        inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (*ys, residual)]
        out = torch.compile(function, fullgraph=True)(inputs[:2], inputs[2])
        grads = torch.autograd.grad(out.square().sum(), inputs)
        return metrics.generated_kernel_count, [out, *grads]

    alone, _ = run(plain)
    kernels, got = run(followed)
    apart = torch.__version__ < "2.11"  # there ReLU's gradient, which the sums read, is a kernel of its own
    assert kernels <= alone + apart
    inputs = [t.double().requires_grad_() for t in (*ys, residual)]
    out = F.relu(
        sum(
            F.batch_norm(y, None, None, g.double(), b.double(), True, 0.0, e)
            for y, g, b, e in zip(inputs[:2], gammas, betas, eps, strict=True)
        )
        + inputs[2]
    )
    true = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    bound = 2e-5 if dtype == torch.float32 else 2e-2  # relu's derivative is decided by a rounded sign
    for g, t in zip(got, true, strict=True):
        assert rel(g, t) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_coefficients_in_pytorch_are_the_same(affine, dtype):
    ys, gammas, betas, eps, grad = make((3, 5, 4, 6), dtype)
    gammas, betas = (gammas, betas) if affine else ([], [])
    found = coefficients._affine(ys, gammas, betas, eps)
    slopes = coefficients._slopes(grad, ys, found[0], found[2], gammas)
    of_operators = (*bn_sum_affine(ys, gammas, betas, eps), *bn_sum_slopes(grad, ys, found[0], found[2], gammas))
    for mine, its in zip((*found, *slopes), of_operators, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_opcheck():
    ys, gammas, betas, eps, grad = make((3, 5, 4, 6))
    torch.library.opcheck(bn_sum_affine, (ys, gammas, betas, eps))
    means, _, rstds, *_ = bn_sum_affine(ys, gammas, betas, eps)
    torch.library.opcheck(bn_sum_slopes, (grad, ys, means, rstds, gammas))
    y = ys[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="no derivative"):
        bn_sum_affine([y], [], [], eps[:1])[0].sum().backward()
    with pytest.raises(NotImplementedError, match="no derivative"):
        bn_sum_slopes(grad, [y], means[:1], rstds[:1], [])[0].sum().backward()
