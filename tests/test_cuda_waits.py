"""What the CUDA paths copy between host and device in a step: nothing, on fake tensors of a device.

A copy from pageable memory has the host wait, and cannot be captured in a CUDA graph. Triton's launches do nothing
here; operators of their own are called by their CUDA bodies, which a fake tensor would pass by.
"""

from __future__ import annotations

import contextlib
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from acnet_kernels._torch_compat import TorchDispatchMode
from acnet_kernels.backends import synced, synced_depthwise
from acnet_kernels.geometry import Geometry, Taps
from acnet_kernels.ops import autocorrelation, bn_sum, check, epilogue, launch
from acnet_kernels.ops._extension import TRITON
from acnet_kernels.spec import Norm
from acnet_kernels.steps import batchnorm, moments_passes, recompute, tables
from acnet_kernels.steps.packed import pack, pack_taps

SHAPE, K = (4, 16, 14, 13), 16


class Copies(TorchDispatchMode):
    """Collects the operators that take or give tensors of the CPU beside the device's, or a number of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {t.device.type for t in pytree.tree_leaves(tensors) if isinstance(t, Tensor)}
            for tensors in ((args, kwargs), out)
        )
        if {"cpu", "cuda"} <= given | made or "_local_scalar" in str(func):
            ours = [f for f in traceback.extract_stack() if "acnet_kernels" in f.filename]
            self.found.append(f"{func}: {ours[-1].filename}:{ours[-1].lineno}" if ours else str(func))
        return out


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, as far as fake tensors and this package ask for one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    told = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: told)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_maybeExchangeDevice", lambda *_: 0, raising=False)
    if TRITON:
        monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *_, **__: None)
    monkeypatch.setattr(tables, "_kept", {})
    monkeypatch.setattr(launch, "run", lambda routine, tensors, *constants: routine(tensors, *constants))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, device="cuda").to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def copies(call, again: bool = True) -> list[str]:
    """What `call` copies, the second time: the first makes tables."""
    with Copies() as seen:
        call()
    if again:
        return copies(call, again=False)
    return seen.found


class Block:
    """A block's arguments as operators take them."""

    def __init__(self, dtype: torch.dtype, kernel: int, groups: int, eps: list[float]) -> None:
        self.x, self.grad = random(*SHAPE, dtype=dtype), random(SHAPE[0], K, *SHAPE[2:], dtype=dtype)
        geometry = Geometry.make(kernel, padding=kernel // 2, groups=groups)
        sizes = ((kernel, kernel), (1, kernel), (kernel, 1))
        self.weights = [random(K, SHAPE[1] // groups, *size) for size in sizes]
        self.gammas, self.betas = ([random(K) for _ in eps] for _ in range(2))
        r = kernel // 2
        own = Taps(0, 0, kernel, kernel), Taps(r, 0, 1, kernel), Taps(0, r, kernel, 1)
        taps = pack_taps(tuple((taps, True) for taps in own), [True] * 3)
        self.eps, self.numbers = eps, (taps, pack(geometry))


EPS = [[1e-5] * 3, [1e-5, 0.0, 1e-3]]


# Of kernel, ε and dtype every pair.
@pytest.mark.parametrize(
    ("kernel", "groups", "eps", "dtype"),
    [
        (3, 1, EPS[0], torch.float32),
        (3, 1, EPS[1], torch.bfloat16),
        (5, 2, EPS[0], torch.bfloat16),
        (5, 2, EPS[1], torch.float32),
    ],
    ids=str,
)
def test_moments(dtype: torch.dtype, eps: list[float], kernel: int, groups: int) -> None:
    with FakeTensorMode():
        b = Block(dtype, kernel, groups, eps)

        def step() -> None:
            _, means, _, *kept = moments_passes.step(
                b.x, b.weights, b.gammas, b.betas, eps, *b.numbers, dtype, True
            )
            needs = True, [True] * 3, True
            moments_passes.step_backward(
                b.grad, b.x, b.weights, b.gammas, means, *kept, *b.numbers, dtype, False, *needs
            )

        assert copies(step) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_recompute(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        b = Block(dtype, 3, 1, [1e-5, 1e-4, 1e-3])

        def step() -> None:
            out, means, _, rstds = recompute.step(b.x, b.weights, b.gammas, b.betas, b.eps, *b.numbers, dtype, True)
            args = (out, b.x, b.weights, b.gammas, means, rstds, b.eps, *b.numbers, True, [True] * 3, True)
            recompute.step_backward(*args)

        assert copies(step) == []


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_batch_norm_sums(layout: torch.memory_format) -> None:
    with FakeTensorMode():
        ys = [random(*SHAPE).contiguous(memory_format=layout) for _ in range(3)]
        gammas, betas = ([random(K) for _ in ys] for _ in range(2))

        def step() -> None:
            out, means, _, rstds = bn_sum.on_cuda["bn_sum_forward"](ys, gammas, betas, [1e-5, 0.0, 1e-3], None)
            bn_sum.on_cuda["bn_sum_backward"](out, ys, means, rstds, gammas, [True, False, True])

        assert copies(step) == []


@pytest.mark.parametrize("activation", range(1, len(epilogue.ACTIVATIONS)), ids=epilogue.ACTIVATIONS.__getitem__)
def test_what_follows_a_sum(activation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "apart", lambda *_: None)  # fake tensors have no memory
    with FakeTensorMode():
        ys, residual = [random(*SHAPE) for _ in range(3)], random(*SHAPE)
        gammas, betas = ([random(K) for _ in ys] for _ in range(2))

        def step() -> None:
            args = ys, gammas, betas, [1e-5, 0.0, 1e-3], None, residual, activation
            out, means, _, rstds = epilogue._forward(*args)
            kept = out if epilogue.is_clamp(epilogue.ACTIVATIONS[activation]) else residual
            dys, of_norms = [torch.empty_like(y) for y in ys], (means, rstds, gammas, betas)
            epilogue._backward_(out, ys, *of_norms, [True] * 3, kept, activation, dys, torch.empty_like(out))

        assert copies(step) == []


@pytest.mark.parametrize("shifts", [[0, 1], [0, 2]], ids=str)
def test_second_moments(shifts: list[int]) -> None:
    with FakeTensorMode():
        x, pivot = random(*SHAPE), random(SHAPE[1])
        assert copies(lambda: autocorrelation.on_cuda(x, pivot, x, pivot, [0, 0], shifts, 1)) == []


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_depthwise_step(layout: torch.memory_format) -> None:
    from acnet_kernels.steps import triton_depthwise

    with FakeTensorMode():
        b = Block(torch.float32, 3, SHAPE[1], [1e-5] * 3)
        x, last = b.x.contiguous(memory_format=layout), layout == torch.channels_last

        def step() -> None:
            out, means, _, *kept = triton_depthwise.depthwise_step(
                x, b.weights, b.gammas, b.betas, b.eps, *b.numbers, last
            )
            args = (out, x, b.weights, b.gammas, [], means, *kept, None, *b.numbers, True, [True] * 3, True)
            triton_depthwise.depthwise_step_backward(*args)

        assert copies(step) == []


class Context(SimpleNamespace):
    """An autograd.Function's, that needs every gradient."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """Nothing."""


@pytest.fixture
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synced.dist, "get_world_size", lambda _: 2)
    for collective in ("all_gather", "all_reduce"):
        monkeypatch.setattr(synced.dist, collective, lambda *_, **__: None)


def of_node(node: type[torch.autograd.Function], *args: object) -> list[str]:
    """copies() of a node's forward and backward, which nothing differentiates."""

    def step() -> None:
        ctx = Context(needs_input_grad=(True,) * len(args))
        outputs = node.forward(ctx, *args)
        with torch.no_grad():
            node.backward.__wrapped__(ctx, *outputs)

    return copies(step)


@pytest.mark.usefixtures("_two_processes")
def test_synced() -> None:
    with FakeTensorMode():
        ys, vectors = [random(*SHAPE) for _ in range(2)], [random(K) for _ in range(4)]
        assert of_node(synced._SyncedSum, None, [1e-5, 1e-3], None, *ys, *vectors) == []


@pytest.mark.usefixtures("_two_processes")
def test_synced_depthwise() -> None:
    with FakeTensorMode():
        b = Block(torch.float32, 3, SHAPE[1], [1e-5] * 3)
        counts, constants = (SHAPE[0] * 14 * 13, 3, 3), (b.eps, *b.numbers, True)
        tensors = b.x, *b.weights, *b.gammas, *b.betas
        assert of_node(synced_depthwise._Synced, None, counts, constants, None, *tensors) == []


@pytest.mark.parametrize("momenta", [(0.1, 0.1), (0.1, 0.2), (None, None)], ids=str)
def test_running_statistics(momenta: tuple[float | None, ...]) -> None:
    with FakeTensorMode():
        means, variances = random(2, K).double(), random(2, K).double()
        norms = []
        for momentum in momenta:
            counter = torch.zeros((), dtype=torch.int64, device="cuda")
            norms.append(Norm(random(K), random(K), random(K), random(K), counter, 1e-5, momentum, True))
        assert copies(lambda: batchnorm.update_running(norms, means, variances, 100, [None, random(K)])) == []


def test_a_table_is_made_before_a_capture_which_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @tables.kept(2)
    def table(size: int, device: torch.device) -> Tensor:
        made.append(size)
        return torch.arange(size)

    def capture(whether: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: whether)

    monkeypatch.setattr(tables, "_in_graphs", [])
    there = torch.device("cuda")
    capture(True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: run one before"):
        table(3, there)
    assert made == []
    capture(False)
    with torch.inference_mode():
        first = table(3, there)
    assert not first.is_inference()
    capture(True)
    assert table(3, there) is first
    capture(False)
    for size in (4, 5, 3):  # of three the last two are kept
        table(size, there)
    assert made == [3, 4, 5, 3]
    (in_graph,) = tables._in_graphs
    assert in_graph is first
