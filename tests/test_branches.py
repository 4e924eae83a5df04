"""The branches backend against the reference in float64, and what its one node promises autograd."""

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
    check_convolution_biases,
    check_levels,
    check_on_the_whole,
    saved_by,
)
from torch import nn

from acnet_kernels import ACBlock
from acnet_kernels.backends import branches, node


def block(*args, backend="branches", **kwargs):
    return scramble(ACBlock(*args, backend=backend, **kwargs))


@pytest.fixture(params=["C++", "Python"])
def _whose_node(request, monkeypatch):
    """Both nodes that run a step: the C++ one where it is built, and the one that serves where it is not."""
    if request.param == "Python":
        monkeypatch.setattr(node, "NODE", None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.usefixtures("_whose_node")
def test_every_geometry(geometry, layout):
    check(block(4, 6, **geometry), torch.randn(3, 4, 13, 11).to(memory_format=layout))


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.usefixtures("_whose_node")
def test_every_variant(kwargs):
    check(block(5, 7, 3, padding=1, **kwargs), torch.randn(4, 5, 9, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.usefixtures("_whose_node")
def test_autocast(dtype, layout):
    b = block(8, 16, 3, padding=1)
    check(b, torch.randn(4, 8, 12, 10).to(memory_format=layout), dtype)
    with torch.autocast("cpu", dtype):
        out = b(torch.randn(4, 8, 12, 10))
    assert out.dtype == dtype
    assert b.square_bn.running_mean.dtype == torch.float32


def test_half_module_and_double():
    x, grad = torch.randn(3, 6, 7, 7), torch.randn(3, 6, 7, 7)
    for dtype in (torch.bfloat16, torch.float64):
        b = block(6, 6, 3, padding=1).to(dtype)
        args = (x.to(dtype), grad.to(dtype))
        oracle.assert_as_good_as(oracle.run(b, *args), oracle.run(as_eager(b), *args), oracle.truth(b, *args))


@pytest.mark.parametrize("shape", [(3, 4, 1, 9), (1, 4, 17, 13)])
def test_small_images(shape):
    check(block(4, 5, 3, padding=1), torch.randn(shape))


@pytest.mark.usefixtures("_whose_node")
def test_an_image_smaller_than_what_a_shifted_branch_crops():
    check(block(2, 3, 7, padding=3, shift=3), torch.randn(8, 2, 1, 2))
    check(block(2, 3, 7, padding=3, shift=-3), torch.randn(8, 2, 2, 1).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 2)])
def test_two_values_a_channel(shape):
    check_on_the_whole(lambda: block(4, 5, 3, padding=1), shape)


def test_a_sum_is_rounded_as_eager_rounds_it():
    """One convolution by the summed kernel errs 1.4 times as much in dx where the mean is far above the spread."""
    mine, eager = 0.0, 0.0
    for _ in range(20):
        b = block(3, 3, 7, stride=2, padding=2, padding_mode="replicate", norm="sum")
        x = 3 + 1e-3 * torch.randn(2, 3, 8, 6)
        grad = torch.randn(b(x).shape)
        true = oracle.truth(b, x, grad)["x"]
        mine += rel(oracle.run(b, x, grad)["x"], true)
        eager += rel(oracle.run(as_eager(b), x, grad)["x"], true)
    assert mine <= 1.1 * eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_may_be_changed_in_place(dtype):
    b = block(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = torch.relu(b(x))
        got = torch.relu_(b(x))  # as nn.ReLU(inplace=True) does in most networks
    assert torch.equal(got, want)
    got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mean", "std"), LEVELS)
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.usefixtures("native_half")
def test_a_mean_far_above_the_spread_does_not_cancel_in_half_precision_convolutions(dtype, mean, std, pointwise):
    check_levels(block(8, 8, 3, padding=1), dtype, mean, std, pointwise)


def test_convolution_biases():
    check_convolution_biases(block(4, 6, 3, padding=1))


@pytest.mark.parametrize("kept", ["", "x", "hor_conv.weight", "square_bn", "conv"])
@pytest.mark.usefixtures("_whose_node")
def test_frozen_parts_get_no_gradient(kept):
    b = block(4, 6, 3, padding=1)
    for name, p in b.named_parameters():
        p.requires_grad_(bool(kept) and kept in name)
    x = torch.randn(3, 4, 6, 7, requires_grad=kept == "x")
    out, want = b(x), as_eager(b)(x)
    assert out.requires_grad == want.requires_grad == bool(kept)
    if kept:
        tensors = [t for t in (x, *b.parameters()) if t.requires_grad]
        eager = as_eager(b)
        grad = torch.randn_like(out)
        theirs = [t for t in (x, *eager.parameters()) if t.requires_grad]
        expected = torch.autograd.grad(eager(x), theirs, grad)
        for a, e in zip(torch.autograd.grad(out, tensors, grad), expected, strict=True):
            assert rel(a, e) < 1e-4


def test_untracked_statistics():
    b = block(4, 6, 3, padding=1)
    for bn in b.norms().values():
        bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None
    for mode in (True, False):
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(b.train(mode)(x), as_eager(b)(x), rtol=1e-4, atol=1e-5)


def test_one_value_per_channel_is_refused_before_anything_changes():
    b = block(4, 6, 3, padding=1)
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        b(torch.randn(1, 4, 1, 1))
    for name, t in b.state_dict().items():
        assert torch.equal(t, before[name])


def test_what_it_declines():
    b, x = block(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    b.hor_bn.eval()
    assert b.plan(x)[1].backend.NAME == "eager"
    assert "normalises by running statistics" in b.plan(x)[1].reason
    torch.testing.assert_close(b(x), as_eager(b)(x))
    b.train()
    empty = b.plan(x[:0])[1]
    assert empty.backend.NAME == "eager"
    assert "empty" in empty.reason
    assert b(x[:0]).shape == (0, 6, 5, 5)


@pytest.mark.usefixtures("_whose_node")
def test_constant_input():
    b = block(4, 6, 3, padding=0)
    out = b(torch.full((2, 4, 6, 6), 3.3))
    want = sum(bn.bias for bn in b.norms().values())
    torch.testing.assert_close(out, want[:, None, None].expand_as(out), atol=1e-3, rtol=0)


# --- memory ---------------------------------------------------------------------------------------------


def gradients(b, x, grad, **kwargs):
    out = b(x)
    return torch.autograd.grad(out, [x, *b.parameters()], grad, **kwargs)


def test_retained_graph_gives_the_same_twice():
    b, x, grad = block(4, 6, 3, padding=1), torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 6, 6, 6)
    out, inputs = b(x), [x, *b.parameters()]
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    third = torch.autograd.grad(out, inputs, grad)
    for a, b_, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b_)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, inputs, grad)


