"""torchvision's and timm's residual blocks with a forward of ours: shortcut and ReLU in a block's own passes.

As with an accelerated block, the module's class becomes one derived from its own, with another forward: it reads
the same children by the same names, and computes what its own forward does. A class is recognised by its name and
by what its forward reads.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .activations import activation_of
from .adapters.adapter import reads
from .rep import RepBlock
from .spec import Epilogue, autocast_dtype
from .steps.epilogue import finish
from .submodules import does_nothing


def finished(layer: nn.Module, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
    """act(layer(x) + residual), in the layer's own passes where it is a block that takes them.

    Args:
        layer: any module.
        x: its input.
        activation: a name in ops/epilogue.py's ACTIVATIONS, '' for none.
        residual: a map like the layer's output; None for none.
    """
    follows = Epilogue(activation, residual)
    # A sum of two dtypes is of the wider one, which a block's output is not.
    fits = residual is None or residual.dtype == autocast_dtype(x.dtype, x.device.type)
    if fits and isinstance(layer, RepBlock) and not follows.is_nothing() and layer.finishing() == "":
        return layer(x, residual=residual, activation=activation or None)
    return finish(layer(x), follows)


class Stage(NamedTuple):
    """The names of a convolution, of the batch norm after it, and of the activation after that."""

    conv: str
    norm: str
    act: str


class Family(NamedTuple):
    """A class of residual blocks: its stages, the last one's activation after the addition.

    `idle` are children that come in between, and do nothing where the forward is ours.
    """

    name: str
    reads: frozenset[str]
    stages: tuple[Stage, ...]
    idle: tuple[str, ...] = ()


def _family(name: str, stages: tuple[Stage, ...], *idle: str) -> Family:
    return Family(
        name, frozenset({*idle, *(part for stage in stages for part in stage), "downsample"}), stages, idle
    )


_IDLE = ("aa", "drop_block", "drop_path", "se")
FAMILIES = tuple(
    _family(name, tuple(Stage(f"conv{i}", f"bn{i}", act.format(i)) for i in range(1, count + 1)), *idle)
    for name, count in (("BasicBlock", 2), ("Bottleneck", 3))
    for act, idle in (("relu", ()), ("act{}", _IDLE))  # torchvision's, timm's
)


class Residual(nn.Module):
    """What the classes of such blocks are derived from first; `_host` is the block's own class."""

    _host: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by: what is pickled is the host's, to be derived from anew.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        make, args, *rest = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (self._host, *args[1:]), *rest)


def _new(host: type[nn.Module], *args: Any) -> nn.Module:
    family = recognise(host)
    cls: type[nn.Module] = host if family is None else _derived(host, family)
    return cls.__new__(cls, *args)


def recognise(cls: type[nn.Module]) -> Family | None:
    """The family of a class, by the one that defines its forward, or None."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    words = reads(owner)
    return next((family for family in FAMILIES if (family.name, family.reads) == (owner.__name__, words)), None)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _derived(host: type[nn.Module], family: Family) -> type[nn.Module]:
    """The class of such blocks of class host: the same one at every call."""
    made = _classes.get(host)
    if made is None:
        made = _classes[host] = _make(host, family)
    return made


def _make(host: type[nn.Module], family: Family) -> type[nn.Module]:
    own = {name: getattr(host, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_host": host, "forward": _forward(host, family)}
    return type(host.__name__, (Residual, host), own)


def _forward(host: type[nn.Module], family: Family) -> Any:
    @functools.wraps(host.forward)
    def forward(self: Any, x: Tensor) -> Tensor:
        modules = self._modules
        idle = all(does_nothing(modules.get(name)) for name in family.idle)
        # Tracers record the submodules' calls.
        if not idle or isinstance(x, fx.Proxy) or torch.jit.is_tracing():
            return host.forward(self, x)
        shortcut = x if modules.get("downsample") is None else modules["downsample"](x)
        for stage in family.stages:
            conv, norm, act = (modules[name] for name in stage)
            added = shortcut if stage is family.stages[-1] else None
            activation = activation_of(act)
            # Autocast may have the shortcut wider, which the host adds to its map in place.
            fits = added is None or added.dtype == autocast_dtype(x.dtype, x.device.type)
            if fits and activation is not None and does_nothing(norm):
                x = finished(conv, x, activation, added)
                continue
            x = norm(conv(x))
            if added is not None:
                x += added
            x = act(x)
        return x

    return forward


def attach(model: nn.Module) -> None:
    """Gives every residual block in model that has one of our blocks in a stage the forward that adds within it."""
    for module in model.modules():
        family = None if isinstance(module, Residual) or "forward" in module.__dict__ else recognise(type(module))
        if family is not None and any(
            isinstance(module._modules.get(stage.conv), RepBlock) for stage in family.stages
        ):
            module.__class__ = _derived(type(module), family)


def detach(model: nn.Module) -> None:
    """Gives them back their own forward."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.__class__ = module._host  # type: ignore[assignment]
