"""The recompute backend against the reference in float64, and that it keeps nothing but x."""

import copy

import oracle
import pytest
import torch
from oracle import rel, scramble
from steps import (
    GEOMETRIES,
    LEVELS,
    VARIANTS,
    as_eager,
    check,
    check_chain,
    check_convolution_biases,
    check_levels,
    check_on_the_whole,
    saved_by,
)

import acnet_kernels
from acnet_kernels import ACBlock
from acnet_kernels.backends import branches, eager, node, recompute
from acnet_kernels.geometry import Geometry, Taps
from acnet_kernels.steps import packed
from acnet_kernels.steps import recompute as ops
from acnet_kernels.steps.maps import StepConfig


def block(*args, **kwargs):
    return scramble(ACBlock(*args, backend="recompute", **kwargs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"kernel_size": 3, "padding": 1, "groups": 2}], ids=str)
def test_every_geometry(geometry, layout):
    b, x = block(4, 6, **geometry), torch.randn(3, 4, 13, 11).to(memory_format=layout)
    assert b.plan(x)[1].backend is recompute
    check(b, x)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_every_variant(kwargs):
    check(block(5, 7, 3, padding=1, **kwargs), torch.randn(4, 5, 9, 8))


@pytest.mark.parametrize("shape", [(3, 4, 1, 9), (1, 4, 17, 13)])
def test_small_images(shape):
    check(block(4, 5, 3, padding=1), torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 2)])
