"""What the tests of a backend's training step share: every kind of block, and the comparison with eager."""

import collections
import contextlib
import copy
import statistics
import warnings
from unittest import mock

import oracle
import torch
from oracle import rel
from torch import nn

from acnet_kernels.backends import node
from acnet_kernels.ops.check import checked
from acnet_kernels.steps import moments, moments_passes


@contextlib.contextmanager
def plain_moments():
    """moments_step by the kernels in plain PyTorch on the CPU too, and by Python's node."""
    library = torch.library.Library("acnet_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of the first kernel that is overridden
        for name, check_arguments, kernel in (
            ("moments_step", moments.check_step, moments_passes.step),
            ("moments_step_backward", moments.check_backward, moments_passes.step_backward),
        ):
            library.impl(name, checked(check_arguments)(kernel), "CPU")
    try:
        with mock.patch.object(node, "NODE", None):
            yield
    finally:
        library._destroy()


def as_eager(b):
    other = copy.deepcopy(b)
    other.backend = "eager"
    return other


def check(b, x, dtype=None):
    """Output and every gradient within the rule; running statistics and counters as eager's; the same layout."""
    grad = torch.randn(b(x).shape, device=x.device)

    def autocast(m, t):
        assert dtype is None or m(t).dtype != dtype
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return m(t)

    eager = as_eager(b)
    got = oracle.run(b, x, grad, autocast)
    want = oracle.run(eager, x, grad, autocast)
    assert got["out"].stride() == want["out"].stride()
    oracle.assert_as_good_as(got, want, oracle.truth(b, x, grad))
    mine, theirs = copy.deepcopy(b), copy.deepcopy(eager)
    autocast(mine, x), autocast(theirs, x)
    for (name, a), e in zip(mine.named_buffers(), theirs.buffers(), strict=True):
        assert a.dtype == e.dtype
        assert rel(a, e) < (1e-5 if dtype is None else 1e-2), name


def check_on_the_whole(make, shape, draws=60):
    """Output and every gradient no further from the truth than eager's are, by medians of fresh blocks and inputs.

    For steps so ill-conditioned that one draw's errors are chance: two values normalise to ±1 whatever they are,
    and what is left of their gradients is rounding's. Now and then that is nearly nothing, and an error relative to
    it huge: means of even 150 draws differ by a quarter.
    """
    mine, eager = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(draws):
        b, x = make(), torch.randn(shape)
        grad = torch.randn(b(x).shape)
        true = oracle.truth(b, x, grad)
        for errors, step in ((mine, b), (eager, as_eager(b))):
            found = oracle.run(step, x, grad)
            for name, t in true.items():
                errors[name].append(rel(found[name], t))
    for name, errors in mine.items():
        error, allowed = (
            statistics.median(errors),
            max(1.1 * statistics.median(eager[name]), oracle.FLOORS[torch.float32]),
        )
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_convolution_biases(b):
    """Biases reach the running means as eager's do; their gradients are zero, eager's are rounding noise."""
    for conv in b.convs().values():
        conv.bias = nn.Parameter(torch.randn(6))
    x = torch.randn(3, 4, 6, 7)
    grad = torch.randn(b(x).shape)
    got, true = oracle.run(b, x, grad), oracle.truth(b, x, grad)
    cancelled = [name for name in got if name.endswith("conv.bias")]
    assert len(cancelled) == len(b.convs())
    for name in cancelled:
        assert not got.pop(name).any()
    oracle.assert_as_good_as(got, oracle.run(as_eager(b), x, grad), {name: true[name] for name in got})
    eager = as_eager(b)
    b(x), eager(x)
    for a, e in zip(b.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, e)


def saved_by(forward, x):
    """(output, {storage: bytes} of what autograd keeps)."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(x)
    return out, kept


def check_chain(blocks):
    """Blocks of 8 channels that keep the size, with ReLUs in place between them, keep one map each."""
    x = torch.randn(4, 8, 16, 16, requires_grad=True)

    def forward(x, inplace=True):
        for block in blocks:
            x = nn.functional.relu(block(x), inplace=inplace)
        return x

    out, kept = saved_by(forward, x)
    map_bytes = x.untyped_storage().nbytes()
    assert sum(size == map_bytes for size in kept.values()) == len(blocks) + 1  # x, and each ReLU's output
    out.square().sum().backward()
    expected = torch.autograd.grad(forward(x, inplace=False).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


# (mean, std) of inputs whose mean cancels.
LEVELS = [(1e3, 0.1), (1e3, 5.0), (30.0, 1.0), (-4.0, 1.0)]


def make_pointwise(block):
    """No padding in sight of any kernel, so that nothing but the input's spread is left of the variance."""
    with torch.no_grad():
        for conv in block.convs().values():
            rows, columns = (taps // 2 for taps in conv.weight.shape[2:])
            centre = conv.weight[:, :, rows, columns].clone()
            conv.weight.zero_()
            conv.weight[:, :, rows, columns] = centre


def check_levels(block, dtype, mean, std, pointwise):
    """As good as eager in this dtype, for inputs, and for gradients, whose mean is far above their spread."""
    if pointwise:
        make_pointwise(block)
    block.to(dtype)
    device = next(block.parameters()).device
    x = (torch.randn(8, 8, 9, 7) * std + mean).to(device, dtype)
    noise = torch.randn(block(x).shape, device=device)
    for grad in (0.7 * as_eager(block).float()(x.float()).detach() + 0.5 * noise + 0.3, 0.1 * noise + 5):
        grad = grad.to(dtype)
        eager, true = oracle.run(as_eager(block), x, grad), oracle.truth(block, x, grad)
        oracle.assert_as_good_as(oracle.run(block, x, grad), eager, true)


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 5, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 3, "stride": (1, 2)},
    {"kernel_size": 3, "padding": 1, "shift": (1, -1)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
]

VARIANTS = [
    {"norm": "sum"},
    {"branches": ("square",)},
    {"branches": ("square", "ver")},
    {"use_affine": False},
    {"momentum": None},
    {"norm": "sum", "branches": ("square", "hor"), "momentum": 0.3, "eps": 1e-2},
]
