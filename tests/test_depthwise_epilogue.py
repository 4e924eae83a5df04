"""act(Σ BN_b(W_b * x) + residual) of depthwise blocks, in their own passes: against float64 and unfused blocks."""

import copy
import itertools

import pytest
import torch
from oracle import reference_step, rel, scramble
from steps import saved_by
from test_depthwise import LAYOUTS, LISTS, Depthwise, assert_as_good_as, modules
from test_epilogue import ACTIVATIONS, FOLLOWS, away_from_kinks, run
from torch import nn
from torch.nn import functional as F

from acnet_kernels import ACBlock, MobileOneBlock, RepVGGBlock, acblock, convert, explain
from acnet_kernels.backends import node, planner
from acnet_kernels.ops import _extension
from acnet_kernels.ops import epilogue as operators
from acnet_kernels.steps import depthwise as ops
from acnet_kernels.steps import depthwise_plain, packed

needs_extension = pytest.mark.skipif(
    not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}"
)


def finishing(activation):
    """forward(block, x, residual) by one step."""

    def forward(b, x, residual):
        step = b.step()
        return acblock(
            x,
            step.branches,
            step.geometry,
            norm=step.norm,
            backend=b.backend,
            activation=activation,
            residual=residual,
        )

    return forward


def apart(activation, sum_of=modules):
    """The same, PyTorch's operators after the sum."""

    def forward(b, x, residual):
        out = sum_of(b, x)
        out = out if residual is None else out + residual
        return out if activation is None else getattr(F, activation)(out)

    return forward


def judge(block, x, residual, activation):
    doubled, wide = copy.deepcopy(block).double(), None if residual is None else residual.double()
    z = reference_step(copy.deepcopy(doubled).step(), x.double(), wide).detach()
    grad = torch.randn(z.shape) * away_from_kinks(z, activation).float() + 0.1 * (activation is None)

    def definition(b, t, r):
        return reference_step(b.step(), t, r, activation)

    got, eager = (run(block, x, residual, grad, f(activation)) for f in (finishing, apart))
    assert_as_good_as(block, got, eager, run(doubled, x.double(), wide, grad.double(), definition))


def residual_of(block, x, dtype, layout):
    with torch.no_grad():
        shape = modules(copy.deepcopy(block).float(), x.float()).shape
    return torch.randn(shape).to(dtype).to(memory_format=layout)


NODES = ("C++ node", "Python's node")


@pytest.fixture(params=NODES)
def either_node(request, monkeypatch):
    if request.param == "Python's node":
        monkeypatch.setattr(node, "NODE", None)
    elif node.NODE is None:
        pytest.skip(f"needs the C++ node: {_extension.WHY_NODE_MISSING}")


# Every list and layout, every list with all that may follow it, and that in both layouts.
@pytest.mark.parametrize(
    ("activation", "adds", "name", "layout"),
    [
        (*follows, name, LAYOUTS[(i + j) % 2])
        for (i, name), (j, follows) in itertools.product(enumerate(LISTS), enumerate(FOLLOWS))
    ],
    ids=str,
)
def test_exact_in_float64(activation, adds, name, layout):
    for channels, multiplier, size in ((17, 1, (9, 7)), (2, 3, (7, 5)), (8, 1, (5, 19))):
        if multiplier > 1 and any(kind == "identity" for kind, *_ in LISTS[name][1]):
            continue
        block = Depthwise(name, channels, multiplier).double().to(memory_format=layout)
        x = torch.randn(3, channels, *size).double().to(memory_format=layout)
        other = LAYOUTS[layout == LAYOUTS[0]]  # a residual may lie otherwise than the output
        judge(block, x, residual_of(block, x, x.dtype, other).double() if adds else None, activation)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
JUDGED = ("mobileone", "mobileone of stride 2", "repvit", "5×5", "padded far", "dilated")


