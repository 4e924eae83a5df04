"""accelerate(): blocks of other libraries, where they stand, on this package's training step; restore() undoes it.

An accelerated block's class is one derived from its own, of the same name, with another forward. So it is still an
instance of its class, every other method is its own, and copies, replicas and pickles follow; a forward set on the
instance would stay bound to the one block. PyTorch's own FSDP2 and parametrizations do the same.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from . import lanes, residual
from .adapters import Adapter, NotKnownError, recognise
from .backends import planner
from .functional import plan, run
from .geometry import Geometry
from .ops.fuse_blocks import Arguments
from .ops.fusion import append_step
from .rep import RepBlock, as_conv
from .spec import Epilogue, Problem, Step
from .submodules import Layout, Submodules, read, read_for_fold


class Attachment(NamedTuple):
    """What an accelerated block carries, as `_acnet_attachment`: where its branches are, and its backend."""

    layout: Layout
    backend: str


class Accelerated(nn.Module):
    """What the classes of accelerated blocks are derived from first; `_host` is the block's own class."""

    _host: type[nn.Module]
    _adapter: Adapter
    _acnet_attachment: Attachment

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by: what is pickled is the host's, to be derived from anew.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        make, args, state, *rest = reduced
        if make is not copyreg.__newobj__ or args[0] is not type(self):  # type: ignore[attr-defined]
            return reduced
        return (_new, (self._host, *args[1:]), lanes.forget(state) if isinstance(state, dict) else state, *rest)


def _new(host: type[nn.Module], *args: Any) -> nn.Module:
    adapter = recognise(host)
    if not isinstance(adapter, Adapter):
        warnings.warn(f"a {host.__name__} was pickled accelerated and is not now: {adapter}", stacklevel=2)
        return host.__new__(host, *args)
    cls = accelerated_class(host, adapter)
    return cls.__new__(cls, *args)


_classes: dict[tuple[type[nn.Module], Adapter], type[nn.Module]] = {}


def accelerated_class(host: type[nn.Module], adapter: Adapter) -> type[nn.Module]:
    """The class of accelerated blocks of class host: the same one at every call."""
    made = _classes.get((host, adapter))
    if made is None:
        own = {name: getattr(host, name) for name in ("__module__", "__qualname__", "__doc__")}
        own |= {"_host": host, "_adapter": adapter, "forward": _forward(host, adapter)}
        made = _classes[host, adapter] = type(host.__name__, (Accelerated, host), own)
    return made


def _forward(host: type[nn.Module], adapter: Adapter) -> Any:
    ends = type(adapter).finish is Adapter.finish
    # Whether the step is of the block's own input and tensors.
    plain = type(adapter).prepare is Adapter.prepare and type(adapter).adjust is Adapter.adjust

    @functools.wraps(host.forward)
    def forward(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        # Tracers record the submodules' calls: right in both modes, and PyTorch's operators alone.
        if len(args) != 1 or kwargs or isinstance(args[0], fx.Proxy) or torch.jit.is_tracing():
            return host.forward(self, *args, **kwargs)
        (x,), (layout, backend) = args, self._acnet_attachment
        remembers = plain and not torch.compiler.is_compiling()
        activation = adapter.activation(self) if ends else None  # which the step then applies
        out = lanes.take(self, x, backend, activation or "") if remembers else None
        if out is None:
            given = Submodules.of(self, layout)
            step = read(given)
            if isinstance(step, str) or adapter.declines(layout, x) is not None:
                return host.forward(self, x)
            out = run(adapter.prepare(self, x), adapter.adjust(self, step), backend, Epilogue(activation or ""))
            if remembers:
                lanes.learn(self, given, step, x, backend)
        return out if activation is not None else adapter.finish(self, out, x)

    return forward


def host_class(cls: type) -> type:
    """The class that an accelerated block's was derived from, also below what FSDP2 has derived from that since."""
    if not issubclass(cls, Accelerated):
        return cls
    if "_host" in vars(cls):
        return vars(cls)["_host"]
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(host_class(base) for base in cls.__bases__), own)


