"""What the driver gets by one call is what Triton's own launcher gives it, launch by launch and byte by byte."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
from problems import DEPTHWISE, PROBLEMS, SHAPED, Problem, Tensors
from recording import Driver, Run, assert_same, run
from torch import Tensor

from acnet_kernels.kernels import bn_sum as kernels
from acnet_kernels.ops import launch, triton_autocorrelation, triton_block, triton_bn_sum, triton_step
from acnet_kernels.ops.epilogue import ACTIVATIONS
from acnet_kernels.ops.running import NONE, Running
from acnet_kernels.ops.triton_bn_sum import Following
from acnet_kernels.steps import triton_depthwise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cpu")
NAMED = {p.name: p for p in (*PROBLEMS, *DEPTHWISE, *SHAPED)}
WIDE = Problem("wide", (2, 32, 9, 7), 48, conv={"padding": 1})  # what 16 divides, and pixels that are split
CHOSEN = [
    WIDE,
    *(
        NAMED[name]
        for name in ("several_tiles", "stride", "groups", "no_row", "alone", "depthwise", "depthwise_stride")
    ),
    NAMED["repvgg_dense"],
    NAMED["one_channel"],
]


def both(driver: Driver, routine: Any, tensors: Sequence[Tensor], *constants: Any) -> tuple[Run, Run]:
    """A routine's first run, by Triton's launcher, and its second."""
    first = run(driver, routine, tensors, *constants)
    return first, run(driver, routine, tensors, *constants)


def running(K: int, norms: int, momenta: Sequence[float | None], shifted: bool = True) -> Running:
    vectors = [[torch.rand(K) for _ in range(norms)] for _ in range(3)]
    counters = [torch.zeros((), dtype=torch.int64) for _ in range(norms)]
    return Running(*vectors[:2], counters, vectors[2] if shifted else [], momenta)


# Dtypes in turn: each pair has kernels of its own to compile, and the driver is given pointers and numbers alike.
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [*((WIDE, dtype) for dtype in DTYPES), *((p, DTYPES[i % 3]) for i, p in enumerate(CHOSEN[1:]))],
    ids=str,
)
def test_a_step(problem: Problem, dtype: torch.dtype, driver: Driver) -> None:
    t = Tensors(problem, dtype, DEVICE)
    B, window = len(t.weights), t.window.flatten()
    buffers = running(problem.K, B, [0.1, None, 1.0][:B])
    driver.use_stream(0x1234)
    forward = triton_block.forward_routine(t.x, t.weights, t.gammas, t.betas, buffers, t.eps, window)
    first, second = both(driver, *forward)
    assert len(second.launches) == 3
    assert all(one.stream == 0x1234 for one in second.launches)
    assert_same(first, second)
    _, means, _, rstds, *ys = launch.run(*forward)
    needs = [True, *(b != 1 for b in range(B))]
    args = (t.grad, t.x, t.weights, t.gammas, t.betas, means, rstds, ys, window, needs[0], needs[1:])
    for overwrite in (True, False):
        first, second = both(driver, *triton_step.backward_routine(*args, overwrite))
        assert 5 <= len(second.launches) <= 6
        assert_same(first, second)


def test_without_what_may_be_missing(driver: Driver) -> None:
    """No γ, β or running statistics; no dx; weights of which none needs a gradient."""
    t = Tensors(WIDE, torch.float16, DEVICE)
    window = t.window.flatten()
    forward = triton_block.forward_routine(t.x, t.weights, [], [], NONE, t.eps, window)
    assert_same(*both(driver, *forward))
    _, means, _, rstds, *ys = launch.run(*forward)
    for needs_x, needs_w, launches in (
        (False, [True] * 3, 5),
        (True, [False] * 3, 4),
        (False, [False, True, False], 5),
    ):
        args = (t.grad, t.x, t.weights, [], [], means, rstds, ys, window, needs_x, needs_w, False)
        first, second = both(driver, *triton_step.backward_routine(*args))
        assert launches - 1 <= len(second.launches) <= launches
        assert_same(first, second)


@pytest.mark.parametrize(("activation", "dtype"), [(a, DTYPES[i % 3]) for i, a in enumerate(ACTIVATIONS)], ids=str)
def test_what_follows_a_step(activation: str, dtype: torch.dtype, driver: Driver) -> None:
    t = Tensors(WIDE, dtype, DEVICE)
    window, residual = t.window.flatten(), torch.randn_like(t.grad)
    common = (t.x, t.weights, t.gammas, t.betas)
    forward = triton_block.forward_routine(*common, NONE, t.eps, window, residual, activation)
    assert_same(*both(driver, *forward))
    out, means, _, rstds, *ys = launch.run(*forward)
    kept = out if activation.startswith("relu") else residual
    for needs in (False, True) if activation else (False,):
        args = (t.grad, *common, means, rstds, ys, window, True, [True] * 3, False, kept, activation, needs)
        first, second = both(driver, *triton_step.backward_routine(*args))
        assert 5 <= len(second.launches) <= 6
        assert_same(first, second)
    of_sum = (ys, t.gammas, t.betas)
    assert_same(*both(driver, *triton_step.sum_routine(*of_sum, NONE, t.eps, None, residual, activation)))
    if activation:
        following = Following(activation, t.betas, kept, torch.empty_like(residual))
        args = (t.grad, ys, means, rstds, t.gammas, [True] * 3, [torch.empty_like(y) for y in ys])
        assert_same(*both(driver, *triton_step.sum_backward_routine(*args, following)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [7, 32])
def test_batch_norm_sums(K: int, dtype: torch.dtype, driver: Driver) -> None:
    ys = [torch.randn(2, K, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    gammas, betas = ([torch.randn(K) for _ in ys] for _ in range(2))
    half = torch.bfloat16 if dtype == torch.float32 else None
    for buffers, out in ((NONE, None), (running(K, 3, [0.1, 0.2, 0.3], False), half)):
        assert_same(*both(driver, *triton_step.sum_routine(ys, gammas, betas, buffers, [1e-5, 0.0, 1e-3], out)))
    _, means, _, rstds = triton_bn_sum.bn_sum_forward(ys, gammas, betas, [1e-5] * 3, None)
    for dys in ([], [ys[0], torch.empty_like(ys[2])]):
        args = (ys[1], ys, means, rstds, gammas, [True, False, True], dys)
        assert_same(*both(driver, *triton_step.sum_backward_routine(*args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_moments(dtype: torch.dtype, driver: Driver) -> None:
    x = torch.randn(2, 16, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    pivot, shifts = torch.zeros(16), ([0, 0], [0, 1])
    raster = triton_autocorrelation.raster(*shifts)
    assert_same(*both(driver, triton_autocorrelation.routine, [x, pivot, x, pivot], 2, raster, 1))


@pytest.mark.parametrize(
    ("dtype", "layout", "multiplier"),
    [(torch.bfloat16, torch.channels_last, 1), (torch.float32, torch.contiguous_format, 2)],
    ids=str,
)
def test_a_depthwise_step_by_moments(
    dtype: torch.dtype, layout: torch.memory_format, multiplier: int, driver: Driver
) -> None:
    C, taps = 16, (0, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    K, geometry = C * multiplier, (3, 3, 1, 2, 1, 1, 1, 1, C)
    x = torch.randn(2, C, 9, 8).to(dtype).contiguous(memory_format=layout)
    weights = [torch.randn(K, 1, 3, 3).to(dtype), torch.randn(K, 1, 1, 1)]
    vectors = [torch.rand(K) for _ in range(2)]
    tensors, counts = triton_depthwise._packed(x, geometry, True, weights, vectors, vectors)
    forward = (
        triton_depthwise._forward,
        tensors,
        counts,
        (1e-5, 1e-3),
        taps,
        geometry,
        layout == torch.channels_last,
        "",
    )
    first, second = both(driver, *forward)
    assert len(second.launches) == 5
    assert_same(first, second)
    out, means, _, *kept = launch.run(*forward)
    apply = [x, means, *kept[:2], *weights, *vectors, *vectors]
    assert_same(*both(driver, triton_depthwise._apply, apply, (2, 2, 2), taps, geometry, False))
    averages = torch.rand(3, K, dtype=torch.float64)
    every, some = (True, (True, True), True), (False, (False, True), False)
    for follows, average, needs, launches in (
        ("", [], (*every, False), 5),
        ("", [averages], (*some, False), 3),
        ("relu6", [], (*every, False), 5),
        ("silu", [], (*every, True), 6),
        ("silu", [], (*some, False), 4),
    ):
        tensors, counts = triton_depthwise._packed(x, geometry, False, weights, vectors, vectors, average)
        tensors += [out, means, *kept, *([out] if follows else [])]
        numbers = taps, geometry, follows
        first, second = both(driver, triton_depthwise._backward, tensors, counts, *numbers, *needs)
        assert len(second.launches) == launches
        assert_same(first, second)


def moved(t: Tensor) -> Tensor:
    """A copy of t that begins beside an address that 16 divides."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return memory.as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("which", ["x", "weight", "gamma"])
