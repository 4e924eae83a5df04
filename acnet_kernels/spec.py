"""The tensors and the problem description that the block hands to a backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from .geometry import Geometry, Pair

TORCH_FUNC = "a torch.func transform"  # grad, vmap, jvp …


class Norm(NamedTuple):
    """One batch norm's tensors and settings, as nn.BatchNorm2d holds them (K channels).

    `batch_stats` says whether this call normalises by the batch's own statistics; running statistics are
    updated in that case wherever `running_mean` is given. `momentum=None` is the cumulative average. `group` is
    the process group whose joint batch gives the statistics (nn.SyncBatchNorm), None for this process's own.
    """

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    batch_stats: bool
    group: Any = None


class Branch(NamedTuple):
    """One branch: weight (K×C/groups×rows×columns), optional convolution bias (K), its batch norm.

    `norm` is None where one batch norm follows the sum of the branches.
    """

    weight: Tensor
    bias: Tensor | None
    norm: Norm | None


TENSORS = (*Branch._fields[:2], *Norm._fields[:5])


@dataclass(frozen=True)
class Step:
    """Everything one block computes with. `norm` is the batch norm after the sum, or None."""

    geometry: Geometry
    branches: dict[str, Branch]
    norm: Norm | None

    @property
    def norms(self) -> list[Norm]:
        """The batch norms in use: the one after the sum, or one a branch."""
        if self.norm is not None:
            return [self.norm]
        return [branch.norm for branch in self.branches.values() if branch.norm is not None]

    def tensors(self) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
        """(a branch or 'the sum', its tensors in the order of TENSORS) for every branch and the norm after them."""
        for name, (weight, bias, norm) in self.branches.items():
            yield name, (weight, bias) if norm is None else (weight, bias, *norm[:5])
        if self.norm is not None:
            yield "the sum", (None, None, *self.norm[:5])

    def padded(self, x: Tensor) -> tuple[Tensor, Step]:
        """x and the step as backends take them: padded already where the padding mode is not zeros."""
        if self.geometry.padding_mode == "zeros":
            return x, self
        return self.geometry.pad_input(x), replace(self, geometry=self.geometry.explicit())


@dataclass(unsafe_hash=True)  # nothing changes one; frozen, it would take four times as long to make, every step
class Problem:
    """What the choice of a backend may depend on: shapes, dtypes and flags, no tensors.

    `dtype` is what the convolutions compute in (autocast taken into account), `input_dtype` what the input
    came in; `batch_stats` has one entry a batch norm; `grad` says whether anything needs a gradient, `synced`
    whether statistics span processes; `transform` names what is at work that has rules for PyTorch's own operators
    alone ('' for nothing); `weight_dtype` is the kernels' own, from which autocast casts them.
    """

    shape: tuple[int, int, int, int]
    out_channels: int
    geometry: Geometry
    branches: tuple[str, ...]
    norm: str
    batch_stats: tuple[bool, ...]
    dtype: torch.dtype
    input_dtype: torch.dtype
    device: str
    channels_last: bool
    grad: bool
    synced: bool = False
    transform: str = ""
    weight_dtype: torch.dtype = torch.float32

    @property
    def output_size(self) -> Pair:
        """(rows, columns) of the output."""
        return self.geometry.output_size(self.shape[2], self.shape[3])

    @property
    def input_bytes(self) -> int:
        """Bytes of the input map in the compute dtype."""
        return self.map_bytes(self.dtype)[0]

    @property
    def output_bytes(self) -> int:
        """Bytes of one output-sized map in the compute dtype."""
        return self.map_bytes(self.dtype)[1]

    def map_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the input map and of one output-sized map in this dtype."""
        (n, c, h, w), (rows, columns) = self.shape, self.output_size
        return n * c * h * w * dtype.itemsize, n * self.out_channels * rows * columns * dtype.itemsize

    @property
    def weights(self) -> int:
        """Elements of all branches' kernels."""
        k = self.geometry.kernel
        taps = sum(k * k if name == "square" else k for name in self.branches)
        return self.out_channels * self.shape[1] // self.geometry.groups * taps

    @property
    def cast_weight_bytes(self) -> int:
        """Bytes of the casts of all branches' kernels; 0 where they are of the compute dtype."""
        return 0 if self.weight_dtype == self.dtype else self.weights * self.dtype.itemsize

    def explicit(self) -> Problem:
        """The same with its input padded already where the padding mode is not zeros: what a backend is given."""
        if self.geometry.padding_mode == "zeros":
            return self
        n, c, height, width = self.shape
        rows, columns = self.geometry.padding
        shape = (n, c, height + 2 * rows, width + 2 * columns)
        return replace(self, shape=shape, geometry=self.geometry.explicit())


