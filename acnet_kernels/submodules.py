"""What a block's submodules compute, read off their tensors and attributes, where these say it all.

The fast paths and the folds speak for real nn.Conv2d and nn.BatchNorm2d modules. They may where the modules are
what their class says: a known class, no hook, nothing set on the instance that its class's forward would call, and
convolutions that sit as the branches of one block do. `speaks_for` is the one place that decides it.

A block says in a `Layout` where its submodules hang and which taps each branch has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ._torch_compat import BatchNormBase, has_global_hooks
from .geometry import Geometry, PaddingMode, Pair, Taps
from .spec import Branch, Norm, Step

# What every instance of these has; anything more may shadow what the class's forward reads.
_CONV_ATTRIBUTES = frozenset(nn.Conv2d(1, 1, 1).__dict__)
_NORM_ATTRIBUTES = frozenset(nn.BatchNorm2d(1).__dict__)
_CONTAINER_ATTRIBUTES = frozenset(nn.Sequential().__dict__)
CONV_BN = ("conv", "bn")  # a container's children, in the order they are called
# What a traced forward may call or read under a name that an instance can shadow.
_CALLED = ("forward", "_conv_forward", "_check_input_dim")
_READ = (*_CALLED, "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What a class may define and still be the batch norm that it derives from.
_HARMLESS = {"__init__", "_check_input_dim", "extra_repr", "__constants__"}
_HARMLESS |= {"__doc__", "__module__", "__annotations__", "__annotate_func__", "__annotations_cache__"}
_HARMLESS |= {"__static_attributes__", "__firstlineno__"}
_IDLE_IN_EVAL = {"DropPath", "DropBlock2d"}  # by whatever library: they drop in training alone
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class Slot(NamedTuple):
    """One branch of a block: its name there, its taps, and where its modules hang, by the names on the way.

    `conv` is None for the identity, `norm` where the branch adds directly. `container` is the nn.Sequential of the
    two that the block calls, where it does not call them itself.
    """

    name: str
    taps: Taps
    conv: tuple[str, ...] | None
    norm: tuple[str, ...] | None
    container: tuple[str, ...] | None = None


class Container(NamedTuple):
    """A module between a block and its branches: of this class, and calling it is calling these children of it.

    Children that do nothing (see `does_nothing`) are not named.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: tuple[str, ...]


Settings = tuple[Pair, Pair, Pair, int, PaddingMode]  # stride, padding, dilation, groups, padding_mode


class Layout(NamedTuple):
    """Where a block was built to have its branches, and their modules; `convs` are its convolutions, by slot.

    `idle` are modules that the block calls between its branches, and that must do nothing.
    """

    geometry: Geometry
    channels: Pair  # in and out
    slots: tuple[Slot, ...]
    total: str | None  # the batch norm after the sum
    convs: tuple[tuple[torch.Size, Settings], ...]  # the weight's shape, and the settings
    containers: tuple[Container, ...]
    idle: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        channels: Pair,
        slots: Sequence[Slot],
        total: str | None = None,
        containers: Sequence[Container] | None = None,
        idle: Sequence[tuple[str, ...]] = (),
    ) -> Layout:
        """The layout of these slots; their containers, where none are given, are nn.Sequentials of CONV_BN."""
        convs = tuple(conv_at(geometry, channels, slot.taps) for slot in slots)
        if containers is None:
            paths = [slot.container for slot in slots if slot.container is not None]
            containers = [Container(path, nn.Sequential, CONV_BN) for path in paths]
        return cls(geometry, channels, tuple(slots), total, convs, tuple(containers), tuple(idle))


