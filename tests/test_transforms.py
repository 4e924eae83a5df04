"""Batches of gradients at once, forward mode and second derivatives equal those of the modules."""

import copy

import pytest
import torch
from oracle import rel, scramble
from stacks import MODES, assert_same_state, through_modules
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from acnet_kernels import ACBlock

OPTIONS = [{}, {"norm": "sum"}, {"momentum": None}, {"use_affine": False, "shift": (1, -1)}]
X, TANGENT, GRADS = (3, 4, 5, 4), (3, 4, 5, 4), (2, 3, 6, 5, 4)


def drawn():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (X, TANGENT, GRADS)]


def batched(b):
    x, _, grads = drawn()
    out = b(x.requires_grad_())
    return torch.autograd.grad(out, [x, *b.parameters()], grads, is_grads_batched=True)


def vmapped_gradients(b):
    x, _, grads = drawn()
    out, inputs = b(x.requires_grad_()), [x, *b.parameters()]
    return torch.func.vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(grads)


def batched_in_the_parameters_alone(b):
    x, _, grads = drawn()
    kept = [p for name, p in b.named_parameters() if "hor" in name or "bn" in name]
    b.requires_grad_(False)
    for p in kept:
        p.requires_grad_()
    return torch.autograd.grad(b(x), kept, grads, is_grads_batched=True) if kept else ()


def jacobian_by(strategy, create_graph=False):
    def found(b):
        x = drawn()[0]
        return [
            jacobian(
                lambda t: b(t).square().mean((2, 3)),
                x,
                vectorize=True,
                create_graph=create_graph,
                strategy=strategy,
            )
        ]

    return found


def hessian_by(strategy):
    def found(b):
        x = drawn()[0][:, :, :2, :2]
        return [hessian(lambda t: b(t).tanh().sum(), x, vectorize=True, outer_jacobian_strategy=strategy)]

    return found


def dual_input(b):
    x, tangent, _ = drawn()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(b(forward_ad.make_dual(x, tangent)))


def dual_parameters(b):
    x = drawn()[0]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p.detach(), p.detach().cos()) for name, p in b.named_parameters()}
        return forward_ad.unpack_dual(torch.func.functional_call(b, duals, (x,)))


def dual_gradient(b):
    x, _, (grad, tangent) = drawn()
    out = b(x.requires_grad_())
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, [x, *b.parameters()], forward_ad.make_dual(grad, tangent))
        return [t for dual in found for t in forward_ad.unpack_dual(dual)]


def forward_over_reverse(b):
    x, tangent, _ = drawn()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), tangent)
        found = torch.autograd.grad(b(dual).tanh().sum(), [dual, *b.parameters()])
        return [t for t in (forward_ad.unpack_dual(g).tangent for g in found) if t is not None]


def double_backward(b):
    x, tangent, _ = drawn()
    x.requires_grad_()
    (g,) = torch.autograd.grad(b(x).tanh().sum(), x, create_graph=True)
    return torch.autograd.grad(g, [x, *b.parameters()], tangent, allow_unused=True, materialize_grads=True)


DERIVATIVES = {
    "batched": batched,
    "vmapped gradients": vmapped_gradients,
    "batched in the parameters alone": batched_in_the_parameters_alone,
    "jacobian": jacobian_by("reverse-mode"),
    "jacobian with a graph": jacobian_by("reverse-mode", create_graph=True),
    "jacobian in forward mode": jacobian_by("forward-mode"),
    "hessian": hessian_by("reverse-mode"),
    "hessian in forward mode": hessian_by("forward-mode"),
    "dual input": dual_input,
    "dual parameters": dual_parameters,
    "dual gradient": dual_gradient,
    "forward over reverse": forward_over_reverse,
    "double backward": double_backward,
}
# Of mode, derivative and options every pair.
EVERY_KIND = [
    (backend, training, options, name)
    for i, (backend, training) in enumerate(MODES)
    for j, name in enumerate(DERIVATIVES)
    for options in OPTIONS[(i + j) % 2 :: 2]
]


@pytest.mark.parametrize(("backend", "training", "options", "name"), EVERY_KIND, ids=str)
def test_derivatives_of_every_kind(backend, training, options, name):
    differentiate = DERIVATIVES[name]
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend, **options)).double().train(training)
    twin = through_modules(b)
    for got, want in zip(differentiate(b), differentiate(twin), strict=True):
        # A sum that cancels is rounding of its terms.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert_same_state(b, twin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
def test_second_derivatives_without_an_epsilon(backend):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend, eps=0.0)).double()
    twin = copy.deepcopy(b)
    twin.backend = "eager"  # newer versions of nn.BatchNorm2d refuse it
    for got, want in zip(double_backward(b), double_backward(twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


FUNCTIONS = {
    "jvp": lambda b, x, tangent: torch.func.jvp(b, (x,), (tangent,))[1],
    "jacfwd": lambda b, x, tangent: torch.func.jacfwd(lambda t: b(t).mean((2, 3)))(x),
    "jacrev": lambda b, x, tangent: torch.func.jacrev(lambda t: b(t).mean((2, 3)))(x),
    "hessian": lambda b, x, tangent: torch.func.hessian(lambda t: b(t).tanh().sum())(x[:, :, :2, :2]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_torch_func(backend, training, name):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).double().train(training)
    x, tangent, _ = drawn()
    if training:  # as nn.BatchNorm2d itself, the block cannot move statistics behind the transform's back
        before = copy.deepcopy(b)
        with pytest.raises(RuntimeError, match="in-place"):
            FUNCTIONS[name](through_modules(b), x, tangent)
        with pytest.raises(ValueError, match=r"running statistics.*functional_call"):
            FUNCTIONS[name](b, x, tangent)
        assert_same_state(b, before, rtol=0, atol=0)
        for kind in ("square", "hor", "ver"):
            setattr(b, f"{kind}_bn", nn.BatchNorm2d(6, track_running_stats=False).double())
    assert rel(FUNCTIONS[name](b, x, tangent), FUNCTIONS[name](through_modules(b), x, tangent)) < 1e-10


@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
def test_a_transform_of_a_gradient_alone_is_refused_clearly(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend).double()
    x, _, (grad, tangent) = drawn()
    out = b(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"call the block inside the transform, or use backend='eager'"):
        torch.func.jvp(lambda g: torch.autograd.grad(out, x, g, retain_graph=True)[0], (grad,), (tangent,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
def test_batches_of_gradients_in_the_dtypes_of_training(backend, dtype):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend))
    x, grads = torch.randn(3, 4, 6, 5, requires_grad=True), torch.randn(2, 3, 6, 6, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        out = b(x)
    inputs, grads = [x, *b.parameters()], grads.to(out.dtype)
    got = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    for t, want, p in zip(got, map(torch.stack, zip(*one_by_one, strict=True)), inputs, strict=True):
        assert t.dtype == p.dtype
        assert rel(t, want) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_plan_says_that_forward_mode_runs_on_the_definition():
    b = ACBlock(4, 6, 3, padding=1, backend="branches")
    x = torch.randn(2, 4, 5, 5)
    with forward_ad.dual_level():
        plan = b.plan(forward_ad.make_dual(x, x))[1]
        assert plan.reason.startswith("branches was requested but under forward-mode differentiation only")
        assert b.plan(x)[1].reason == "requested"
