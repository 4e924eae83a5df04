"""Random blocks, inputs, layouts, dtypes, modes and backends: equivalence or the documented error, nothing else.

2,000 cases of tiny shapes; HYPOTHESIS_CASES=N asks for N, with fresh randomness in every run.
"""

import copy
import os
import warnings

import oracle
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from acnet_kernels import ACBlock
from acnet_kernels.backends import planner

CASES = int(os.environ.get("HYPOTHESIS_CASES", 2000))
MODES = ("train", "eval", "frozen norms", "one frozen norm", "momentum=None")

pair_or_int = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
sides = st.sampled_from([(), ("hor",), ("ver",), ("hor", "ver")])


@st.composite
def options(draw):
    """Constructor arguments, most of them valid."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    k = draw(st.sampled_from([1, 3, 3, 3, 5, 7]))
    padding = st.one_of(st.integers(0, 4), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("same"))
    if k == 1:  # nn.Conv2d itself crashes now and then on a padded 1×1 kernel (torch 2.14.1, CPU, channels_last)
        padding = st.just(0)
    return {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": k,
        "stride": draw(pair_or_int),
        "padding": draw(padding),
        "dilation": draw(st.sampled_from([1, 1, 2, (1, 2)])),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        "use_affine": draw(st.sampled_from([True, True, False])),
        "branches": ("square", *draw(sides)),
        "norm": draw(st.sampled_from(["branch", "branch", "sum"])),
        "shift": draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (-1, 1), 3])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "backend": draw(st.sampled_from(planner.CHOICES)),
    }


@st.composite
def inputs(draw, channels):
    """An input of tiny sizes: empty, strided, channels_last, expanded, far from zero."""
    n, h, w = draw(st.integers(0, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided", "expanded"]))
    x = torch.randn(n, channels, h, 2 * w)
    x = x * draw(st.sampled_from([1.0, 1e-3, 10.0])) + draw(st.sampled_from([0.0, 0.0, 3.0]))
    x = x.to(dtype)
    if layout == "strided":
        return x[..., ::2]
    if layout == "expanded":
        return x[:, :1, :, :w].expand(n, channels, h, w)
    x = x[..., :w].contiguous()
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def build(arguments):
    """The block, or the error that its arguments document."""
    try:
        return ACBlock(**arguments), None
    except (ValueError, TypeError) as error:
        return None, error


def prepare(b, mode, dtype):
    """b in its mode and dtype, with random norms; half blocks keep their norms in float32 half of the time."""
    oracle.scramble(b)
    b = b.to(dtype)
    if mode == "eval":
        b.eval()
    for name, norm in b.norms().items():
        if mode == "frozen norms" or (mode == "one frozen norm" and name in ("hor", "sum")):
            norm.eval().requires_grad_(False)
        if mode == "momentum=None":
            norm.momentum = None
    return b


def attempt(function):
    try:
        return function(), None
    except (ValueError, RuntimeError) as error:
        return None, error


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize="HYPOTHESIS_CASES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(data=st.data())
def check(data):
    arguments = data.draw(options())
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    b, error = build(arguments)
    if b is None:
        documented = ("padding='same'", "shift", "padding_mode")
        assert any(word in str(error) for word in documented), (arguments, error)
        event("refused by the constructor")
        return
    mode = data.draw(st.sampled_from(MODES))
    x = data.draw(inputs(arguments["in_channels"]))
    b = prepare(b, mode, x.dtype)
    before = {name: t.clone() for name, t in b.state_dict().items()}
    want, its_error = attempt(lambda: oracle.run(b, x, gradient(b, x), lambda m, t: m._forward_modules(t)))
    got, error = attempt(lambda: oracle.run(b, x, gradient(b, x)))
    if its_error is not None or error is not None:
        assert error is not None, f"only the submodules refuse this: {its_error}"
        assert its_error is not None, f"the submodules take this: {error}"
        attempt(lambda: b(x))
        for name, t in b.state_dict().items():
            assert torch.equal(t, before[name]), f"{name} changed although forward raised {error!r}"
        event(f"refused by forward: {str(error)[:40]}")
        return
    event(f"compared: {mode}, {b.plan(x)[1].backend.NAME}")
    check_outputs(b, x, got, want)
    check_statistics(b, x)
    check_folding(b, x)


def gradient(b, x):
    rows, columns = b.geometry.output_size(x.shape[2], x.shape[3])
    generator = torch.Generator().manual_seed(7)  # the same one every time it is asked for
    return torch.randn(x.shape[0], b.out_channels, rows, columns, generator=generator).to(x.dtype)


def check_outputs(b, x, got, want):
    assert got["out"].dtype == want["out"].dtype == x.dtype
    assert got["out"].shape == want["out"].shape
    assert got.keys() == want.keys()
    for name, t in want.items():
        if t.isfinite().all():
            assert got[name].isfinite().all(), f"{name} is not finite, the submodules' is"
    live = any(norm.batch_stats for norm in b.step().norms)
    values = want["out"].numel() // b.out_channels
    # The variance of a handful of half-precision values can be all rounding error, eager's as well as ours.
    meaningful = x.numel() and not (live and x.dtype.itemsize == 2 and values < 16)
    if meaningful and all(t.isfinite().all() for t in want.values()):
        close(got, want, oracle.truth(b, x, gradient(b, x)), live_terms_of(b, x) if live else terms_of(b, x))


def close(got, eager, true, terms=0.0):
    """The suite's tolerance rule, with the norm of the terms that cancel in out as its least scale."""
    # Among thousands of half-precision cases eager is sometimes lucky: four times the floor there.
    dtype = got["out"].dtype
    floor = oracle.FLOORS[dtype] * (4 if dtype.itemsize == 2 else 1)
    largest = max(t.double().norm() for t in true.values())
    for name, t in true.items():
        t, off = t.double(), eager[name].double() - t.double()
        scale = max(t.norm(), terms) if name == "out" else largest
        allowed = max(2 * off.norm(), floor * scale)
        error = (got[name].double() - t).norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, norm {t.norm():.2e}"


