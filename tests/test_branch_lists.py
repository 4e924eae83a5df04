"""Lists of branches beyond ACNet's three, through every backend, against the definition in float64."""

import copy
import itertools
import random

import oracle
import pytest
import torch
from oracle import rel
from steps import saved_by
from torch import Tensor, nn

from acnet_kernels import Branch, Geometry, Norm, Taps, acblock
from acnet_kernels.backends import planner
from acnet_kernels.functional import describe, step_of
from acnet_kernels.ops.fusion import fold_steps

C = 6
WHOLE = Taps(0, 0, 3, 3)
CENTRE = Taps(1, 1, 1, 1)
ALL, ONE, IDENTITY = ("conv", WHOLE, True), ("conv", CENTRE, True), ("identity", None, True)
BARE, BARE_ONE, BARE_IDENTITY = ("conv", WHOLE, False), ("conv", CENTRE, False), ("identity", None, False)


def convs(*taps: Taps) -> list[tuple[str, Taps, bool]]:
    return [("conv", own, True) for own in taps]


# Name → (geometry's arguments, (kind, taps, whether it has a batch norm) a branch, whether one follows the sum).
SHAPES = {
    "repvgg": ({}, [ALL, ONE, IDENTITY], False),
    "repvgg of stride 2": ({"stride": 2}, [ALL, ONE], False),
    "mobileone": ({"groups": C}, [*[ALL] * 4, ONE, IDENTITY], False),
    "mobileone pointwise": ({"kernel_size": 1, "padding": 0}, [*convs(*[Taps(0, 0, 1, 1)] * 2), IDENTITY], False),
    "textnet": ({}, [ALL, *convs(Taps(1, 0, 1, 3), Taps(0, 1, 3, 1)), IDENTITY], False),
    "eight": ({}, [*[ALL] * 3, *[ONE] * 3, *[IDENTITY] * 2], False),
    "repvit": ({"groups": C}, [ALL, BARE_ONE, BARE_IDENTITY], True),
    "sum with the identity": ({}, [BARE, BARE_ONE, BARE_IDENTITY], True),
    "residual": ({}, [ALL, BARE_IDENTITY], False),
    "residual of one without": ({}, [ALL, BARE_ONE], False),
    "large": (
        {"kernel_size": 7, "padding": 3, "groups": C},
        convs(Taps(0, 0, 7, 7), Taps(1, 1, 5, 5), Taps(1, 1, 3, 3, 2)),
        False,
    ),
    "rectangular": (
        {"kernel_size": (3, 5), "padding": (1, 2)},
        [*convs(Taps(0, 0, 3, 5), Taps(1, 0, 1, 5)), IDENTITY],
        False,
    ),
    "corners": ({"padding": 2, "dilation": (1, 2)}, convs(Taps(0, 0, 2, 2), Taps(1, 1, 2, 2)), False),
    "even": ({"kernel_size": (2, 4), "padding": 1}, convs(Taps(0, 0, 2, 4), Taps(1, 2, 1, 1)), False),
    "identity alone normalised": ({}, [BARE, IDENTITY], False),
    "reflected": ({"padding_mode": "reflect"}, [ALL, ONE, IDENTITY], False),
}
BACKENDS = ("eager", "branches", "moments", "recompute")


class Block(nn.Module):
    """A block of such a list, as acblock() takes it."""

    def __init__(self, shape: str, backend: str, bias: bool = False) -> None:
        super().__init__()
        arguments, branches, total = SHAPES[shape]
        self.geometry = Geometry.make(**{"kernel_size": 3, "padding": 1} | arguments)
        self.kinds, self.backend = branches, backend
        thin = C // self.geometry.groups
        self.convs = nn.ModuleList()
        for kind, taps, _ in branches:
            module = nn.Identity()
            if kind == "conv":
                module = nn.Conv2d(thin, C, (taps.rows, taps.columns), bias=bias)
            self.convs.append(module)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) if normed else nn.Identity() for *_, normed in branches)
        self.total = nn.BatchNorm2d(C) if total else None

    def step(self):
        def norm_of(bn: nn.Module | None) -> Norm | None:
            if not isinstance(bn, nn.BatchNorm2d):
                return None
            buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
            return Norm(bn.weight, bn.bias, *buffers, bn.eps, bn.momentum, bn.training)

        branches = [
            Branch(taps, getattr(conv, "weight", None), getattr(conv, "bias", None), norm_of(norm))
            for (_, taps, _), conv, norm in zip(self.kinds, self.convs, self.norms, strict=True)
        ]
        return step_of(branches, self.geometry, norm_of(self.total))

    def forward(self, x: Tensor) -> Tensor:
        step = self.step()
        return acblock(x, step.branches, step.geometry, norm=step.norm, backend=self.backend)


