"""The moments backend: exact in float64, as good as eager in every dtype, and keeping x alone for backward."""

import copy
import itertools

import pytest
import torch
from oracle import assert_as_good_as, rel, run, scramble, truth
from steps import LEVELS, check_chain, check_levels, plain_moments, saved_by
from torch import nn

import acnet_kernels
from acnet_kernels import ACBlock
from acnet_kernels.backends import moments, planner
from acnet_kernels.ops import _extension
from acnet_kernels.steps import moments_algebra as algebra
from acnet_kernels.steps import moments_passes as passes


def half_of(*values):
    """Every second combination: any two of the values' own are together in one, where they are three or more."""
    chosen = itertools.product(*map(enumerate, values))
    return [tuple(v for _, v in own) for own in chosen if sum(i for i, _ in own) % 2 == 1]


def block_of(c=4, k=6, size=3, **options):
    return scramble(ACBlock(c, k, size, padding=size // 2, backend="moments", **options))


def as_eager(block):
    block = copy.deepcopy(block)
    block.backend = "eager"
    return block


def gradient_for(block, x):
    """A gradient that depends on the output: every term of the batch norm's backward counts."""
    with torch.no_grad():
        out = as_eager(block).float()(x.float())
    return 0.7 * out + 0.5 * torch.randn_like(out) + 0.3


def check(block, x):
    assert block.plan(x)[1].backend is moments, block.plan(x)[1].reason
    grad = gradient_for(block, x).to(x.dtype)
    assert_as_good_as(run(block, x, grad), run(as_eager(block), x, grad), truth(block, x, grad))


@pytest.fixture(params=["compiled", "by composite", "by branch", "centred"])
def gradient(request, monkeypatch):
    """The C++ operators, and plain PyTorch's: of these both ways to the gradient of x, whatever the number of
    channels, the first also as where the level rounds.
    """
    if request.param == "compiled":
        if not _extension.LOADED:
            pytest.skip(_extension.WHY_MISSING)
        yield
        return
    monkeypatch.setattr(passes, "LEAST_CHANNELS_BY_BRANCH", 1 if request.param == "by branch" else 1 << 30)
    if request.param == "centred":
        monkeypatch.setattr(passes, "_rounds_by_the_mean", lambda dtype, x: x.dtype == dtype)
    with plain_moments():
        yield


IMAGES = ((1, 1), (1, 7), (2, 2), (2, 4), (3, 1), (3, 4), (4, 2), (4, 7), (9, 1), (9, 4))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.usefixtures("gradient")
def test_exact_in_float64_on_images_smaller_and_larger_than_the_kernel(size, groups):
    block = block_of(8, 8, size, groups=groups).double()
    for h, w in IMAGES[(size // 2 + groups // 2) % 3 :: 3]:  # every image with every size, and with every groups
        check(block, torch.randn(8, 8, h, w, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"branches": ("square",)},
        {"branches": ("square", "hor")},
        {"branches": ("square", "ver")},
        {"norm": "sum"},
        {"norm": "sum", "shift": (1, -1), "groups": 2},
        {"shift": (1, 1)},
        {"shift": (-1, 1), "size": 5},
        {"use_affine": False},
    ],
)
@pytest.mark.usefixtures("gradient")
def test_exact_in_float64_for_every_kind_of_block(options):
    for h, w in ((2, 3), (2, 2), (5, 4)):
        check(block_of(**options).double(), torch.randn(6, 4, h, w, dtype=torch.float64))


def test_gradcheck():
    block = block_of(2, 2).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


PROBLEMS = [(16, 19, 3, 1, 11, 13), (8, 8, 5, 2, 9, 4), (6, 5, 3, 1, 2, 1)]  # c, k, size, groups, h, w


@pytest.mark.parametrize(
    ("dtype", "channels_last", "problem"),
    half_of((torch.float32, torch.bfloat16, torch.float16), (False, True), PROBLEMS),
)
@pytest.mark.usefixtures("gradient")
def test_as_good_as_eager(dtype, channels_last, problem):
    c, k, size, groups, h, w = problem
    layout = torch.channels_last if channels_last else torch.contiguous_format
    block = block_of(c, k - k % groups, size, groups=groups).to(dtype)
    x = torch.randn(7, c, h, w).to(dtype).contiguous(memory_format=layout)
    check(block, x)
    assert block(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("dtype", "level", "pointwise"),
    half_of((torch.float32, torch.bfloat16, torch.float16), LEVELS, (False, True)),
)
@pytest.mark.usefixtures("gradient")
def test_a_mean_far_above_the_spread_does_not_cancel(dtype, level, pointwise):
    check_levels(block_of(8, 8), dtype, *level, pointwise)


@pytest.mark.parametrize(
    ("dtype", "level", "pointwise"), half_of((torch.bfloat16, torch.float16), LEVELS, (False, True))
)
@pytest.mark.usefixtures("gradient", "native_half")
def test_nor_does_it_in_half_precision_convolutions(dtype, level, pointwise):
    check_levels(block_of(8, 8), dtype, *level, pointwise)


@pytest.mark.parametrize(
    ("dtype", "channels_last", "problem"), half_of((torch.bfloat16, torch.float16), (False, True), PROBLEMS)
)
@pytest.mark.usefixtures("gradient", "native_half")
def test_half_precision_convolutions_are_as_good_as_eagers(dtype, channels_last, problem):
    test_as_good_as_eager(dtype, channels_last, problem)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("gamma", [1e-4, 1.0])
@pytest.mark.usefixtures("gradient", "native_half")
def test_kernels_beyond_float16s_exponents(scale, gamma):
    block = block_of(16, 16)
    for bn in block.norms().values():
        nn.init.constant_(bn.weight, gamma)
        nn.init.zeros_(bn.bias)
    block, x = block.half(), (torch.randn(8, 16, 9, 7) * 3e3).half()
    with torch.no_grad():
        grad = (as_eager(block)(x).float() / gamma + 0.5 * torch.randn(8, 16, 9, 7)) * scale
    eager, true = run(as_eager(block), x, grad), truth(block, x, grad)
    assert_as_good_as(run(block, x, grad), eager, true)


def test_the_mean_cancels_exactly_where_nothing_is_padded():
    x = torch.randn(2, 3, 9, 5, dtype=torch.float64) * 1e-3 - 100  # squares lose 10 of 16 digits to the mean's
    weight = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    branches = passes._branches([weight], 1, [0, 0, 1, 1, 1, 1], 1, 1)
    _, variance, _ = passes.statistics(passes.moments_of(x, passes.pivot_of(x), 1, 1), branches)
    true = nn.functional.conv2d(x - x.mean((0, 2, 3), keepdim=True), weight).var((0, 2, 3), correction=0)
    assert rel(variance[0], true) < 1e-9


def test_a_variance_far_below_its_terms_is_exact_of_few_pixels():
    # Kernels that make (0.40, 0.43, 0.41) of three pixels as large as 600: float32 squares would keep no digit.
    pixels = torch.tensor([100.0, 640.0, -400.0], dtype=torch.float64)
    taps = torch.stack([torch.tensor([0, *pixels, 0], dtype=torch.float64)[i : i + 3] for i in range(3)])
    kernel = torch.linalg.solve(taps, torch.tensor([0.40, 0.43, 0.41], dtype=torch.float64))
    x = pixels.float().view(1, 1, 1, 3)
    branches = passes._branches([kernel.view(1, 1, 1, 3).float()], 1, [1, 0, 1, 3, 1, 1], 3, 1)
    _, variance, _ = passes.statistics(passes.moments_of(x, passes.pivot_of(x), 3, 1), branches)
    true = nn.functional.conv2d(x.double(), branches[0].weight.view(1, 1, 1, 3), padding=(0, 1)).var(correction=0)
    assert rel(variance[0, 0], true) < 1e-6


def test_taps_that_see_padding_alone_cost_no_precision():
    block = block_of(2, 2, 3, branches=("square",))
    with torch.no_grad():  # a centre far below its neighbours, and a variance far below ε
        block.square_conv.weight[..., 1, 1] *= 1e-3
    check(block, torch.randn(2, 2, 1, 1))


def test_a_branch_that_sees_padding_alone_has_no_variance_and_no_gradient():
    block = block_of(2, 2, 7, groups=2, shift=(3, 3))  # ver's column lies beyond images of one column
    x = torch.randn(3, 2, 11, 1) * 10
    found = run(block, x, torch.randn(3, 2, 11, 1))
    assert found["ver_conv.weight"].count_nonzero() == 0
    before = block.ver_bn.running_var.clone()
    block(x)
    assert torch.equal(block.ver_bn.running_var, before.lerp(torch.zeros(2), 0.1))


def test_without_the_pivot_the_mean_cancels(monkeypatch):
    monkeypatch.setattr(passes, "pivot_of", lambda x: x.new_zeros(x.shape[1]))
    with pytest.raises(AssertionError, match=r"error .* allowed"), plain_moments():
        test_a_mean_far_above_the_spread_does_not_cancel(torch.float32, (1e3, 0.1), True)


@pytest.mark.parametrize("shape", [(128, 16, 32), (128, 32, 16)])
def test_weight_gradients_in_bfloat16_are_far_better_than_eagers(shape):
    n, c, h = shape
    block, x = block_of(c, c), torch.randn(n, c, h, h).bfloat16()
    grad = torch.randn(n, c, h, h).bfloat16()

    def autocast(block, x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    got, eager = run(block, x, grad, autocast), run(as_eager(block), x, grad, autocast)
    true = truth(block, x, grad)
    for name in ("square_conv.weight", "hor_conv.weight", "ver_conv.weight"):
        assert rel(got[name], true[name]) <= 1e-4 < 1e-3 <= rel(eager[name], true[name]), name
    assert_as_good_as(got, eager, true)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", ["branch", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (0, 4, 5, 6)])
def test_running_statistics_are_updated_as_by_batch_norm(momentum, norm, shape):
    block = block_of(norm=norm, momentum=momentum)
    for conv in block.convs().values():
        conv.bias = nn.Parameter(torch.randn(6))
    eager = as_eager(block)
    for _ in range(3):
        x = torch.randn(shape)
        block(x).sum().backward()
        eager(x).sum().backward()
    for (name, ours), (_, theirs) in zip(block.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    for name, conv in block.convs().items():
        torch.testing.assert_close(conv.bias.grad, torch.zeros(6), msg=name)
        if shape[0] == 0:
            torch.testing.assert_close(conv.weight.grad, torch.zeros_like(conv.weight), msg=name)


def test_one_value_a_channel_is_refused_before_anything_changes():
    block = block_of()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 6, 1, 1\)"):
        block(torch.randn(1, 4, 1, 1))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), block.state_dict().values(), strict=True))


def test_another_dtype_than_the_weights_is_refused():
    with pytest.raises(TypeError, match=r"weights' dtype torch.float32, got torch.float64"):
        block_of()(torch.randn(2, 4, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 16, 32), (128, 32, 16)])
