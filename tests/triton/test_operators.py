"""The registered phases: schema, shapes without data, and no graph break."""

import pytest
import torch
from oracle import rel
from problems import PROBLEMS, Problem, Tensors

from acnet_kernels.ops import triton_block

CHOSEN = [p for p in PROBLEMS if p.name in ("stride", "no_row")]


@pytest.mark.parametrize("problem", CHOSEN, ids=str)
def test_opcheck(problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poisoning is no part of an operator
    t = Tensors(problem, torch.float32, device)
    weights, window = t.weights, t.window.flatten()
    forward = (t.x, weights, t.gammas, t.betas, t.eps, window)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_block.triton_forward, forward, test_utils=checks)
    ys = triton_block.triton_forward(*forward)[1]
    torch.library.opcheck(triton_block.triton_input_grad, (ys, weights, window, t.x.shape[2:]), test_utils=checks)
    torch.library.opcheck(triton_block.triton_weight_grads, (t.x, ys, weights, window), test_utils=checks)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_of_what_needs_one(frozen: tuple[int, ...], device: torch.device) -> None:
    """The operator's own gradient, the frozen branches' weights apart."""
    t = Tensors(CHOSEN[0], torch.float32, device)
    weights = [w.clone().requires_grad_(b not in frozen) for b, w in enumerate(t.weights)]
    gammas, betas = ([p.clone().requires_grad_() for p in own] for own in (t.gammas, t.betas))
    x = t.x.clone().requires_grad_()
    out = triton_block.triton_forward(x, weights, gammas, betas, t.eps, t.window.flatten())[0]
    out.backward(t.grad)
    true = t.truth()
    assert rel(x.grad, true["x"]) < 1e-5
    for b, (w, gamma, beta) in enumerate(zip(weights, gammas, betas, strict=True)):
        assert w.grad is None if b in frozen else rel(w.grad, true[f"w{b}"]) < 1e-5
        assert rel(gamma.grad, true[f"gamma{b}"]) < 1e-5
        assert rel(beta.grad, true[f"beta{b}"]) < 1e-5


def test_arguments_that_do_not_fit_are_named(device: torch.device) -> None:
    t = Tensors(CHOSEN[0], torch.float32, device)
    numbers = t.window.flatten()
    with pytest.raises(ValueError, match="dys must have 3 entries, one for each of the weights"):
        triton_block.triton_weight_grads(t.x, [t.grad], t.weights, numbers)
    with pytest.raises(ValueError, match="weights must have 3 entries, one a branch of the window"):
        triton_block.triton_input_grad([t.grad], t.weights[:1], numbers, t.x.shape[2:])
    with pytest.raises(ValueError, match="window must have 9 numbers and 5 for each of 1 to 3 branches"):
        triton_block.triton_forward(t.x, t.weights, [], [], t.eps, numbers[:-1])
