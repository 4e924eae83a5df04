"""The recompute backend with its statistics by the Triton pass that stores no map."""

import pytest
import torch
from oracle import FLOORS, border, rel
from problems import DEPTHWISE, PROBLEMS, Problem, Tensors

from acnet_kernels.geometry import Geometry
from acnet_kernels.steps import recompute as ops
from acnet_kernels.steps.packed import pack, pack_taps

CHOSEN = [p for p in (*PROBLEMS, *DEPTHWISE) if p.name in ("stride", "crop_5", "no_row", "depthwise_shift")]


def packed(problem: Problem) -> tuple[list[int], list[int]]:
    """The problem's taps and geometry as recompute's operators take them."""
    branches = tuple((taps, True) for taps in problem.branches)
    taps = pack_taps(branches, [True] * len(branches))
    return taps, pack(Geometry.make(problem.kernel, **problem.conv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", CHOSEN, ids=str)
def test_step(problem: Problem, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ops, "_has_triton", lambda x: asked.append(x) or True)
    t = Tensors(problem, dtype, device)
    constants = (t.eps, *packed(t.problem))
    out, means, variances, rstds = ops.recompute_step(t.x, t.weights, t.gammas, t.betas, *constants, dtype, True)
    assert asked
    true, eager = t.truth(), t.eager()
    for part in (lambda v: v, border):
        allowed = max(2 * rel(part(eager["out"]), part(true["out"])), FLOORS[dtype])
        assert rel(part(out), part(true["out"])) <= allowed
    for b, eps in enumerate(t.eps):
        var = true[f"y{b}"].var((0, 2, 3), correction=0)
        assert rel(means[b], true[f"y{b}"].mean((0, 2, 3))) < 1e-5
        assert rel(variances[b], var) < 1e-5
        assert rel(rstds[b], (var + eps).rsqrt()) < 1e-5


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_what_the_forwards_statistics_round_does_not_reach_the_gradient(
    layout: torch.memory_format, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's products are not the library's, TF32 above all; the mean's difference times Σg must not be in dγ."""
    monkeypatch.setattr(ops, "_has_triton", lambda x: True)
    t = Tensors(CHOSEN[0], torch.float32, device)
    constants = (t.eps, *packed(t.problem))
    x, weights = t.x.contiguous(memory_format=layout), t.weights
    out, means, _, rstds = ops.recompute_step(x, weights, t.gammas, t.betas, *constants, torch.float32, True)
    grad, needs = torch.rand_like(out) + 1, (True, [True] * len(weights), True)
    found = [
        ops.recompute_step_backward(grad, x, weights, t.gammas, m, r, *constants, *needs)
        for m, r in ((means, rstds), (means + 1e-2, rstds * 1.01))
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