def test_keeps_a_quarter_of_eager_and_half_of_a_plain_layer(dtype, shape):
    n, c, h = shape
    block = block_of(c, c)
    plain = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
    x = torch.randn(n, c, h, h).to(dtype).requires_grad_()

    def kept(module):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return module(x)

        return sum(saved_by(forward, x)[1].values())

    ours = kept(block)
    assert ours <= 0.27 * kept(as_eager(block))
    assert ours <= 0.55 * kept(plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        claimed = moments.saved_bytes(block.plan(x)[0])
    assert claimed == pytest.approx(ours, rel=0.05)


def test_a_chain_with_relu_in_place_keeps_one_map_a_block():
    check_chain([block_of(8, 8) for _ in range(3)])


def test_frozen_parts_skip_their_work(monkeypatch):
    calls = []
    for name in ("cross_correlation", "_input_gradient"):
        real = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    with plain_moments():
        check_frozen(calls)


def check_frozen(calls):
    x = torch.randn(2, 4, 5, 5)
    whole = block_of()
    grad = torch.randn(2, 6, 5, 5)
    full = run(whole, x, grad)
    assert sorted(calls) == ["_input_gradient", "cross_correlation"]
    for frozen, wanted in (
        (("x",), ["cross_correlation"]),
        (("x", "conv", "bn.weight"), []),
        (("conv",), ["_input_gradient", "cross_correlation"]),
        (("x", "square_conv", "bn.weight"), ["cross_correlation"]),
    ):
        block = copy.deepcopy(whole)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen if part != "x"))
        calls.clear()
        inputs = x.clone().requires_grad_("x" not in frozen)
        block(inputs).backward(grad)
        assert sorted(calls) == wanted, frozen
        assert (inputs.grad is None) == ("x" in frozen)
        for name, parameter in block.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, full[name])


