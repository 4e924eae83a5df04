"""Determinism, CUDA graphs, streams, maps of 2³¹ elements, and a training that follows eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import rel
from torch import Tensor

from acnet_kernels.geometry import Taps
from acnet_kernels.ops.autocorrelation import autocorrelation
from acnet_kernels.ops.triton_block import triton_forward, triton_input_grad, triton_weight_grads
from acnet_kernels.ops.triton_bn_sum import bn_sum_backward_
from acnet_kernels.ops.triton_conv import Window, conv_forward, input_grad, weight_grads
from acnet_kernels.steps import depthwise

DEVICE = "cuda"
WINDOW = Window(3, 3, 1, 1, 1, 1, 1, 1, 1, (Taps(0, 0, 3, 3), Taps(1, 0, 1, 3), Taps(0, 1, 3, 1)))
NUMBERS = WINDOW.flatten()
SIZES, PADDINGS = ((3, 3), (1, 3), (3, 1)), ((1, 1), (0, 1), (1, 0))
EPS = [1e-5] * 3
TRAINING = (3, 8, 64, 16)  # epochs, batches, images in each, channels


def map_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)


def weights_of(K: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [map_of(K, C, *size, dtype=dtype) / (9 * C) ** 0.5 for size in SIZES]


class TritonBlock(torch.autograd.Function):
    """A 3×3 block's training step with all phases by Triton."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, gammas, betas = (list(parameters[i : i + 3]) for i in (0, 3, 6))
        out, ys, means, _, rstds = triton_forward(x, weights, gammas, betas, EPS, NUMBERS)
        ctx.save_for_backward(x, *weights, *gammas, *ys, means, rstds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, *rest, means, rstds = ctx.saved_tensors
        weights, gammas, ys = rest[:3], rest[3:6], rest[6:]
        grad = grad.contiguous(memory_format=torch.channels_last)
        dgammas, dbeta = bn_sum_backward_(grad, ys, means, rstds, gammas, [True] * 3, ys)
        dx = triton_input_grad(ys, weights, NUMBERS, x.shape[2:])
        return dx, *triton_weight_grads(x, ys, weights, NUMBERS), *dgammas, *(dbeta.clone() for _ in range(3))


def eager_block(x: Tensor, *parameters: Tensor) -> Tensor:
    weights, gammas, betas = (parameters[i : i + 3] for i in (0, 3, 6))
    return torch.stack(
        [
            F.batch_norm(F.conv2d(x, w, None, 1, p), None, None, g, b, True, 0.0, e)
            for w, p, g, b, e in zip(weights, PADDINGS, gammas, betas, EPS, strict=True)
        ]
    ).sum(0)


def parameters_of(K: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    affine = [torch.rand(K, device=DEVICE) + 0.5 for _ in range(3)] + [
        torch.randn(K, device=DEVICE) for _ in range(3)
    ]
    return [*weights_of(K, C, dtype), *affine]


def step(x: Tensor, parameters: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    out = TritonBlock.apply(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def test_hundred_runs_give_the_same_bits() -> None:
    x, grad = (map_of(8, 48, 29, 31, dtype=torch.bfloat16) for _ in range(2))
    parameters = parameters_of(48, 48, torch.bfloat16)
    first = step(x, parameters, grad)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, step(x, parameters, grad), strict=True))


def test_hundred_runs_of_depthwise_phases_and_second_moments_give_the_same_bits() -> None:
    C = 96
    window = WINDOW._replace(groups=C)
    x, dys = map_of(8, C, 29, 31, dtype=torch.bfloat16), [map_of(8, C, 29, 31, dtype=torch.bfloat16)] * 3
    weights = weights_of(C, 1, torch.bfloat16)
    pivot = torch.zeros(C, device=DEVICE)

    def run() -> list[Tensor]:
        ys, moments = conv_forward(x, weights, window)
        dx, dws = input_grad(dys, weights, window, (29, 31)), weight_grads(x, dys, weights, window)
        products = [*autocorrelation(x, pivot, 2, 2, 1), *autocorrelation(x.float(), pivot + 0.5, 2, 2, 3)]
        return [t for t in (*ys, moments.partial, dx, *dws, *products) if t is not None]

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_hundred_runs_of_a_depthwise_step_by_moments_give_the_same_bits() -> None:
    C, numbers = 96, ([0, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1], [3, 3, 1, 1, 1, 1, 1, 1, 96])
    weights = [torch.randn(C, 1, 3, 3, device=DEVICE), torch.randn(C, 1, 1, 1, device=DEVICE)]
    vectors = [torch.rand(C, device=DEVICE) for _ in weights]
    for x in (map_of(8, C, 29, 31, dtype=torch.bfloat16), torch.randn(8, C, 29, 31, device=DEVICE)):

        def run(x: Tensor = x) -> list[Tensor]:
            step = depthwise.depthwise_step(
                x, weights, vectors, vectors, [1e-5] * 2, *numbers, x.dtype != torch.float32, None, 0
            )
            out, means, _, *kept = step
            needs = True, [True] * 2, True
            back = depthwise.depthwise_step_backward(
                out, x, weights, vectors, [], means, *kept, None, *numbers, *needs
            )
            return [*step, back[0], *back[1], *back[2:]]

        first = run()
        for _ in range(99):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_cuda_graph_replays_a_step() -> None:
    x, grad, parameters = map_of(4, 32, 14, 14), map_of(4, 32, 14, 14), parameters_of(32, 32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, parameters, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, parameters, grad)
    x.copy_(map_of(4, 32, 14, 14))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(x, parameters, grad), strict=True))


