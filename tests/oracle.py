"""What the tests compare with: the reference in float64, and the rule of how far from it a path may be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from acnet_kernels import ACBlock, reference
from acnet_kernels.spec import Norm, Step

# Relative error ‖a−b‖/‖b‖ a tensor may always have, by dtype; beyond it, twice eager's own error.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def scramble(module: nn.Module) -> nn.Module:
    """Random γ, β and running statistics, so that no term of the fold vanishes."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            if bn.running_mean is not None and bn.running_var is not None:
                nn.init.uniform_(bn.running_mean, -1, 1)
                nn.init.uniform_(bn.running_var, 0.3, 2)
            if bn.affine:
                nn.init.uniform_(bn.weight, 0.3, 1.5)
                nn.init.normal_(bn.bias)
    return module


def rel(a: Tensor, b: Tensor) -> float:
    """‖a−b‖/‖b‖."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def border(t: Tensor, width: int = 1) -> Tensor:
    """The pixels within width of the edge of an N×K×H×W map, flattened."""
    mask = torch.ones(t.shape[2:], dtype=torch.bool)
    if min(t.shape[2:]) > 2 * width:
        mask[width:-width, width:-width] = False
    return t[:, :, mask]


def reference_block(block: ACBlock, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The block's output by acnet_kernels.reference on the block's own tensors, in x's dtype."""
    return reference_step(block.step(), x, residual, getattr(block, "activation", None))


def reference_step(step: Step, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """A step's output by acnet_kernels.reference, in x's dtype."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    def norm_of(norm: Norm | None) -> reference.Norm | None:
        if norm is None:
            return None
        stats = None if norm.batch_stats else (cast(norm.running_mean), cast(norm.running_var))
        return reference.Norm(cast(norm.gamma), cast(norm.beta), norm.eps, stats)

    g = step.geometry
    branches = [
        reference.Branch(cast(b.weight), b.taps.row, b.taps.column, b.taps.step, cast(b.bias), norm_of(b.norm))
        for b in step.branches
    ]
    out, _ = reference.rep_block(
        x,
        branches,
        g.kernel,
        norm=norm_of(step.norm),
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        padding_mode=g.padding_mode,
        residual=residual,
        activation=activation,
    )
    return out


def run(block: nn.Module, x: Tensor, grad: Tensor, forward=None) -> dict[str, Tensor]:
    """Output and every gradient of one step: {'out', 'x', parameter names…}."""
    block = copy.deepcopy(block)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(block, x) if forward else block(x)
    out.backward(grad.to(out.dtype))
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    # Gradients that share memory are right once, and wrong as soon as a second backward accumulates into them.
    assert len({t.data_ptr() for t in found.values()}) == len(found), "two parameters share a gradient's memory"
    return {"out": out.detach(), "x": x.grad, **found}


def truth(block: ACBlock, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """run() of the reference in float64."""
    return run(copy.deepcopy(block).double(), x.double(), grad.double(), reference_block)


def judge_on_its_terms(
    name: str,
    weight: Tensor,
    dgamma: Tensor,
    got: dict[str, Tensor],
    eager: dict[str, Tensor],
    true: dict[str, Tensor],
) -> None:
    """Takes a gradient that vanishes out of all three, once it is as good as eager's on the scale of its terms.

    A batch norm of W·x, W one number a channel, does not depend on W but for ε: the terms of W's gradient, each of
    the size of dγ/W, cancel, and what is left of their rounding is chance.
    """
    judge_on((dgamma / weight.flatten()).double().norm(), name, got, eager, true)


def judge_on(
    scale: Tensor, name: str, got: dict[str, Tensor], eager: dict[str, Tensor], true: dict[str, Tensor]
) -> None:
    """Takes a tensor out of all three, once its error is eager's twice, or the floor on this scale."""
    t = true.pop(name)
    error, its = ((found.pop(name).double() - t).norm() for found in (got, eager))
    floor = FLOORS[got["out"].dtype]
    assert error <= max(2 * its, floor * scale), (
        f"{name}: error {error:.2e}, eager's {its:.2e}, on a scale of {scale:.2e}"
    )


def assert_as_good_as(got: dict[str, Tensor], eager: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Every tensor of got is within max(2 × eager's error, the floor) of true; maps on their border too."""
    assert got.keys() == true.keys()
    for name, t in true.items():
        floor = FLOORS[got["out"].dtype]
        parts = [(name, lambda v: v)]
        if t.dim() == 4 and name in ("out", "x"):
            parts.append((f"{name} (border)", border))
        for label, part in parts:
            error = rel(part(got[name]), part(t))
            allowed = max(2 * rel(part(eager[name]), part(t)), floor)
            assert error <= allowed, f"{label}: error {error:.2e}, allowed {allowed:.2e}"