def terms_of(b, x):
    """‖conv(|x|, |W|) + |bias|‖ of the folded block: what its output is the rounded sum of."""
    b = copy.deepcopy(b).double().eval()
    b.switch_to_deploy()
    with torch.no_grad():
        for p in b.fused_conv.parameters():
            p.abs_()
        return b(x.double().abs()).norm()


def live_terms_of(b, x):
    """The same by batch statistics: conv(|x|, |W|), scaled as its batch norm scales what is left of it."""
    b, x = copy.deepcopy(b).double(), x.double()
    norms, maps, terms = b.norms(), {}, {}
    with torch.no_grad():
        for name, conv in b.convs().items():
            place, key = b.geometry.placement(name), name if name in norms else "sum"
            maps[key] = maps.get(key, 0) + conv(place.apply(x, b.padding_mode))
            conv.weight.abs_()
            terms[key] = terms.get(key, 0) + conv(place.apply(x.abs(), b.padding_mode)).abs()
        total = torch.zeros((), dtype=torch.float64)
        for name, bn in norms.items():
            scale = (maps[name].var((0, 2, 3), unbiased=False) + bn.eps).rsqrt()
            scale = scale if bn.weight is None else scale * bn.weight.abs()
            total += (terms[name] * scale[:, None, None]).norm()
    return total


def check_statistics(b, x):
    got, want = copy.deepcopy(b), copy.deepcopy(b)
    got(x), want._forward_modules(x)
    tolerance = oracle.FLOORS[x.dtype]
    for (name, t), its in zip(got.named_buffers(), want.buffers(), strict=True):
        if its.isfinite().all():
            torch.testing.assert_close(t, its, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_folding(b, x):
    undeployed = b
    b = copy.deepcopy(b).eval()
    want = copy.deepcopy(b).double()._forward_modules(x.double())
    eager = b._forward_modules(x)
    b.switch_to_deploy()
    if x.numel() and want.isfinite().all() and eager.isfinite().all():
        close({"out": b(x)}, {"out": eager}, {"out": want}, terms_of(undeployed, x))


@pytest.mark.slow
def test_fuzz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check()