@dataclass(eq=False)
class HostBlock:
    """A block of another library seen as a block of this package's: what it computes, and how it folds."""

    module: nn.Module
    adapter: Adapter
    layout: Layout

    @property
    def backend(self) -> str:
        """The one that the module was accelerated with; 'auto' where it is not."""
        return self.module._acnet_attachment.backend if isinstance(self.module, Accelerated) else "auto"

    @backend.setter
    def backend(self, value: str) -> None:
        attach(self.module, self.adapter, self.layout, planner.check_choice(value))

    @property
    def training(self) -> bool:
        """The module's."""
        return self.module.training

    @property
    def deploy(self) -> bool:
        """Whether it is folded, by whatever library."""
        return self.adapter.is_folded(self.module)

    def step(self) -> Step:
        """The tensors and settings one step computes with, read from the submodules as they are now.

        Raises:
            ValueError: only the block's own forward can tell (see `module_path_reason`).
        """
        step = read(Submodules.of(self.module, self.layout))
        if isinstance(step, str):
            raise ValueError(f"the block runs its own forward: {step}")
        return self.adapter.adjust(self.module, step)

    def module_path_reason(self) -> str | None:
        """Why the block must run its own forward, or None."""
        step = read(Submodules.of(self.module, self.layout))
        return step if isinstance(step, str) else None

    def finishing(self) -> str | None:
        """The activation that alone follows the sum, '' for none, None for something else."""
        plain = type(self.adapter).finish is Adapter.finish
        return self.adapter.activation(self.module) if plain else None

    def declines(self, x: Tensor) -> str | None:
        """Why the block must run its own forward on this input, or None."""
        return self.adapter.declines(self.layout, x)

    def plan(self, x: Tensor) -> tuple[Problem, planner.Choice]:
        """What the branches run on x, which they get, and why; ValueError as `step`, or x does not fit."""
        return plan(x, self.step(), self.backend)

    @property
    def geometry(self) -> Geometry:
        """The whole kernel's, as the block was found."""
        return self.layout.geometry

    @property
    def out_channels(self) -> int:
        """K, as the block was found."""
        return self.layout.channels[1]

    def fold_step(self) -> Step:
        """The step in eval, for folding; ValueError where it is not known to be one fixed convolution."""
        if self.deploy:
            raise ValueError("cannot fold: the block is folded already, by its own library")
        step = read_for_fold(Submodules.of(self.module, self.layout))
        with torch.autocast(step.kernel.device.type, enabled=False):
            return self.adapter.adjust(self.module, step)

    def append_fold(self, a: Arguments) -> None:
        """Appends the block's tensors to the fold operator's lists; ValueError as `fold_step`."""
        append_step(a, self.fold_step())

    def become(self, weight: Tensor, bias: Tensor) -> nn.Module:
        """What takes the block's place: the block in its library's folded form, or modules of PyTorch's."""
        step = self.fold_step()
        trained = any(t is not None and t.requires_grad for _, own in step.tensors() for t in own)
        conv = as_conv(step.geometry, weight, bias, step.kernel, trained).train(self.training)
        detach(self.module)
        return self.adapter.fold_away(self.module, conv)


def attach(module: nn.Module, adapter: Adapter, layout: Layout, backend: str) -> None:
    """Accelerates a block."""
    if not isinstance(module, Accelerated):
        module.__class__ = accelerated_class(type(module), adapter)
    module._acnet_attachment = Attachment(layout, backend)  # type: ignore[assignment]


def detach(module: nn.Module) -> None:
    """Makes an accelerated block an ordinary one of its class again; leaves any other alone."""
    if isinstance(module, Accelerated):
        for name in set(vars(module)) - set(lanes.forget(vars(module))):
            delattr(module, name)
        del module._acnet_attachment
        module.__class__ = host_class(type(module))


def seen(module: nn.Module) -> HostBlock | str | None:
    """A module of another library as a block, why it is none although its class's name is known, or None."""
    if isinstance(module, RepBlock):
        return None
    if isinstance(module, Accelerated):
        return HostBlock(module, module._adapter, module._acnet_attachment.layout)
    adapter = recognise(type(module))
    if not isinstance(adapter, Adapter):
        return adapter
    try:
        return HostBlock(module, adapter, adapter.layout(module))
    except NotKnownError as error:
        return str(error)


def is_block(module: nn.Module) -> bool:
    """Whether a module is a block of this package's, or an accelerated one."""
    return isinstance(module, (RepBlock, Accelerated))


def strangers(model: nn.Module) -> Iterator[tuple[str, nn.Module, HostBlock | str]]:
    """(name, module, what it is seen as) of every module, outside blocks, whose class's name is a known one's.

    What is inside one that is seen as a block is part of it.
    """
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_block(module):
            inside.update(module.modules())
            continue
        found = seen(module)
        if found is not None:
            yield name, module, found
        if isinstance(found, HostBlock) and found.module_path_reason() is None:
            inside.update(module.modules())


def accelerate(model: nn.Module, *, backend: str = "auto") -> nn.Module:
    """Has blocks of other libraries compute their training steps and evals as this package's blocks do, in place.

    Known are ACNet's, RepVGG's, MobileOne's and the YOLOs' original blocks, timm's and transformers' (see
    `acnet_kernels.adapters`). Nothing is renamed, added or removed: parameters, state-dict keys, hooks outside the
    blocks, and what the block's own library does with it afterwards stay. What is done to a block later has its
    effect: one with a hook inside, another module or a parametrization runs its own forward, as `explain(model)`
    says, and one that its own library has folded is its convolution. Blocks whose inside is not what is known are
    left alone; `explain(model)` says which, and why.

    Args:
        model: any module.
        backend: 'auto' or a backend's name, for every block; blocks accelerated before change to it.

    Returns:
        model.

    Raises:
        ValueError: backend is unknown.
    """
    planner.check_choice(backend)
    for module in model.modules():
        if isinstance(module, Accelerated):
            module._acnet_attachment = module._acnet_attachment._replace(backend=backend)
    for _, module, found in list(strangers(model)):
        if isinstance(found, HostBlock) and found.module_path_reason() is None:
            attach(module, found.adapter, found.layout, backend)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place: every block runs its library's own forward again. Returns model.

    So do residual blocks that `convert(fuse_activations=True)` gave a forward.
    """
    for module in model.modules():
        detach(module)
    residual.detach(model)
    return model


def left_alone(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(name, class, why) of every module that is not accelerated although its class's name is a known one's."""
    for name, module, found in strangers(model):
        why = found if isinstance(found, str) else found.module_path_reason()
        yield name or "(model)", type(module).__name__, why or "accelerate(model) would run it"