def conv_at(geometry: Geometry, channels: Pair, taps: Taps) -> tuple[torch.Size, Settings]:
    """(the weight's shape, the settings) of the convolution of these taps."""
    place, (inputs, outputs) = geometry.placement(taps), channels
    settings = (geometry.stride, place.padding, place.dilation, geometry.groups, geometry.padding_mode)
    return torch.Size((outputs, inputs // geometry.groups, *place.kernel)), settings


class Submodules(NamedTuple):
    """A block's modules as they are now: a convolution and a batch norm a slot, None where it has none.

    `missing` names the first one that the layout has and the block has not.
    """

    layout: Layout
    convs: list[nn.Module | None]
    norms: list[nn.Module | None]
    total: nn.Module | None
    containers: list[nn.Module | None]
    idle: list[nn.Module | None]
    missing: str

    @classmethod
    def of(cls, block: nn.Module, layout: Layout) -> Submodules:
        """Those of a block."""
        modules, missing = block._modules, ""
        convs: list[nn.Module | None] = []
        norms: list[nn.Module | None] = []
        for _, _, conv, norm, _ in layout.slots:
            for path, found in ((conv, convs), (norm, norms)):
                module = None if path is None else module_at(modules, path)
                found.append(module)
                if module is None and path is not None:
                    missing = missing or ".".join(path)
        containers = [module_at(modules, container.path) for container in layout.containers]
        idle = [module_at(modules, path) for path in layout.idle]
        total = None if layout.total is None else modules.get(layout.total)
        if total is None and layout.total is not None:
            missing = missing or layout.total
        return cls(layout, convs, norms, total, containers, idle, missing)

    def named(self) -> Iterator[tuple[str, Any, type[nn.Module], frozenset[str]]]:
        """(name, module, the class that a block builds there, what every instance of it has) of each."""
        for slot, conv, norm in zip(self.layout.slots, self.convs, self.norms, strict=True):
            if conv is not None:
                yield ".".join(slot.conv or ()), conv, nn.Conv2d, _CONV_ATTRIBUTES
            if norm is not None:
                yield ".".join(slot.norm or ()), norm, nn.BatchNorm2d, _NORM_ATTRIBUTES
        if self.total is not None:
            yield self.layout.total or "", self.total, nn.BatchNorm2d, _NORM_ATTRIBUTES


def module_at(modules: Any, path: tuple[str, ...]) -> nn.Module | None:
    """The module that hangs at the end of these names, None where one of them leads nowhere."""
    found = modules.get(path[0])
    for name in path[1:]:
        found = None if found is None else found._modules.get(name)
    return found


def read(given: Submodules) -> Step | str:
    """The step that the submodules compute when called one by one, or why only calling them can tell.

    Its geometry is the layout's where the convolutions say the same, else the one they agree on.
    """
    geometry = speaks_for(given)
    return geometry if isinstance(geometry, str) else _step(given, geometry)


def speaks_for(given: Submodules) -> Geometry | str:
    """The predicate of `read`, which takes its arguments: the geometry if it holds, else why it does not."""
    if has_global_hooks():
        return "a global module hook is registered"
    if given.missing:
        return f"it has no {given.missing}"
    compiling = torch.compiler.is_compiling()
    for conv in given.convs:
        if conv is not None and (type(conv) is not nn.Conv2d or _is_altered(conv, _CONV_ATTRIBUTES, compiling)):
            return _first_reason(given)
    for norm in (*given.norms, given.total):
        if norm is not None and (
            not (type(norm) is nn.BatchNorm2d or _is_known_norm(norm))
            or _is_altered(norm, _NORM_ATTRIBUTES, compiling)
        ):
            return _first_reason(given)
    for module, container in zip(given.containers, given.layout.containers, strict=True):
        if (why := _why_no_container(module, container)) is not None:
            return why
    for module, path in zip(given.idle, given.layout.idle, strict=True):
        if not does_nothing(module):
            return f"{'.'.join(path)}, between the branches, is a {type(module).__name__}, or has hooks"
    return _agree(given)


def _why_no_container(module: nn.Module | None, container: Container) -> str | None:
    """Why calling the module is not calling the convolution and then the batch norm that it holds, or None."""
    if module is None:  # with what it holds, which is missed first
        return None
    kind, children = container.kind, container.children
    if type(module) is not kind or _is_altered(module, _CONTAINER_ATTRIBUTES, torch.compiler.is_compiling()):
        return f"a branch's container {_why_special(module, kind, _CONTAINER_ATTRIBUTES)}"
    found = module._modules
    if tuple(found) != children and tuple([n for n in found if not does_nothing(found[n])]) != children:
        return f"a branch's container holds {tuple(found)}, not {children}"
    return None


def _drops(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module).__name__ in _IDLE_IN_EVAL and not hooks


def does_nothing(module: nn.Module | None) -> bool:
    """Whether calling a module that a block has, or has not, is no more than handing x on."""
    return module is None or (
        type(module) is nn.Identity
        and not _is_altered(module, _CONTAINER_ATTRIBUTES, torch.compiler.is_compiling())
    )


def _first_reason(given: Submodules) -> str:
    for name, module, kind, usual in given.named():
        known = type(module) is kind or (kind is nn.BatchNorm2d and _is_known_norm(module))
        if not known or _is_altered(module, usual, torch.compiler.is_compiling()):
            return f"{name} {_why_special(module, kind, usual)}"
    raise AssertionError("a submodule is special")


def read_for_fold(given: Submodules) -> Step:
    """`read` for eval, of submodules too whose parameters are computed from others (pruning, weight norm …).

    Hooks known to do nothing but compute a parameter are run, so that it is not the last step's.

    Raises:
        ValueError: what the submodules compute in eval is not known to be one fixed convolution; names the
            submodule and its class.
    """
    if given.missing:
        raise ValueError(f"cannot fold: it has no {given.missing}")
    modules = []
    for name, module, kind, usual in given.named():
        modules.append(module)
        refresh(module)
        known = type(module) is nn.Conv2d if kind is nn.Conv2d else _is_known_norm(module)
        if not (known or _is_parametrized(module, kind)) or _changes_values(module):
            raise ValueError(f"cannot fold: {name} {_why_special(module, kind, usual)}")
        if kind is nn.BatchNorm2d and (module.running_mean is None or module.running_var is None):
            raise ValueError(
                f"cannot fold: {name} has track_running_stats=False, so it always normalises by the "
                "batch and no fixed convolution equals it"
            )
    for module, container in zip(given.containers, given.layout.containers, strict=True):
        if (why := _why_no_container(module, container)) is not None:
            raise ValueError(f"cannot fold: {why}")
    for module, path in zip(given.idle, given.layout.idle, strict=True):
        if module is not None and not (does_nothing(module) or _drops(module)):
            raise ValueError(f"cannot fold: {'.'.join(path)} is a {type(module).__name__}, or has hooks")
    with _evaluating(modules):
        geometry = _agree(given)
        if isinstance(geometry, str):
            raise ValueError(f"cannot fold: {geometry}")
        return _step(given, geometry)


def refresh(module: nn.Module) -> None:
    """Has the hooks that compute a module's parameters from others compute them now, as in eval."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
        elif isinstance(hook, (prune.BasePruningMethod, WeightNorm)):
            hook(module, None)


def _is_altered(module: nn.Module, usual: frozenset[str], compiling: bool) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return (compiling or len(module.__dict__) != len(usual)) and bool(_shadows(module, usual))


def _is_known_norm(norm: nn.Module) -> bool:
    """Whether a module's eval is nn.BatchNorm2d's.

    Known are nn.BatchNorm2d and nn.SyncBatchNorm, classes derived from the base of both that change nothing but
    the check of the input (what undoing a SyncBatchNorm conversion leaves behind), FrozenBatchNorm2d, and timm's
    batch norms with an activation where that is none.
    """
    kind: type = type(norm)
    if kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm:
        return True
    if _has_activation(kind):
        return all(does_nothing(child) for child in norm._modules.values())
    return is_frozen(norm) or _changes_nothing(kind)


def _has_activation(kind: type) -> bool:
    """Whether a class is a batch norm as timm writes it, with a child to drop and an activation after itself."""
    base = {"BatchNormAct2d": nn.BatchNorm2d, "SyncBatchNormAct": nn.SyncBatchNorm}.get(kind.__name__)
    return base is not None and kind.__bases__ == (base,)


@functools.cache
def _changes_nothing(kind: type) -> bool:
    if not issubclass(kind, BatchNormBase) or issubclass(kind, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return False
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, *BatchNormBase.__mro__)
    return all(set(dict(vars(base))) <= _HARMLESS for base in kind.__mro__ if base not in known)


def is_frozen(norm: nn.Module) -> bool:
    """Whether it is a FrozenBatchNorm2d as torchvision and detectron2 write it: four buffers and an ε.

    It normalises by its running statistics in training too. Others by that name have no ε, or another one.
    """
    kind = type(norm)
    named = kind.__name__ == "FrozenBatchNorm2d" and kind.__bases__ == (nn.Module,)
    return named and norm._buffers.keys() >= _FROZEN_BUFFERS and isinstance(norm.__dict__.get("eps"), float)


def _is_parametrized(module: nn.Module, kind: type[nn.Module]) -> bool:
    return parametrize.is_parametrized(module) and type(module).__bases__ == (kind,)


def _shadows(module: nn.Module, usual: frozenset[str]) -> str | None:
    """An attribute set on the instance, besides the usual ones, that its class or its tensors have by that name."""
    own = module.__dict__
    if torch.compiler.is_compiling():  # Dynamo of torch 2.10 and 2.11 knows each attribute, but no list of them
        names: Iterable[str] = [name for name in _READ if name in own]
    elif len(own) == len(usual):
        return None
    else:
        names = own
    for name in names:
        if name not in usual and (
            hasattr(type(module), name) or name in module._parameters or name in module._buffers
        ):
            return name
    return None


def _changes_values(module: nn.Module) -> bool:
    """Whether hooks or attributes of the instance may change what it computes, beyond computing its parameters."""
    computing = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
    return bool(
        module._forward_hooks
        or any(not isinstance(hook, computing) for hook in module._forward_pre_hooks.values())
        or any(name in module.__dict__ for name in _CALLED)
        or (not parametrize.is_parametrized(module) and _shadows(module, _CONV_ATTRIBUTES | _NORM_ATTRIBUTES))
    )


def _why_special(module: nn.Module, expected: type[nn.Module], usual: frozenset[str]) -> str:
    kind = type(module)
    if _has_activation(kind) and (inside := [n for n, m in module._modules.items() if not does_nothing(m)]):
        return f"is a {kind.__name__} with {' and '.join(inside)} of its own inside the sum"
    if kind is not expected and not (expected is nn.BatchNorm2d and _is_known_norm(module)):
        plain = f"nn.{expected.__name__}" if expected.__module__.startswith("torch.nn.") else expected.__name__
        return f"is a {kind.__name__}, not a plain {plain}"
    own = next((name for name in _CALLED if name in module.__dict__), _shadows(module, usual))
    return f"has a {own} of its own" if own else "has hooks"


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    # A parametrization (spectral norm) may do in training what it does not in eval.
    parts = [part for module in modules if parametrize.is_parametrized(module) for part in module.modules()]
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _agree(given: Submodules) -> Geometry | str:
    # Where the convolutions sit, if they are the branches of one block, and their batch norms those of one step.
    layout, moved, resized = given.layout, False, False
    for conv, (shape, settings) in zip(given.convs, layout.convs, strict=True):
        if conv is None:
            continue
        found: Any = conv
        resized = resized or kernel_of(found)[0].shape != shape
        own = (found.stride, found.padding, found.dilation, found.groups, found.padding_mode)
        if own != settings or (found.padding_mode != "zeros" and _pads_by(found) != found.padding):
            moved = True
    if resized and (why := _why_sizes_differ(given)) is not None:
        return why
    group = None
    for norm in (*given.norms, given.total):
        if isinstance(norm, nn.SyncBatchNorm) and (its := _group_of(norm)) is not None:
            if group is not None and its is not group:
                return "its batch norms synchronise over different process groups"
            group = its
    geometry = agreed_geometry(given) if moved else layout.geometry
    if (moved or resized) and isinstance(geometry, Geometry) and None in given.convs:
        outputs, inputs = next(kernel_of(conv)[0].shape[:2] for conv in given.convs if conv is not None)
        if geometry.centre is None or outputs != inputs * geometry.groups:
            return "the convolutions change the map's size or channels, which its identity cannot"
    return geometry


def _why_sizes_differ(given: Submodules) -> str | None:
    # Why weights of other shapes than were built, as after physical pruning, are not those of one block, or None.
    channels = None
    for slot, conv, (shape, _) in zip(given.layout.slots, given.convs, given.layout.convs, strict=True):
        if conv is None:
            continue
        found = kernel_of(conv)[0].shape
        channels = channels or found[:2]
        if found != (*channels, *shape[2:]):
            return f"{'.'.join(slot.conv or ())}'s weight is {(*found,)}, not {(*channels, *shape[2:])}"
    return None


def _step(given: Submodules, geometry: Geometry) -> Step:
    branches = []
    for slot, conv, norm in zip(given.layout.slots, given.convs, given.norms, strict=True):
        weight, bias = (None, None) if conv is None else kernel_of(conv)
        branches.append(Branch(slot.taps, weight, bias, None if norm is None else norm_of(norm), slot.name))
    return Step(geometry, tuple(branches), None if given.total is None else norm_of(given.total))


def agreed_geometry(given: Submodules) -> Geometry | str:
    """The geometry that all convolutions sit in, by that of the whole kernel, or which one does not."""
    built = given.layout.geometry
    slots = given.layout.slots
    convs = zip(slots, given.convs, strict=True)
    whole = next((i for i, (slot, conv) in enumerate(convs) if conv is not None and slot.taps == built.whole), None)
    if whole is None:
        return "its convolutions are not where they were built, and none of them has all taps"
    anchor: Any = given.convs[whole]
    named = ".".join(slots[whole].conv or ())
    try:
        geometry = Geometry.make(
            built.kernel, anchor.stride, anchor.padding, anchor.dilation, anchor.groups, anchor.padding_mode
        )
    except (TypeError, ValueError) as error:
        return f"{named} has settings that no block has: {error}"
    for slot, conv in zip(slots, given.convs, strict=True):
        if conv is None:
            continue
        found: Any = conv
        place = geometry.placement(slot.taps)
        for attribute, value, wanted in (
            ("stride", _pair(found.stride), geometry.stride),
            ("padding", _pair(found.padding), place.padding),
            ("dilation", _effective_dilation(found, place.kernel), place.dilation),
            ("groups", found.groups, geometry.groups),
            ("padding_mode", found.padding_mode, geometry.padding_mode),
            ("padding of the input", _pads_by(found), place.padding),
        ):
            if value != wanted and not (attribute == "padding of the input" and geometry.padding_mode == "zeros"):
                name = ".".join(slot.conv or ())
                return f"{name}'s {attribute} is {value}, where a block like {named} has {wanted}"
    return geometry


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)


def _effective_dilation(conv: nn.Conv2d, kernel: Pair) -> Any:
    # Along an axis of one tap it means nothing, and the block has 1 there.
    dilation = _pair(conv.dilation)
    return tuple(1 if k == 1 else d for d, k in zip(dilation, kernel, strict=True))


def _pads_by(conv: nn.Conv2d) -> Any:
    # What nn.Conv2d pads its input by in any mode but 'zeros': a copy of `padding` made when it was built.
    columns, _, rows, _ = conv._reversed_padding_repeated_twice
    return rows, columns


def kernel_of(conv: Any) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a convolution."""
    own = conv._parameters
    # nn.Module.__getattr__ costs ten times a dictionary's look-up, and folding a network reads thousands of these.
    # Whatever is no plain parameter (computed, replaced) goes through it.
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (conv.weight, conv.bias)


def norm_of(bn: Any) -> Norm:
    """The tensors and settings of a known batch norm, by nn.BatchNorm2d.forward's own rules.

    It normalises by the batch in training, or without buffers, and touches the buffers in training only if it
    tracks them.
    """
    own, buffers = bn._parameters, bn._buffers
    if "weight" in own and "bias" in own and "running_mean" in buffers and "running_var" in buffers:
        gamma, beta = own["weight"], own["bias"]
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers.get("num_batches_tracked")
    elif is_frozen(bn):
        return Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, None, bn.eps, None, False)
    else:
        gamma, beta = bn.weight, bn.bias
        mean, var, counter = bn.running_mean, bn.running_var, bn.num_batches_tracked
    batch_stats = bn.training or (mean is None and var is None)
    if bn.training and not bn.track_running_stats:
        mean = var = counter = None
    return Norm(gamma, beta, mean, var, counter, bn.eps, bn.momentum, batch_stats, _group_of(bn))


def _group_of(bn: nn.Module) -> dist.ProcessGroup | None:
    """The process group that bn's batch statistics span now, by nn.SyncBatchNorm.forward's own rules, or None."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
