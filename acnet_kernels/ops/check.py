"""What the operators ask of their arguments where Python sees them: shape inference, CUDA, no extension.

csrc/check.h asks the same of the C++ operators. Shape inference is asked too because the dispatcher brings it calls
that mix meta tensors with others: their outputs would be uninitialised memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_compat import OpOverload, base_of, below_autograd, schema_of

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_TAPS = 255  # of a kernel's side
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_Given = Tensor | Sequence[Tensor | None] | None


def checked(check: Callable[..., None]) -> Callable[[_Kernel], _Kernel]:
    """Decorates an operator's kernel: `check` sees the arguments first, and no None where a tensor is annotated."""

    def decorate(kernel: _Kernel) -> _Kernel:
        needed = [(i, name) for i, (name, kind) in enumerate(kernel.__annotations__.items()) if kind == "Tensor"]

        @functools.wraps(kernel)
        def run(*args: Any) -> Any:
            for i, name in needed:  # the dispatcher lets None through
                if i < len(args) and args[i] is None:
                    raise TypeError(f"{name} must be a tensor, got None")
            check(*args)
            return kernel(*args)

        return run  # type: ignore[return-value]

    return decorate


def named(given: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of all that are given, a list's as `name[i]`."""
    found: list[tuple[str, Tensor]] = []
    for name, value in given.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        elif value is not None:
            found += [(f"{name}[{i}]", t) for i, t in enumerate(value) if t is not None]
    return found


def one_device(**given: _Given) -> None:
    """ValueError unless all tensors are on one device, and have memory there."""
    tensors = named(given)
    for name, t in tensors:
        if t.device != tensors[0][1].device:
            raise ValueError(
                f"{name} must be on the device of {tensors[0][0]}, {tensors[0][1].device}, got {t.device}"
            )
        if type(t) in (Tensor, Parameter) and not t.is_meta and t.data_ptr() == 0 and t.numel() > 0:
            raise ValueError(f"{name} has no memory behind its shape {tuple(t.shape)}")


def floats(**given: _Given) -> None:
    """ValueError unless all tensors are of a float dtype that the kernels know."""
    for name, t in named(given):
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, float64, float16 or bfloat16, got {t.dtype}")


def dtype(wanted: torch.dtype, why: str, **given: _Given) -> None:
    """ValueError unless all tensors are of the wanted dtype."""
    for name, t in named(given):
        if t.dtype != wanted:
            raise ValueError(f"{name} must be {wanted}, {why}, got {t.dtype}")


def shape(wanted: Sequence[int], **given: _Given) -> None:
    """ValueError unless all tensors are of the wanted shape."""
    for name, t in named(given):
        if tuple(t.shape) != tuple(wanted):
            raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(t.shape)}")


def contiguous(**given: _Given) -> None:
    """ValueError unless all tensors are contiguous."""
    for name, t in named(given):
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def length(wanted: int, what: str, **given: Sequence[Any]) -> None:
    """ValueError unless all lists are as long as wanted."""
    for name, values in given.items():
        if len(values) != wanted:
            raise ValueError(f"{name} must have {wanted} entries, {what}, got {len(values)}")


def maps(**given: _Given) -> None:
    """ValueError unless all tensors are N×C×H×W of a float dtype, with pixels; N may be 0."""
    for name, t in named(given):
        if t.dim() != 4 or min(t.shape[1:]) < 1:
            raise ValueError(f"{name} must be N×C×H×W with C, H, W > 0, got {tuple(t.shape)}")
    floats(**given)


def kernel_size(kernel: int) -> None:
    """ValueError unless a kernel's side is odd and of a size that is computed."""
    if not (0 < kernel <= MOST_TAPS and kernel % 2):
        raise ValueError(f"kernel must be odd, from 1 to {MOST_TAPS}, got {kernel}")


def addressable(**numbers: Sequence[int]) -> None:
    """ValueError unless all numbers of a geometry are below 2³¹: nothing computed of them overflows then."""
    for name, values in numbers.items():
        if max(values) >= 2**31:
            raise ValueError(f"{name} must hold numbers below 2³¹, got {tuple(values)}")


def group_count(groups: int, **channels: int) -> None:
    """ValueError unless the groups divide every number of channels."""
    for name, count in channels.items():
        if groups < 1 or count % groups:
            raise ValueError(f"groups={groups} must divide {name}'s {count} channels")


def apart(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """ValueError where a tensor that is written shares memory with another, or with one that is read."""
    spans = [(*_extent(t), i < len(written), name) for i, (name, t) in enumerate((*written, *read)) if t.numel()]
    furthest = {True: (0, ""), False: (0, "")}  # the last byte yet of what is written, and of what is read
    for begin, end, is_written, name in sorted(spans):
        for kind in (True, False) if is_written else (True,):
            if begin < furthest[kind][0]:
                raise ValueError(f"{name} and {furthest[kind][1]} must share no memory: one of them is written")
        furthest[is_written] = max(furthest[is_written], (end, name))


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def refuse_leaves(library: torch.library.Library, operator: OpOverload) -> None:
    """Has a writing operator raise, as PyTorch's own do, for a leaf that requires a gradient, or its view."""
    schema = schema_of(operator)
    arguments = schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for name, t in named({name: args[i] for i, name in written}):
                base = base_of(t)
                if base is not None and base.requires_grad and base.is_leaf:
                    raise ValueError(
                        f"{name} is a leaf that requires a gradient, or its view, and would be changed in place: "
                        f"call {operator.name()} under torch.no_grad()"
                    )
        with below_autograd():
            return operator(*args)

    library.impl(schema.name.split("::")[1], kernel, "Autograd")
