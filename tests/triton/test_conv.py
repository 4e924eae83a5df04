"""The convolution kernels and the whole step against float64."""

import collections
import itertools
import statistics
from types import SimpleNamespace

import pytest
import torch
from oracle import FLOORS, assert_as_good_as, border, rel
from problems import DEPTHWISE, PROBLEMS, SHAPED, SHAPES, SMALL, TF32_FLOOR, Problem, Tensors, acnet, step

from acnet_kernels.geometry import Taps
from acnet_kernels.kernels import rounding, taps
from acnet_kernels.ops import triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import Window

BOTH_KINDS = pytest.mark.parametrize("problem", [PROBLEMS[0], DEPTHWISE[0]], ids=str)
EVERY = [*PROBLEMS, *DEPTHWISE]
# Of SHAPED every one has strides, which kernels without take for 1: of these a few.
UNSTRIDED = ("two_dilated", "even", "repvgg")
HALVES = (torch.float16, torch.bfloat16)


def check_medians(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    """The oracle's rule for the medians of fresh draws' errors."""
    mine, eagers = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(5):
        t = Tensors(problem, dtype, device)
        got, eager, true = step(t), t.eager(), t.truth()
        for name in true:
            mine[name].append(rel(got[name], true[name]))
            eagers[name].append(rel(eager[name], true[name]))
    for name, errors in mine.items():
        assert statistics.median(errors) <= max(2 * statistics.median(eagers[name]), FLOORS[dtype]), name


# Every problem in float32, every fifth in a half type too, whose kernels differ in nothing but how they round: of
# each kind of kernel one a type at least.
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [*((p, torch.float32) for p in EVERY), *((p, HALVES[i % 2]) for i, p in enumerate(EVERY[::5]))],
    ids=str,
)
def test_step_is_as_exact_as_eager(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    t = Tensors(problem, dtype, device)
    got, eager, true = step(t), t.eager(), t.truth()
    if problem.name == "one_pixel":  # two values normalise to ±1 whatever they are: one draw's errors are chance
        check_medians(problem, dtype, device)
        return
    assert_as_good_as(got, eager, true)
    for b in range(len(t.weights)):
        assert rel(border(got[f"y{b}"]), border(true[f"y{b}"])) <= FLOORS[dtype]


@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        *((p, torch.float32) for p in SHAPED if "stride" in p.name or p.name.startswith(UNSTRIDED)),
        *((p, torch.float16) for p in SHAPED if p.name in ("mobileone_groups_stride", "even_depthwise")),
    ],
    ids=str,
)
def test_any_branches(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    """The convolutions alone: of one weight a channel a batch norm has no gradient but what rounding leaves."""
    t = Tensors(problem, dtype, device)
    ys, moments = triton_conv.conv_forward(t.x, t.weights, t.window, config=SMALL)
    dys = [torch.randn(y.shape).to(y).contiguous(memory_format=torch.channels_last) for y in ys]
    dx = triton_conv.input_grad(dys, t.weights, t.window, t.x.shape[2:], config=SMALL)
    dws = triton_conv.weight_grads(t.x, dys, t.weights, t.window, config=SMALL)
    got = (
        {"out": sum(ys), "x": dx} | {f"y{b}": y for b, y in enumerate(ys)} | {f"w{b}": w for b, w in enumerate(dws)}
    )
    eager, true = t.convolutions(dys, dtype), t.convolutions(dys, torch.float64)
    assert_as_good_as(got, eager, true)
    norms = triton_bn_sum.merge_statistics(moments, [], [], t.eps)
    for b, y in enumerate(ys):
        assert rel(border(y), border(true[f"y{b}"])) <= FLOORS[dtype]
        assert rel(norms.means[b], y.double().mean((0, 2, 3))) < 1e-5
        assert rel(norms.variances[b], y.double().var((0, 2, 3), correction=0)) < 1e-5


@pytest.mark.parametrize(
    "problem", [p for p in SHAPED if p.name in ("two_dilated_dense", "two_dilated_depthwise_stride")], ids=str
)
def test_a_branch_has_the_same_bits_alone(problem: Problem, device: torch.device) -> None:
    """Where a weight's or a map's neighbours need no gradient, the window of the others is run alone."""
    t = Tensors(problem, torch.float32, device)
    ys = triton_conv.conv_forward(t.x, t.weights, t.window, config=SMALL)[0]
    dws = triton_conv.weight_grads(t.x, ys, t.weights, t.window, config=SMALL)
    for chosen in ([1], [2, 0]):
        own, maps, window = [t.weights[b] for b in chosen], [ys[b] for b in chosen], t.window.only(chosen)
        found = triton_conv.weight_grads(t.x, maps, own, window, config=SMALL)
        assert all(torch.equal(dw, dws[b]) for dw, b in zip(found, chosen, strict=True))


@pytest.mark.parametrize("name", ["primes", "stride", "kernel_5", "groups", "no_row"])
def test_tf32_is_taken_where_it_is_allowed_and_has_its_own_bound(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    t = Tensors(next(p for p in PROBLEMS if p.name == name), torch.float32, device)
    got, true = step(t), t.truth()
    errors = {key: rel(got[key], true[key]) for key in true}
    assert max(errors.values()) <= TF32_FLOOR, errors
    assert min(errors[f"y{b}"] for b in range(len(t.weights))) > FLOORS[torch.float32], errors


def test_tf32s_weights_are_rounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to 10 bits, as maps are, these would lose three quarters of their last one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    t = Tensors(PROBLEMS[0], torch.float32, device)
    weights = [torch.full_like(w, 1 + 0.75 * 2.0**-10) for w in t.weights]
    x = torch.randint_like(t.x, 1, 5)
    ys, _ = triton_conv.conv_forward(x, weights, t.window, config=SMALL)
    dys = [torch.randint_like(y, 1, 5) for y in ys]
    dx = triton_conv.input_grad(dys, weights, t.window, x.shape[2:], config=SMALL)
    t.x, t.weights = x, weights
    true = t.convolutions(dys, torch.float64)
    assert max(rel(dx, true["x"]), *(rel(y, true[f"y{b}"]) for b, y in enumerate(ys))) < 0.3 * 2.0**-10


@pytest.mark.parametrize(("reduce_k", "last"), [(False, False), (True, False), (True, True)])
def test_rounding_to_tf32_takes_the_nearest_and_orders_them(
    reduce_k: bool, last: bool, device: torch.device
) -> None:
    branches = (Taps(0, 0, 3, 2), Taps(1, 0, 1, 2))
    window = Window(3, 2, 1, 1, 0, 0, 1, 1, 2, branches)
    layout = torch.channels_last if last else torch.contiguous_format
    groups, KG, CG = 2, 37, 5
    weights = [torch.randn(groups * KG, CG, taps.rows, taps.columns) for taps in branches]
    weights[0] *= 10.0 ** torch.randint(-40, 38, weights[0].shape)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max, 0.0, -0.0])
    # As a GPU's arithmetic makes it: all bits set, one more would be −0.
    special = torch.cat([special, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)])
    weights[1].view(-1)[: len(special)] = special
    given = [w.to(device, memory_format=layout) for w in weights]
    rounded = [torch.empty(w.numel(), device=device) for w in given]
    options = {"WINDOW": window.constant, "CHANNELS_LAST": last, "REDUCE_K": reduce_k, "BLOCK": 32}
    rounding.round_to_tf32[(groups * 2, 6, 2)](tuple(given), tuple(rounded), CG, KG, **options)
    found = []
    for w, r in zip(weights, rounded, strict=True):
        taps = w.shape[2:].numel()
        ordered = r.cpu().view(groups, CG, taps, KG).permute(0, 3, 1, 2) if reduce_k else None
        ordered = r.cpu().view(-1, taps, CG).transpose(1, 2) if ordered is None else ordered
        found.append(ordered.reshape(w.shape))
    for near, w in zip(found, weights, strict=True):
        finite = w.abs() < torch.finfo(torch.float32).max
        near, w = near[finite], w[finite]
        assert not torch.any(near.view(torch.int32) & 0x1FFF)
        last_bit = torch.ldexp(torch.ones_like(w), torch.frexp(w).exponent - 11).clamp_min(2.0**-136)
        assert torch.all((near.double() - w.double()).abs() <= last_bit.double() / 2)
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf, 0.0, -0.0, torch.nan])
    torch.testing.assert_close(found[1].reshape(-1)[: len(special)], expected, equal_nan=True)