def test_two_runs_agree_to_the_bit():
    block, x = block_of(16, 16), torch.randn(8, 16, 9, 9)
    grad = torch.randn(8, 16, 9, 9)
    first, second = run(block, x, grad), run(block, x, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_differentiable_twice(norm):
    block = block_of(2, 2, norm=norm, shift=(1, -1)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: block(x), (x, *block.parameters()))


def test_the_operators_gradient_says_that_it_has_no_derivative():
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(6, 4, 3, 3)
    taps, geometry = [0, 0, 3, 3, 1, 1], [3, 3, 1, 1, 1, 1, 1, 1, 1]
    out, *_ = torch.ops.acnet_kernels.moments_step(
        x, [weight], [], [], [1e-5], taps, geometry, torch.float32, False
    )
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moments_step_backward has no derivative; acblock\(\) has one"):
        grad.sum().backward()


def test_compiles_whole_and_agrees():
    block, x = block_of(), torch.randn(3, 4, 6, 5)
    grad = torch.randn(3, 6, 6, 5)
    expected = run(block, x, grad)
    compiled = run(block, x, grad, lambda block, x: torch.compile(block, fullgraph=True)(x))
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = torch.randn(2, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, 4, 1, 3, requires_grad=True)]
    gammas, betas = ([torch.rand(6, requires_grad=True) for _ in range(2)] for _ in range(2))
    eps, taps, geometry = [1e-5, 1e-3], [0, 0, 3, 3, 1, 1, 1, 0, 1, 3, 1, 1], [3, 3, 1, 1, 1, 1, 1, 1, 1]
    step = torch.ops.acnet_kernels.moments_step.default
    torch.library.opcheck(step, (x, weights, gammas, betas, eps, taps, geometry, dtype, True))
    with torch.no_grad():
        out, means, _, *rest = step(x, weights, gammas, betas, eps, taps, geometry, dtype, True)
        lists = [weight.detach() for weight in weights], [gamma.detach() for gamma in gammas]
        for need in ((True, [True, True], True), (False, [False, True], False), (False, [False, False], False)):
            args = (torch.randn_like(out), x.detach(), *lists, means, *rest, taps, geometry, dtype, True, *need)
            torch.library.opcheck(torch.ops.acnet_kernels.moments_step_backward.default, args)


