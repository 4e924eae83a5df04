"""Depthwise blocks by moments: exact in float64, as good as eager in every dtype, for any branches and geometry."""

import copy
import random
from dataclasses import replace

import distributed
import oracle
import pytest
import torch
from oracle import rel
from steps import LEVELS, saved_by
from test_branch_lists import Block, modules, truth
from test_distributed import Collectives

from acnet_kernels import ACBlock
from acnet_kernels.backends import branches, moments, moments_depthwise, planner, synced, synced_depthwise
from acnet_kernels.functional import describe
from acnet_kernels.geometry import Geometry, Taps
from acnet_kernels.ops import _extension
from acnet_kernels.steps import depthwise as ops
from acnet_kernels.steps import depthwise_plain, packed

WHOLE, CENTRE = Taps(0, 0, 3, 3), Taps(1, 1, 1, 1)
# Name → (geometry's arguments, branches, whether a batch norm follows the sum), as in test_branch_lists.
LISTS = {
    "mobileone": ({}, [*[("conv", WHOLE, True)] * 4, ("conv", CENTRE, True), ("identity", None, True)], False),
    "mobileone of stride 2": ({"stride": 2}, [*[("conv", WHOLE, True)] * 2, ("conv", CENTRE, True)], False),
    "acnet": ({}, [("conv", t, True) for t in (WHOLE, Taps(1, 0, 1, 3), Taps(0, 1, 3, 1))], False),
    "scale-invariant": ({}, [("conv", WHOLE, True), ("conv", CENTRE, True)], False),
    "one": ({}, [("conv", WHOLE, True)], False),
    "pointwise": (
        {"kernel_size": 1, "padding": 0},
        [("conv", Taps(0, 0, 1, 1), True), ("identity", None, True)],
        False,
    ),
    "repvit": ({}, [("conv", WHOLE, True), ("conv", CENTRE, False), ("identity", None, False)], True),
    "sum": ({}, [("conv", WHOLE, False), ("conv", CENTRE, False), ("identity", None, False)], True),
    "5×5": (
        {"kernel_size": 5, "padding": 2},
        [("conv", Taps(0, 0, 5, 5), True), ("conv", Taps(1, 1, 3, 3), True), ("identity", None, True)],
        False,
    ),
    "5×5 of stride 2": (
        {"kernel_size": 5, "padding": 2, "stride": 2},
        [("conv", Taps(0, 0, 5, 5), True)] * 2,
        False,
    ),
    "with gaps": ({"kernel_size": 5, "padding": 2}, [("conv", Taps(0, 0, 3, 3, 2), True)], False),
    "dilated": ({"padding": 2, "dilation": 2}, [("conv", WHOLE, True), ("identity", None, True)], False),
    "valid": ({"padding": 0}, [("conv", WHOLE, True), ("conv", CENTRE, True)], False),
    "padded far": ({"padding": 4}, [("conv", WHOLE, True), ("conv", Taps(0, 1, 2, 2), True)], False),
    "even": ({"kernel_size": (2, 4), "padding": 1, "stride": (3, 1)}, [("conv", Taps(0, 0, 2, 4), True)], False),
    "reflected": ({"padding_mode": "reflect"}, [("conv", WHOLE, True), ("conv", CENTRE, True)], False),
}


class Depthwise(Block):
    """A block of one of LISTS, of `channels` in and `multiplier` times as many out."""

    def __init__(self, name: str, channels: int, multiplier: int = 1, backend: str = "moments") -> None:
        torch.nn.Module.__init__(self)
        arguments, self.kinds, total = LISTS[name]
        self.geometry = Geometry.make(**{"kernel_size": 3, "padding": 1, "groups": channels} | arguments)
        self.backend, out, self.synced = backend, channels * multiplier, False
        self.convs, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
        for kind, taps, normed in self.kinds:
            conv = torch.nn.Identity()
            if kind == "conv":
                conv = torch.nn.Conv2d(1, out, (taps.rows, taps.columns), bias=False)
            self.convs.append(conv)
            self.norms.append(torch.nn.BatchNorm2d(out) if normed else torch.nn.Identity())
        self.total = torch.nn.BatchNorm2d(out) if total else None
        oracle.scramble(self)

    def step(self):
        """As of nn.SyncBatchNorm where `synced`."""
        step = super().step()
        if not self.synced:
            return step

        def grouped(norm):
            return norm and norm._replace(group=torch.distributed.group.WORLD)

        branches = tuple(branch._replace(norm=grouped(branch.norm)) for branch in step.branches)
        return replace(step, branches=branches, norm=grouped(step.norm))


