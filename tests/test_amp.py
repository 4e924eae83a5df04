"""Mixed and low precision: autocast, GradScaler with steps that overflow, pure half, float64."""

import copy

import oracle
import pytest
import torch
from oracle import scramble
from stacks import MODES, TRAINING, Net, assert_same_state, through_modules
from torch import nn

from acnet_kernels import ACBlock

DTYPES = [torch.bfloat16, torch.float16]


def autocast(dtype, forward):
    def call(module, x):
        with torch.autocast("cpu", dtype):
            return forward(module, x)

    return call


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_autocast(backend, training, dtype, layout):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    x, grad = torch.randn(3, 4, 9, 7).to(memory_format=layout), torch.randn(3, 6, 9, 7)
    got = oracle.run(b, x, grad, autocast(dtype, lambda m, t: m(t)))
    eager = oracle.run(b, x, grad, autocast(dtype, lambda m, t: m._forward_modules(t)))
    assert got["out"].dtype == eager["out"].dtype == dtype
    assert {t.dtype for name, t in got.items() if name != "out"} == {torch.float32}
    assert got["out"].is_contiguous(memory_format=layout)
    oracle.assert_as_good_as(got, eager, oracle.truth(b, x, grad))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64])
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_one_dtype_throughout(backend, training, dtype):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training).to(dtype)
    x, grad = torch.randn(3, 4, 9, 7).to(dtype), torch.randn(3, 6, 9, 7).to(dtype)
    got = oracle.run(b, x, grad)
    eager = oracle.run(b, x, grad, lambda m, t: m._forward_modules(t))
    assert {t.dtype for t in got.values()} == {dtype}
    oracle.assert_as_good_as(got, eager, oracle.truth(b, x, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TRAINING)
def test_float64_input_is_not_autocast(backend, dtype):
    b = ACBlock(4, 6, 3, padding=1, backend=backend).double()
    with torch.autocast("cpu", dtype):
        assert b(torch.randn(2, 4, 8, 8).double()).dtype == torch.float64


def scaled_steps(net, batches, scale):
    """Trains with autocast fp16 and a GradScaler: (the scale after, parameters after each step)."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10)
    seen = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append([p.detach().clone() for p in net.parameters()])
    return scaler.get_scale(), seen


@pytest.mark.parametrize("backend", TRAINING)
def test_grad_scaler_skips_an_overflow_and_statistics_move_on(backend):
    net = Net(backend)
    start = [p.detach().clone() for p in net.parameters()]
    twin = through_modules(net)
    batches = [(torch.randn(4, 4, 8, 8), torch.randint(3, (4,))) for _ in range(3)]
    huge = 2.0**40  # scaled gradients overflow float16 in the first step, and in the next ones too
    scale, seen = scaled_steps(net, batches, huge)
    scaled_steps(twin, batches, huge)
    assert scale == huge / 2**3
    assert all(torch.equal(p, q) for step in seen for p, q in zip(step, start, strict=True))
    assert int(net.first.square_bn.num_batches_tracked) == 3
    assert_same_state(net, twin, rtol=1e-2, atol=1e-3)  # running statistics moved as nn.BatchNorm2d's

    scale, seen = scaled_steps(net, batches, 2.0**8)
    assert scale == 2.0**8
    assert not torch.equal(seen[0][0], start[0])
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("backend", TRAINING)
def test_maps_that_overflow_float16_spoil_no_more_than_batch_norms_own(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    with torch.no_grad():
        b.square_conv.weight.mul_(1e4)
    twin = copy.deepcopy(b)
    x = torch.randn(4, 4, 8, 8) * 100
    with torch.autocast("cpu", torch.float16):
        out, want = b(x), twin._forward_modules(x)
    assert not want.isfinite().all()
    assert (out.isfinite() | ~want.isfinite()).all()
    for got, its in zip(b.buffers(), twin.buffers(), strict=True):
        assert (got.isfinite() | ~its.isfinite()).all()
        torch.testing.assert_close(got[its.isfinite()], its[its.isfinite()], rtol=1e-2, atol=1e-2)
