"""act(Σ BN_b(W_b * x) + residual) by Triton's passes: by themselves, and in a block's step, against float64."""

import copy

import pytest
import test_epilogue as following
import torch
from blocks import assign, on_device_path
from oracle import rel, scramble
from test_epilogue import FOLLOWS, away_from_kinks
from torch.nn import functional as F

from acnet_kernels import ACBlock, MobileOneBlock, reference
from acnet_kernels.kernels.configs import Tile
from acnet_kernels.ops import epilogue, triton_bn_sum
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases

SHAPES = [(2, 7, 5, 3), (1, 5, 7, 9)]
DTYPES = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


CASES = [(2, *follows, *DTYPES[0]) for follows in FOLLOWS]
CASES += [
    (2, *follows, *dtypes) for follows in ((None, True), ("relu", True), ("silu", True)) for dtypes in DTYPES[1:]
]
CASES += [(B, a, True, *DTYPES[0]) for B, a in ((1, "hardswish"), (3, "silu"), (5, "relu6"))]


@pytest.mark.parametrize(("B", "activation", "adds", "dtype", "narrow"), CASES)
def test_passes(B, activation, adds, dtype, narrow, device, monkeypatch):
    """Also with several blocks of rows a tile; five maps are read three at a time, before a clamp."""
    number, outer = epilogue.ACTIVATIONS.index(activation or ""), narrow or dtype
    for shape, split in zip(SHAPES, (False, True), strict=True):
        if split:
            monkeypatch.setattr(triton_bn_sum, "sum_tile", lambda *_: Tile(16, 16))
            monkeypatch.setattr(triton_bn_sum, "row_split", lambda M, K, tile: (-(-M // 48), 48))

        def like(t, dtype):
            return t.to(device, dtype).contiguous(memory_format=torch.channels_last)

        ys = [like(torch.randn(shape) * 2 + 3, dtype) for _ in range(B)]
        gammas, betas = ([torch.rand(shape[1], device=device) + 0.5 for _ in ys] for _ in range(2))
        residual = like(torch.randn(shape), outer) if adds else None
        leaves = [t.double().requires_grad_() for t in (*ys, *gammas, *betas, *([residual] if adds else []))]
        parts = zip(leaves[:B], leaves[B : 2 * B], leaves[2 * B : 3 * B], strict=True)
        z = sum(F.batch_norm(y, None, None, gamma, beta, True, 0.0, 1e-4) for y, gamma, beta in parts)
        z = z + leaves[-1] if adds else z
        grad = like(torch.randn(shape) * away_from_kinks(z.detach(), activation).float().cpu(), outer)
        true_out = z if activation is None else reference.ACTIVATIONS[activation](z)
        true = torch.autograd.grad(true_out, leaves, grad.double())
        args = (ys, gammas, betas, [1e-4] * B, narrow, residual, number)
        out, means, _, rstds = epilogue.on_cuda["bn_sum_epilogue_forward"](*args)
        assert out.dtype == outer
        assert rel(out, true_out) < TOLERANCES[outer]
        if activation is None:
            continue
        kept = out if epilogue.is_clamp(activation) else residual
        for dresidual in (None, torch.full_like(grad, torch.nan)):
            targets = [ys[0].clone(), *(torch.full_like(y, torch.nan) for y in ys[1:])]
            maps = [targets[0], *ys[1:]]  # one dy over its map, the others apart
            given = (grad, maps, means, rstds, gammas, betas, [True] * B, kept, number, targets, dresidual)
            dgammas, dbeta = epilogue.on_cuda["bn_sum_epilogue_backward_"](*given)
            found = [*targets, *dgammas, *[dbeta] * B, *([] if dresidual is None else [dresidual])]
            for a, e in zip(found, true, strict=dresidual is not None and adds):
                assert (a.double() - e).norm() < TOLERANCES[outer] * max(e.norm(), 1), (shape, activation)


def test_values_of_every_size(device):
    """Infinities too, and NaN but for the slope, of which PyTorch's own kernels differ."""
    odd = torch.tensor([0.0, -3.0, 3.0, 6.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    z = torch.cat([torch.linspace(-100, 100, 501), odd]).view(1, 1, 1, -1).to(device)
    for activation in following.ACTIVATIONS[1:]:
        numbers = [], [], [1e-5], None, z, epilogue.ACTIVATIONS.index(activation)
        out = epilogue.on_cuda["bn_sum_epilogue_forward"]([torch.zeros_like(z)], *numbers)[0]
        leaf = z.clone().requires_grad_()
        want = getattr(F, activation)(leaf)
        torch.testing.assert_close(out, want.detach(), rtol=1e-5, atol=1e-30, equal_nan=True)
        (steep,) = torch.autograd.grad(want.sum(), leaf)
        kept = out if epilogue.is_clamp(activation) else z
        slope, means = torch.zeros_like(z), torch.zeros(1, 1, dtype=torch.float64, device=device)
        given = (torch.ones_like(z), [torch.zeros_like(z)], means, means, [], [], [False], kept, numbers[-1], [])
        epilogue.on_cuda["bn_sum_epilogue_backward_"](*given, slope)
        smooth = (away_from_kinks(z, activation) > 0) & ~z.isnan()
        torch.testing.assert_close(slope[smooth], steep[smooth], rtol=1e-5, atol=1e-6, equal_nan=True)


ASSIGNMENTS = [ALL_TRITON, ALL_LIBRARY, Phases(TRITON, LIBRARY, LIBRARY)]


@pytest.fixture
def path(monkeypatch):
    on_device_path(monkeypatch)
    return monkeypatch


def block_of(device, layout, **options):
    block = scramble(ACBlock(4, 6, 3, padding=1, backend="branches", **options))
    x, residual = torch.randn(2, 4, 5, 4), torch.randn(2, 6, 5, 4)
    return block.to(device), x.to(device, memory_format=layout), residual.to(device)


STEPS = [(ALL_TRITON, *follows) for follows in FOLLOWS]
STEPS += [(assigned, a, True) for assigned in ASSIGNMENTS[1:] for a in ("relu", "silu", None)]


@pytest.mark.parametrize(("assigned", "activation", "adds"), STEPS)
def test_steps(activation, adds, assigned, device, path):
    assign(path, assigned)
    block, x, residual = block_of(device, torch.channels_last, activation=activation)
    if activation == "relu6":
        residual = residual.contiguous(memory_format=torch.channels_last)
    following.judge(block, x, residual if adds else None)


BARE, LAST = {"use_affine": False, "momentum": None}, torch.channels_last
OTHER_BLOCKS = [(BARE, LAST, ALL_TRITON)]  # of the others it computes none
OTHER_BLOCKS += [(o, la, ALL_LIBRARY) for o in (BARE, {"norm": "sum"}) for la in (torch.contiguous_format, LAST)]


@pytest.mark.parametrize("activation", ["relu6", "silu"])
@pytest.mark.parametrize(("options", "layout", "assigned"), OTHER_BLOCKS)
def test_other_blocks(options, layout, activation, assigned, device, path):
    assign(path, assigned)
    following.judge(*block_of(device, layout, activation=activation, **options))


@pytest.mark.parametrize("assigned", ASSIGNMENTS[:2], ids="-".join)
@pytest.mark.parametrize(
    ("activation", "adds"), [("relu", True), ("hardswish", True), ("silu", False), (None, True)]
)
def test_under_autocast(activation, adds, assigned, device, path):
    assign(path, assigned)
    block, x, residual = block_of(device, torch.channels_last, activation=activation)
    residual = residual.to(torch.float16) if adds else None
    outs = []
    for forward in (following.block_of, following.modules_of):
        leaf = None if residual is None else residual.clone().requires_grad_()
        with torch.autocast(device.type, torch.float16):
            out = forward(copy.deepcopy(block), x, leaf)
        out.sum().backward()
        outs.append((out, *([] if leaf is None else [leaf.grad])))
    assert outs[0][0].dtype == torch.float16
    for got, want in zip(*outs, strict=True):
        assert rel(got, want) < 5e-3


@pytest.mark.parametrize("assigned", ASSIGNMENTS[:2], ids="-".join)
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_gradients_of_what_needs_one(activation, assigned, device, path):
    """A residual without one costs nothing; one that is x gets both; a kept graph gives the same bits again."""
    assign(path, assigned)
    block, x, _ = block_of(device, torch.channels_last, activation=activation)
    block = scramble(ACBlock(4, 4, 3, padding=1, activation=activation, backend="branches")).to(device)
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)
    found = []
    for forward in (following.block_of, following.modules_of):
        out = forward(copy.deepcopy(block), leaf, leaf)
        first = torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out, leaf, grad)[0])
        alone = torch.autograd.grad(forward(copy.deepcopy(block), leaf, x), leaf, grad)[0]
        found.append((first, alone))
    for got, want in zip(*found, strict=True):
        assert rel(got, want) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_twice_differentiable(activation, device, path):
    assign(path, ALL_TRITON)
    block, x, residual = block_of(device, torch.channels_last, activation=activation)
    inputs, found = [x.requires_grad_(), residual.requires_grad_()], []
    for forward in (following.block_of, following.modules_of):
        first = torch.autograd.grad(forward(block, x, residual).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), inputs))
    assert all(rel(got, want) < 1e-3 for got, want in zip(*found, strict=True))


def test_more_maps_than_a_smooth_activations_passes_take(device, path):
    assign(path, ALL_LIBRARY)
    for activation in (torch.nn.ReLU(), torch.nn.SiLU()):
        block = scramble(MobileOneBlock(6, 6, 3, padding=1, num_conv_branches=3)).to(device)
        block.activation, block.backend = activation, "branches"
        x = torch.randn(2, 6, 4, 5).to(device, memory_format=torch.channels_last).requires_grad_()
        want = activation(block._forward_modules(x))
        got = block(x)
        assert rel(got, want) < 1e-5
        grad = torch.randn_like(got)
        assert rel(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(want, x, grad)[0]) < 1e-4
