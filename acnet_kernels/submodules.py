"""What a block's submodules compute, read off their tensors and attributes, where these say it all.

The fast paths and the folds speak for real nn.Conv2d and nn.BatchNorm2d modules. They may where the modules are
what their class says: a known class, no hook, nothing set on the instance that its class's forward would call, and
convolutions that sit as the branches of one block do. `speaks_for` is the one place that decides it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .geometry import Geometry, Pair
from .spec import Branch, Norm, Step

Modules = Mapping[str, nn.Module]

# What every instance of these has; anything more may shadow what the class's forward reads.
_CONV_ATTRIBUTES = frozenset(nn.Conv2d(1, 1, 1).__dict__)
_NORM_ATTRIBUTES = frozenset(nn.BatchNorm2d(1).__dict__)
# What a traced forward may call or read under a name that an instance can shadow.
_CALLED = ("forward", "_conv_forward", "_check_input_dim")
_READ = (*_CALLED, "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What a class may define and still be the batch norm that it derives from.
_HARMLESS = {"__init__", "_check_input_dim", "extra_repr", "__constants__"}
_HARMLESS |= {"__doc__", "__module__", "__annotations__", "__annotate_func__", "__annotations_cache__"}
_HARMLESS |= {"__static_attributes__", "__firstlineno__"}
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def read(convs: Modules, norms: Modules, built: Geometry) -> Step | str:
    """The step that the submodules compute when called one by one, or why only calling them can tell.

    Args:
        convs: branch name → its convolution.
        norms: branch name → its batch norm, or 'sum' → the one after the sum.
        built: where the branches were put; the step's geometry where the convolutions say the same, else the one
            they agree on.
    """
    geometry = speaks_for(convs, norms, built)
    return geometry if isinstance(geometry, str) else _step(convs, norms, geometry)


def speaks_for(convs: Modules, norms: Modules, built: Geometry) -> Geometry | str:
    """The predicate of `read`, which takes its arguments: the geometry if it holds, else why it does not."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "a global module hook is registered"
    compiling = torch.compiler.is_compiling()
    for name, conv in convs.items():
        if type(conv) is not nn.Conv2d or _is_altered(conv, _CONV_ATTRIBUTES, compiling):
            return f"{name}_conv {_why_special(conv, nn.Conv2d, _CONV_ATTRIBUTES)}"
    for name, norm in norms.items():
        if not (type(norm) is nn.BatchNorm2d or _is_known_norm(norm)) or _is_altered(
            norm, _NORM_ATTRIBUTES, compiling
        ):
            return f"{_norm_label(name)} {_why_special(norm, nn.BatchNorm2d, _NORM_ATTRIBUTES)}"
    return _agree(convs, norms, built)


def read_for_fold(convs: Modules, norms: Modules, built: Geometry) -> Step:
    """`read` for eval, of submodules too whose parameters are computed from others (pruning, weight norm …).

    Hooks known to do nothing but compute a parameter are run, so that it is not the last step's.

    Raises:
        ValueError: what the submodules compute in eval is not known to be one fixed convolution; names the
            submodule and its class.
    """
    for name, conv in convs.items():
        refresh(conv)
        if not (type(conv) is nn.Conv2d or _is_parametrized(conv, nn.Conv2d)) or _changes_values(conv):
            raise ValueError(f"cannot fold: {name}_conv {_why_special(conv, nn.Conv2d, _CONV_ATTRIBUTES)}")
    for name, norm in norms.items():
        refresh(norm)
        if not (_is_known_norm(norm) or _is_parametrized(norm, nn.BatchNorm2d)) or _changes_values(norm):
            reason = _why_special(norm, nn.BatchNorm2d, _NORM_ATTRIBUTES)
            raise ValueError(f"cannot fold: {_norm_label(name)} {reason}")
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"cannot fold: {_norm_label(name)} has track_running_stats=False, so it always normalises by the "
                "batch and no fixed convolution equals it"
            )
    with _evaluating([*convs.values(), *norms.values()]):
        geometry = _agree(convs, norms, built)
        if isinstance(geometry, str):
            raise ValueError(f"cannot fold: {geometry}")
        return _step(convs, norms, geometry)