def test_scattering_is_the_transpose_of_assembling():
    """⟨assemble(R, strips, corners), T⟩ = ⟨(R, strips, corners), scatter(T)⟩ for symmetric T."""
    k, c, g, r = 5, 2, 2, 2
    plane = torch.randn(g, 2 * k - 1, 2 * k - 1, c, c, dtype=torch.float64)
    strips = torch.randn(4, g, 2 * k - 1, r, r, c, c, dtype=torch.float64)
    corners = torch.randn(2, 2, g, r * r * c, r * r * c, dtype=torch.float64)
    composite = torch.randn(g, k * k * c, k * k * c, dtype=torch.float64)
    composite = composite + composite.mT
    ours = (algebra.assemble_gram(plane, strips, corners, k) * composite).sum()
    p, s, q = algebra.scatter_composite(composite, k)
    p = p.unflatten(0, (g, c)).permute(0, 3, 4, 1, 2)  # g×d×d×c×c'
    s = s.unflatten(0, (4, g, r, c)).unflatten(4, (r, c)).permute(0, 1, 6, 2, 4, 3, 5)
    torch.testing.assert_close(ours, (plane * p).sum() + (strips * s).sum() + (corners * q).sum())


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.skipif(not _extension.LOADED, reason=f"there is one implementation alone: {_extension.WHY_MISSING}")
@pytest.mark.parametrize(
    ("dtypes", "mean", "total", "problem"),
    half_of(
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
        ],
        (0, 30),
        (False, True),
        [  # size, groups, n, c, k, h, w
            (1, 1, 3, 4, 4, 3, 2),
            (3, 1, 2, 4, 6, 7, 5),
            (3, 2, 3, 4, 4, 2, 4),
            (5, 2, 2, 6, 4, 6, 9),
            (5, 1, 3, 3, 3, 2, 1),
            (7, 2, 2, 4, 4, 3, 8),
            (3, 1, 2, 64, 64, 9, 8),  # dx by the branches' maps
            (3, 2, 2, 128, 64, 5, 4),
            (3, 1, 9, 16, 16, 33, 40),
        ],
    ),
)
def test_compiled_and_plain_steps_agree(dtypes, mean, total, problem):
    (dtype, compute), (size, groups, n, c, k, h, w) = dtypes, problem
    r, channels_last = size // 2, n == 3
    branches = [(0, 0, size, size, 1), (r, 0, 1, size, 1), (0, r, size, 1, 1)]
    branches += [(r, r, 1, 1, 0)] if c == k else []  # the identity
    branches += [(0, 0, 3, 3, size // 3 + size // 5)] if size > 3 else []  # one with gaps, off the middle for 5
    weights = [torch.randn(k, c // groups, own[2], own[3]).to(dtype) for own in branches if own[4]]
    norms = 1 if total else len(branches)
    gammas, betas = ([torch.randn(k).to(dtype) for _ in range(norms)] for _ in range(2))
    taps = [n for own in branches for n in (*own, norms == len(branches))]
    geometry = [size, size, 1, 1, r, r, 1, 1, groups]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(n, c, h, w) + mean).to(dtype).contiguous(memory_format=layout)
    args = (x, weights, gammas, betas, [1e-5] * norms, taps, geometry, compute, channels_last)
    found, expected = torch.ops.acnet_kernels.moments_step(*args), passes.step(*args)

    def check(name, ours, plain):
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype), name
        assert rel(ours, plain) <= TOLERANCES[dtype], (name, rel(ours, plain))

    names = ("out", "means", "variances", "rstds", "", "sums", "centred")
    for name, ours, plain in zip(names, found, expected, strict=True):
        if name:  # the pivot is any number near the mean
            check(name, ours, plain)
    out, means, _, *kept = found
    assert out.is_contiguous(memory_format=layout)
    grad = (torch.randn(out.shape) + 0.3 * out.float() + 0.2).to(dtype)
    for accumulates in (True, False):
        needs = True, [i != 1 for i in range(len(weights))], True
        args = (grad, x, weights, gammas, means, *kept, taps, geometry, compute, accumulates, *needs)
        ours, plain = torch.ops.acnet_kernels.moments_step_backward(*args), passes.step_backward(*args)
        assert len(ours[1]) == len(plain[1]) == sum(needs[1])
        for name, a, b in zip(
            ("dx", "dgammas", "dbeta"), (ours[0], *ours[2:]), (plain[0], *plain[2:]), strict=True
        ):
            check(name, a, b)
        for i, (a, b) in enumerate(zip(ours[1], plain[1], strict=True)):
            check(f"dws[{i}]", a, b)


@pytest.mark.skipif(not _extension.LOADED, reason=f"only the C++ operators promise it: {_extension.WHY_MISSING}")
@pytest.mark.parametrize("c", [16, 80])
def test_the_number_of_threads_changes_no_bit_of_the_moments(c):
    x, weight = torch.randn(9, c, 7, 6).to(memory_format=torch.channels_last), torch.randn(8, c, 3, 3)
    args = (x, [weight], [], [], [1e-5], [0, 0, 3, 3, 1, 1], [3, 3, 1, 1, 1, 1, 1, 1, 1], torch.float32, True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.acnet_kernels.moments_step(*args)[4:6])  # of the pivot, and of the patches
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 2}, r"stride \(2, 2\) is not \(1, 1\)"),
        ({"dilation": 2}, r"dilation \(2, 2\) is not \(1, 1\)"),
        ({"padding": 0}, r"padding \(0, 0\) is not \(1, 1\)"),
        ({"padding_mode": "circular"}, "padding_mode 'circular' is not 'zeros'"),
    ],
)
def test_declines_what_the_identities_do_not_cover(options, reason):
    block = ACBlock(4, 4, 3, backend="moments", **({"padding": 1} | options))
    with pytest.raises(AssertionError, match=reason):
        check(block, torch.randn(2, 4, 8, 8))
    block.eval()
    assert block.plan(torch.randn(2, 4, 8, 8))[1].backend.NAME == "folded"


