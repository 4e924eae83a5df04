"""Adapter: how a class of another library is a sum of branches, read off its modules by their names there.

One subclass a class, one file a library; docs/adapters.md shows how to add one. Nothing here, nor in the files
beside, imports the libraries: a class is recognised by its name and by the names that its forward reads.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..activations import activation_of
from ..geometry import MOST_BRANCHES, Geometry, Taps
from ..spec import Step, autocast_dtype
from ..submodules import Container, Layout, Slot, Submodules, does_nothing, module_at, read


class NotKnownError(ValueError):
    """A block is not what its adapter knows; the message says what is different."""


class Part(NamedTuple):
    """One branch of a block, by its modules' names there, with dots.

    Attributes:
        conv: its convolution; '' for the identity.
        norm: its batch norm; '' for none.
        containers: modules that the block calls, and they call these.
        idle: modules that the block calls on the way, and that must do nothing.
    """

    conv: str
    norm: str
    containers: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def find(block: nn.Module, name: str) -> Any:
    """The module of this name, with dots; NotKnownError where there is none."""
    found = module_at(block._modules, tuple(name.split(".")))
    if found is None:
        raise NotKnownError(f"it has no {name}")
    return found


def has(block: nn.Module, name: str) -> bool:
    """Whether the block has a child of this name that is a module, not None."""
    return block._modules.get(name) is not None


def branch_in(block: nn.Module, name: str, *outer: str) -> Part:
    """The branch of a container that holds one convolution and one batch norm, whatever their names.

    Args:
        block: the block.
        name: the container's, with dots.
        outer: containers that it is in, and that are called too.

    Raises:
        NotKnownError: there is none, or it holds other things.
    """
    active = _active(find(block, name))
    if len(active) != 2:
        raise NotKnownError(f"{name} holds {', '.join(active) or 'nothing'}, not a convolution and a batch norm")
    return Part(f"{name}.{active[0]}", f"{name}.{active[1]}", (*outer, name))


def branches_in(block: nn.Module, name: str, *outer: str) -> Iterator[Part]:
    """The branches of a list of containers."""
    for key in find(block, name)._modules:
        yield branch_in(block, f"{name}.{key}", *outer)


def identity(norm: str = "", *containers: str, idle: tuple[str, ...] = ()) -> Part:
    """The branch of a batch norm on x itself, or of x alone."""
    return Part("", norm, containers, idle)


def reads(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes and globals that a class's forward names; empty where it is no Python function."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


class Adapter:
    """How the blocks of one class are one step: where their branches are, and what the block does around the sum.

    Attributes:
        classes: names, or fnmatch patterns, of the class that defines the block's forward.
        reads: the names which that forward reads; a block whose forward reads others is left alone.
        containers: class name, or pattern, → what the forward of a container of that library reads; nn.Sequential's
            forward is known anyway.
        total: the batch norm after the sum, '' for none; where it is an nn.Identity there is none either.
        idle: modules that the block calls between its branches, and that must do nothing.
        after: the modules that the block calls on the sum, one after the other.
        folded: the name under which the block's own folded form has its convolution, '' where it has no such form.
    """

    classes: ClassVar[tuple[str, ...]]
    reads: ClassVar[frozenset[str]]
    containers: ClassVar[Mapping[str, frozenset[str]]] = {}
    total: ClassVar[str] = ""
    idle: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    folded: ClassVar[str] = ""

    # --- What a library's class needs to say.

    def branches(self, block: Any) -> Iterable[Part]:
        """The block's branches, one with a convolution first.

        Raises:
            NotKnownError: the block is not made of branches that are known.
        """
        raise NotImplementedError

    def crop(self, block: Any) -> int:
        """How many pixels at each end of a line the block's 1×k and k×1 convolutions do not see."""
        return 0

    def declines(self, layout: Layout, x: Tensor) -> str | None:
        """Why the block must run its own forward on this input, or None.

        Under autocast the identity hands on a float32 map as it is, where a step has one dtype.
        """
        dtype = autocast_dtype(x.dtype, x.device.type)
        if dtype != x.dtype and any(slot.conv is None for slot in layout.slots):
            return f"its identity is of {x.dtype} where autocast's convolutions are of {dtype}"
        return None

    def prepare(self, block: Any, x: Tensor) -> Tensor:
        """What the branches get of the block's input."""
        return x

    def adjust(self, block: Any, step: Step) -> Step:
        """The step as the block has it, of the step that its branches are: scaled, say."""
        return step

    def finish(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        """What the block makes of the sum, and of its input."""
        for name in self.after:
            out = getattr(block, name)(out)
        return out

    def activation(self, block: Any) -> str | None:
        """The activation that the modules of `after` are now, '' for none, None for something else."""
        found = ""
        for name in self.after:
            own = activation_of(block._modules.get(name))
            if own is None or (own and found):
                return None
            found = found or own
        return found

    def is_folded(self, block: Any) -> bool:
        """Whether the block is in its library's folded form."""
        return bool(self.folded) and getattr(block, self.folded, None) is not None

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """What takes the block's place once its branches are this convolution.

        That is the block in its library's own folded form, or else a module made of PyTorch's.
        """
        if self.folded:
            for name in self.parts_of(block):
                if name in block._modules:
                    delattr(block, name)
            setattr(block, self.folded, conv)
            return block
        rest = [(name, getattr(block, name)) for name in self.after]
        return nn.Sequential(OrderedDict([("conv", conv), *rest])).train(block.training) if rest else conv

    def parts_of(self, block: Any) -> set[str]:
        """The names of the block's children that fold away."""
        names = {self.total, *self.idle}
        for part in self.branches(block):
            names |= {part.conv, part.norm, *part.containers, *part.idle}
        return {name.split(".")[0] for name in names if name}

    # --- What the rest of the package asks.

    def is_for(self, name: str) -> bool:
        """Whether it is the adapter of classes of this name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.classes)

    def layout(self, block: nn.Module) -> Layout:
        """Where the block has its branches.

        Raises:
            NotKnownError: they are not those of one kernel; the message says what is different.
        """
        if "forward" in block.__dict__:
            raise NotKnownError("it has a forward of its own")
        if self.is_folded(block):
            raise NotKnownError("it is folded already, by its own library")
        parts = list(self.branches(block))
        convs = {part.conv: _conv(block, part.conv) for part in parts if part.conv}
        if not convs or len(parts) > MOST_BRANCHES:
            raise NotKnownError(f"it has {len(parts)} branches, {len(convs)} of them convolutions")
        geometry, channels = _geometry(max(convs.values(), key=lambda conv: conv.weight[0, 0].numel()))
        slots = []
        for part in parts:
            name = part.conv or part.norm or "the identity"
            taps = _taps(geometry, convs.get(part.conv), channels, name)
            if any(edge not in (0, -self.crop(block)) for edge in geometry.placement(taps).edges):
                raise NotKnownError(f"{name}'s map does not fit that of a kernel with padding {geometry.padding}")
            slots.append(Slot(name, taps, _path(part.conv), _path(part.norm)))
        total = self.total if self.total and not does_nothing(find(block, self.total)) else None
        idle = [*self.idle, *(name for part in parts for name in part.idle)]
        if self.total and total is None:
            idle.append(self.total)
        containers = self._containers(block, parts)
        return Layout.of(geometry, channels, slots, total, containers, [tuple(name.split(".")) for name in idle])

    def _containers(self, block: nn.Module, parts: list[Part]) -> list[Container]:
        found = []
        for name in dict.fromkeys(name for part in parts for name in part.containers):
            module = find(block, name)
            kind = type(module)
            named = [pattern for pattern in self.containers if fnmatch.fnmatchcase(kind.__name__, pattern)]
            known = [self.containers[pattern] for pattern in named]
            usual = kind.forward is nn.Sequential.forward or does_nothing(module)
            if not usual and reads(kind) not in known:
                raise NotKnownError(f"{name} is a {kind.__name__}, whose forward is not one that is known")
            inside = [n.removeprefix(f"{name}.") for part in parts for n in part[:2] if n.startswith(f"{name}.")]
            children = {n.split(".")[0] for n in inside}
            active = _active(module)
            if set(active) != children:
                raise NotKnownError(f"{name} holds {', '.join(active)}, not {', '.join(sorted(children))} alone")
            found.append(Container(tuple(name.split(".")), kind, tuple(active)))
        return found

    def why_not(self, block: nn.Module) -> str | None:
        """Why the block is not one step as it is now, or None."""
        try:
            step = read(Submodules.of(block, self.layout(block)))
        except NotKnownError as error:
            return str(error)
        return step if isinstance(step, str) else None


def _active(module: nn.Module) -> list[str]:
    return [key for key, child in module._modules.items() if not does_nothing(child)]


def _path(name: str) -> tuple[str, ...] | None:
    return tuple(name.split(".")) if name else None


def _conv(block: nn.Module, name: str) -> nn.Conv2d:
    found = find(block, name)
    if not isinstance(found, nn.Conv2d):
        raise NotKnownError(f"{name} is a {type(found).__name__}, not a plain nn.Conv2d")
    return found


def _geometry(conv: nn.Conv2d) -> tuple[Geometry, tuple[int, int]]:
    given: Any = conv
    try:
        geometry = Geometry.make(
            given.kernel_size, given.stride, given.padding, given.dilation, given.groups, given.padding_mode
        )
    except (TypeError, ValueError) as error:
        raise NotKnownError(str(error)) from None
    return geometry, (conv.in_channels, conv.out_channels)


def _taps(geometry: Geometry, conv: nn.Conv2d | None, channels: tuple[int, int], name: str) -> Taps:
    if conv is None:
        if geometry.centre is None or channels[0] != channels[1]:
            raise NotKnownError(f"{name}'s map is not as large as those of the convolutions")
        return geometry.centre
    (rows, columns), (height, width) = geometry.kernel, conv.kernel_size
    above, left = rows - height, columns - width
    if above < 0 or left < 0 or above % 2 or left % 2:
        raise NotKnownError(f"{name}'s kernel of {height}×{width} is not in the middle of one of {rows}×{columns}")
    return Taps(above // 2, left // 2, height, width)