# Of list, dtype and what follows every pair, by either node in turn.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "adds", "name", "dtype", "either_node"),
    [
        (*follows, name, DTYPES[(i + j + j // 3) % 3], NODES[(i + j) % 2])
        for (i, name), (j, follows) in itertools.product(enumerate(JUDGED), enumerate(FOLLOWS))
    ],
    ids=str,
    indirect=["either_node"],
)
def test_as_good_as_eager(activation, adds, name, dtype, either_node):
    for layout, channels, size in ((LAYOUTS[0], 33, (12, 17)), (LAYOUTS[1], 32, (9, 18)), (LAYOUTS[1], 5, (3, 2))):
        block = Depthwise(name, channels).to(dtype).to(memory_format=layout)
        x = torch.randn(6, channels, *size).to(dtype).to(memory_format=layout)
        judge(block, x, residual_of(block, x, dtype, layout) if adds else None, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("name", ["mobileone", "repvit"])
def test_differentiable_twice_and_batched(name, activation, either_node):
    block = scramble(Depthwise(name, 2)).double()
    x, residual = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs, grad = [x, residual, *block.parameters()], torch.randn(2, 2, 5, 4, dtype=torch.float64)
    found = []
    for forward in (finishing(activation), apart(activation)):
        first = torch.autograd.grad(forward(block, x, residual), inputs, grad.requires_grad_(), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [x, residual, grad], allow_unused=True)
        batched = torch.autograd.grad(
            forward(block, x, residual),
            inputs,
            torch.stack([grad.detach(), 2 * grad.detach()]),
            is_grads_batched=True,
        )
        found.append([*first, *second, *batched])
    for a, e in zip(*found, strict=True):
        if a is None or e is None:
            assert not any(t.any() for t in (a, e) if t is not None)
        else:
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_what_needs_a_gradient_gets_one(activation, name, either_node):
    block = scramble(Depthwise(name, 4)).double()
    like = residual_of(block, torch.randn(2, 4, 7, 5), torch.float64, LAYOUTS[0])
    for needs in itertools.product((False, True), repeat=3):
        x = torch.randn(2, 4, 7, 5).double().requires_grad_(needs[0])
        residual = torch.randn_like(like).requires_grad_(needs[1])
        block.requires_grad_(needs[2])
        out = finishing(activation)(block, x, residual)
        assert out.requires_grad == any(needs)
        if any(needs):
            wanted = [t for t, need in zip((x, residual, block.convs[0].weight), needs, strict=True) if need]
            got = torch.autograd.grad(out.square().sum(), wanted)
            want = torch.autograd.grad(apart(activation)(block, x, residual).square().sum(), wanted)
            torch.testing.assert_close(got, want)


def test_without_an_activation_the_residuals_gradient_is_the_outputs(either_node):
    block, seen = Depthwise("mobileone", 4), []
    residual = torch.randn(2, 4, 7, 5, requires_grad=True)
    residual.register_hook(lambda g: seen.append(g.data_ptr()))
    grad = torch.randn(2, 4, 7, 5)
    torch.autograd.grad(finishing(None)(block, torch.randn(2, 4, 7, 5), residual), residual, grad)
    assert seen == [grad.data_ptr()]


def test_changed_in_place_afterwards(either_node):
    for activation, allowed in ((None, True), ("relu", False), ("relu6", False), ("silu", True)):
        block = Depthwise("mobileone", 4)
        x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 5)
        got = finishing(activation)(block, x, residual)
        if not allowed:  # as of nn.ReLU's output
            got.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                got.sum().backward()
            continue
        want, parameters = apart(activation)(block, x, residual), list(block.parameters())
        got, want = (
            torch.autograd.grad(t.square().sum(), parameters) for t in (F.relu(got, inplace=True), F.relu(want))
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_gradient_of_any_strides(activation, either_node):
    block, x = Depthwise("mobileone", 17).double(), torch.randn(3, 17, 7, 5).double().requires_grad_()
    for grad in (
        torch.randn(1, 17, 1, 5).double().expand(x.shape),
        torch.randn(x.shape).double().to(memory_format=LAYOUTS[1]),
        torch.randn(3, 17, 7, 10).double()[..., ::2],
    ):
        got, want = (
            torch.autograd.grad(f(activation)(block, x, x), [x, *block.parameters()], grad)
            for f in (finishing, apart)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_infinite_output_hands_its_gradient_on_as_eagers_does(activation, either_node):
    block, residual = Depthwise("mobileone", 4), torch.randn(2, 4, 5, 5)
    residual[0, 1, 2, 3] = float("inf")
    x, grads = torch.randn(2, 4, 5, 5), []
    for f in (finishing, apart):
        given = residual.clone().requires_grad_()
        grads += torch.autograd.grad(f(activation)(block, x, given).sum(), given)
    assert torch.equal(*grads)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_not_a_number_stays_one(activation):
    block, x, residual = Depthwise("mobileone", 17), torch.randn(2, 17, 6, 5), torch.randn(2, 17, 6, 5)
    residual[0, 1, 2, 3] = float("nan")
    assert torch.equal(finishing(activation)(block, x, residual).isnan(), residual.isnan())
    x[0, 2, 0, 0] = float("inf")
    for value in (float("inf"), float("nan")):
        x[0, 2, 0, 0] = value
        got, want = (f(activation)(copy.deepcopy(block), x, residual) for f in (finishing, apart))
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_number_of_threads_changes_no_bit(activation):
    block, x = Depthwise("mobileone", 20), torch.randn(5, 20, 40, 41)
    grad, before, results = torch.randn(x.shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(block, x, x, grad, finishing(activation)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def arguments(activation, adds, layout):
    x = torch.randn(2, 5, 6, 7).to(memory_format=layout)
    weights = [torch.randn(5, 1, 3, 3), torch.randn(5, 1, 1, 1)]
    vectors = [torch.rand(5) + 0.5 for _ in range(2)]
    geometry = packed.pack(Depthwise("mobileone", 5).geometry)
    numbers = [0, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1], geometry, layout == LAYOUTS[1]
    residual = torch.randn(x.shape).to(memory_format=layout) if adds else None
    return [x, weights, vectors, vectors, [1e-5] * 2, *numbers, residual, activation]


@pytest.mark.parametrize(("activation", "adds"), [(0, True), (2, False), (4, True)])
def test_opcheck(activation, adds):
    args = arguments(activation, adds, LAYOUTS[1])
    args[0].requires_grad_()
    args[1] = [weight.requires_grad_() for weight in args[1]]
    torch.library.opcheck(ops.depthwise_step, args)
    if not activation:
        return
    with torch.no_grad():
        out, means, _, *kept = ops.depthwise_step(*args)
    x, weights, gammas, betas, _, *numbers, _, residual, _ = args
    told = out if operators.is_clamp(operators.ACTIVATIONS[activation]) else residual
    needs = True, [True] * 2, True, told, activation, True
    given = [torch.randn_like(out), x.detach(), [w.detach() for w in weights], gammas, betas, means, *kept, None]
    torch.library.opcheck(ops.depthwise_step_backward, [*given, *numbers, *needs])


BACKWARDS = {"operator": ops.depthwise_step_backward, "pytorch": depthwise_plain.step_backward}


@pytest.mark.parametrize("implementation", BACKWARDS)
def test_arguments_that_do_not_fit(implementation):
    for activation, change, message in (
        (1, {"residual": torch.randn(2, 5, 6, 7)}, "residual must be dense in the layout of out"),
        (1, {"residual": torch.randn(2, 5, 6, 1)}, "residual must have shape"),
        (1, {"residual": torch.randn(2, 5, 6, 7).double()}, "residual must have"),
        (5, {}, "activation must be a number from 0 to 4, got 5"),
    ):
        args = arguments(activation, False, LAYOUTS[1])
        args[-2] = change.get("residual")
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.depthwise_step(*args)
    if implementation == "pytorch":
        return
    args = arguments(1, False, LAYOUTS[1])
    x, weights, gammas, betas, _, *numbers, _, _, _ = args
    out, means, _, *kept = ops.depthwise_step(*args)
    given = [out, x, weights, gammas, betas, means, *kept, None, *numbers, True, [True] * 2, True]
    for after, message in (
        ((None, 1, False), "kept must be out, which tells where a clamp is flat, got None"),
        ((out.contiguous(), 1, False), "kept must be dense in the layout of out"),
        ((None, 0, True), "need_residual must be false without an activation"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.depthwise_step_backward(*given, *after)


# ---- blocks ----


def blocks():
    yield ACBlock(6, 6, 3, padding=1, groups=6, activation="relu")
    yield ACBlock(6, 6, 3, stride=2, padding=1, groups=6, activation="hardswish")
    yield MobileOneBlock(6, 6, 3, padding=1, groups=6, num_conv_branches=2)
    yield RepVGGBlock(6, 6, 3, padding=1, groups=6)


@pytest.mark.parametrize("which", range(4))
def test_blocks_say_and_do_so(which, either_node):
    block = scramble(list(blocks())[which])
    unfused, x = copy.deepcopy(block), torch.randn(3, 6, 9, 8, requires_grad=True)
    report = explain(block, x.detach()).blocks[0]
    if _extension.LOADED:
        assert report.backend == "moments"
        assert f"; {block.finishing()} in the convolution's own passes" in report.reason
    for _ in range(2):  # the second by a lane
        out, want = block(x), getattr(F, block.finishing())(unfused._forward_modules(x))
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        got, want = (torch.autograd.grad(t.square().sum(), x)[0] for t in (out, want))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_chain_keeps_each_activation_once():
    """x, and one output a block: the next one's input."""
    made = [ACBlock(8, 8, 3, padding=1, groups=8, activation="relu", backend="moments") for _ in range(3)]
    x = torch.randn(4, 8, 64, 64, requires_grad=True)

    def forward(x):
        for b in made:
            x = b(x, residual=x)
        return x

    out, kept = saved_by(forward, x)
    assert sum(size == x.untyped_storage().nbytes() for size in kept.values()) == len(made) + 1
    out.sum().backward()


def test_a_converted_network_absorbs_the_activation():
    net = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
    ours = convert(net, fuse_activations=True)
    assert ours[0].finishing() == "relu6"
    where = explain(ours, (2, 6, 8, 8)).blocks[0].reason
    if _extension.LOADED:
        assert "; relu6 in the convolution's own passes" in where


def test_where_the_passes_do_not_finish_it_says_so():
    block = ACBlock(6, 6, 3, padding=1, groups=6, activation="relu", backend="eager")
    assert "; relu after it, by PyTorch" in explain(block, (2, 6, 8, 8)).blocks[0].reason
    dense = ACBlock(6, 6, 3, padding=1, activation="relu", backend="moments")
    assert planner.where_finished(*dense.plan(torch.randn(2, 6, 8, 8)), "relu") == "after it, by PyTorch"


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_compiled_it_is_within_the_operator_too(activation):
    block = Depthwise("mobileone", 6)
    x, residual, grad = (torch.randn(3, 6, 9, 8) for _ in range(3))
    expected = run(block, x, residual, grad, finishing(activation))
    compiled = torch.compile(finishing(activation), fullgraph=True, backend="aot_eager")
    got = run(block, x, residual, grad, compiled)
    for name, t in expected.items():
        assert (got[name] - t).norm() <= 1e-5 * max(t.norm(), 1e-2), name
    assert rel(got["out"], expected["out"]) < 1e-6
