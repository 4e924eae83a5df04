"""Values at the edge of arithmetic: every backend does with them what nn.Conv2d and nn.BatchNorm2d do."""

import copy

import oracle
import pytest
import torch
from oracle import scramble
from torch import nn

import acnet_kernels
from acnet_kernels import ACBlock
from acnet_kernels.backends import planner, synced
from acnet_kernels.ops import bn_sum
from acnet_kernels.steps import batchnorm

TRAINING = ("eager", "branches", "moments", "recompute")
INF, NAN = float("inf"), float("nan")


def plain(block, x):
    """The block's modules, called one by one."""
    out = 0
    for name, conv in block.convs().items():
        bn, y = block.norms()[name], conv(block.geometry.placement(block.taps[name]).apply(x))
        if bn.training and bn.eps == 0:  # newer releases of PyTorch refuse what their operator computes
            bn.num_batches_tracked.add_(1)
            buffers = bn.running_mean, bn.running_var
            out = out + torch.batch_norm(y, bn.weight, bn.bias, *buffers, True, bn.momentum, 0.0, True)
        else:
            out = out + bn(y)
    return out


def step(block, x, grad, forward):
    """Output, gradients and, after one step more on the clean input, buffers."""
    block = copy.deepcopy(block)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(block, x)
    out.backward(grad)
    with torch.no_grad():
        forward(block, grad[:, : x.shape[1]])
    gradients = {f"d {name}": p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "d x": x.grad, **gradients, **dict(block.named_buffers())}


