"""The batch-norm sum against its definition in float64, in every implementation this machine can run."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import rel

from acnet_kernels.ops import _extension, bn_sum, running
from acnet_kernels.spec import Norm
from acnet_kernels.steps import batchnorm
from acnet_kernels.steps.batchnorm import update_running

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Odd and prime sizes, one channel, one pixel, rows narrower and wider than a vector, several chunks and leftovers.
SHAPES = (
    (2, 3, 5, 7),
    (128, 16, 8, 8),
    (3, 17, 9, 5),
    (2, 130, 7, 3),
    (1, 1, 1, 5),
    (5, 70, 1, 1),
    (2, 1, 33, 33),
    (40, 33, 13, 13),
    (2, 600, 3, 3),
    (1, 5, 181, 211),
)
# Of out and dy (rounded to the maps' dtype), and of dγ and dβ (sums, never rounded to it).
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 5e-5),
    torch.bfloat16: (4e-3, 5e-5),
    torch.float16: (5e-4, 5e-5),
}
IMPLEMENTATIONS = {
    "operators": (bn_sum.bn_sum_forward, bn_sum.bn_sum_backward, bn_sum.bn_sum_backward_),
    "pytorch": (bn_sum._forward, bn_sum._backward, bn_sum._backward_),
}


def make(shape, dtype=torch.float32, layout=torch.contiguous_format, count=3, mean=3.0, deviation=2.0):
    """(ys, gammas, betas, eps, grad)."""
    ys = [(torch.randn(shape) * deviation + mean).to(dtype).contiguous(memory_format=layout) for _ in range(count)]
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    gammas = [torch.rand(shape[1], dtype=parameter) + 0.5 for _ in range(count)]
    betas = [torch.randn(shape[1], dtype=parameter) for _ in range(count)]
    grad = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=layout)
    return ys, gammas, betas, [10.0 ** -(5 - b % 3) for b in range(count)], grad


def definition(ys, gammas, betas, eps, grad):
    """(out, dys, dgammas, dbeta) in float64 by autograd."""
    ys = [y.double().requires_grad_() for y in ys]
    gammas = [g.double().requires_grad_() for g in gammas]
    betas = [b.double().requires_grad_() for b in betas]
    out = sum(
        F.batch_norm(y, None, None, g, b, True, 0.0, e) for y, g, b, e in zip(ys, gammas, betas, eps, strict=True)
    )
    grads = torch.autograd.grad(out, [*ys, *gammas, betas[0]], grad.double())
    return out, grads[: len(ys)], torch.stack(grads[len(ys) : -1]), grads[-1]


def check(implementation, shape, dtype, layout, count):
    """Asserts that out, dy, dγ and dβ are the definition's for `count` maps.

    The backward that writes gives the same bits, whether dy_b takes y_b's memory or, as of the last one, another.
    """
    forward, backward, backward_ = IMPLEMENTATIONS[implementation]
    ys, gammas, betas, eps, grad = make(shape, dtype, layout, count)
    true_out, true_dys, true_dgammas, true_dbeta = definition(ys, gammas, betas, eps, grad)
    out, means, _, rstds = forward(ys, gammas, betas, eps, None)
    needs_dy = [True] * count
    dys, dgammas, dbeta = backward(grad, ys, means, rstds, gammas, needs_dy)
    of_maps, of_sums = TOLERANCES[dtype]
    for got in (out, *dys):
        assert got.dtype == dtype
        assert got.stride() == ys[0].stride()
    assert rel(out, true_out) < of_maps
    for dy, true_dy in zip(dys, true_dys, strict=True):
        assert rel(dy, true_dy) < of_maps
    assert (dgammas.double() - true_dgammas).norm() < of_sums * true_dgammas.norm().clamp_min(1)
    assert rel(dbeta, true_dbeta) < of_sums
    assert rel(means, torch.stack([y.double().mean((0, 2, 3)) for y in ys])) < 1e-6
    again = [y.clone(memory_format=torch.preserve_format) for y in ys]
    targets = [*again[:-1], torch.full_like(ys[-1], torch.nan)]
    dgammas_, dbeta_ = backward_(grad, again, means, rstds, gammas, needs_dy, targets)
    assert torch.equal(again[-1], ys[-1])
    dgammas_too, _ = backward_(grad, again[-1:], means[-1:], rstds[-1:], gammas[-1:], [True], again[-1:])
    for a, b in zip((*dys, dgammas, dbeta), (*targets, dgammas_, dbeta_), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again[-1], dys[-1])
    assert torch.equal(dgammas_too[0], dgammas[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_is_the_definition(implementation, dtype, layout):
    for shape in SHAPES:
        for count in (1, 2, 3):
            check(implementation, shape, dtype, layout, count)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_number_of_maps(implementation, dtype, layout):
    for count in range(4, 8):
        check(implementation, (3, 17, 9, 5), dtype, layout, count)
    for shape in SHAPES[::2]:
        check(implementation, shape, dtype, layout, 8)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_maps_between_narrow_ones(implementation, layout, narrow):
    forward, backward, _ = IMPLEMENTATIONS[implementation]
    ys, gammas, betas, eps, grad = make((3, 19, 7, 5), layout=layout)
    wide, means, _, rstds = forward(ys, gammas, betas, eps, None)
    out = forward(ys, gammas, betas, eps, narrow)[0]
    assert torch.equal(out, wide.to(narrow))
    assert out.stride() == ys[0].stride()
    grad = grad.to(narrow)
    got = backward(grad, ys, means, rstds, gammas, [True] * 3)
    want = backward(grad.float(), ys, means, rstds, gammas, [True] * 3)
    for a, b in zip([*got[0], *got[1:]], [*want[0], *want[1:]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_bits_for_any_number_of_threads(layout):
    ys, gammas, betas, eps, grad = make((40, 33, 20, 20), layout=layout, count=4)

    def run():
        out, means, variances, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
        dys, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, [True] * 4)
        return [out, means, variances, rstds, *dys, dgammas, dbeta]

    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mean_far_larger_than_the_deviation(layout):
    ys, gammas, betas, eps, grad = make((8, 6, 12, 11), layout=layout, mean=1e3, deviation=0.1)
    true_out, true_dys, true_dgammas, _ = definition(ys, gammas, betas, eps, grad)
    out, means, _, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
    dys, dgammas, _ = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, [True] * 3)
    assert rel(out, true_out) < 1e-6
    assert rel(dgammas, true_dgammas) < 1e-5
    for dy, true_dy in zip(dys, true_dys, strict=True):
        assert rel(dy, true_dy) < 1e-6
        # What a constant added to the input would move: zero but for rounding.
        assert dy.double().sum((0, 2, 3)).abs().max() < 1e-6 * dy.double().abs().sum((0, 2, 3)).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_variance_far_below_eps_keeps_its_digits(implementation, dtype):
    forward = IMPLEMENTATIONS[implementation][0]
    y = torch.randn(3, 4, 5, 5, dtype=dtype) * 1e-6
    variances = forward([y], [], [], [1e-3], None)[2]
    want = y.double().var((0, 2, 3), correction=0)
    assert rel(variances[0], want) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_constant_maps(implementation):
    forward, backward, _ = IMPLEMENTATIONS[implementation]
    ys = [torch.full((3, 4, 5, 5), 7.3) for _ in range(2)]
    betas = [torch.randn(4) for _ in range(2)]
    out, means, _, rstds = forward(ys, [torch.ones(4)] * 2, betas, [1e-5] * 2, None)
    torch.testing.assert_close(out, (betas[0] + betas[1])[:, None, None].expand_as(out), atol=1e-3, rtol=0)
    torch.testing.assert_close(rstds, torch.full_like(rstds, 1e-5).rsqrt(), rtol=1e-3, atol=0)
    dys, _, _ = backward(torch.randn_like(out), ys, means, rstds, [], [True] * 2)
    assert all(dy.isfinite().all() for dy in dys)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_wanted_dy(implementation):
    forward, backward, backward_ = IMPLEMENTATIONS[implementation]
    ys, gammas, betas, eps, grad = make((3, 5, 4, 6))
    _, means, _, rstds = forward(ys, gammas, betas, eps, None)
    every, dgammas, _ = backward(grad, ys, means, rstds, gammas, [True] * 3)
    some, dgammas_of_some, _ = backward(grad, ys, means, rstds, gammas, [False, True, False])
    assert len(some) == 1
    assert torch.equal(some[0], every[1])
    assert torch.equal(dgammas, dgammas_of_some)
    copies = [y.clone() for y in ys]
    backward_(grad, copies, means, rstds, gammas, [False, True, False], copies[1:2])
    for copy, want in zip(copies, (ys[0], every[1], ys[2]), strict=True):
        assert torch.equal(copy, want)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(affine, layout):
    ys, gammas, betas, eps, grad = make((3, 5, 4, 6), layout=layout)
    gammas, betas = (gammas, betas) if affine else ([], [])
    _, means, _, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
    wants = [True, False, True]
    torch.library.opcheck(bn_sum.bn_sum_backward, (grad, ys, means, rstds, gammas, wants))
    for targets in ([ys[0], ys[2]], [ys[0], torch.empty_like(ys[2])]):
        torch.library.opcheck(bn_sum.bn_sum_backward_, (grad, ys, means, rstds, gammas, wants, targets))
    torch.library.opcheck(bn_sum.bn_sum_forward, (ys, gammas, betas, eps, None))
    for t in (*ys, *gammas, *betas):
        t.requires_grad_()
    torch.library.opcheck(bn_sum.bn_sum_forward, (ys, gammas, betas, eps, None))


def test_gradcheck():
    ys, gammas, betas, eps, _ = make((2, 3, 2, 3), torch.float64)
    tensors = [t.requires_grad_() for t in (*ys, *gammas, *betas)]

    def forward(*t):
        return bn_sum.bn_sum_forward(t[:3], t[3:6], t[6:], eps, None)[0]

    assert torch.autograd.gradcheck(forward, tensors)


def test_second_derivative_is_refused():
    ys, gammas, betas, eps, _ = make((2, 3, 2, 3))
    y = ys[0].requires_grad_()
    out = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)[0]
    (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dy.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ys: [], "1 to 8 maps"),
        (lambda ys: ys * 3, "1 to 8 maps"),
        (lambda ys: [ys[0], ys[1].double(), ys[2]], "agree in shape and dtype"),
        (lambda ys: [ys[0], ys[1][:1], ys[2]], "agree in shape and dtype"),
        (lambda ys: [y[:0] for y in ys], "non-empty"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_maps_are_refused(implementation, change, message):
    ys, gammas, betas, eps, _ = make((2, 3, 4, 4))
    with pytest.raises((ValueError, RuntimeError), match=message):
        IMPLEMENTATIONS[implementation][0](change(ys), gammas, betas, eps, None)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (lambda ys, _: ys[:1], "dys must have"),
        (lambda ys, _: [ys[0], ys[1].float()], r"dys\[1\] must agree in shape and dtype"),
        (lambda ys, _: [ys[0], ys[0]], "must share no memory"),
        (lambda ys, _: [ys[2], ys[0]], "must share no memory"),
        (lambda ys, _: [ys[0], ys[1]], "must share no memory"),
        (lambda ys, others: [ys[0], others[0].view_as(ys[0])], "grad"),
        (lambda ys, others: [ys[0], others[1].view_as(ys[0])], "means"),
        (lambda ys, others: [ys[0], others[2].view_as(ys[0])], "rstds"),
        (lambda ys, others: [ys[0], others[3].view_as(ys[0])], r"gammas\[0\]"),
        (lambda ys, _: [ys[0], torch.zeros(2, 3, 4, 8).double()[..., ::2]], "must (have the layout|be contiguous)"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_targets_are_refused_before_anything_is_written(implementation, targets, message):
    forward, _, backward_ = IMPLEMENTATIONS[implementation]
    ys, gammas, betas, eps, grad = make((2, 3, 4, 4), torch.float64)
    _, means, _, rstds = forward(ys, gammas, betas, eps, None)
    memory = torch.zeros(4, grad.numel(), dtype=torch.float64)  # with room for a map where each of these begins
    given = [
        row[: t.numel()].view_as(t).copy_(t) for row, t in zip(memory, (grad, means, rstds, gammas[0]), strict=True)
    ]
    grad, means, rstds, gammas[0] = given
    before = [t.clone() for t in (memory, *ys)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        backward_(grad, ys, means, rstds, gammas, [True, False, True], targets(ys, memory))
    assert all(torch.equal(t, old) for t, old in zip((memory, *ys), before, strict=True))


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
def test_wrong_layouts_are_refused():
    ys, gammas, betas, eps, grad = make((2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="all be contiguous or all channels_last"):
        bn_sum.bn_sum_forward([ys[0], ys[1].to(memory_format=torch.channels_last), ys[2]], gammas, betas, eps, None)
    with pytest.raises(RuntimeError, match="all be contiguous or all channels_last"):
        bn_sum.bn_sum_forward([y[:, :, ::2] for y in ys], gammas, betas, eps, None)
    _, means, _, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, eps, None)
    wrong = grad.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="grad must agree"):
        bn_sum.bn_sum_backward(wrong, ys, means, rstds, gammas, [True] * 3)


@pytest.mark.skipif(not _extension.LOADED, reason=f"only the C++ kernels promise it: {_extension.WHY_MISSING}")
def test_means_near_zero_are_not_rounded_to_float32_on_their_way():
    # Less a pivot of the deviation's size they are not near zero: rounding them costs 2e-8, and so once a plane.
    y = torch.randn(2, 64, 64, 64)
    means = bn_sum.bn_sum_forward([y], [], [], [1e-5], None)[1][0]
    assert (means - y.double().mean((0, 2, 3))).square().mean().sqrt() < 1e-8


@pytest.fixture(params=["in one call", "in PyTorch"])
def update(request, monkeypatch):
    if request.param == "in PyTorch":
        monkeypatch.setattr(batchnorm, "LOADED", False)
    elif not _extension.LOADED:
        pytest.skip(f"needs the C++ operator: {_extension.WHY_MISSING}")


@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (0.1, 0.7, 0.1), (None, None, None), (None, 0.7, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_batchnorm2d_s(momenta, dtype, update):
    modules = [torch.nn.BatchNorm2d(5, momentum=momentum, dtype=dtype) for momentum in momenta]
    norms = [Norm(*(t.clone() for t in (m.weight, m.bias, *m.buffers())), m.eps, m.momentum, True) for m in modules]
    biases = [None, torch.randn(5, dtype=dtype), None]
    for _ in range(3):
        ys = make((4, 5, 3, 3), dtype)[0]
        _, means, variances, _ = bn_sum.bn_sum_forward(ys, [], [], [m.eps for m in modules], None)
        update_running(norms, means, variances, 36, biases)
        for module, y, bias in zip(modules, ys, biases, strict=True):
            module(y if bias is None else y + bias[:, None, None])
    for module, norm in zip(modules, norms, strict=True):
        torch.testing.assert_close(norm.running_mean, module.running_mean)
        torch.testing.assert_close(norm.running_var, module.running_var)
        assert norm.num_batches_tracked == module.num_batches_tracked == 3


def test_running_statistics_that_are_not_kept(update):
    kept, counter = [torch.zeros(5), torch.ones(5)], torch.tensor(0)
    norms = [Norm(None, None, None, None, None, 1e-5, 0.1, True), Norm(None, None, *kept, counter, 1e-5, 0.1, True)]
    means, variances = torch.randn(2, 5).double(), torch.rand(2, 5).double()
    update_running(norms, means, variances, 11, [None, None])
    torch.testing.assert_close(kept[0], 0.1 * means[1].float())
    torch.testing.assert_close(kept[1], 0.9 + 0.1 * 1.1 * variances[1].float())
    before = [t.clone() for t in kept]
    update_running(norms, means, variances, 0, [None, None])
    assert counter == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ operator: {_extension.WHY_MISSING}")
def test_the_update_is_an_operator():
    buffers = [[torch.zeros(5), torch.zeros(5)], [torch.ones(5), torch.ones(5)], [torch.tensor(0), torch.tensor(3)]]
    statistics = torch.randn(2, 5).double(), torch.rand(2, 5).double()
    torch.library.opcheck(running.update_running_, (*buffers, *statistics, [0.1, 0.2], 7))
    with pytest.raises(RuntimeError, match="moved alone"):
        running.update_running_(*buffers, *statistics, [math.nan, 0.2], 7)
    with pytest.raises(RuntimeError, match="vectors of 5 channels"):
        running.update_running_([torch.zeros(4)], [torch.ones(5)], [], *(t[:1] for t in statistics), [0.1], 7)


def test_a_momentum_of_one_leaves_nothing_of_the_old_statistics(update):
    kept = [torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    means, variances = 1e-9 * torch.rand(1, 5).double(), 1e-9 * torch.rand(1, 5).double()
    for momentum in (1.0, None):
        norm = Norm(None, None, *kept, torch.tensor(0), 1e-5, momentum, True)
        update_running([norm], means, variances, 10**9, [None])
        torch.testing.assert_close(kept[0], means[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(kept[1], variances[0], rtol=1e-8, atol=0)
