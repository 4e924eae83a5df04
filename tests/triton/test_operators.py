"""The registered phases: schema, shapes without data, and no graph break."""

import pytest
import torch
from problems import PROBLEMS, Problem, Tensors

from acnet_kernels.ops import triton_block

CHOSEN = [p for p in PROBLEMS if p.name in ("stride", "no_hor")]


@pytest.mark.parametrize("problem", CHOSEN, ids=str)
def test_opcheck(problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poisoning is no part of an operator
    t = Tensors(problem, torch.float32, device)
    weights, window = list(t.by_branch()), list(t.window)
    forward = (t.x, *weights, t.gammas, t.betas, t.eps, window)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_block.triton_forward, forward, test_utils=checks)
    ys = triton_block.triton_forward(*forward)[1]
    torch.library.opcheck(triton_block.triton_input_grad, (ys, weights, window, t.x.shape[2:]), test_utils=checks)
    torch.library.opcheck(triton_block.triton_weight_grads, (t.x, ys, weights, window), test_utils=checks)


def test_branches_that_do_not_fit_are_named(device: torch.device) -> None:
    t = Tensors(CHOSEN[0], torch.float32, device)
    with pytest.raises(ValueError, match="dys must hold a tensor for each"):
        triton_block.triton_weight_grads(t.x, [t.grad], list(t.by_branch()), list(t.window))