def modules(block: Block, x: Tensor) -> Tensor:
    """The block's modules called one by one, by the definition of where a branch's taps are."""
    g, out = block.geometry, 0
    for (_, taps, _), conv, norm in zip(block.kinds, block.convs, block.norms, strict=True):
        y = x
        if isinstance(conv, nn.Conv2d):
            place = g.placement(taps)
            seen = place.apply(x, g.padding_mode)
            mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
            padded = torch.nn.functional.pad(seen, (place.padding[1],) * 2 + (place.padding[0],) * 2, mode)
            y = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, g.stride, 0, place.dilation, g.groups)
        out = out + norm(y)
    return out if block.total is None else block.total(out)


def truth(block: Block, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return oracle.run(
        copy.deepcopy(block).double(), x.double(), grad.double(), lambda b, t: oracle.reference_step(b.step(), t)
    )


# Every list by every backend in either dtype, the layouts in turn: of the four any three take every value together.
@pytest.mark.parametrize(
    ("shape", "backend", "layout", "dtype"),
    [
        (shape, backend, (torch.contiguous_format, torch.channels_last)[(i + j + k) % 2], dtype)
        for (i, shape), (j, backend), (k, dtype) in itertools.product(
            *map(enumerate, (SHAPES, BACKENDS, (torch.float32, torch.bfloat16)))
        )
    ],
    ids=str,
)
def test_a_training_step(shape, backend, layout, dtype):
    block = oracle.scramble(Block(shape, backend)).to(memory_format=layout).to(dtype)
    x = torch.randn(3, C, 9, 8).to(memory_format=layout).to(dtype)
    before = x.clone()
    grad = torch.randn(block(x).shape)
    got, eager = oracle.run(block, x, grad), oracle.run(copy.deepcopy(block), x, grad, modules)
    assert got["out"].stride() == eager["out"].stride()
    true = truth(block, x, grad)
    for name in [name for name in true if block.total is not None and name.startswith("norms") and "bias" in name]:
        # A β before another batch norm has no effect: what its gradient is, is rounding's.
        assert true.pop(name).abs().max() < 1e-10
        assert got.pop(name).abs().max() < 1e-4 if dtype == torch.float32 else got.pop(name) is not None
    for i, (kind, _, normed) in enumerate(block.kinds):
        if kind == "conv" and normed and block.convs[i].weight[0].numel() == 1 and block.total is None:
            weight, dgamma = block.convs[i].weight, true[f"norms.{i}.weight"]
            oracle.judge_on_its_terms(f"convs.{i}.weight", weight, dgamma, got, eager, true)
    oracle.assert_as_good_as(got, eager, true)
    assert torch.equal(x, before)
    twin = copy.deepcopy(block)
    block(x), modules(twin, x)
    for (name, a), e in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert rel(a, e) < (1e-5 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("shape", SHAPES)
def test_no_backend_declines_what_it_could_do(shape):
    alone = {"identity alone normalised"}
    same = {"rectangular", "corners", "even", "reflected", "repvgg of stride 2"}
    x = torch.randn(3, C, 9, 8)
    for backend, declined in (("branches", alone), ("recompute", alone), ("moments", same | alone)):
        problem = describe(x, Block(shape, backend).step())
        assert (backend != planner.choose(problem, backend).backend.NAME) == (shape in declined), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [name for name in SHAPES if name != "reflected"]
)  # whose padded input is kept too
def test_saved_bytes_is_what_is_saved(shape, backend):
    block = Block(shape, backend)
    x = torch.randn(3, C, 33, 31, requires_grad=True)
    problem = describe(x, block.step())
    _, kept = saved_by(block, x)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    maps = sum(size for address, size in kept.items() if address not in own and size > 8 * C * 49)
    declared = planner.choose(problem, backend).backend.saved_bytes(problem)
    assert abs(maps - declared) <= 0.1 * x.nbytes  # `moments` keeps a number a weight besides


@pytest.mark.parametrize("shape", SHAPES)
def test_eval_is_one_convolution(shape):
    block = oracle.scramble(Block(shape, "auto", bias=True)).double().eval()
    x, grad = torch.randn(3, C, 9, 8), torch.randn(3, C, *block.geometry.output_size(9, 8)).double()
    assert planner.choose(describe(x.double(), block.step())).backend.NAME == "folded"
    got, want = oracle.run(block, x.double(), grad), truth(block, x, grad)
    for name, t in want.items():
        assert (got[name] - t).norm() <= 1e-11 * max(t.norm(), 1), name
    (weight, bias), *_ = fold_steps([block.step()])
    g = block.geometry
    padded = g.pad_input(x.double())
    out = torch.nn.functional.conv2d(padded, weight, bias, g.stride, 0, g.dilation, g.groups)
    assert rel(out, want["out"]) < 1e-12


@pytest.mark.parametrize("backend", ["branches", "recompute", "moments"])
@pytest.mark.parametrize("shape", ["textnet", "mobileone", "sum with the identity"])
def test_gradients_of_every_order_and_half_of_them(shape, backend):
    block = oracle.scramble(Block(shape, backend)).double()
    x = torch.randn(2, C, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *block.parameters())  # fast: along one random direction, not every number's derivative apart
    assert torch.autograd.gradgradcheck(lambda x, *_: block(x), inputs, nondet_tol=1e-12, fast_mode=True)
    grad = torch.randn(2, C, 4, 3, dtype=torch.float64)
    (alone,) = torch.autograd.grad(block(x), x, grad)
    true = truth(block, x, grad)
    assert rel(alone, true["x"]) < 1e-10
    some = dict(list(block.named_parameters())[::2])
    for (name, _), found in zip(
        some.items(), torch.autograd.grad(block(x), list(some.values()), grad), strict=True
    ):
        assert rel(found, true[name]) < 1e-10


def random_list(r: random.Random) -> tuple[dict, list, bool]:
    """A geometry, branches and whether a batch norm follows, as in SHAPES."""
    kernel = (r.randint(1, 5), r.randint(1, 5)) if r.random() < 0.5 else (3, 3)
    arguments = {
        "kernel_size": kernel,
        "stride": r.choice([1, 1, 2]),
        "padding": (kernel[0] // 2, kernel[1] // 2) if r.random() < 0.7 else r.randint(0, 2),
        "dilation": r.choice([1, 1, 2]),
        "groups": r.choice([1, 2, C]),
        "padding_mode": r.choice(["zeros", "zeros", "reflect", "circular"]),
    }
    normed = r.choice(["all", "all", "all", "none", "some"])
    found = []
    for i in range(r.randint(1, 6)):
        step = r.choice([1, 1, 2])
        rows, columns = (r.randint(1, (k - 1) // step + 1) for k in kernel)
        row, column = (r.randint(0, k - 1 - (n - 1) * step) for k, n in zip(kernel, (rows, columns), strict=True))
        own = normed == "all" or (normed == "some" and (i == 0 or r.random() < 0.5))
        if i and r.random() < 0.3 and Geometry.make(**arguments).centre is not None:
            found.append(("identity", None, own))
        else:
            found.append(("conv", Taps(row, column, rows, columns, step), own))
    return arguments, found, normed == "none" or (normed == "some" and r.random() < 0.5)


@pytest.mark.parametrize("seed", range(40))
def test_random_lists(seed, monkeypatch):
    r = random.Random(seed)
    monkeypatch.setitem(SHAPES, "random", random_list(r))
    layout = r.choice([torch.contiguous_format, torch.channels_last])
    x = torch.randn(3, C, r.randint(9, 12), r.randint(9, 12)).double().to(memory_format=layout)
    torch.manual_seed(seed)
    block = oracle.scramble(Block("random", "eager", bias=r.random() < 0.3)).double().to(memory_format=layout)
    grad = torch.randn(block(x).shape).double()
    true = truth(block, x, grad)
    largest = max(t.norm() for t in true.values())
    for block.backend in BACKENDS:
        for training in (True, False):
            got, want = oracle.run(block.train(training), x, grad), truth(block, x, grad)
            for name, t in want.items():
                assert (got[name] - t).norm() <= 1e-9 * max(t.norm(), largest), (block.backend, name)


WHOLE_BRANCH = Branch(WHOLE, torch.ones(C, C, 3, 3))


@pytest.mark.parametrize(
    ("branches", "arguments", "words"),
    [
        ([], {}, "branches must be 1 to 8 with one weight at least, got 0 with 0"),
        ([Branch(None, None)], {}, "got 1 with 0"),
        ([WHOLE_BRANCH] * 9, {}, "got 9 with 9"),
        (
            [Branch(WHOLE, torch.ones(C, C, 3, 2))],
            {},
            r"branches\[0\].weight must be \(6, 6, 3, 3\), got \(6, 6, 3, 2\)",
        ),
        ([Branch(Taps(1, 1, 3, 3), torch.ones(C, C, 3, 3))], {}, r"branches\[0\].taps must lie inside the 3×3"),
        ([Branch(None, torch.ones(C, C, 3, 3))], {}, r"branches\[0\].taps must say which taps"),
        ([WHOLE_BRANCH, Branch(None, None)], {"stride": 2}, r"branches\[1\], the identity, needs"),
        ([WHOLE_BRANCH, Branch(WHOLE, None)], {}, r"branches\[1\], the identity, needs"),
        ([Branch(WHOLE, torch.ones(2, C, 3, 3)), Branch(None, None)], {}, r"got 6 in, 2 out"),
    ],
)
def test_lists_that_are_no_blocks(branches, arguments, words):
    geometry = Geometry.make(**{"kernel_size": 3, "padding": 1} | arguments)
    with pytest.raises(ValueError, match=words):
        acblock(torch.randn(2, C, 5, 5), branches, geometry)