def test_two_values_a_channel(shape):
    check_on_the_whole(lambda: block(4, 5, 3, padding=1), shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autocast(dtype, layout):
    check(block(8, 16, 3, stride=2, padding=1), torch.randn(4, 8, 12, 10).to(memory_format=layout), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_whole_module_in_a_dtype(dtype):
    b = block(6, 6, 3, padding=1).to(dtype)
    x, grad = torch.randn(3, 6, 7, 7).to(dtype), torch.randn(3, 6, 7, 7).to(dtype)
    oracle.assert_as_good_as(oracle.run(b, x, grad), oracle.run(as_eager(b), x, grad), oracle.truth(b, x, grad))


@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.usefixtures("native_half")
def test_rounded_kernels_shift_no_mean(mean):
    """Convolutions in bfloat16 itself: the folded kernel's rounding, times the input's mean, must not reach out."""
    b, x = block(8, 16, 3, stride=2).bfloat16(), (torch.randn(4, 8, 13, 11) + mean).bfloat16()
    grad = torch.randn(b(x).shape).bfloat16()
    got, true = oracle.run(b, x, grad), oracle.truth(b, x, grad)
    oracle.assert_as_good_as(got, oracle.run(as_eager(b), x, grad), true)
    offset = (got["out"].double() - true["out"]).mean((0, 2, 3))
    assert offset.norm() / true["out"].std() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mean", "std"), LEVELS)
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.usefixtures("native_half")
def test_a_mean_far_above_the_spread_does_not_cancel_in_half_precision_convolutions(dtype, mean, std, pointwise):
    check_levels(block(8, 8, 3, padding=1), dtype, mean, std, pointwise)


def test_convolution_biases():
    check_convolution_biases(block(4, 6, 3, stride=2, padding=1))


def test_frozen_parts_skip_their_work(monkeypatch):
    monkeypatch.setattr(node, "NODE", None)  # Python's node shows what it calls
    calls = []
    for owner, name in ((StepConfig, "maps"), (ops, "convolution_gradients")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    whole, x, grad = block(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    full = oracle.run(whole, x, grad)
    assert calls == ["maps"] * 2 + ["convolution_gradients"]
    for frozen, wanted in (
        (("x",), ["maps", "convolution_gradients"]),
        (("conv", "bn.weight"), ["maps", "convolution_gradients"]),
        (("x", "conv"), ["maps", "convolution_gradients"]),
        (("x", "conv", "bn.weight"), []),
    ):
        b = copy.deepcopy(whole)
        for name, parameter in b.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen if part != "x"))
        inputs = x.clone().requires_grad_("x" not in frozen)
        out = b(inputs)
        calls.clear()
        out.backward(grad)
        assert calls == wanted, frozen
        assert (inputs.grad is None) == ("x" in frozen)
        for name, parameter in b.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, full[name])


def test_one_value_a_channel_is_refused_before_anything_changes():
    b = block(4, 6, 3, padding=1)
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        b(torch.randn(1, 4, 1, 1))
    assert all(torch.equal(t, before[name]) for name, t in b.state_dict().items())


def test_what_it_declines():
    b, x = block(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    assert "empty" in b.plan(x[:0])[1].reason
    b.hor_bn.eval()
    assert b.plan(x)[1].backend is eager
    assert "normalises by running statistics" in b.plan(x)[1].reason


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_keeps_x_alone(geometry, dtype):
    b, x = block(4, 6, **geometry), torch.randn(3, 4, 13, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        problem = b.plan(x)[0]
        _, kept = saved_by(b, x)
    known = {t.untyped_storage().data_ptr() for t in (x, *b.parameters())}
    statistics = 2 * 3 * 6 * 8  # mean and rstd of every branch and channel, float64
    others = sum(size for at, size in kept.items() if at not in known)
    padded = geometry.get("padding_mode") == "reflect"  # then x is a padded copy
    assert others == statistics + (3 * 4 * 15 * 13 * 4 if padded else 0)
    assert recompute.saved_bytes(problem) == 3 * 4 * 13 * 11 * 4
    with torch.no_grad():
        assert recompute.saved_bytes(b.plan(x)[0]) == 0


def test_a_chain_with_relu_in_place_keeps_one_map_a_block():
    check_chain([block(8, 8, 3, padding=2, dilation=2) for _ in range(3)])


def test_memory_saver_takes_it():
    x = torch.randn(2, 8, 32, 32)
    strided, plain = ACBlock(8, 16, 3, stride=2, padding=1), ACBlock(8, 8, 3, padding=1)
    with acnet_kernels.memory_saver():
        problem, plan = strided.plan(x)
        assert plan.backend is recompute
        assert f"{eager.saved_bytes(problem) - x.nbytes:,} fewer than eager" in plan.reason
        assert plain.plan(x)[1].backend is recompute
        with torch.no_grad():
            assert strided.plan(x)[1].backend is branches  # nothing is kept, so nothing is saved
        row = acnet_kernels.explain(strided, x).blocks[0]
        assert (row.backend, row.saved_bytes) == ("recompute", x.nbytes)
        assert row.transient_bytes == recompute.transient_bytes(problem)
    assert strided.plan(x)[1].backend is not recompute


# --- transforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_differentiable_twice(norm):
    b = block(2, 2, 3, stride=2, padding=1, norm=norm).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: b(x), (x, *b.parameters()))


def test_the_operators_gradient_says_that_it_has_no_derivative():
    x, weight, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(6, 4, 3, 3), torch.ones(6)
    constants = [1e-5], [0, 0, 3, 3, 1, 1], packed.pack(Geometry.make(3, padding=1)), torch.float32, False
    out, *_ = ops.recompute_step(x, [weight], [gamma], [gamma], *constants)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"recompute_step_backward has no derivative; acblock\(\) has one"):
        grad.sum().backward()


def test_gradcheck():
    b = block(2, 2, 3, stride=2, padding=1).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: b(x), (x, *b.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_it_keeps_x_alone_too(layout):
    """A compiled graph's partitioner chooses what to keep: the y_b must be out of its reach."""
    b, x = block(4, 6, 3, stride=2, padding=1), torch.randn(3, 4, 16, 16).to(memory_format=layout)
    grad = torch.randn(3, 6, 8, 8)
    compiled = torch.compile(lambda m, t: m(t), fullgraph=True, backend="aot_eager")
    expected, got = oracle.run(b, x, grad), oracle.run(b, x, grad, compiled)
    for name, t in expected.items():
        assert rel(got[name], t) < 1e-6, name
    assert got["x"].stride() == expected["x"].stride()
    _, kept = saved_by(lambda t: compiled(b, t), x.requires_grad_())
    assert 3 * 6 * 8 * 8 * 4 not in kept.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = torch.randn(2, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(6, 4, *size, requires_grad=True) for size in ((3, 3), (3, 1))]
    gammas, betas = ([torch.rand(6, requires_grad=True) for _ in range(2)] for _ in range(2))
    geometry = packed.pack(Geometry.make(3, padding=1, stride=(1, 2)))
    constants = ([1e-5, 1e-3], [0, 0, 3, 3, 1, 1, 0, 1, 3, 1, 1, 1], geometry)
    torch.library.opcheck(ops.recompute_step, (x, weights, gammas, betas, *constants, dtype, True))
    with torch.no_grad():
        out, means, _, rstds = ops.recompute_step(x, weights, gammas, betas, *constants, dtype, True)
        tensors = torch.randn_like(out), x.detach(), [w.detach() for w in weights], [g.detach() for g in gammas]
        for need in ((True, [True, True], True), (False, [False, True], False), (False, [False, False], False)):
            torch.library.opcheck(ops.recompute_step_backward, (*tensors, means, rstds, *constants, *need))


def test_geometry_survives_its_numbers():
    geometry = Geometry.make((5, 3), (1, 2), (3, 0), (2, 1), 4)
    assert packed.unpack(packed.pack(geometry)) == geometry
    branches = ((Taps(0, 0, 5, 3), True), (Taps(2, 1, 1, 1), False), (Taps(0, 0, 3, 2, 2), True))
    for normed in ((True, False, True), (False, False, False)):
        numbers = packed.pack_taps(branches, normed)
        assert (packed.unpack_taps(numbers), packed.unpack_normed(numbers)) == (branches, normed)
