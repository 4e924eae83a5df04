"""Convolutions of our own for all branches at once (csrc/direct.h), through the steps that take them."""

import oracle
import pytest
import torch
from oracle import scramble
from steps import as_eager, saved_by
from test_branch_lists import SHAPES, Block, modules, truth

import acnet_kernels as ak
from acnet_kernels import ACBlock
from acnet_kernels.backends import node
from acnet_kernels.ops import _extension
from acnet_kernels.steps import convolution

pytestmark = pytest.mark.skipif(node.NODE is None, reason=f"needs the C++ node: {_extension.WHY_NODE_MISSING}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Channels of x and of the output, image and padding: around blocks of 4, 8 and 16 channels, of one pixel to several
# runs of pixels and rows, and of as many as are summed in several parts.
CASES = [
    ((1, 16), (5, 6), 1),
    ((3, 1), (1, 1), 1),
    ((4, 8), (1, 57), 1),
    ((16, 32), (9, 14), 1),
    ((17, 15), (12, 29), 1),
    ((33, 48), (7, 13), 2),
    ((64, 47), (3, 3), 0),
    ((5, 20), (40, 45), 1),
]


def everywhere(channels, pixels, dtype, geometry, channels_last):
    """The rule where it is not about speed."""
    return geometry.stride == (1, 1) and geometry.groups == 1 and dtype in DTYPES


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(node, "direct_pays", everywhere)


def judge(block, x):
    grad = torch.randn(block(x).shape).to(memory_format=torch.channels_last)
    got, eager = oracle.run(block, x, grad), oracle.run(as_eager(block), x, grad)
    # Where no step goes this way of itself the library may have other layouts for half-precision maps.
    chosen = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if chosen and min(x.shape[1], got["out"].shape[1]) > 1:
        for layout in LAYOUTS:
            assert got["out"].is_contiguous(memory_format=layout) == eager["out"].is_contiguous(
                memory_format=layout
            )
    oracle.assert_as_good_as(got, eager, oracle.truth(block, x, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("channels", "size", "padding"), CASES)
def test_as_good_as_eager(channels, size, padding, layout, dtype):
    block = scramble(ACBlock(*channels, 3, padding=padding)).to(dtype).to(memory_format=layout)
    judge(block, torch.randn(4, channels[0], *size).to(dtype).to(memory_format=layout))


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_other_kernels(kernel):
    block = scramble(ACBlock(18, 20, kernel, padding=kernel // 2))
    judge(block, torch.randn(3, 18, 8, 17))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "shape", [name for name, (own, _, total) in SHAPES.items() if not total and "groups" not in own]
)
def test_lists_of_branches(shape, layout):
    block = scramble(Block(shape, "branches")).to(memory_format=layout)
    x = torch.randn(3, 6, 9, 8).to(memory_format=layout)
    grad = torch.randn(block(x).shape)
    got, eager = oracle.run(block, x, grad), oracle.run(block, x, grad, modules)
    oracle.assert_as_good_as(got, eager, truth(block, x, grad))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (1025, 1)},
        {"padding": (1, 1025)},
        {"padding": 1025, "dilation": 1025},
        {"kernel_size": 17},
    ],
    ids=str,
)
def test_what_it_refuses_is_the_librarys(options, monkeypatch):
    monkeypatch.setattr(node, "direct_pays", convolution.direct_pays)
    block = scramble(ACBlock(4, 4, **{"kernel_size": 3, "padding": 8, **options}))
    judge(block, torch.randn(1, 4, 1, 33))


@pytest.mark.parametrize("wanted", [["x"], ["square_conv.weight"], ["hor_conv.weight", "ver_bn.weight"]], ids=str)
def test_gradients_of_some(wanted):
    block, x = scramble(ACBlock(20, 17, 3, padding=1)), torch.randn(2, 20, 9, 11)
    grad = torch.randn(block(x).shape)
    for name, p in block.named_parameters():
        p.requires_grad_(name in wanted)
    found = []
    for own in (block, as_eager(block).double()):
        given = x.to(next(own.parameters()).dtype, copy=True).requires_grad_("x" in wanted)
        own(given).backward(grad.to(given.dtype))
        found.append([given.grad, *(p.grad for p in own.parameters())])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    assert sum(g is not None for g in found[0]) == len(wanted)
    for mine, true in zip(*found, strict=True):
        assert mine is None or oracle.rel(mine, true) < 1e-5


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_map_is_not_kept(dtype, activation):
    block, x = scramble(ACBlock(4, 6, 3, padding=1, activation=activation)), torch.randn(3, 4, 9, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        out, kept = saved_by(block, x)
    maps = 2 + (activation is not None)
    assert sum(size == out.numel() * out.element_size() for size in kept.values()) == maps
    # Nothing that a second backward needs is overwritten.
    grad, inputs = torch.randn_like(out), list(block.parameters())
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for again, once in zip(torch.autograd.grad(out, inputs, grad), first, strict=True):
        assert torch.equal(again, once)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_number_of_threads_changes_no_bit(layout):
    block = scramble(ACBlock(24, 33, 3, padding=1)).to(memory_format=layout)
    x = torch.randn(6, 24, 20, 33).to(memory_format=layout)  # enough for several threads, and parts of sums
    grad, before = torch.randn(block(x).shape), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(oracle.run(block, x, grad))
    finally:
        torch.set_num_threads(before)
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name])
        assert torch.equal(t, found[2][name])


def test_explained(monkeypatch):
    model = torch.nn.Sequential(ACBlock(16, 16, 3, padding=1), ACBlock(16, 16, 3, padding=1, stride=2))
    first, second = ak.explain(model, (2, 16, 12, 12)).blocks
    assert "all branches' convolutions at once" in first.reason
    assert "at once" not in second.reason
    monkeypatch.setattr(node, "direct_pays", lambda *_: False)
    assert "at once" not in ak.explain(model, (2, 16, 12, 12)).blocks[0].reason
