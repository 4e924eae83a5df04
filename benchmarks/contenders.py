"""The ways to compute a block that are compared: eager, its peers, the plain layer, and every backend of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acnet_kernels import ACBlock
from acnet_kernels.backends import planner
from acnet_kernels.reference import embed

from .shapes import Shape

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
COMPILED = {"compile": "default", "reduce-overhead": "reduce-overhead"}  # contender → torch.compile's mode
PEERS = ("3k", "checkpoint", "conv+bn")


class Modules(nn.Module):
    """The block as one writes it in PyTorch: a convolution and a batch norm for every branch, summed."""

    def __init__(self, block: ACBlock) -> None:
        super().__init__()
        self.block, norms = block, block.norms()
        self.parts = [
            (block.geometry.placement(block.taps[name]), conv, norms[name]) for name, conv in block.convs().items()
        ]

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×H'×W'."""
        first, *others = (norm(conv(place.apply(x))) for place, conv, norm in self.parts)
        return functools.reduce(torch.add, others, first)


class Concatenated(nn.Module):
    """The block as one convolution of 3K outputs, kernels zero-padded to k×k; one batch norm over them, and a sum.

    The parameters are the block's own kernels, padded at every step; groups keep their channels together.
    """

    def __init__(self, block: ACBlock) -> None:
        super().__init__()
        self.geometry, self.groups, self.taps = block.geometry, block.groups, list(block.taps.values())
        self.weights = nn.ParameterList(conv.weight for conv in block.convs().values())
        norms = block.norms().values()
        self.bn = nn.BatchNorm2d(len(norms) * block.out_channels, block.eps)
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(self.bn, name).copy_(self._interleave([getattr(norm, name) for norm in norms]))

    def _interleave(self, tensors: Sequence[Tensor]) -> Tensor:
        """K×… of each branch → 3K×…, group by group."""
        return torch.stack([t.unflatten(0, (self.groups, -1)) for t in tensors], 1).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W → N×K×H'×W'."""
        g = self.geometry
        weight = self._interleave(
            [embed(w, g.kernel, t.row, t.column) for w, t in zip(self.weights, self.taps, strict=True)]
        )
        y = self.bn(F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups))
        first, *others = y.unflatten(1, (self.groups, len(self.weights), -1)).unbind(2)
        for other in others:
            first = first + other
        return first.flatten(1, 2)


class Checkpointed(nn.Module):
    """A block that keeps its input and computes itself again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """As the block's."""
        return checkpoint(self.block, x, use_reentrant=False)


@dataclass(frozen=True)
class Contender:
    """One way in one layout, with the input sets it runs on: pairs of input and gradient of the output."""

    name: str
    layout: str
    module: nn.Module
    sets: list[tuple[Tensor, Tensor]]
    autocast: torch.dtype | None

    @property
    def label(self) -> str:
        """Name and layout."""
        return f"{self.name} {self.layout}"

    def autocasting(self) -> torch.autocast:
        """The context that the forward runs in."""
        device = self.sets[0][0].device.type
        return torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def forward(self, i: int = 0) -> Tensor:
        """The output for input set i, with its graph."""
        with self.autocasting():
            return self.module(self.sets[i][0])

    def step(self, i: int = 0) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the input and of every parameter, added to nothing."""
        return torch.autograd.grad(self.forward(i), [self.sets[i][0], *self.module.parameters()], self.sets[i][1])

    def calls(self, mode: str) -> list[Callable[[], object]]:
        """'forward' or 'step', one call an input set."""
        run = getattr(self, mode)
        return [lambda i=i: run(i) for i in range(len(self.sets))]


def names(device: torch.device) -> tuple[str, ...]:
    """Every contender there is on this kind of device."""
    compiled = [name for name in COMPILED if name == "compile" or device.type == "cuda"]
    return ("eager", *compiled, *PEERS, *ours())


def ours() -> list[str]:
    """Our backends but the definition, which is the contender `eager`, and the planner's choice among them."""
    return [*(name for name in planner.BACKENDS if name != "eager"), "auto"]


def build(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    sets: int,
    chosen: Sequence[str],
) -> list[Contender]:
    """The chosen contenders, all with the same weights and inputs; backends that decline the step are left out.

    eager and ours come in both layouts, their peers in channels_last, which is the faster one.

    Args:
        shape: the block.
        dtype: float32, or what autocast computes in over float32 parameters; the input is of it, as from a layer
            before.
        device: where.
        sets: how many copies of the input to rotate among.
        chosen: of `names(device)`.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # every shape is compiled for itself, as a first one is: no sizes made dynamic
    args = (shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups)
    source = ACBlock(shape.channels, shape.out_channels, *args, backend="eager", device=device)
    autocast = None if dtype == torch.float32 else dtype
    x, grad = shape.tensors(dtype, device)
    inputs = {
        name: [
            (x.clone(memory_format=layout).requires_grad_(), grad.clone(memory_format=layout)) for _ in range(sets)
        ]
        for name, layout in LAYOUTS.items()
    }

    def block(backend: str) -> ACBlock:
        made = ACBlock(shape.channels, shape.out_channels, *args, backend=backend, device=device)
        made.load_state_dict(source.state_dict())
        return made

    def contender(name: str, layout: str, module: nn.Module) -> Contender:
        return Contender(name, layout, module.to(memory_format=LAYOUTS[layout]), inputs[layout], autocast)

    plain = nn.Sequential(
        nn.Conv2d(shape.channels, shape.out_channels, *args, bias=False), nn.BatchNorm2d(shape.out_channels)
    )
    peers: dict[str, Callable[[], nn.Module]] = {
        "3k": lambda: Concatenated(block("eager")),
        "checkpoint": lambda: Checkpointed(Modules(block("eager"))),
        "conv+bn": lambda: plain.to(device),
    }
    found = []
    for name in chosen:
        if name in COMPILED:
            module = block("eager").to(memory_format=torch.channels_last)
            found.append(contender(name, "channels_last", torch.compile(module, mode=COMPILED[name])))
        elif name in PEERS:
            found.append(contender(name, "channels_last", peers[name]()))
        elif name == "eager":
            found += [contender(name, layout, Modules(block(name))) for layout in LAYOUTS]
        else:
            made = [contender(name, layout, block(name)) for layout in LAYOUTS]
            found += [c for c in made if name in ("auto", backend_of(c))]
    return found


def backend_of(contender: Contender) -> str:
    """The name of the backend that computes the step: an ACBlock's choice, or the contender's own."""
    if not isinstance(contender.module, ACBlock):
        return contender.name
    x = contender.sets[0][0]
    with contender.autocasting():
        return contender.module.plan(x)[1].backend.NAME