@pytest.mark.parametrize(("C", "K", "groups"), [(24, 8, 1), (20, 12, 2), (6, 40, 1)])
def test_channels_of_every_vector(C: int, K: int, groups: int, device: torch.device) -> None:
    """In multiples of 16 bytes but not of 16, of 4 bytes, and odd: the table's tile for each."""
    problem = Problem("vectors", (1, C, 4, 3), K, conv={"padding": 1, "groups": groups})
    t = Tensors(problem, torch.float16, device)
    assert_as_good_as(step(t, config=None), t.eager(), t.truth())


@BOTH_KINDS
def test_table_configuration_and_pixel_splits(
    problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's own tiles, pixels split three ways and several blocks of them a program: the same truth."""
    monkeypatch.setattr(triton_conv.configs, "pixel_split", lambda M, *_: (3, -(-M // 3)))
    monkeypatch.setattr(triton_conv.configs, "row_split", lambda M, K, tile: (2, -(-M // 2)))
    t = Tensors(problem, torch.float32, device)
    assert_as_good_as(step(t, config=None), t.eager(), t.truth())


@pytest.mark.parametrize("problem", [PROBLEMS[4], DEPTHWISE[2]], ids=str)
def test_64_bit_offsets_change_nothing(
    problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = Tensors(problem, torch.float32, device)
    narrow = step(t)
    launch = triton_conv._prepare
    monkeypatch.setattr(triton_conv, "_prepare", lambda *args: _widened(launch(*args)))
    wide = step(t)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


def _widened(launch):
    assert not launch.options["INT64_OFFSETS"]
    return launch._replace(options={**launch.options, "INT64_OFFSETS": True})


@pytest.mark.parametrize(
    ("shape", "K", "wide"),
    [((8, 64, 2048, 2047), 64, False), ((8, 64, 2048, 2048), 64, True), ((1, 1, 8192, 8192), 32, True)],
)
def test_wide_from_the_first_map_of_two_to_the_31(shape: tuple[int, ...], K: int, wide: bool) -> None:
    window = PROBLEMS[0].window
    for kind in ("conv", "dgrad", "wgrad"):
        launch = triton_conv._prepare(
            kind, shape, K, window, True, torch.float16, "tf32", torch.device("cpu"), SMALL
        )
        assert launch.options["INT64_OFFSETS"] == wide


@BOTH_KINDS
def test_statistics_alone(problem: Problem, device: torch.device) -> None:
    """store=False leaves no maps and the statistics of the fp32 results: what the recompute variant runs."""
    t = Tensors(problem, torch.float16, device)
    maps, moments = triton_conv.conv_forward(t.x, t.weights, t.window, store=False, config=SMALL)
    norms = triton_bn_sum.merge_statistics(moments, t.gammas, t.betas, t.eps)
    true = t.truth()
    assert maps == []
    for b, eps in enumerate(t.eps):
        var = true[f"y{b}"].var((0, 2, 3), correction=0)
        assert rel(norms.means[b], true[f"y{b}"].mean((0, 2, 3))) < 1e-5
        assert rel(norms.rstds[b], (var + eps).rsqrt()) < 1e-5


def test_empty_batch(device: torch.device) -> None:
    window, x = PROBLEMS[0].window, torch.empty(0, 4, 5, 5, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(6, 4, *lines, device=device) for lines in ((3, 3), (1, 3), (3, 1))]
    ys, moments = triton_conv.conv_forward(x, weights, window)
    assert ys[0].shape == (0, 6, 5, 5)
    assert moments.total == 0
    assert triton_conv.input_grad(ys, weights, window, (5, 5)).shape == x.shape
    assert all(not dw.any() for dw in triton_conv.weight_grads(x, ys, weights, window))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t.x.contiguous()}, "x must be 4-D in channels_last"),
        ({"x": lambda t: t.x[:, :3].contiguous(memory_format=torch.channels_last)}, r"weights\[0\] of shape"),
        ({"weights": lambda t: t.weights[1:]}, "weights must hold a tensor for each branch"),
        ({"weights": lambda t: [t.weights[0], t.weights[2], t.weights[1]]}, r"weights\[1\] must be"),
        ({"weights": lambda t: [t.weights[0].double(), *t.weights[1:]]}, r"weights\[0\] must be"),
        ({"weights": lambda t: [t.weights[0].contiguous(), *t.weights[1:]]}, "all be contiguous or all be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str, device: torch.device) -> None:
    t = Tensors(PROBLEMS[0], torch.float32, device)
    arguments = {"x": t.x, "weights": t.weights} | {name: make(t) for name, make in change.items()}
    with pytest.raises(ValueError, match=message):
        triton_conv.conv_forward(**arguments, window=t.window)


def test_gradients_that_do_not_fit_are_named(device: torch.device) -> None:
    t = Tensors(PROBLEMS[0], torch.float32, device)
    dys = triton_conv.conv_forward(t.x, t.weights, t.window, config=SMALL)[0]
    with pytest.raises(ValueError, match="dys must hold a tensor for each"):
        triton_conv.input_grad(dys[:2], t.weights, t.window, t.x.shape[2:])
    with pytest.raises(ValueError, match="dys must be 8×3"):
        triton_conv.input_grad(dys, t.weights, t.window, (8, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride_h": 0}, "sizes above 0"),
        ({"pad_w": -1}, "padding from 0 on"),
        ({"kernel_w": 256}, "a kernel of 1 to 255 rows and columns"),
        ({"dil_h": 2**31}, "numbers below 2³¹"),
        ({"branches": ()}, "1 to 3 branches"),
        ({"branches": (Taps(0, 0, 1, 1),) * 4}, "1 to 3 branches"),
        *(
            ({"branches": (Taps(0, 0, 3, 3), Taps(*taps))}, "branches of taps in its kernel")
            for taps in ((-1, 0, 3, 3), (1, 0, 3, 3), (0, 3, 1, 1), (0, 0, 0, 1), (0, 0, 1, 1, 0), (0, 0, 3, 1, 2))
        ),
    ],
)
def test_windows_that_cannot_be_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton_conv.checked_size(PROBLEMS[0].window._replace(**change), (1, 3, 9, 9))


def test_window_as_numbers() -> None:
    """Operators take a window as a list of numbers, of which 1 to 3 branches can be."""
    for window in (p.window for p in (*PROBLEMS, *SHAPED)):
        assert Window.unflatten(window.flatten()) == window
    numbers = PROBLEMS[0].window.flatten()
    for wrong in ([], numbers[:9], numbers[:-1], numbers + numbers[-5:]):
        with pytest.raises(ValueError, match="window must have 9 numbers and 5 for each of 1 to 3 branches, got"):
            Window.unflatten(wrong)


def test_window_of_a_geometry() -> None:
    given = SimpleNamespace(
        kernel=(3, 5), stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=4, padding_mode="zeros"
    )
    branches = [Taps(0, 0, 3, 5), Taps(1, 0, 1, 5)]
    assert Window.of(given, branches) == Window(3, 5, 1, 2, 0, 1, 2, 1, 4, tuple(branches))
    given.padding_mode = "reflect"
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        Window.of(given, branches)


@pytest.mark.parametrize("branches", [acnet(5, (-2, 1)), *(shape[1] for shape in SHAPES.values())], ids=str)
def test_every_tap_is_one_of_its_branches_own(branches: tuple[Taps, ...]) -> None:
    """The pieces of all masks name each wanted tap once, with the branches that want it."""
    window = PROBLEMS[0].window._replace(kernel_h=9, kernel_w=8, branches=branches)
    wanted: dict[tuple[int, int], int] = {}
    for b, t in enumerate(branches):
        for i, j in itertools.product(range(t.rows), range(t.columns)):
            at = t.row + i * t.step, t.column + j * t.step
            wanted[at] = wanted.get(at, 0) | 1 << b
    found = [
        (tap, mask)
        for mask in range(1, 2 ** len(branches))
        for rows, columns in taps.pieces(window, mask)
        for tap in itertools.product(rows, columns)
    ]
    assert len(found) == len(wanted) == sum(taps.tap_count(window, mask) for mask in range(1, 2 ** len(branches)))
    assert dict(found) == wanted
