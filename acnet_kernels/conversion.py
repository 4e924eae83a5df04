"""Turning networks into ACNets and back: convert() conv(+BN) → ACBlock; fuse() and fold() any block → conv."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import residual
from .absorbing import absorbable
from .acceleration import Accelerated, HostBlock, detach, is_block, seen
from .activations import activation_of
from .block import ACBlock
from .conv_bn_pairs import Usage, trace
from .observing import as_call, observe
from .ops.fuse_blocks import Arguments
from .ops.fusion import fold_arguments
from .rep import RepBlock
from .spec import prefers_channels_last
from .submodules import is_frozen, refresh

Skip = Callable[[str, nn.Conv2d], bool] | Collection[str] | None
RECORD = "_acnet_conversions"


@dataclass(frozen=True)
class Conversion:
    """What convert() did with one convolution, and why."""

    name: str
    converted: bool
    note: str


def convert(
    model: nn.Module,
    *,
    kernel_sizes: Collection[int] = (3, 5),
    init: str = "fresh",
    skip: Skip = None,
    gamma: float | None = None,
    backend: str = "auto",
    example: Any = None,
    fuse_activations: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Turns each Conv2d, with the BatchNorm2d that consumes it alone, into an ACBlock.

    The consumer is found by torch.fx; where a module cannot be traced, by Sequential order and, given an example,
    by running the model. The absorbed batch norm leaves an nn.Identity behind. Shared modules and tied weights
    stay shared. What was and was not converted, which batch norms stay after a block, and why, is in
    `explain(model)`.

    Args:
        model: any module; itself an nn.Conv2d, the block is returned.
        kernel_sizes: the sides of kernels to convert; 7×7 stems and 1×1 stay unless named here.
        init: 'fresh' initialises the blocks anew; 'from_conv' keeps the function: the branch of all taps takes the
            convolution and its batch norm over, γ = 0 silences the others until training wakes them. Eval
            outputs are then equal before and after; so are training outputs where the batch norm was absorbed. A
            batch norm that is not trained (in eval without gradients, or torchvision's or detectron2's
            FrozenBatchNorm2d) is taken over too; kernels of 0 silence the others there.
        skip: names or fnmatch patterns to leave alone, or a predicate (name, conv) → bool.
        gamma: starting γ of fresh blocks (the authors' later setting on CIFAR: 1/3).
        backend: the blocks' backend.
        example: what the model is called with: a tensor, its shape (zeros in the dtype and on the device of the
            first parameter), a tuple of arguments or a dict of keyword arguments. Where torch.fx cannot trace the
            model (data-dependent control flow, say), it runs once on it, in eval mode without gradients, and is
            left as it was. A run shows the branches that it takes: give an example that takes those that matter.
        fuse_activations: have a block apply the ReLU, ReLU6, Hardswish or SiLU module that takes its output and
            nothing else, in its own passes; the module leaves an nn.Identity behind, and the function stays.
            Residual blocks of torchvision and timm (BasicBlock, Bottleneck) add their shortcut and apply their ReLU
            there too, by a forward of ours on the same module; `restore` gives them their own back.
        inplace: change model itself instead of a deep copy.

    Returns:
        The converted model.

    Raises:
        ValueError, TypeError: an argument out of range, or an example that the model does not run on; the model is
            then as it was.
    """
    if init not in ("fresh", "from_conv"):
        raise ValueError(f"init must be 'fresh' or 'from_conv', got {init!r}")
    if init == "from_conv" and gamma is not None:
        raise ValueError(
            f"gamma is for init='fresh': init='from_conv' fixes every γ to keep the function, got {gamma}"
        )
    sizes = set(kernel_sizes)
    bad = [k for k in sizes if not isinstance(k, int) or k < 1 or k % 2 == 0]
    if bad:
        raise ValueError(f"kernel_sizes must be odd positive ints, got {sorted(kernel_sizes)}")
    call = None if example is None else as_call(model, example)
    if not inplace:
        model = _copy(model)
    names = _convolutions(model)
    names_of = {module: name for name, module in model.named_modules()}
    refusals = {conv: _refusal(conv, aliases, sizes, skip) for conv, aliases in names.items()}
    usage = trace(model)
    if call is not None and any(refusal is None and usage.is_unknown(conv) for conv, refusal in refusals.items()):
        usage.learn(observe(model, call))
    for conv, refusal in refusals.items():
        if refusal is None and conv in usage.read:
            refusals[conv] = "its weight is read outside its own forward"
    _refuse_ties(model, refusals)
    builder = _Builder(init, gamma, backend)
    replacements: dict[nn.Module, nn.Module] = {}
    record = []
    for conv, aliases in names.items():
        note = refusals[conv]
        if note is None:
            bn, note = _absorbed(conv, usage, init)
            replacements[conv] = builder.block(conv, bn)
            if bn is not None:
                replacements[bn] = nn.Identity().train(bn.training)
        record += [Conversion(name or "(model)", conv in replacements, note) for name in aliases]
    model = _replace(model, replacements)
    if fuse_activations:
        pairs = absorbable(model)
        for block, act in pairs:
            block.activation = activation_of(act)
        model = _replace(model, {act: nn.Identity().train(act.training) for _, act in pairs})
        residual.attach(model)
        acts: dict[nn.Module | None, str] = {block: names_of[act] for block, act in pairs}
        notes = {name: acts.get(replacements.get(conv)) for conv, own in names.items() for name in own}
        record = [replace(c, note=f"{c.note}, and {its}") if (its := notes.get(c.name)) else c for c in record]
    setattr(model, RECORD, [*getattr(model, RECORD, []), *record])
    return model


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, of pruned modules too: their `weight` is the result of an operation, which does not copy."""
    with torch.no_grad():
        for module in model.modules():
            refresh(module)
    return copy.deepcopy(model)


def _convolutions(model: nn.Module) -> dict[nn.Conv2d, list[str]]:
    """Every Conv2d outside existing blocks → all its names."""
    blocks = [name for name, module in model.named_modules(remove_duplicate=False) if is_block(module)]
    found: dict[nn.Conv2d, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d) and not any(name.startswith(f"{b}." if b else "") for b in blocks):
            found.setdefault(module, []).append(name)
    return found


def _refusal(conv: nn.Conv2d, names: list[str], sizes: set[int], skip: Skip) -> str | None:
    """Why conv stays as it is, or None."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain nn.Conv2d: its forward may differ"
    rows, columns = conv.kernel_size
    if rows != columns or rows not in sizes:
        return f"kernel {rows}×{columns} is not among kernel_sizes={sorted(sizes)}"
    if any(skip(name, conv) if callable(skip) else _matches(name, skip) for name in names):
        return "skipped as asked"
    if any(getattr(conv, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
        return "it has hooks (pruning and weight norm use them), which a block would lose"
    return None


def _matches(name: str, patterns: Collection[str] | None) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ())


def _refuse_ties(model: nn.Module, refusals: dict[nn.Conv2d, str | None]) -> None:
    """Adds a refusal where a parameter also belongs to a module that is not being converted alike."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(module)
    changed = True
    while changed:  # one refusal can leave another convolution's weight tied to what stays
        changed = False
        for conv, refusal in refusals.items():
            if refusal is None and not all(
                isinstance(other, nn.Conv2d)
                and refusals.get(other, "not listed") is None
                and other.kernel_size == conv.kernel_size
                for other in owners[conv.weight]
            ):
                refusals[conv] = "its weight is tied to a module that is not being converted"
                changed = True
            elif refusal is None and conv.bias is not None and len(owners[conv.bias]) > 1:
                refusals[conv] = "its bias is tied to another module"
                changed = True


def _absorbed(conv: nn.Conv2d, usage: Usage, init: str) -> tuple[nn.Module | None, str]:
    """The batch norm the block takes over, and the note that says so or why there is none."""
    bn, note = usage.absorbable(conv)
    if bn is None:
        return None, note
    frozen = is_frozen(bn)
    if type(bn) is not nn.BatchNorm2d and not (frozen and init == "from_conv"):
        return None, f"its consumer is a {type(bn).__name__}, which stays after the block"
    if bn._forward_hooks or bn._forward_pre_hooks or bn._backward_hooks:
        return None, "its batch norm has hooks and stays after the block"
    if bn.weight is None or bn.running_mean is None or len(bn.running_mean) != conv.out_channels:
        return None, "its batch norm has no γ or no running statistics and stays after the block"
    return bn, "with its frozen batch norm" if frozen else "with its batch norm"


class _Builder:
    """Builds the blocks of one convert() call, tied where the convolutions' weights were tied."""

    def __init__(self, init: str, gamma: float | None, backend: str) -> None:
        self.init, self.gamma, self.backend = init, gamma, backend
        self.tied: dict[Tensor, ACBlock] = {}

    def block(self, conv: nn.Conv2d, bn: Any) -> ACBlock:
        """The ACBlock that takes the place of conv and bn."""
        block = ACBlock(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
            gamma_init=self.gamma,
            eps=1e-5 if bn is None else bn.eps,
            momentum=0.1 if bn is None or is_frozen(bn) else bn.momentum,
            backend=self.backend,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        frozen_norm = conv if bn is None else bn
        for name, norm in block.norms().items():
            if bn is not None:
                norm.to(bn.weight.dtype)
            for parameter in (norm.weight, norm.bias):
                parameter.requires_grad_(frozen_norm.weight.requires_grad)
            norm.train(frozen_norm.training)
            branch = getattr(block, f"{name}_conv")
            branch.weight.requires_grad_(conv.weight.requires_grad)
            branch.train(conv.training)
            if prefers_channels_last(conv.weight, conv.weight):
                branch.to(memory_format=torch.channels_last)
        block.training = conv.training
        if self.init == "from_conv":
            self._take_over(block, conv, bn)
        first = self.tied.setdefault(conv.weight, block)
        for name in block.branches:
            getattr(block, f"{name}_conv").weight = getattr(first, f"{name}_conv").weight
        return block

    @staticmethod
    def _take_over(block: ACBlock, conv: nn.Conv2d, bn: Any) -> None:
        block.single_init()
        block.square_conv.weight = conv.weight
        with torch.no_grad():
            if bn is None:
                assert block.square_bn.running_var is not None
                block.square_bn.running_var.fill_(1 - block.eps)  # so that s = 1
                if conv.bias is not None:
                    block.square_bn.bias.copy_(conv.bias)
                return
            block.square_bn = bn
            if conv.bias is not None:
                bn.running_mean -= conv.bias  # s·(y + b − μ) = s·(y − (μ − b))
            if is_frozen(bn) or not (bn.training or bn.weight.requires_grad):
                # A γ that nothing trains would silence a branch for good: its kernel starts at 0 instead, s at 1.
                for name in block.branches[1:]:
                    own = copy.deepcopy(bn)
                    own.weight.fill_(1)
                    own.bias.zero_()
                    own.running_mean.zero_()
                    own.running_var.fill_(1 - bn.eps)
                    setattr(block, f"{name}_bn", own)
                    getattr(block, f"{name}_conv").weight.zero_()


Block = RepBlock | HostBlock


def blocks_of(model: nn.Module | Iterable[nn.Module], *, others: bool = False) -> dict[str, Block]:
    """Name → every block of a model or of a sequence of modules, in order, each once in a model.

    Accelerated blocks of other libraries are among them; with `others`, those too that could be.
    """
    found: dict[str, Block] = {}
    if isinstance(model, nn.Module):
        _collect(model, "", found, set(), others)
        return found
    for index, module in enumerate(model):
        if not isinstance(module, nn.Module):
            raise TypeError(f"model_or_blocks must be a module or modules, got {type(module).__name__} at {index}")
        _collect(module, str(index), found, set(), others)
    return found


def _collect(module: nn.Module, name: str, found: dict[str, Block], visited: set[int], others: bool) -> None:
    # named_modules() without the blocks' own submodules, which are most of a network's modules.
    if id(module) in visited:
        return
    visited.add(id(module))
    if isinstance(module, RepBlock):
        found[name] = module
        return
    host = seen(module) if others or isinstance(module, Accelerated) else None
    if isinstance(host, HostBlock):
        found[name] = host
        return
    for key, child in module._modules.items():
        if child is not None:
            _collect(child, f"{name}.{key}" if name else key, found, visited, others)


def fold(
    model_or_blocks: nn.Module | Iterable[nn.Module], *, out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of the one convolution each block equals in eval, all computed in one call.

    Differentiable in every weight, convolution bias, γ and β, unless `out` is given.

    Args:
        model_or_blocks: a module, whose blocks are taken in the order of named_modules(), or modules.
        out: one (weight K×C/groups×k×k, bias K) a block, written in place and returned.

    Raises:
        ValueError: a deployed block, one that is not known to equal a convolution, or an `out` of other lengths or
            shapes.
    """
    return _fold(blocks_of(model_or_blocks), out)


def _fold(
    blocks: dict[str, Block], out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    arguments = Arguments.empty()
    for name, block in blocks.items():
        try:
            block.append_fold(arguments)
        except ValueError as error:
            raise ValueError(f"block {name or '(model)'}: {error}") from None
    return fold_arguments(arguments, out)


def fuse(model: nn.Module, inplace: bool = False, *, keep_blocks: bool = False) -> nn.Module:
    """Replaces every block of model by the one nn.Conv2d that it equals, all folded in one call.

    A block that does more after its sum (RepVGGBlock, MobileOneBlock) stays, deployed. Blocks of other libraries
    that `accelerate` knows are folded too, accelerated or not: they stay in their library's own folded form, or are
    replaced by the convolution and what follows it.

    Device, dtype, training flags, requires_grad, memory layout and hooks on the blocks are kept. Folded in
    float32 or better, rounded to the weights' dtype at the end. Warns about blocks in train mode: their batch
    statistics are not what the folded convolution uses.

    Args:
        model: any module with blocks.
        inplace: change model itself instead of a deep copy. A model that is itself a block is deployed in place.
        keep_blocks: leave deployed blocks (`switch_to_deploy`), whose state dicts have the original code's names,
            as fused_conv.weight and fused_conv.bias.

    Returns:
        The folded network.

    Raises:
        ValueError: a block that is not known to equal a convolution (the message names it); the model is then as it
            was.
    """
    with torch.inference_mode(False):
        if not inplace:
            model = _copy(model)
        blocks = blocks_of(model, others=True)
        trained = {name: block for name, block in blocks.items() if not block.deploy}
        with torch.no_grad():
            folded = _fold(trained)
    training = [name for name, block in trained.items() if block.training]
    if training:
        warnings.warn(
            f"{len(training)} of {len(trained)} blocks are folded in train mode (first: {training[0]!r}); the "
            "folded convolutions use the running statistics, not the batch's: call eval() to see their output",
            stacklevel=2,
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for block, (weight, bias) in zip(trained.values(), folded, strict=True):
        if isinstance(block, RepBlock):
            block.become(weight, bias)
            continue
        other = block.become(weight, bias)
        if other is not block.module:
            replacements[block.module] = _with_hooks(block.module, other)
    for block in blocks.values():
        if isinstance(block, HostBlock):
            detach(block.module)
        elif not keep_blocks and block.is_a_convolution and (block is not model or not inplace):
            replacements[block] = _with_hooks(block, block.fused)
    return _replace(model, replacements)


def _with_hooks(block: nn.Module, conv: nn.Module) -> nn.Module:
    # What is hung on a block is hung on what takes its place.
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(conv, name).update(getattr(block, name))
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        getattr(conv, name).update(getattr(block, name))
    return conv


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """model with modules replaced wherever a module has them as a child."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements and parent not in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)