def test_dy_is_written_over_the_maps_unless_a_hook_keeps_them(monkeypatch):
    monkeypatch.setattr(node, "NODE", None)  # Python's node shows what it saves
    b, x, grad = block(4, 6, 3, padding=1), torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 6, 6, 6)
    out = b(x)
    maps = [t for t in _node(out).saved_tensors if t.shape == out.shape]
    before = [t.clone() for t in maps]
    out.backward(grad)
    assert len(maps) == 3
    assert not any(torch.equal(a, e) for a, e in zip(maps, before, strict=True))
    kept = []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = b(x)
    out.backward(grad)
    assert all(torch.equal(t, copy_) for t, copy_ in kept)


def _node(out):
    node = out.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return node


@pytest.mark.parametrize("norm", ["branch", "sum"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_bytes_is_what_is_saved(norm, dtype):
    b, x = block(4, 6, 3, padding=1, norm=norm), torch.randn(2, 4, 9, 9, requires_grad=True)
    known, kept = {p.data_ptr() for p in b.parameters()}, {}

    def pack(t):
        if t.dim() == 4 and t.shape[2:] == (9, 9) and t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None),
    ):
        problem, _ = b.plan(x)
        out = b(x)
    assert out.requires_grad
    assert sum(kept.values()) == branches.saved_bytes(problem)
    with torch.no_grad():
        assert branches.saved_bytes(b.plan(x)[0]) == 0


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_by_float32_convolutions_keeps_half_maps(dtype, python, monkeypatch):
    monkeypatch.setattr(node, "direct_pays", lambda *_: False)
    if python:
        monkeypatch.setattr(node, "NODE", None)
    for options in ({}, {"norm": "sum"}, {"stride": 2}, {"activation": "relu"}):
        b, x = block(4, 6, 3, padding=1, **options), torch.randn(3, 4, 9, 7)
        if "activation" not in options:  # whose kink is rounding's to decide
            check(b, x, dtype)
        with torch.autocast("cpu", dtype):
            out, kept = saved_by(b, x)
        map_bytes = out.numel() * out.element_size()
        maps = (1 if "norm" in options else 3) + ("activation" in options)
        assert sum(size == map_bytes for size in kept.values()) == maps
        # Nothing that a second backward needs is overwritten.
        with torch.autocast("cpu", dtype):
            out = b(x)
        grad, inputs = torch.randn_like(out), list(b.parameters())
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for again, once in zip(torch.autograd.grad(out, inputs, grad), first, strict=True):
            assert torch.equal(again, once)


# --- transforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_differentiable_twice(norm):
    b = block(2, 2, 3, padding=1, norm=norm).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in b.parameters() if p.dim() == 1 or p.shape[2:] == (1, 3)]

    def f(x, *_):
        return b(x)

    assert torch.autograd.gradcheck(f, (x, *parameters))
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiles_without_a_break(dtype):
    b, x = block(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(lambda m, t: m(t), fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 6, 8, 8)

    def forward(run):
        def under(m, t):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                return run(m, t)

        return under

    plain = oracle.run(b, x, grad, forward(lambda m, t: m(t)))
    traced = oracle.run(b, x, grad, forward(compiled))
    for name, t in plain.items():
        assert rel(traced[name], t) < (1e-5 if dtype is None else 1e-2), name


def test_learns_as_eager_does():
    # A net that must fit 64 random images: the losses go the same way within what rounding makes of 30 steps.
    losses = {}
    x, target = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))
    for backend in ("eager", "branches"):
        torch.manual_seed(1)
        net = nn.Sequential(
            ACBlock(3, 8, 3, 1, 1, backend=backend), nn.ReLU(), ACBlock(8, 8, 3, 2, 1, backend=backend),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
        )  # fmt: skip
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(30):
            loss = nn.functional.cross_entropy(net(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.setdefault(backend, []).append(loss.item())
    assert losses["branches"][-1] < 0.3 * losses["branches"][0]
    torch.testing.assert_close(
        torch.tensor(losses["branches"][:10]), torch.tensor(losses["eager"][:10]), rtol=1e-3, atol=1e-4
    )