def problem_of(step: Step, x: Tensor) -> Problem:
    """Describes step on input x (any tensor with a shape: meta and fake ones too)."""
    device, square, norms = x.device.type, step.branches["square"].weight, step.norms
    transform = _transform(step, x)
    return Problem(
        shape=(*x.shape,),
        out_channels=square.shape[0],
        geometry=step.geometry,
        branches=tuple(step.branches),
        norm="branch" if step.norm is None else "sum",
        batch_stats=tuple([norm.batch_stats for norm in norms]),
        dtype=autocast_dtype(x.dtype, device),
        input_dtype=x.dtype,
        device=device,
        channels_last=not transform and prefers_channels_last(x, square),  # vmap knows no layouts
        grad=torch.is_grad_enabled() and (x.requires_grad or _has_gradients(step)),
        synced=any(norm.group is not None for norm in norms),
        transform=transform,
        weight_dtype=square.dtype,
    )


def _transform(step: Step, x: Tensor) -> str:
    if torch.compiler.is_compiling():  # Dynamo traces transforms in its own way, and cannot read the stack
        return ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return TORCH_FUNC
    if forward_ad._current_level >= 0 and any(
        map(has_tangent, (x, *(t for _, own in step.tensors() for t in own)))
    ):
        return "forward-mode differentiation"
    return ""


def has_tangent(t: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through t."""
    return t is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What nn.Conv2d takes a tensor of dtype for: autocast casts every float but float64."""
    if device == "meta" or not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device) if dtype.is_floating_point else dtype


def _has_gradients(step: Step) -> bool:
    convolutions = (t for branch in step.branches.values() for t in (branch.weight, branch.bias))
    norms = (t for norm in step.norms for t in (norm.gamma, norm.beta))
    return any(t is not None and t.requires_grad for t in (*convolutions, *norms))


def prefers_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether nn.Conv2d would return channels_last: its rule is that either of the two has that layout.

    Strides decide, so that a map or kernel of one channel, dense in both layouts, has the one it was converted to.
    """
    return _is_channels_last(x) or _is_channels_last(weight)


def _is_channels_last(t: Tensor) -> bool:
    # The common answers first: PyTorch's walk through the strides is one in Python.
    if t.is_contiguous():
        if t.stride(1) != 1:
            return False
    elif t.is_contiguous(memory_format=torch.channels_last):
        return True
    return suggest_memory_format(t) == torch.channels_last


def taps_of(geometry: Geometry, name: str) -> tuple[int, int, int, int, int]:
    """Adapter until a geometry has taps: (row, column, rows, columns, step) of a branch."""
    k = geometry.kernel
    return {
        "square": (0, 0, k, k, 1),
        "hor": (geometry.hor_row, 0, 1, k, 1),
        "ver": (0, geometry.ver_column, k, 1, 1),
    }[name]


class _Kernel(NamedTuple):
    kernel: Pair
    groups: int


class _Listed(NamedTuple):
    geometry: _Kernel
    branches: tuple[Any, ...]
    norm: Norm | None


def listed(step: Step) -> Any:
    """Adapter until a step's branches are a list."""
    g = step.geometry
    branches = [(taps_of(g, name), *branch) for name, branch in step.branches.items()]
    return _Listed(_Kernel((g.kernel, g.kernel), g.groups), tuple(branches), step.norm)