def kinds(t):
    """0 where finite, ±1 where infinite, 2 where NaN."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign(), 0))


def check_alike(block, x, backend, rtol=1e-4, gradients=True):
    block = copy.deepcopy(block)
    block.backend = backend
    assert block.plan(x)[1].backend is planner.BACKENDS[backend], block.plan(x)[1].reason
    grad = torch.randn_like(plain(copy.deepcopy(block), x))
    want = step(block, x, grad, plain)
    for name, t in step(block, x, grad, lambda b, t: b(t)).items():
        if gradients or not name.startswith("d "):
            assert torch.equal(kinds(t), kinds(want[name])), name
            finite = want[name].isfinite()
            torch.testing.assert_close(t[finite], want[name][finite], rtol=rtol, atol=rtol, msg=name)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def layout(request):
    return request.param


@pytest.mark.parametrize("backend", TRAINING)
@pytest.mark.parametrize("affine", [True, False])
def test_a_channel_without_variance_where_epsilon_is_zero(backend, affine, layout):
    block = scramble(ACBlock(6, 6, 3, padding=1, eps=0.0, use_affine=affine))
    with torch.no_grad():
        for conv in block.convs().values():
            conv.weight[2] = 0
        block.hor_conv.weight[4] = 0
        block.hor_bn.eps = 1e-3
    check_alike(block, torch.randn(6, 6, 9, 7).contiguous(memory_format=layout), backend, 1e-3)


@pytest.mark.parametrize("value", [0.1, -1e3])
def test_moments_takes_rounding_for_no_variance_where_epsilon_is_zero(value, layout):
    block = scramble(ACBlock(6, 6, 1, eps=0.0, backend="moments"))
    x = torch.randn(6, 6, 9, 7).contiguous(memory_format=layout)
    x[:, 1:] = value  # some are constant, and kernels whose taps cancel see nothing else
    with torch.no_grad():
        for conv in block.convs().values():
            conv.weight[:3, 0] = 0
            conv.weight[1] = torch.tensor([0, 1, -1, 0, 2, -2.0]).view(6, 1, 1)
    out = block(x.requires_grad_())
    beta = sum(bn.bias for bn in block.norms().values())
    torch.testing.assert_close(out[:, :3], beta[:3, None, None].expand_as(out[:, :3]))
    out.square().sum().backward()
    for t in (out, x.grad, *(p.grad for p in block.parameters())):
        assert t.isfinite().all()
    for conv in block.convs().values():
        assert not conv.weight.grad[:3].any()


@pytest.mark.parametrize("backend", TRAINING)
@pytest.mark.parametrize(("value", "positive"), [(INF, False), (INF, True), (NAN, False)])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 2, 3, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "shift": (1, -1)},
    ],
    ids=str,
)
def test_one_value_of_the_input_that_is_not_finite(backend, value, at, options, positive, layout):
    block, x = scramble(ACBlock(4, 4, **options)), torch.randn(5, 4, 9, 7).contiguous(memory_format=layout)
    x[at] = value
    if positive:  # then a mean is infinite, where kernels of both signs make it NaN
        with torch.no_grad():
            for conv in block.convs().values():
                conv.weight.abs_()
    # moments has one patch matrix for all branches: a shifted one that does not see the value has its NaN in dW.
    check_alike(block, x, backend, gradients=backend != "moments" or "shift" not in options)


@pytest.mark.parametrize("backend", TRAINING)
@pytest.mark.parametrize("scale", [6e17, 1e-18])
@pytest.mark.parametrize("groups", [1, 4])
def test_as_good_as_eager_where_squares_leave_float32(backend, scale, groups, layout):
    block = scramble(ACBlock(4, 4, 3, padding=1, groups=groups, backend=backend))
    x, grad = (torch.randn(8, 4, 13, 11) * scale).contiguous(memory_format=layout), torch.randn(8, 4, 13, 11)
    eager = copy.deepcopy(block)
    eager.backend = "eager"
    theirs, true = oracle.run(eager, x, grad), oracle.truth(block, x, grad)
    assert oracle.rel(theirs["out"], true["out"]) < 1e-5
    oracle.assert_as_good_as(oracle.run(block, x, grad), theirs, true)


@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_moments_is_right_even_where_eager_overflows(scale):
    block = scramble(ACBlock(4, 4, 3, padding=1, backend="moments"))
    x, grad = torch.randn(8, 4, 13, 11) * scale, torch.randn(8, 4, 13, 11)
    true = oracle.truth(block, x, grad)
    oracle.assert_as_good_as(oracle.run(block, x, grad), true, true)


@pytest.mark.parametrize("backend", ["auto", *TRAINING])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [INF, -INF, NAN, -1e-6, -1.0, 0.0])
def test_poisoned_running_statistics_speak_in_eval_and_are_refused_by_the_fold(backend, buffer, value):
    block, x = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).eval(), torch.randn(3, 4, 8, 7)
    getattr(block.hor_bn, buffer)[2] = value
    chosen = block.plan(x)[1].backend
    assert chosen is planner.BACKENDS["eager" if backend == "eager" else "folded"]
    grad = torch.randn(3, 6, 8, 7)
    want = step(block, x, grad, plain)
    for name, t in step(block, x, grad, lambda b, t: b(t)).items():
        finite = want[name].isfinite()
        if name.startswith("d "):
            assert torch.equal(t.isfinite(), finite), name
        else:
            assert torch.equal(kinds(t), kinds(want[name])), name
        torch.testing.assert_close(t[finite], want[name][finite], rtol=1e-4, atol=1e-4, msg=name)
    if buffer == "running_var" and value != 0:
        with pytest.raises(ValueError, match="var of branch 1 must be finite, not negative"):
            acnet_kernels.fold(block)
        with pytest.raises(ValueError, match="var of branch 1 must be finite, not negative"):
            acnet_kernels.fuse(nn.Sequential(block))


def test_poisoned_running_statistics_speak_in_a_compiled_graph():
    block, x = scramble(ACBlock(4, 6, 3, padding=1)).eval(), torch.randn(3, 4, 8, 7)
    block.ver_bn.running_var[1] = NAN
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x).isnan(), plain(block, x).isnan())
    torch.compiler.reset()


# --- the pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [INF, NAN, 1e18, 0.0])
def test_compiled_and_plain_batch_norm_sums_agree(dtype, value, layout):
    y = torch.randn(5, 4, 9, 7).to(dtype).contiguous(memory_format=layout)
    y[0, 0] *= 1 if value else 0
    y[:, 1] *= value if value == 1e18 else 1
    y[:, 2] = 0
    y[1, 3, 2, 2] = value
    gammas, betas = [torch.rand(4)], [torch.rand(4)]
    found = bn_sum.bn_sum_forward([y], gammas, betas, [0.0], None)
    expected = bn_sum._forward([y], gammas, betas, [0.0], None)
    eager = torch.batch_norm(y, gammas[0].to(dtype), betas[0].to(dtype), None, None, True, 0.0, 0.0, True)
    assert torch.equal(kinds(found[0]), kinds(eager))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(kinds(got), kinds(want))
        finite = want.isfinite()
        torch.testing.assert_close(
            got[finite], want[finite], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
        )


@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e30, 1.0])
def test_processes_statistics_merge_as_one_process_has_them(value):
    y = torch.randn(6, 3, 5, 4)
    y[3, 1] = value
    rows = []
    for part in y.split([1, 0, 3, 2]):
        mean, m2 = synced._moments(part, torch.float32)
        rows.append(torch.cat([torch.tensor([part.numel() / 3]), mean, m2]).double())
    count, mean, m2 = synced.merge(torch.stack(rows), 1)
    wide = y.double()
    torch.testing.assert_close(mean[0], wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        m2[0] / count, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("compiled", [True, False])
def test_running_statistics_stay_infinite_as_batch_norms_do(momentum, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(batchnorm, "LOADED", False)
    block = ACBlock(4, 4, 1, momentum=momentum, backend="branches")
    for conv in block.convs().values():
        nn.init.ones_(conv.weight)
    theirs = copy.deepcopy(block)
    for x in (torch.full((2, 4, 3, 3), INF), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)):
        block(x), plain(theirs, x)
        for (name, t), want in zip(block.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(t, want, equal_nan=True, msg=name)
