"""The convolution kernels and the whole step against float64."""

import pytest
import torch
from oracle import FLOORS, assert_as_good_as, border, rel
from problems import BRANCHES, DEPTHWISE, PROBLEMS, SMALL, TF32_FLOOR, Problem, Tensors, step

from acnet_kernels.geometry import Geometry
from acnet_kernels.ops import triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import Window

BOTH_KINDS = pytest.mark.parametrize("problem", [PROBLEMS[0], DEPTHWISE[0]], ids=str)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [*PROBLEMS, *DEPTHWISE], ids=str)
def test_step_is_as_exact_as_eager(problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
    t = Tensors(problem, dtype, device)
    got, eager, true = step(t), t.eager(), t.truth()
    assert_as_good_as(got, eager, true)
    for name in got.keys() & {f"y_{b}" for b in BRANCHES}:
        assert rel(border(got[name]), border(true[name])) <= FLOORS[dtype]


@pytest.mark.parametrize("name", ["primes", "stride", "kernel_5", "groups", "no_hor"])
def test_tf32_is_taken_where_it_is_allowed_and_has_its_own_bound(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    t = Tensors(next(p for p in PROBLEMS if p.name == name), torch.float32, device)
    got, true = step(t), t.truth()
    errors = {key: rel(got[key], true[key]) for key in true}
    assert max(errors.values()) <= TF32_FLOOR, errors
    assert min(errors[f"y_{b}"] for b in t.branches) > FLOORS[torch.float32], errors


@BOTH_KINDS
def test_table_configuration_and_pixel_splits(
    problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's own tiles, pixels split three ways and several blocks of them a program: the same truth."""
    monkeypatch.setattr(triton_conv.configs, "pixel_split", lambda M, programs, block_m: (3, -(-M // 3)))
    monkeypatch.setattr(triton_conv.configs, "row_split", lambda M, K, tile: (2, -(-M // 2)))
    t = Tensors(problem, torch.float32, device)
    assert_as_good_as(step(t, config=None), t.eager(), t.truth())


@pytest.mark.parametrize("problem", [PROBLEMS[4], DEPTHWISE[2]], ids=str)
def test_64_bit_offsets_change_nothing(
    problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = Tensors(problem, torch.float32, device)
    narrow = step(t)
    plan = triton_conv._plan
    monkeypatch.setattr(triton_conv, "_plan", lambda *args: _widened(plan(*args)))
    wide = step(t)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


def _widened(plan):
    assert not plan.options["WIDE"]
    return plan._replace(options={**plan.options, "WIDE": True})


@pytest.mark.parametrize(
    ("shape", "K", "wide"),
    [((8, 64, 2048, 2047), 64, False), ((8, 64, 2048, 2048), 64, True), ((1, 1, 8192, 8192), 32, True)],
)
def test_wide_from_the_first_map_of_two_to_the_31(shape: tuple[int, ...], K: int, wide: bool) -> None:
    window = Window.of(Geometry.make(3, padding=1))
    for kind in ("conv", "dgrad", "wgrad"):
        plan = triton_conv._plan(kind, shape, K, window, True, torch.float16, "tf32", torch.device("cpu"), SMALL)
        assert plan.options["WIDE"] == wide


@BOTH_KINDS
def test_statistics_alone(problem: Problem, device: torch.device) -> None:
    """store=False leaves no maps and the statistics of the fp32 results: what the recompute variant runs."""
    t = Tensors(problem, torch.float16, device)
    maps, moments = triton_conv.conv_forward(t.x, t.by_branch(), t.window, store=False, config=SMALL)
    norms = triton_bn_sum.merge_statistics(moments, t.gammas, t.betas, t.eps)
    true = t.truth()
    assert maps == (None, None, None)
    for i, b in enumerate(t.branches):
        var = true[f"y_{b}"].var((0, 2, 3), correction=0)
        assert rel(norms.means[i], true[f"y_{b}"].mean((0, 2, 3))) < 1e-5
        assert rel(norms.rstds[i], (var + t.eps[i]).rsqrt()) < 1e-5


def test_empty_batch(device: torch.device) -> None:
    window, x = Window.of(Geometry.make(3, padding=1)), torch.empty(0, 4, 5, 5, device=device)
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
        ({"weights": lambda t: (None, *t.by_branch()[1:])}, "weights must be"),
        ({"weights": lambda t: (t.by_branch()[0], t.by_branch()[2], None)}, r"weights\[1\] must be"),
        ({"weights": lambda t: (t.by_branch()[0].double(), None, None)}, r"weights\[0\] must be"),
        ({"weights": lambda t: (t.by_branch()[0].contiguous(), *t.by_branch()[1:])}, "all be contiguous or all be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str, device: torch.device) -> None:
    t = Tensors(PROBLEMS[0], torch.float32, device)
    arguments = {"x": t.x, "weights": t.by_branch()} | {name: make(t) for name, make in change.items()}
    with pytest.raises(ValueError, match=message):
        triton_conv.conv_forward(**arguments, window=t.window)


def test_gradients_that_do_not_fit_are_named(device: torch.device) -> None:
    t = Tensors(PROBLEMS[0], torch.float32, device)
    dys = triton_conv.conv_forward(t.x, t.by_branch(), t.window, config=SMALL)[0]
    with pytest.raises(ValueError, match="dys must hold a tensor for each"):
        triton_conv.input_grad((dys[0], None, dys[2]), t.by_branch(), t.window, t.x.shape[2:])
    with pytest.raises(ValueError, match="dys must be 8×3"):
        triton_conv.input_grad(dys, t.by_branch(), t.window, (8, 3))
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        Window.of(Geometry.make(3, padding=1, padding_mode="reflect"))