def check(block, x, noise=0.5):
    problem = describe(x, block.step())
    choice = planner.choose(problem, "moments")
    assert choice.backend is moments, choice.reason
    if problem.geometry.padding_mode == "zeros":
        assert moments_depthwise.takes(problem)
    with torch.no_grad():
        out = modules(copy.deepcopy(block).float() if x.dtype != torch.float64 else copy.deepcopy(block), wide(x))
    grad = (0.7 * out + noise * torch.randn_like(out) + 0.3).to(x.dtype)
    got, eager, true = oracle.run(block, x, grad), oracle.run(block, x, grad, modules), truth(block, x, grad)
    assert_as_good_as(block, got, eager, true)


def assert_as_good_as(block, got, eager, true):
    """The oracle's rule, where a gradient does not vanish: there on the scale of its terms."""
    assert got["out"].stride() == eager["out"].stride()
    before_norm = block.total is not None
    for name in list(true):
        weight = block.get_parameter(name) if name not in ("out", "x", "residual") else None
        if weight is None:
            continue
        # A BN of W·x does not depend on W but for ε: of a kernel of which one tap sees the image, neither.
        seen = true[name].reshape(len(weight), -1) != 0
        vanishing = weight.dim() == 4 and (seen.sum(1) == 1).all()
        if vanishing or (before_norm and name.startswith("norms") and "bias" in name):
            norm = (
                true[f"norms.{name.split('.')[1]}.weight"] if vanishing and not before_norm else true["total.bias"]
            )
            if vanishing:
                oracle.judge_on_its_terms(name, weight.flatten(1)[seen], norm, got, eager, true)
            else:
                oracle.judge_on(norm.norm(), name, got, eager, true)
    oracle.assert_as_good_as(got, eager, true)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_exact_in_float64(name, layout):
    for channels, multiplier, size in ((3, 1, (9, 7)), (17, 1, (6, 11)), (2, 3, (7, 5)), (8, 1, (5, 5))):
        if multiplier > 1 and any(kind == "identity" for kind, *_ in LISTS[name][1]):
            continue
        block = Depthwise(name, channels, multiplier).double().to(memory_format=layout)
        check(block, torch.randn(3, channels, *size).double().to(memory_format=layout))


@pytest.mark.parametrize("name", ["mobileone", "acnet", "repvit", "5×5", "dilated", "padded far", "sum"])
def test_exact_in_float64_on_images_down_to_one_pixel(name):
    block = Depthwise(name, 5).double()
    for size in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 4), (1, 9)):
        check(block, torch.randn(9, 5, *size).double())


