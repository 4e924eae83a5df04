"""What follows a block's sum by PyTorch, for whatever computes the sum: the residual added, then the activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.epilogue import ACTIVATIONS, activate
from ..spec import Epilogue

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def check_activation(activation: Any) -> str:
    """An `activation` argument, None or a name, as Epilogue has it.

    Raises:
        TypeError: it is neither.
        ValueError: no activation has that name.
    """
    if activation is None:
        return ""
    if not isinstance(activation, str):
        raise TypeError(f"activation must be None or a name, got {type(activation).__name__}")
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS[1:]}, got {activation!r}")
    return activation


def check_residual(residual: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """TypeError or ValueError unless the residual is a map like the sum."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor, got {type(residual).__name__}")
    for name, got, wanted in (
        ("shape", tuple(residual.shape), tuple(shape)),
        ("dtype", residual.dtype, dtype),
        ("device", residual.device, device),
    ):
        if got != wanted:
            raise ValueError(f"residual must have the output's {name}, {wanted}, got {got}")


def finish(out: Tensor, epilogue: Epilogue) -> Tensor:
    """act(out + residual); differentiable."""
    if epilogue.residual is not None:
        out = out + epilogue.residual
    return activate(out, epilogue.activation)