def refresh(module: nn.Module) -> None:
    """Has the hooks that compute a module's parameters from others compute them now, as in eval."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
        elif isinstance(hook, (prune.BasePruningMethod, WeightNorm)):
            hook(module, None)


def _is_altered(module: nn.Module, usual: frozenset[str], compiling: bool) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ((compiling or len(module.__dict__) != len(usual)) and _shadows(module, usual))
    )


def _is_known_norm(norm: nn.Module) -> bool:
    """Whether a module's eval is nn.BatchNorm2d's.

    Known are nn.BatchNorm2d and nn.SyncBatchNorm, classes derived from the base of both that change nothing but
    the check of the input (what undoing a SyncBatchNorm conversion leaves behind), and FrozenBatchNorm2d.
    """
    kind: type = type(norm)
    return kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm or is_frozen(norm) or _changes_nothing(kind)


@functools.cache
def _changes_nothing(kind: type) -> bool:
    if not issubclass(kind, _BatchNorm) or issubclass(kind, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return False
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, *_BatchNorm.__mro__)
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
    if kind is not expected and not (expected is nn.BatchNorm2d and _is_known_norm(module)):
        return f"is a {kind.__name__}, not a plain nn.{expected.__name__}"
    own = next((name for name in _CALLED if name in module.__dict__), _shadows(module, usual))
    return f"has a {own} of its own" if own else "has hooks"


def _norm_label(name: str) -> str:
    return "bn" if name == "sum" else f"{name}_bn"


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


def _agree(convs: Mapping[str, Any], norms: Mapping[str, Any], built: Geometry) -> Geometry | str:
    # Where the convolutions sit, if they are the branches of one block, and their batch norms those of one step.
    channels = None
    moved = False
    for name, conv in convs.items():
        rows_columns, wanted = built.settings(name)
        k, c, *taps = kernel_of(conv)[0].shape
        if (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) != wanted or (
            conv.padding_mode != "zeros" and _pads_by(conv) != conv.padding
        ):
            moved = True
        channels = channels or (k, c)
        if (k, c) != channels or taps != rows_columns:
            return f"{name}_conv's weight is {(k, c, *taps)}, not {(*channels, *rows_columns)}"
    group = None
    for norm in norms.values():
        if type(norm) is nn.SyncBatchNorm and (its := _group_of(norm)) is not None:
            if group is not None and its is not group:
                return "its batch norms synchronise over different process groups"
            group = its
    return agreed_geometry(convs, built) if moved else built


def _step(convs: Mapping[str, Any], norms: Mapping[str, Any], geometry: Geometry) -> Step:
    found = {name: norm_of(norm) for name, norm in norms.items()}
    branches = {name: Branch(*kernel_of(conv), found.get(name)) for name, conv in convs.items()}
    return Step(geometry, branches, found.get("sum"))


def agreed_geometry(convs: Mapping[str, Any], built: Geometry) -> Geometry | str:
    """The geometry, of the built one's kernel and shift, that all convolutions sit in, or which one does not."""
    square = convs["square"]
    try:
        geometry = Geometry.make(
            built.kernel,
            square.stride,
            square.padding,
            square.dilation,
            square.groups,
            square.padding_mode,
            built.shift,
        )
    except (TypeError, ValueError) as error:
        return f"square_conv has settings that no block has: {error}"
    for name, conv in convs.items():
        place = geometry.placement(name)
        for attribute, found, wanted in (
            ("stride", _pair(conv.stride), geometry.stride),
            ("padding", _pair(conv.padding), place.padding),
            ("dilation", _effective_dilation(conv, place.kernel), place.dilation),
            ("groups", conv.groups, geometry.groups),
            ("padding_mode", conv.padding_mode, geometry.padding_mode),
            ("padding of the input", _pads_by(conv), place.padding),
        ):
            if found != wanted and not (attribute == "padding of the input" and geometry.padding_mode == "zeros"):
                return f"{name}_conv's {attribute} is {found}, where a block like square_conv has {wanted}"
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
