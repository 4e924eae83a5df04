"""The tensors and the problem description that the block hands to a backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._torch_compat import in_forward_mode, suggest_memory_format, transform_stack
from .geometry import Geometry, Pair, Taps

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
    """One branch: its taps of the kernel, its own kernel, optional convolution bias (K), and its batch norm.

    `weight` (K×C/groups×rows×columns) is None for the identity, whose map is x: it sits on the centre tap, which
    `taps` may leave out. `norm` is None where the branch adds directly.
    """

    taps: Taps | None
    weight: Tensor | None
    bias: Tensor | None = None
    norm: Norm | None = None
    name: str = ""  # for messages


class Epilogue(NamedTuple):
    """What follows the sum of a step: `residual`, a map like the sum, is added, then the activation is applied.

    `activation` is a name in ops/epilogue.py's ACTIVATIONS, '' for none.
    """

    activation: str = ""
    residual: Tensor | None = None

    # No property: Dynamo of torch 2.10 knows none of a named tuple's.
    def is_nothing(self) -> bool:
        """Whether the sum is the output."""
        return not self.activation and self.residual is None


NOTHING = Epilogue()
TENSORS = (*Branch._fields[1:3], *Norm._fields[:5])


@dataclass(frozen=True)
class Step:
    """Everything one block computes with. `norm` is the batch norm after the sum, or None.

    Every branch has its taps, and one at least a weight: `functional.step_of` sees to it.
    """

    geometry: Geometry
    branches: tuple[Branch, ...]
    norm: Norm | None

    @property
    def norms(self) -> list[Norm]:
        """The batch norms in use, the branches' first."""
        own = [branch.norm for branch in self.branches if branch.norm is not None]
        return own if self.norm is None else [*own, self.norm]

    @property
    def kernel(self) -> Tensor:
        """The first weight: the one whose dtype, layout and channels stand for the step's."""
        for branch in self.branches:
            if branch.weight is not None:
                return branch.weight
        raise AssertionError("a step has a weight")

    def tensors(self) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
        """(whose they are, the tensors in the order of TENSORS) for every branch and the norm after them."""
        for i, (_, weight, bias, norm, name) in enumerate(self.branches):
            yield name or f"branch {i}", (weight, bias) if norm is None else (weight, bias, *norm[:5])
        if self.norm is not None:
            yield "the sum", (None, None, *self.norm[:5])

    def padded(self, x: Tensor) -> tuple[Tensor, Step]:
        """x and the step as backends take them: padded already where the padding mode is not zeros."""
        if self.geometry.padding_mode == "zeros":
            return x, self
        return self.geometry.pad_input(x), replace(self, geometry=self.geometry.explicit())


BRANCH, SUM, MIXED = "branch", "sum", "mixed"  # which batch norms there are: see Problem.norm


@dataclass(unsafe_hash=True)  # nothing changes one; frozen, it would take four times as long to make, every step
class Problem:
    """What the choice of a backend may depend on: shapes, dtypes and flags, no tensors.

    `dtype` is what the convolutions compute in (autocast taken into account), `input_dtype` what the input has;
    `convolved` says of each branch whether it is a convolution, or the identity, `normed` whether it has a batch
    norm, and `total` whether one follows the sum; `batch_stats` has one entry a batch norm; `grad` says whether
    anything needs a gradient, `synced` whether statistics span processes; `transform` names what is at work that
    has rules for PyTorch's own operators alone ('' for nothing); `weight_dtype` is the kernels' own, from which
    autocast casts them.
    """

    shape: tuple[int, int, int, int]
    out_channels: int
    geometry: Geometry
    branches: tuple[Taps, ...]
    convolved: tuple[bool, ...]
    normed: tuple[bool, ...]
    total: bool
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
    def norm(self) -> str:
        """BRANCH where each branch has a batch norm, SUM where one follows their sum, else MIXED."""
        if self.total:
            return MIXED if any(self.normed) else SUM
        return BRANCH if all(self.normed) else MIXED

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
    def normalised_maps(self) -> int:
        """How many maps besides x batch norms normalise: the identity's is x."""
        parts = zip(self.convolved, self.normed, strict=True)
        return sum(convolved and normed for convolved, normed in parts) + self.total

    @property
    def taps(self) -> list[int]:
        """How many taps each convolution has."""
        return [t.rows * t.columns for t, convolved in zip(self.branches, self.convolved, strict=True) if convolved]

    @property
    def weights(self) -> int:
        """Elements of all branches' kernels."""
        return self.out_channels * self.shape[1] // self.geometry.groups * sum(self.taps)

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
    device, kernel, norms = x.device.type, step.kernel, step.norms
    transform = _transform(step, x)
    return Problem(
        shape=(*x.shape,),
        out_channels=kernel.shape[0],
        geometry=step.geometry,
        branches=tuple([branch.taps for branch in step.branches]),  # type: ignore[misc]
        convolved=tuple([branch.weight is not None for branch in step.branches]),
        normed=tuple([branch.norm is not None for branch in step.branches]),
        total=step.norm is not None,
        batch_stats=tuple([norm.batch_stats for norm in norms]),
        dtype=autocast_dtype(x.dtype, device),
        input_dtype=x.dtype,
        device=device,
        channels_last=not transform and prefers_channels_last(x, kernel),  # vmap knows no layouts
        grad=torch.is_grad_enabled() and (x.requires_grad or _has_gradients(step)),
        synced=any(norm.group is not None for norm in norms),
        transform=transform,
        weight_dtype=kernel.dtype,
    )


def _transform(step: Step, x: Tensor) -> str:
    if torch.compiler.is_compiling():  # Dynamo traces transforms in its own way, and cannot read the stack
        return ""
    if transform_stack() is not None:
        return TORCH_FUNC
    if in_forward_mode() and any(map(has_tangent, (x, *(t for _, own in step.tensors() for t in own)))):
        return "forward-mode differentiation"
    return ""


def has_tangent(t: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through t."""
    return t is not None and in_forward_mode() and forward_ad.unpack_dual(t).tangent is not None


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What nn.Conv2d takes a tensor of dtype for: autocast casts every float but float64."""
    if device == "meta" or not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device) if dtype.is_floating_point else dtype


def _has_gradients(step: Step) -> bool:
    convolutions = (t for branch in step.branches for t in (branch.weight, branch.bias))
    norms = (t for norm in step.norms for t in (norm.gamma, norm.beta))
    return any(t is not None and t.requires_grad for t in (*convolutions, *norms))


def prefers_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether nn.Conv2d would return channels_last: its rule is that either of the two has that layout.

    Strides decide, so that a map or kernel of one channel, dense in both layouts, has the one it was converted to.
    """
    return _is_channels_last(x) or _is_channels_last(weight)


def _is_channels_last(t: Tensor) -> bool:
    contiguous = t.is_contiguous()
    if contiguous != t.is_contiguous(memory_format=torch.channels_last):
        return not contiguous  # the common answers, without PyTorch's walk through the strides, one in Python
    if torch.compiler.is_dynamo_compiling():
        # Given both layouts of an input in turn, torch 2.14 fails on the strides of what .to() made of it.
        t = torch.empty_like(t)
    return suggest_memory_format(t) == torch.channels_last
