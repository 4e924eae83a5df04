"""The phases of a `branches` step by Triton's operators: what they want of layouts is seen to here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.window import Window
from ..ops import triton_block, triton_step
from ..ops.running import Running
from ..spec import Epilogue

Numbers = Sequence[int]  # what Window.flatten gives


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: Sequence[float],
    window: Numbers,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """(out, ys, means, variances, rstds), in x's dtype; differentiable."""
    return triton_block.triton_forward(last(x), alike(weights), gammas, betas, list(eps), window)


def step(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: Sequence[float],
    window: Numbers,
    epilogue: Epilogue,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """forward() and what follows it, not differentiable, which moves running statistics too."""
    given = (last(x), alike(weights), gammas, betas, running, eps, window)
    return triton_step.forward(*given, *_following(epilogue))


def bn_sum(
    ys: Sequence[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: Sequence[float],
    dtype: torch.dtype | None,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, means, variances, rstds) of maps that `triton_takes`, not differentiable; running statistics move."""
    return triton_step.bn_sum(ys, gammas, betas, running, eps, dtype, *_following(epilogue))


def _following(epilogue: Epilogue) -> tuple[Tensor | None, str]:
    """(residual, activation) of what follows."""
    return None if epilogue.residual is None else last(epilogue.residual), epilogue.activation


def input_grad(dys: Sequence[Tensor], weights: Sequence[Tensor], window: Numbers, size: Sequence[int]) -> Tensor:
    """dx (rows × columns: size) from every branch's dy."""
    return triton_block.triton_input_grad([last(dy) for dy in dys], alike(weights), window, list(size))


def weight_grads(
    x: Tensor, dys: Sequence[Tensor | None], weights: Sequence[Tensor], window: Numbers, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dW_b of each branch that needs one, and has a dy, None of the others."""
    wanted = [b for b, need in enumerate(needs) if need]
    given = [last(dy) for dy, need in zip(dys, needs, strict=True) if need and dy is not None]
    chosen = Window.unflatten(window).only(wanted).flatten()
    found = triton_block.triton_weight_grads(last(x), given, alike([weights[b] for b in wanted]), chosen)
    results = iter(found)
    return [next(results) if need else None for need in needs]


def last(t: Tensor) -> Tensor:
    """t in channels_last."""
    return t.contiguous(memory_format=torch.channels_last)


def alike(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights in one memory format: their own if that is one, else channels_last."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if all(weight.is_contiguous(memory_format=layout) for weight in weights):
            return list(weights)
    return [last(weight) for weight in weights]
