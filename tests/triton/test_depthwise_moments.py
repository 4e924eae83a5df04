"""The Triton kernels of depthwise blocks by moments against the definition in float64, by their operators.

Few and tiny shapes: the interpreter takes a second or two for each. Random ones run on a device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import operator_cases
import pytest
import torch
from oracle import FLOORS, rel
from torch import Tensor

from acnet_kernels.geometry import Geometry
from acnet_kernels.kernels import rectangles
from acnet_kernels.ops import epilogue
from acnet_kernels.ops.triton_conv import INTERPRETED
from acnet_kernels.steps import depthwise, depthwise_plain, packed, tables, triton_depthwise

LAST, FIRST = torch.channels_last, torch.contiguous_format
# Branches, as numbers: a whole kernel, one tap of it, the identity on it.
ALL, ONE, IDENTITY = [0, 0, 3, 3, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]


@dataclass(frozen=True)
class Case:
    """x of `shape` to `multiplier` times as many channels by branches of one kernel."""

    name: str
    shape: tuple[int, int, int, int]
    taps: list[int]
    geometry: dict[str, Any] = field(default_factory=dict)
    multiplier: int = 1
    layout: torch.memory_format = LAST
    dtype: torch.dtype = torch.float32
    summed: bool = False
    level: tuple[float, float] = (0.3, 1.0)
    nested: tuple[bool, ...] = ()  # which branches have a batch norm of their own, where one follows the sum
    few: bool = False  # pixels, whose sums are float64's

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("mobileone", (2, 5, 4, 6), [*ALL, *ALL, *ONE, *IDENTITY]),
    Case("NCHW", (2, 2, 5, 4), [*ALL, *ONE], layout=FIRST, dtype=torch.float16, level=(30.0, 1.0)),
    Case("stride", (2, 2, 5, 6), [*ALL, 1, 0, 1, 3, 1, 1], {"stride": 2}, 2, dtype=torch.bfloat16),
    Case("sum", (1, 3, 4, 3), [*ALL, *ONE, *IDENTITY], summed=True),
    Case("repvit", (2, 3, 4, 5), [*ALL, *ONE, *IDENTITY], nested=(True, False, False)),
    Case("nested", (2, 2, 5, 4), [*ONE, *ALL, *ALL], {"stride": 2}, 2, FIRST, nested=(True, False, True)),
    Case("one pixel", (3, 3, 1, 1), [*ALL, *ONE], few=True),
    Case("5×5", (9, 3, 1, 1), [0, 0, 5, 5, 1, 1, 0, 0, 3, 3, 2, 1], {"kernel_size": 5, "padding": 2}, few=True),
    Case("valid", (2, 3, 3, 4), [*ALL, *ONE], {"padding": 0}, level=(1e3, 0.1)),
    Case(
        "dilated", (1, 3, 5, 4), [0, 0, 2, 3, 1, 1], {"kernel_size": (2, 3), "padding": (1, 2), "dilation": (3, 2)}
    ),
    Case("line", (2, 3, 1, 7), [0, 0, 1, 4, 1, 1], {"kernel_size": (1, 4), "padding": (0, 5), "stride": (2, 3)}, 2),
]


@pytest.fixture(autouse=True)
def _several_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums of few pixels are shared by several programs, as of many."""
    caches = (rectangles.padded, rectangles.inside)
    monkeypatch.setattr(tables, "_kept", {})
    monkeypatch.setattr(rectangles, "LEAST_PIXELS", 16)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def arguments(case: Case, device: torch.device) -> list[Any]:
    """Those of depthwise_step."""
    torch.manual_seed(len(case.name))
    N, C, H, W = case.shape
    K, mean, std = C * case.multiplier, *case.level
    geometry = Geometry.make(**{"kernel_size": 3, "padding": 1, "groups": C} | case.geometry)
    x = (torch.randn(N, C, H, W) * std + mean).to(device, case.dtype).contiguous(memory_format=case.layout)
    branches = packed.unpack_taps(case.taps)
    normed = case.nested or [not case.summed] * len(branches)
    weights = [
        torch.randn(K, 1, own.rows, own.columns).to(device, case.dtype) for own, convolved in branches if convolved
    ]
    norms = sum(normed) + (case.summed or bool(case.nested))
    gammas, betas = ([torch.rand(K).to(device) + 0.5 for _ in range(norms)] for _ in range(2))
    return [
        x,
        weights,
        gammas,
        betas,
        [1e-3] * norms,
        packed.pack_taps(branches, normed),
        packed.pack(geometry),
        case.layout == LAST,
    ]


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in FLOORS else value
    return [wide(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value


def definition(name: str, args: list[Any]) -> Any:
    """An operator's results by depthwise_plain.py, of the arguments in float64."""
    return getattr(depthwise_plain, name)(*(wide(arg) for arg in args))


def backward_of(
    args: list[Any], kept: tuple[Tensor, ...], grad: Tensor, averages: Tensor | None, *needs: Any
) -> list:
    x, weights, gammas, betas, _, taps, geometry, *_ = args
    means, _, rstds, pivot, sums, centred = kept
    return [grad, x, weights, gammas, betas, means, rstds, pivot, sums, centred, averages, taps, geometry, *needs]


def assert_gradients(got: Any, want: Any, floor: float) -> None:
    """Weights' gradients on the scale of the largest: a batch norm's of one tap are what rounding leaves."""
    (dx, dws, dgammas, dbeta, *_), (true_dx, true_dws, true_dgammas, true_dbeta, *_) = got, want
    assert dx.stride() == true_dx.stride()
    assert rel(dx, true_dx) < floor
    scale = max(t.norm() for t in true_dws)
    for dw, true in zip(dws, true_dws, strict=True):
        assert dw.stride() == true.stride()
        assert (dw - true).norm() < floor * scale
    for found, true in ((dgammas, true_dgammas), (dbeta, true_dbeta)):
        assert rel(found, true) < 1e-5


FOLLOWS = {  # in each layout a clamp, a smooth activation, and what needs the residual and what does not
    "NCHW": [("relu6", True), ("hardswish", False)],
    "stride": [("", True), ("relu", False), ("silu", True)],
    "repvit": [("silu", True)],
    "nested": [("silu", True)],
}


@pytest.mark.parametrize(
    ("case", "activation", "adds"),
    [(case, *follows) for case in CASES for follows in FOLLOWS.get(case.name, ())],
    ids=str,
)
def test_what_follows(
    case: Case, activation: str, adds: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_depthwise, "FEW_PIXELS", 0)
    args, number = arguments(case, device), epilogue.ACTIVATIONS.index(activation)
    shape = depthwise_plain.step(*args)[0].shape
    residual = torch.randn(shape).to(device, case.dtype).contiguous(memory_format=case.layout) if adds else None
    args += [residual, number]
    out, *kept = depthwise.on_cuda["depthwise_step"](*args)
    true_out, *_ = definition("step", args)
    assert (out.dtype, out.stride()) == (case.dtype, true_out.stride())
    assert rel(out, true_out) < FLOORS[case.dtype]
    if not activation:
        return
    grad = torch.randn(out.shape).to(device, case.dtype).contiguous(memory_format=case.layout)
    told = out if epilogue.is_clamp(activation) else residual
    for need_x, need_residual in ((True, adds), (False, False)):
        needs = need_x, [True] * len(args[1]), True, told, number, need_residual
        backward = backward_of(args, tuple(kept), grad, None, *needs)
        got = depthwise.on_cuda["depthwise_step_backward"](*backward)
        want = definition("step_backward", backward)
        if need_residual:
            assert got[-1].stride() == grad.stride()
            assert rel(got[-1], want[-1]) < FLOORS[case.dtype]
        if not need_x:
            got, want = (grad, *got[1:]), (grad, *want[1:])
        assert_gradients(got, want, FLOORS[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not case.few:
        monkeypatch.setattr(triton_depthwise, "FEW_PIXELS", 0)
    args = arguments(case, device)
    weights = args[1]
    out, *kept = depthwise.on_cuda["depthwise_step"](*args)
    true_out, *true = definition("step", args)
    assert (out.dtype, out.stride()) == (case.dtype, true_out.stride())
    assert rel(out, true_out) < FLOORS[case.dtype]
    means, variances, rstds, _, sums, centred = kept
    for found, wanted, bound in ((means, true[0], 1e-6), (variances, true[1], 1e-6), (rstds, true[2], 1e-6)):
        assert found.dtype == torch.float64
        assert rel(found, wanted) < bound
    assert rel(sums, true[4]) < 1e-6
    assert centred.dtype == torch.float32
    assert rel(centred, true[5]) < 1e-5
    grad = (torch.randn(out.shape).to(device, case.dtype) + 0.3).contiguous(memory_format=case.layout)
    needs = True, [True] * len(weights), True
    got = depthwise.on_cuda["depthwise_step_backward"](*backward_of(args, tuple(kept), grad, None, *needs))
    assert_gradients(
        got, definition("step_backward", backward_of(args, tuple(true), grad, None, *needs)), FLOORS[case.dtype]
    )


LINE = Case(
    "by halves", (3, 2, 1, 9), [0, 0, 1, 3, 1, 1, 0, 1, 1, 1, 0, 1], {"kernel_size": (1, 3), "padding": (0, 1)}
)


def test_the_halves_of_a_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that are not x's own, no γ or β, averages of other maps, gradients of some tensors alone."""
    monkeypatch.setattr(triton_depthwise, "FEW_PIXELS", 0)
    args = arguments(LINE, device)
    x, weights, _, _, eps, *numbers, _ = args
    found = depthwise.on_cuda["depthwise_statistics"](x, weights, eps, *numbers)
    true = definition("statistics", [x, weights, eps, *numbers])
    assert all(rel(found[i], true[i]) < 1e-6 for i in (0, 1, 3, 4))
    means, rstds = true[0] + 1, (true[1] + 0.5).rsqrt()
    for channels_last in (False, True):
        given = [x, weights, [], [], means, rstds, found[2], *numbers, channels_last]
        out, want = depthwise.on_cuda["depthwise_apply"](*given), definition("apply", given)
        assert out.stride() == want.stride()
        assert rel(out, want) < 1e-6
    bare, kept = [x, weights, [], [], *args[4:]], (means, None, rstds, found[2], *found[3:])
    grad, averages = torch.randn(out.shape).to(device), torch.randn(3, 2, dtype=torch.float64).to(device)
    for average, need_x, need_weight, need_gammas in ((averages, True, True, False), (None, False, False, True)):
        backward = backward_of(bare, kept, grad, average, need_x, [need_weight], need_gammas)
        got, want = depthwise.on_cuda["depthwise_step_backward"](*backward), definition("step_backward", backward)
        assert [t.numel() for t in (got[0], got[2])] == [t.numel() for t in (want[0], want[2])]
        for found_, wanted in zip(
            (got[0], *got[1], got[2], got[3]), (want[0], *want[1], want[2], want[3]), strict=True
        ):
            assert rel(found_, wanted) < 1e-5


def test_few_pixels_and_no_epsilon(device: torch.device) -> None:
    """In float64 where float32's squares would be infinite, and a constant channel has no variance at all."""
    args = arguments(LINE, device)
    args[0] = args[0] * torch.tensor([1e25, 1.0], device=device)[:, None, None]
    args[0][:, 1] = 7.1
    args[4] = [0.0, 0.0]
    out, _, variances, rstds, *_ = depthwise.on_cuda["depthwise_step"](*args)
    true = definition("step", args)
    assert rel(variances[:, 0], true[2][:, 0]) < 1e-12
    assert variances[1, 1] == rstds[1, 1] == 0  # of the identity, which sees no padding
    assert rel(out, true[0]) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes seconds for each")
@pytest.mark.parametrize("seed", range(40))
def test_random_lists_on_the_device(seed: int, device: torch.device) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    given = operator_cases.depthwise_step(r)
    dtype = r.choice([torch.float32, torch.float16, torch.bfloat16])
    args = [
        [t.to(device, dtype if i < 2 else t.dtype) for t in own] if isinstance(own, list) and i < 4 else own
        for i, own in enumerate(given)
    ]
    args[0] = given[0].to(device, dtype)
    out, *kept = depthwise.on_cuda["depthwise_step"](*args)
    true_out, *true = definition("step", args)
    assert rel(out, true_out) < FLOORS[dtype]
    grad = torch.randn(out.shape).to(device, dtype)
    needs = True, [True] * len(args[1]), True
    got = depthwise.on_cuda["depthwise_step_backward"](*backward_of(args, tuple(kept), grad, None, *needs))
    want = definition("step_backward", backward_of(args, tuple(true), grad, None, *needs))
    assert rel(got[0], want[0]) < FLOORS[dtype]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((torch.float64, (3, 3), (1, 1)), "float64 has no kernel"),
        ((torch.float32, (7, 3), (1, 1)), "7×3 has more than 5 taps a side"),
        ((torch.float32, (3, 3), (1, 5)), "a stride of 5 is more than 4"),
    ],
)
def test_what_it_declines(change: tuple[Any, ...], why: str) -> None:
    assert why in depthwise.triton_declines(*change)
    assert depthwise.triton_declines(torch.bfloat16, (5, 5), (4, 4)) is None