def test_two_streams_do_not_disturb_each_other() -> None:
    problems = [(map_of(8, 64, 28, 28), parameters_of(64, 64), map_of(8, 64, 28, 28)) for _ in range(2)]
    alone = [step(*problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                together.append(step(*problem))
        torch.cuda.synchronize()
        for a, b in zip(alone, together, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def huge_map(N: int, C: int, H: int, device: str = DEVICE) -> Tensor:
    """Half precision, small enough that Σx² over an image's 2²⁰ pixels, as in a weight's gradient, is finite."""
    x = torch.randn(N, C, H, H, device=device, dtype=torch.float16) / 64
    return x.contiguous(memory_format=torch.channels_last)


def test_map_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a device with 60 GiB: the maps have 2³¹ elements each")
    N, C, H = 33, 64, 1024
    weights = weights_of(C, C, torch.float16)
    x = huge_map(N, C, H)
    ys, _ = conv_forward(x, weights, WINDOW)
    for y, w, p in zip(ys, weights, PADDINGS, strict=True):
        assert rel(y[-1:], F.conv2d(x[-1:].float(), w.float(), None, 1, p)) < 2e-3
    del ys
    dys = [x] * 3  # read alone: any huge map serves
    dx = input_grad(dys, weights, WINDOW, (H, H))
    true = sum(
        F.conv_transpose2d(x[-1:].float(), w.float(), None, 1, p) for w, p in zip(weights, PADDINGS, strict=True)
    )
    assert rel(dx[-1:], true) < 2e-3
    del dx, true
    x[:-1] = 0  # the last image alone has a gradient, so that a slice of the problem tells the truth
    dws = weight_grads(x, dys, weights, WINDOW)
    small = weight_grads(x[-1:], [x[-1:]] * 3, weights, WINDOW)
    assert all(rel(a, b) < 2e-3 for a, b in zip(dws, small, strict=True))


def test_training_follows_eager() -> None:
    """Two blocks and a linear head on separable data: the same losses as eager to 1%, and they fall."""
    epochs, batches, N, C = TRAINING
    means = torch.randn(4, 3, 8, 8, device=DEVICE)
    labels = [torch.randint(4, (N,), device=DEVICE) for _ in range(batches)]
    data = [
        (means[y] + torch.randn(N, 3, 8, 8, device=DEVICE)).contiguous(memory_format=torch.channels_last)
        for y in labels
    ]
    start = [*parameters_of(C, 3), *parameters_of(C, C), torch.randn(4, C, device=DEVICE) / C**0.5]
    curves = []
    for block in (TritonBlock.apply, eager_block):
        parameters = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in start]
        optimizer, losses = torch.optim.SGD(parameters, 0.05, 0.9), []
        for _ in range(epochs):
            for x, y in zip(data, labels, strict=True):
                hidden = block(x, *parameters[:9]).relu()
                hidden = block(hidden, *parameters[9:18]).relu().mean((2, 3))
                loss = F.cross_entropy(hidden @ parameters[18].T, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert rel(curves[0], curves[1]) < 0.01
    assert curves[0][-batches:].mean() < curves[0][:batches].mean()