def test_one_frozen_batch_norm_makes_it_decline():
    block = block_of()
    block.ver_bn.eval()
    assert block.plan(torch.randn(2, 4, 8, 8))[1].backend.NAME == "eager"


def test_memory_saver_takes_moments_where_that_saves_and_says_how_much():
    x = torch.empty(16, 3, 64, 64)
    block, strided = ACBlock(3, 32, 3, padding=1), ACBlock(3, 32, 3, stride=2, padding=1)
    assert block.plan(x)[1].backend.NAME in ("eager", "branches")
    with acnet_kernels.memory_saver():
        problem, plan = block.plan(x)
        assert plan.backend is moments
        saved = planner.BACKENDS["eager"].saved_bytes(problem) - moments.saved_bytes(problem)
        assert f"{saved:,} fewer than eager" in plan.reason
        assert strided.plan(x)[1].backend.NAME == "recompute"
        with torch.no_grad():
            assert "memory saver" not in block.plan(x)[1].reason  # nothing is kept, so nothing is saved
        with acnet_kernels.memory_saver(False):
            assert "memory saver" not in block.plan(x)[1].reason
        assert block.plan(x)[1].backend is moments
    assert "memory saver" not in block.plan(x)[1].reason
    assert ACBlock(3, 32, 3, padding=1, backend="memory_saver").plan(x)[1].backend is moments


def test_trains_as_eager_does():
    network = nn.Sequential(
        block_of(3, 8), nn.ReLU(), block_of(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    networks = network, copy.deepcopy(network)
    for block in (networks[1][0], networks[1][2]):
        block.backend = "eager"
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in networks]
    x, target = torch.randn(32, 3, 8, 8), torch.randint(8, (32,))
    losses = []
    for _ in range(15):
        losses.append([])
        for net, optimizer in zip(networks, optimizers, strict=True):
            loss = nn.functional.cross_entropy(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = torch.tensor(losses).T
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
    assert ours[-1] < ours[0] - 0.4