def test_a_pointer_that_16_does_not_divide_has_kernels_of_its_own(which: str, driver: Driver) -> None:
    t = Tensors(WIDE, torch.float16, DEVICE)
    tensors = {"x": t.x, "weight": t.weights[1], "gamma": t.gammas[2]}

    def routine() -> tuple[Any, ...]:
        weights = [t.weights[0], tensors["weight"], t.weights[2]]
        gammas = [*t.gammas[:2], tensors["gamma"]]
        return triton_block.forward_routine(tensors["x"], weights, gammas, t.betas, NONE, t.eps, t.window.flatten())

    _, aligned = both(driver, *routine())
    tensors[which] = moved(tensors[which])
    first, second = both(driver, *routine())
    assert_same(first, second)
    kernel = 1 if which == "gamma" else 0
    assert second.launches[kernel].function != aligned.launches[kernel].function


def test_a_tensor_given_twice_is_not_taken_for_two_others(driver: Driver) -> None:
    t = Tensors(NAMED["kernel_1"], torch.float32, DEVICE)
    once, other = t.weights[:2]
    rest = (t.gammas, t.betas, NONE, t.eps, t.window.flatten())
    for weights in ([once, once, once], [once, other, other], [other, other, once], [once, other, once.clone()]):
        assert_same(*both(driver, *triton_block.forward_routine(t.x, weights, *rest)))