# Of list, layout and dtype every pair.
@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        (name, LAYOUTS[(i + j) % 2], dtype)
        for i, name in enumerate(LISTS)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
    ids=str,
)
def test_as_good_as_eager(name, layout, dtype):
    for channels, size in ((33, (12, 17)), (16, (5, 4))):
        block = Depthwise(name, channels).to(dtype).to(memory_format=layout)
        check(block, torch.randn(6, channels, *size).to(dtype).to(memory_format=layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mean", "std"), LEVELS)
@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2", "repvit", "pointwise", "5×5", "valid"])
def test_a_mean_far_above_the_spread_does_not_cancel(name, mean, std, dtype):
    x = (torch.randn(8, 8, 9, 7) * std + mean).to(dtype)
    check(Depthwise(name, 8).to(dtype), x)


@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2"])
def test_weight_gradients_in_bfloat16_are_as_exact_as_float32s(name):
    block, x = Depthwise(name, 16), torch.randn(16, 16, 24, 24).bfloat16()
    grad = torch.randn(block(x.float()).shape).bfloat16()

    def autocast(b, x):
        with torch.autocast("cpu", torch.bfloat16):
            return b(x)

    got, true = oracle.run(block, x, grad, autocast), truth(block, x, grad)
    assert got["out"].dtype == torch.bfloat16
    assert rel(got["convs.0.weight"], true["convs.0.weight"]) < 1e-5


@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last gradient", "sliced"])
def test_any_strides(layout):
    block = Depthwise("mobileone", 6).double()
    x, grad = torch.randn(3, 6, 7, 5).double(), torch.randn(3, 6, 7, 5).double()
    given, back = x, grad
    if layout == "strided":
        given = torch.zeros(3, 6, 7, 10).double()[..., ::2].copy_(x)
    elif layout == "sliced":
        given = torch.zeros(3, 9, 8, 5).double()[:, 2:8, :7].copy_(x)
    elif layout == "expanded":
        back = grad[:1, :, :, :1].expand(grad.shape)
    else:
        back = grad.contiguous(memory_format=torch.channels_last)
    oracle.assert_as_good_as(*(oracle.run(block, t, g, f) for t, g, f in ((given, back, None), (x, back, modules))),
                             truth(block, x, back))  # fmt: skip


def arguments_of(r: random.Random, dtype: torch.dtype):
    """Of a step and, without the first, its gradient."""
    import operator_cases

    args = operator_cases.depthwise_step(r)
    args[0], args[1] = args[0].to(dtype), [w.to(dtype) for w in args[1]]
    return args


@pytest.mark.parametrize("seed", range(40))
def test_random_lists_by_the_operators(seed):
    """Both kernels of the operators, each of which may be the one that registers itself."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    args = arguments_of(r, torch.float64)
    x, weights, gammas, _, _, taps, geometry, _ = args
    true = depthwise_plain.step(*args)
    got = ops.depthwise_step(*args, None, 0)
    for a, b in zip((*got[:4], got[5]), (*true[:4], true[5]), strict=True):
        assert rel(a, b) < 1e-9
        assert a.stride() == b.stride()
    grad = torch.randn(got[0].shape, dtype=torch.float64)
    rest = taps, geometry, True, [True] * len(weights), True
    _, means, _, rstds, pivot, sums, centred = got
    back = ops.depthwise_step_backward(
        grad, x, weights, gammas, [], means, rstds, pivot, sums, centred, None, *rest
    )
    want = depthwise_plain.step_backward(grad, x, weights, gammas, [], true[1], *true[3:], None, *rest)
    largest = max(t.norm() for t in (want[0], *want[1], *want[2:]))
    for a, b in zip((back[0], *back[1], *back[2:]), (want[0], *want[1], *want[2:]), strict=True):
        assert (a - b).norm() <= 1e-9 * max(b.norm(), largest)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@pytest.mark.skipif(not _extension.LOADED, reason=f"only the C++ kernels promise it: {_extension.WHY_MISSING}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2"])
def test_the_number_of_threads_changes_no_bit(name, layout):
    block, x = Depthwise(name, 20).to(memory_format=layout), torch.randn(5, 20, 40, 41).to(memory_format=layout)
    grad, before = torch.randn(block(x).shape), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(oracle.run(block, x, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


@pytest.mark.parametrize(
    ("dtype", "seed"), zip((torch.float32, torch.bfloat16, torch.float64, torch.float32), range(4), strict=True)
)
def test_opcheck(dtype, seed):
    r = random.Random(seed)
    args = arguments_of(r, dtype)
    args[0].requires_grad_()
    args[1] = [weight.requires_grad_() for weight in args[1]]
    args += [None, 0]
    torch.library.opcheck(ops.depthwise_step, args)
    with torch.no_grad():
        _, means, _, rstds, pivot, sums, centred = ops.depthwise_step(*args)
    x, weights, gammas, _, _, taps, geometry, *_ = args
    x, weights = x.detach(), [weight.detach() for weight in weights]
    shape = packed.unpack(geometry).output_size(*x.shape[2:])
    grad = torch.randn(len(x), len(weights[0]), *shape).to(dtype)
    back = [
        grad,
        x,
        weights,
        gammas,
        [],
        means,
        rstds,
        pivot,
        sums,
        centred,
        None,
        taps,
        geometry,
        True,
        [True] * len(weights),
        True,
    ]
    torch.library.opcheck(ops.depthwise_step_backward, back)


def test_the_operators_gradient_says_that_it_has_no_derivative():
    x, weight, gamma = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(4, 1, 3, 3), torch.ones(4)
    constants = [1e-5], [0, 0, 3, 3, 1, 1], packed.pack(Geometry.make(3, padding=1, groups=4)), False, None, 0
    out, *_ = ops.depthwise_step(x, [weight], [gamma], [gamma], *constants)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"depthwise_step_backward has no derivative; acblock\(\) has one"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["mobileone of stride 2", "repvit"])
def test_differentiable_twice(name):
    block = Depthwise(name, 2).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: block(x), (x, *block.parameters()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compiled_it_keeps_x_alone_too(layout):
    block, x = (
        Depthwise("mobileone", 6).to(memory_format=layout),
        torch.randn(3, 6, 16, 16).to(memory_format=layout),
    )
    grad = torch.randn(3, 6, 16, 16)
    compiled = torch.compile(lambda m, t: m(t), fullgraph=True, backend="aot_eager")
    expected, got = oracle.run(block, x, grad), oracle.run(block, x, grad, compiled)
    for name, t in expected.items():
        assert (got[name] - t).norm() <= 1e-6 * max(t.norm(), 1e-3), name
    assert got["x"].stride() == expected["x"].stride()
    _, kept = saved_by(lambda t: compiled(block, t), x.requires_grad_())
    assert sum(size >= 3 * 6 * 16 * 16 * 4 for size in kept.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2", "sum", "repvit", "5×5"])
def test_what_is_kept_is_what_it_says(name, dtype):
    block = Depthwise(name, 16)
    x = torch.randn(4, 16, 20, 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        problem = describe(x, block.step())
        _, kept = saved_by(block, x)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    assert sum(size for data, size in kept.items() if data not in parameters) == moments.saved_bytes(problem)


# ---- several processes ----

SIZES = (5, 2, 0)


def synced_step(rank, world, block, x, grad):
    block.synced = True
    x, grad = (t.split(list(SIZES))[rank].clone() for t in (x, grad))
    x.requires_grad_()
    with Collectives() as forward:
        out = block(x)
    with Collectives() as backward:
        out.backward(grad)
    names = forward.names, backward.names
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {
        "out": out.detach(),
        "x": x.grad,
        "grads": gradients,
        "buffers": dict(block.named_buffers()),
        "names": names,
    }


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
@pytest.mark.parametrize("name", ["mobileone", "mobileone of stride 2", "sum", "5×5"])
def test_processes_share_one_batchs_statistics_in_one_collective_each_way(name):
    block, x = Depthwise(name, 6).double(), torch.randn(sum(SIZES), 6, 7, 6).double() * 2 + 30
    grad = torch.randn(block(x).shape).double() + 1
    whole = copy.deepcopy(block)
    results = distributed.run(len(SIZES), synced_step, block, x, grad)
    true = truth(block, x, grad)
    got = {key: torch.cat([r[key] for r in results]) for key in ("out", "x")}
    for key in results[0]["grads"]:  # each process holds its share
        got[key] = torch.stack([r["grads"][key] for r in results]).sum(0)
    largest = max(t.norm() for t in true.values())
    for key, t in true.items():
        assert (got[key] - t).norm() <= 1e-9 * max(t.norm(), largest), key
    modules(whole, x)
    for r in results:
        for key, t in whole.named_buffers():
            torch.testing.assert_close(r["buffers"][key], t)
        if _extension.LOADED:
            assert [len(names) for names in r["names"]] == [1, 1]


def test_it_is_what_auto_takes():
    wanted = moments if _extension.LOADED else planner.eager
    for name in ("mobileone", "mobileone of stride 2", "5×5", "acnet", "repvit", "dilated", "reflected"):
        step = Depthwise(name, 8).step()
        assert planner.choose(describe(torch.randn(2, 8, 9, 9), step)).backend is wanted, name
    problem = describe(torch.randn(2, 8, 9, 9), Depthwise("one", 8).step())  # which shares its passes with none
    assert planner.choose(problem).backend is (branches if _extension.LOADED else planner.eager)
    block = ACBlock(6, 6, 3, padding=1, groups=6)
    block.ver_bn.eval()
    assert block.plan(torch.randn(2, 6, 9, 9))[1].backend is not moments
    wide_kernel = ACBlock(6, 6, 7, padding=3, groups=6)
    assert moments.declines(wide_kernel.plan(torch.randn(2, 6, 9, 9))[0]) is None


def test_on_cuda_it_is_what_auto_takes_where_triton_has_kernels(monkeypatch):
    monkeypatch.setattr(ops, "TRITON", True)
    x = torch.randn(2, 8, 9, 9)

    def chosen(name, dtype=torch.float32):
        problem = replace(describe(x, Depthwise(name, 8).step()), device="cuda", dtype=dtype)
        return planner.decide(problem, {})[0]

    for name in ("mobileone", "mobileone of stride 2", "5×5", "sum", "repvit", "dilated", "padded far"):
        assert chosen(name) == chosen(name, torch.bfloat16) == "moments"
        problem = replace(describe(x, Depthwise(name, 8).step()), device="cuda")
        assert (
            planner.where_finished(problem, planner.Choice(moments, ""), "silu")
            == "in the convolution's own passes"
        )
        assert chosen(name, torch.float64) == "eager"
    synchronised = replace(describe(x, Depthwise("mobileone", 8).step()), device="cuda", synced=True)
    assert planner.choose(synchronised).backend is synced_depthwise
    assert planner.choose(replace(synchronised, dtype=torch.float64)).backend is synced
    monkeypatch.setattr(ops, "MOST_TRITON_STRIDE", 1)
    assert chosen("mobileone of stride 2") == "eager"
    assert chosen("mobileone") == "moments"
    monkeypatch.setattr(ops, "TRITON", False)
    assert chosen("mobileone") == "eager"
    strided = replace(describe(x, Depthwise("mobileone of stride 2", 8).step()), device="cuda")
    assert moments.declines(strided) == "stride (2, 2) is not (1, 1), for which the identities hold"


def test_nested_batch_norms_of_an_epsilon_of_0_are_as_eagers():
    """Whose inner one may divide by a variance that rounding alone has made."""
    block, x = Depthwise("repvit", 4).double(), torch.randn(3, 4, 6, 5, dtype=torch.float64)
    block.norms[0].eps = 0.0
    with torch.no_grad():
        block.convs[0].weight[1] = 0  # a map of variance 0
    eager = copy.deepcopy(block)
    eager.backend = "eager"
    assert planner.choose(describe(x, block.step()), "moments").backend is moments
    out, want = block(x), eager(x)
    torch.testing.assert_close(out, want)


def test_not_finite_is_as_eagers():
    for value in (float("inf"), float("-inf"), float("nan")):
        for name in ("mobileone", "repvit"):
            block, x = Depthwise(name, 4), torch.randn(3, 4, 6, 5)
            x[1, 2, 3, 0] = value
            eager = copy.deepcopy(block)
            out, want = block(x), modules(eager, x)
            torch.testing.assert_close(out, want, equal_nan=True)
            for a, b in zip(block.buffers(), eager.buffers(), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("scale", [1e15, 1e18])
def test_squares_beyond_float32(scale):
    block, x = Depthwise("mobileone", 4), torch.randn(3, 4, 16, 16) * scale
    grad = torch.randn(x.shape)
    got, true = oracle.run(block, x, grad), truth(block, x, grad)
    assert rel(got["out"], true["out"]) < 1e-5
    assert rel(got["x"], true["x"]) < 1e-5
