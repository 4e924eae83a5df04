"""Convolutions of our own as operators of a compiler's graph (steps/direct.py)."""

import copy

import oracle
import pytest
import torch
from functorch.compile import make_boxed_func
from oracle import scramble
from steps import as_eager
from torch._dynamo.backends.common import aot_autograd

from acnet_kernels import ACBlock, RepVGGBlock
from acnet_kernels.backends import node
from acnet_kernels.ops import _extension

pytestmark = pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ operators: {_extension.WHY_MISSING}")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(node, "direct_pays", lambda *_: True)


@pytest.mark.parametrize(("layout", "autocast"), [(LAYOUTS[0], True), (LAYOUTS[1], False)], ids=str)
def test_they_are_the_graphs(layout, autocast):
    """In a compiler's graph they are two operators, and of any number of images."""
    torch.compiler.reset()
    if torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(1)):
        pytest.skip(
            "this torch's compiler takes every graph for an exported one, in which steps stay whole operators"
        )
    graphs = []

    def backend(graph, inputs):
        graphs.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    block = scramble(ACBlock(18, 20, 3, padding=1, backend="branches")).to(memory_format=layout)
    step = torch.compile(
        copy.deepcopy(block), fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend)
    )
    for images in (2, 3):
        x = torch.randn(images, 18, 7, 9).to(memory_format=layout)
        grad, dtype = torch.randn(images, 20, 7, 9), torch.bfloat16 if autocast else torch.float32
        found = []
        for own in (step, block, as_eager(block).double()):
            given = x.to(next(own.parameters()).dtype, copy=True).requires_grad_()
            own.zero_grad()
            with torch.autocast("cpu", dtype, enabled=autocast and given.dtype == torch.float32):
                out = own(given)
            out.backward(grad.to(out.dtype))
            found.append([out, given.grad, *(p.grad for p in own.parameters())])
        assert found[0][0].stride() == found[1][0].stride()
        for mine, nodes, true in zip(*found, strict=True):
            assert mine.dtype == nodes.dtype
            assert oracle.rel(mine, true) < (1e-5 if dtype == torch.float32 else 3e-2)
    ours = {str(target) for target in graphs if "direct" in str(target)}
    assert ours == {"acnet_kernels.direct_maps.default", "acnet_kernels.direct_gradients.default"}
    assert not any("convolution" in str(target) for target in graphs)


@pytest.mark.parametrize("wanted", [["x"], ["square_conv.weight"], ["hor_conv.weight", "ver_bn.weight"]], ids=str)
def test_gradients_of_some(wanted):
    torch.compiler.reset()
    block = scramble(ACBlock(20, 17, 3, padding=1, backend="branches"))
    x = torch.randn(2, 20, 9, 11)
    for name, p in block.named_parameters():
        p.requires_grad_(name in wanted)
    found = []
    for own in (torch.compile(block, backend="aot_eager", fullgraph=True), block):
        given = x.clone().requires_grad_("x" in wanted)
        block.zero_grad()
        own(given).square().sum().backward()
        found.append([given.grad, *(p.grad for p in block.parameters())])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    for mine, nodes in zip(*found, strict=True):
        assert mine is None or oracle.rel(mine, nodes) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_identity_beside_them(layout):
    torch.compiler.reset()
    block = scramble(RepVGGBlock(18, 18, 3, padding=1, backend="branches")).to(memory_format=layout)
    step, found = torch.compile(block, backend="aot_eager", fullgraph=True), []
    for own in (step, as_eager(block).double()):
        x = torch.randn(2, 18, 7, 9, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
        x = x.to(next(own.parameters()).dtype).requires_grad_()
        block.zero_grad()
        out = own(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in own.parameters())])
    for mine, true in zip(*found, strict=True):
        assert oracle.rel(mine, true) < 1e-4


@pytest.mark.parametrize("identity", [False, True])
def test_opcheck(identity):
    x, weight = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(3, 3, 3, 3, requires_grad=True)
    taps = [0, 0, 3, 3, 1, 1] + [1, 1, 1, 1, 0, 1] * identity
    geometry = [3, 3, 1, 1, 1, 1, 1, 1, 1]
    operators = torch.ops.acnet_kernels
    torch.library.opcheck(operators.direct_maps.default, (x, [weight], taps, geometry, True))
    given = [t.detach() for t in (torch.randn(2, 3, 5, 6), x, weight)]
    dy, x, weight = given
    arguments = [dy], x, [weight], taps, geometry, True, [True], False
    torch.library.opcheck(operators.direct_gradients.default, arguments)
    with pytest.raises(RuntimeError, match="direct_gradients has no derivative"):
        operators.direct_gradients([dy.requires_grad_()], *arguments[1:])[0].sum().backward()