def test_every_constant_counts(driver: Driver) -> None:
    """Another ε, momentum or precision of products, and what was recorded for one is not launched for the other."""
    t = Tensors(WIDE, torch.float32, DEVICE)
    window = t.window.flatten()
    found = []
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        for eps, momentum in ((1e-5, 0.1), (1e-3, 0.1), (1e-3, 0.2)):
            buffers = running(WIDE.K, 3, [momentum] * 3)
            routine = triton_block.forward_routine(t.x, t.weights, [], [], buffers, [eps] * 3, window)
            first, second = both(driver, *routine)
            assert_same(first, second)
            *_, convolution, merge, _ = second.launches  # after the weights' rounding, under TF32
            numbers = {argument.value for argument in merge.arguments if argument.size == 4}
            found.append((convolution.function, frozenset(numbers)))
    assert len(set(found)) == 6


def test_contexts_and_threads(driver: Driver) -> None:
    """A thread without a context, or in another device's, launches in the kernels' own, and is left as it was."""
    ys = [torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)]
    routine = triton_step.sum_routine(ys, [], [], NONE, [1e-5], None)
    first, _ = both(driver, *routine)
    driver.take()
    left = {}

    def launch_in(context: int) -> None:
        driver.use_context(context)
        for _ in range(50):
            assert launch.replay(*routine)
        left[context] = driver.context()

    threads = [threading.Thread(target=launch_in, args=(context,)) for context in (0, 1, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == {context: context for context in (0, 1, 7, 9)}
    launches = driver.take()
    assert len(launches) == 4 * 50 * 3
    assert {one.context for one in launches} == {1}
    assert {one.function for one in launches} == {one.function for one in first.launches}


def test_tritons_launcher_while_a_hook_is_set(driver: Driver) -> None:
    ys = [torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)]
    routine = triton_step.sum_routine(ys, [], [], NONE, [1e-5], None)
    both(driver, *routine)
    names: list[str] = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook := lambda metadata: names.append(metadata.get()["name"]))
    try:
        hooked = run(driver, *routine)
    finally:
        hooks.remove(hook)
    assert names == ["statistics", "merge_statistics", "apply"]
    assert not any(one.plain for one in hooked.launches)
    assert all(one.plain for one in run(driver, *routine).launches)


def clustered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A routine with a launch that has an attribute."""
    (y,), K = tensors, tensors[0].shape[1]
    partial = launch.empty((1, 2, K, 1), torch.float32, y.device)
    sizes = {"B": 1, "BLOCK_M": 16, "BLOCK_K": 16, "launch_pdl": True}
    launch.launch(kernels.statistics, (1, 1), (y,), partial, triton_bn_sum.pixels(y), K, 1, 64, **sizes)
    return [partial]


def unknown_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A routine that launches on memory that it neither was given nor made by `empty`."""
    (y,), K = tensors, tensors[0].shape[1]
    partial = launch.empty((1, 2, K, 1), torch.float32, y.device)
    sizes = {"B": 1, "BLOCK_M": 16, "BLOCK_K": 16}
    launch.launch(kernels.statistics, (1, 1), (y.clone(),), partial, triton_bn_sum.pixels(y), K, 1, 64, **sizes)
    return [partial]


@pytest.mark.parametrize("routine", [clustered, unknown_memory])
def test_what_is_not_understood_is_left_to_triton(routine: Any, driver: Driver) -> None:
    y = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    for again in both(driver, routine, [y]):
        assert len(again.launches) == 1
        assert not again.launches[0].plain


def test_a_launch_that_the_device_refuses_is_an_error(driver: Driver) -> None:
    y = torch.randn(2, 8, 4, 6)
    kernels_ = [1, 1, 70_000 - 5_000, 1, 1024, 227 * 1024 + 1, 0]
    torch.ops.acnet_kernels.remember(-1, [y], [y], 0, kernels_)
    with pytest.raises(RuntimeError, match="replay: CUDA error 1 in cuLaunchKernel: an error of the stand-in"):
        torch.ops.acnet_kernels.replay(-1, 0, [y])
    assert torch.ops.acnet_kernels.replay(-1, 0, [y[:1]]) == []


def test_operators_pass_the_checks_of_torch_library(driver: Driver) -> None:
    """But for torch.compile's, which knows no operator that writes and returns a list; it gets functional ones."""
    checks = ("test_schema", "test_faketensor")
    y = torch.randn(2, 8, 4, 6)
    torch.library.opcheck(torch.ops.acnet_kernels.replay.default, (-2, 0, [y]), test_utils=checks)
    remembered = (-2, [y], [y], 64, [1, 1, 1, 1, 32, 0, 0])
    torch.library.opcheck(torch.ops.acnet_kernels.remember.default, remembered, test_utils=checks)
