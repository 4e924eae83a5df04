"""Small problems are bound by launches: how many a step takes, all phases by Triton."""

import pytest
import torch
import triton
from conftest import INTERPRETED
from problems import DEPTHWISE, PROBLEMS, SMALL, Problem, Tensors
from torch import Tensor

from acnet_kernels.backends import moments
from acnet_kernels.ops import autocorrelation, triton_autocorrelation, triton_bn_sum, triton_conv


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on: by Triton's launch hook, or by the interpreter's executor."""
    names: list[str] = []
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)
    else:
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(hook := lambda metadata: names.append(metadata.get()["name"]))
        yield names
        hooks.remove(hook)
        return
    yield names


@pytest.mark.parametrize(
    ("problem", "convolutions"),
    [
        (PROBLEMS[0], ("conv_branches", "conv_dgrad", "conv_wgrad")),
        (DEPTHWISE[0], ("depthwise_branches", "depthwise_dgrad", "depthwise_wgrad")),
    ],
    ids=["grouped", "depthwise"],
)
@pytest.mark.parametrize("config", [SMALL, None], ids=["several_tiles", "table"])
def test_launches_of_a_step(
    launches: list[str], config, problem: Problem, convolutions: tuple[str, ...], device: torch.device
) -> None:
    t = Tensors(problem, torch.float32, device)
    forward, *backward = convolutions
    weights = t.by_branch()
    _, ys, norms = triton_conv.block_forward(t.x, weights, t.gammas, t.betas, t.eps, t.window)
    assert launches == [forward, "merge_statistics", "apply"]
    launches.clear()
    triton_bn_sum.bn_sum_backward_(t.grad, ys, norms.means, norms.rstds, t.gammas, [True] * 3)
    triton_conv.input_grad(ys, weights, t.window, t.x.shape[2:], config=config)
    triton_conv.weight_grads(t.x, ys, weights, t.window, config=config)
    assert launches[:5] == ["reduce_grad", "merge_grad", "apply_grad", *backward]
    assert len(launches) <= 6


def test_launches_of_second_moments(
    launches: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plane is one call, the four edge strips of all groups are another; 3 launches each at most."""
    monkeypatch.setattr(autocorrelation, "cross_correlation", _by_triton)
    x = torch.randn(2, 8, 6, 5, device=device)
    moments.moments_of(x, torch.zeros(8, device=device), 3, 2)
    assert launches == ["cross_correlation", "centred_total"] * 2
    launches.clear()
    monkeypatch.setattr(triton_autocorrelation.configs, "pixel_split", lambda M, programs, block: (2, -(-M // 2)))
    moments.moments_of(x, torch.zeros(8, device=device), 3, 2)
    assert launches == ["cross_correlation", "sum_splits", "centred_total"] * 2


def _by_triton(x: Tensor, x_pivot: Tensor, y: Tensor, *rest) -> tuple[Tensor, Tensor]:
    last = x.contiguous(memory_format=torch.channels_last)
    return triton_autocorrelation.cross_correlation(last, x_pivot, last, *rest)
