"""What the tests of a backend's training step share: every kind of block, and the comparison with eager."""

import copy

import oracle
import torch
from oracle import rel


def as_eager(b):
    other = copy.deepcopy(b)
    other.backend = "eager"
    return other


def check(b, x, dtype=None):
    """Output and every gradient within the rule; running statistics and counters as eager's; the same layout."""
    grad = torch.randn(b(x).shape)

    def autocast(m, t):
        assert dtype is None or m(t).dtype != dtype
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
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
