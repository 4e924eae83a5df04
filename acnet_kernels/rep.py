"""RepBlock: what every re-parameterised block shares, a sum of convolutions with batch norms that folds into one.

A subclass builds its modules under its own names and says in a `Layout` which is which branch (`block.py`).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn

from . import lanes
from .backends import planner
from .functional import plan, run
from .geometry import Geometry, IntOrPair, PaddingMode, Pair, Taps, as_int
from .ops.epilogue import activate
from .ops.fuse_blocks import Arguments
from .ops.fusion import FoldEntry, append_branches, append_step, fold
from .spec import Epilogue, Problem, Step, autocast_dtype, prefers_channels_last
from .steps.epilogue import check_activation, check_residual, finish
from .submodules import (
    CONV_BN,
    Layout,
    Settings,
    Slot,
    Submodules,
    agreed_geometry,
    conv_at,
    kernel_of,
    module_at,
    read,
    read_for_fold,
    speaks_for,
)


def conv_bn(conv: nn.Conv2d) -> nn.Sequential:
    """The convolution and its batch norm as most such blocks hold them: children `conv` and `bn` of one module."""
    bn = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
    return nn.Sequential(OrderedDict(zip(CONV_BN, (conv, bn), strict=True)))


def usual_slots(
    geometry: Geometry, whole: Sequence[tuple[str, ...]], scale: str | None, skip: str | None
) -> list[Slot]:
    """The branches of most such blocks: convolutions of all taps, one of the centre tap, and the identity.

    Args:
        geometry: of an odd kernel.
        whole: where each convolution of all taps hangs, with its batch norm.
        scale: the same of the 1×1 convolution, None for none.
        skip: the identity's batch norm, None for none; there is none either where maps change their size.

    Raises:
        ValueError: the kernel has no centre.
    """
    rows, columns = geometry.kernel
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"kernel_size must be odd, for a 1×1 branch to have a centre, got {geometry.kernel}")
    centre = Taps(rows // 2, columns // 2, 1, 1)
    places = [(path, geometry.whole) for path in whole] + ([] if scale is None else [((scale,), centre)])
    conv, bn = CONV_BN
    slots = [Slot(".".join(path), taps, (*path, conv), (*path, bn), path) for path, taps in places]
    if skip is not None and geometry.centre is not None:
        slots.append(Slot(skip, centre, None, (skip,)))
    return slots


def make_conv(placed: tuple[torch.Size, Settings], bias: bool, factory: Mapping[str, Any]) -> nn.Conv2d:
    """The convolution of a weight's shape and settings."""
    (outputs, cg, rows, columns), (stride, padding, dilation, groups, mode) = placed
    size = (rows, columns)
    return nn.Conv2d(cg * groups, outputs, size, stride, padding, dilation, groups, bias, mode, **factory)


def as_conv(geometry: Geometry, weight: Tensor, bias: Tensor, like: Tensor | None, trained: bool) -> nn.Conv2d:
    """The nn.Conv2d of this geometry that has this weight, in like's memory layout, and this bias."""
    channels = weight.shape[1] * geometry.groups, weight.shape[0]
    conv = make_conv(conv_at(geometry, channels, geometry.whole), True, {"device": "meta"})
    if like is not None and prefers_channels_last(like, like):
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight.detach(), trained)
    conv.bias = nn.Parameter(bias.detach(), trained)
    return conv


class RepBlock(nn.Module):
    """A block whose branches run as one step in training and as one folded convolution in eval.

    A subclass calls `_lay_out` in its constructor, before it builds its modules, and names in `FUSED` the one
    convolution that `switch_to_deploy` leaves.
    """

    FUSED = "fused_conv"
    deploy: bool
    backend: str

    def _lay_out(
        self,
        geometry: Geometry,
        in_channels: SupportsIndex,
        out_channels: SupportsIndex,
        slots: Sequence[Slot],
        total: str | None,
        deploy: bool,
        backend: str,
    ) -> None:
        found = []
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            channels = as_int(value, f"{name} must be an int")
            if channels < 1 or channels % geometry.groups:
                raise ValueError(f"{name} must be a positive multiple of groups={geometry.groups}, got {channels}")
            found.append(channels)
        self._layout = Layout.of(geometry, (found[0], found[1]), slots, total)
        self.deploy = deploy
        self.backend = planner.check_choice(backend)

    def _conv(self, number: int, factory: Mapping[str, Any]) -> nn.Conv2d:
        """The convolution of a slot."""
        return make_conv(self._layout.convs[number], False, factory)

    def _fused_conv(self, factory: Mapping[str, Any]) -> nn.Conv2d:
        geometry = self._layout.geometry
        return make_conv(conv_at(geometry, self._layout.channels, geometry.whole), True, factory)

    @property
    def fused(self) -> nn.Conv2d:
        """The folded convolution of a deployed block."""
        return getattr(self, self.FUSED)

    def submodules(self) -> Submodules:
        """The branches' modules, of a block that is not deployed."""
        return Submodules.of(self, self._layout)

    def finish(self, out: Tensor) -> Tensor:
        """What the block does with the sum of its branches and the residual: nothing, unless a subclass says."""
        return out

    def finishing(self) -> str | None:
        """The activation that `finish` is now, '' for nothing, None for something else."""
        return "" if type(self).finish is RepBlock.finish else None

    @property
    def is_a_convolution(self) -> bool:
        """Whether nothing comes after the sum, so that a deployed block is its folded convolution alone."""
        return self.finishing() == ""

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """N×C×H×W → N×K×H'×W', as nn.Conv2d: the sum of the branches and the residual, then the activation.

        Args:
            input: N×C×H×W.
            residual: a map of the output's shape, dtype and device, added before the activation.
            activation: taken of a block that has none itself: 'relu', 'relu6', 'hardswish' or 'silu'.

        Raises:
            ValueError, TypeError: the residual is another map than that, or the block does more after its sum than
                an activation, so that there is no one place to add it; the activation is unknown, or the block has
                one.
        """
        own = self.finishing()
        if activation is not None:
            if own != "":
                raise ValueError(f"activation must be None for a block that has one itself, got {activation!r}")
            own = check_activation(activation)
        # Tracers record the submodules' calls: right in both modes, and PyTorch's operators alone.
        if self.deploy or isinstance(input, fx.Proxy) or torch.jit.is_tracing():
            return self._through_modules(input, residual, own, activation is None)
        compiling = torch.compiler.is_compiling()
        if not compiling and (own is not None or residual is None):
            out = lanes.take(self, input, self.backend, own or "", residual)
            if out is not None:
                return out if own is not None else self.finish(out)
        return self._step(input, residual, own, compiling)

    def _through_modules(self, x: Tensor, residual: Tensor | None, activation: str | None, is_own: bool) -> Tensor:
        self._check_residual(x, residual, activation)
        out = self.fused(x) if self.deploy else self._forward_modules(x)
        out = out if residual is None else out + residual
        return self.finish(out) if is_own else activate(out, activation or "")

    def _step(self, x: Tensor, residual: Tensor | None, activation: str | None, compiling: bool) -> Tensor:
        given = self.submodules()
        step = read(given)
        epilogue = Epilogue(activation or "", residual)
        if isinstance(step, str) or activation is None:
            self._check_residual(x, residual, activation)
        if isinstance(step, str):
            out = finish(self._forward_modules(x), epilogue)
        else:
            out = run(x, step, self.backend, epilogue)
            if not compiling:
                lanes.learn(self, given, step, x, self.backend)
        return self.finish(out) if activation is None else out

    def _check_residual(self, x: Tensor, residual: Tensor | None, activation: str | None) -> None:
        if residual is None:
            return
        if activation is None:
            raise ValueError(
                f"residual: this {type(self).__name__} does more after its sum than an activation that is known "
                "(squeeze-and-excitation, another module, one with hooks); add the residual to its output"
            )
        if not (isinstance(x, fx.Proxy) or isinstance(residual, fx.Proxy)):
            shape = (x.shape[0], self.out_channels, *self.geometry.output_size(x.shape[2], x.shape[3]))
            check_residual(residual, shape, autocast_dtype(x.dtype, x.device.type), x.device)

    def __getstate__(self) -> dict[str, Any]:
        return lanes.forget(self.__dict__)

    def _forward_modules(self, x: Tensor) -> Tensor:
        given, geometry, out = self.submodules(), self.geometry, None
        for slot, conv, norm in zip(self._layout.slots, given.convs, given.norms, strict=True):
            if slot.container is not None:
                parts = [module_at(self._modules, slot.container)]
            else:
                parts = [m for path, m in ((slot.conv, conv), (slot.norm, norm)) if path is not None]
            if parts and all(part is None for part in parts):  # a branch set to None adds nothing
                continue
            y = x if slot.conv is None else geometry.placement(slot.taps).apply(x, geometry.padding_mode)
            for part in parts:
                y = part(y)  # type: ignore[misc]
            # A sum would broadcast, or raise without a name. What is traced has no shapes to compare.
            if isinstance(out, Tensor) and not torch.jit.is_tracing() and out.shape != y.shape:
                raise ValueError(
                    f"the branches' maps must have one shape to be summed: {self._layout.slots[0].name}'s is "
                    f"{tuple(out.shape)}, {slot.name}'s {tuple(y.shape)}"
                )
            out = y if out is None else out + y
        if out is None:
            raise ValueError(f"the block has no branch left: {given.missing} is None")
        return out if self._layout.total is None else given.total(out)  # type: ignore[misc]

    def step(self) -> Step:
        """The tensors and settings one step computes with, read from the submodules as they are now.

        Raises:
            ValueError: only calling the submodules can tell (see `module_path_reason`).
        """
        step = read(self.submodules())
        if isinstance(step, str):
            raise ValueError(f"the block runs through its submodules: {step}")
        return step

    def plan(self, x: Tensor) -> tuple[Problem, planner.Choice]:
        """What forward(x) runs, and why; x may be a meta tensor.

        Raises:
            ValueError: as `step`, or x does not fit.
        """
        return plan(x, self.step(), self.backend)

    def module_path_reason(self) -> str | None:
        """Why the step must go through the submodules' own forward (always eager), or None."""
        step = None if self.deploy else read(self.submodules())
        return step if isinstance(step, str) else None

    @property
    def geometry(self) -> Geometry:
        """The whole kernel's: as the convolutions' attributes say now where they agree, else as built."""
        built = self._layout.geometry
        if self.deploy:
            given: Any = self.fused
            if not isinstance(given, nn.Conv2d):
                return built
            try:
                found: Geometry | str = Geometry.make(
                    built.kernel, given.stride, given.padding, given.dilation, given.groups, given.padding_mode
                )
            except (TypeError, ValueError):
                return built
        else:
            modules = self.submodules()
            if not all(conv is None or isinstance(conv, nn.Conv2d) for conv in modules.convs):
                return built
            found = agreed_geometry(modules)
        return built if isinstance(found, str) else found

    def _place(self, **settings: Any) -> None:
        """Moves every convolution to where a block of these settings has it."""
        was = self.geometry
        names = ("stride", "padding", "dilation", "padding_mode")
        new = {name: getattr(was, name) for name in names} | settings
        geometry = Geometry.make(was.kernel, groups=was.groups, **new)
        layout = Layout.of(geometry, self._layout.channels, self._layout.slots, self._layout.total)
        convs: list[Any] = [self.fused] if self.deploy else list(self.submodules().convs)
        placed = [conv_at(geometry, layout.channels, geometry.whole)] if self.deploy else layout.convs
        for conv, own in zip(convs, placed, strict=True):
            if conv is not None:
                like = make_conv(own, False, {"device": "meta"})
                for attribute in (*names, "_reversed_padding_repeated_twice"):
                    setattr(conv, attribute, getattr(like, attribute))
        self._layout = layout

    # nn.Conv2d's attributes. Setting one moves all branches.
    @property
    def in_channels(self) -> int:
        """C, as the convolutions' weights have it now."""
        weight = self._kernel()
        return self._layout.channels[0] if weight is None else weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """K, as the convolutions' weights have it now."""
        weight = self._kernel()
        return self._layout.channels[1] if weight is None else weight.shape[0]

    def _kernel(self) -> Tensor | None:
        convs = [self.fused] if self.deploy else self.submodules().convs
        weight = getattr(next((conv for conv in convs if conv is not None), None), "weight", None)
        return weight if isinstance(weight, Tensor) and weight.dim() == 4 else None

    @property
    def kernel_size(self) -> Pair:
        """(rows, columns)."""
        return self._layout.geometry.kernel

    @property
    def stride(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.stride

    @stride.setter
    def stride(self, value: IntOrPair) -> None:
        self._place(stride=value)

    @property
    def padding(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.padding

    @padding.setter
    def padding(self, value: IntOrPair | str) -> None:
        self._place(padding=value)

    @property
    def dilation(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.dilation

    @dilation.setter
    def dilation(self, value: IntOrPair) -> None:
        self._place(dilation=value)

    @property
    def groups(self) -> int:
        """As nn.Conv2d's."""
        return self.geometry.groups

    @property
    def padding_mode(self) -> PaddingMode:
        """As nn.Conv2d's."""
        return self.geometry.padding_mode

    @padding_mode.setter
    def padding_mode(self, value: PaddingMode) -> None:
        self._place(padding_mode=value)

    @property
    def taps(self) -> dict[str, Taps]:
        """Branch name → its taps of the whole kernel."""
        return {slot.name: slot.taps for slot in self._layout.slots}

    def norms(self) -> dict[str, nn.BatchNorm2d]:
        """Branch name, or 'sum', → its batch norm; empty once deployed."""
        if self.deploy:
            return {}
        given = self.submodules()
        found = {
            slot.name: norm for slot, norm in zip(given.layout.slots, given.norms, strict=True) if norm is not None
        }
        return found if given.total is None else {**found, "sum": given.total}  # type: ignore[dict-item, return-value]

    def convs(self) -> dict[str, nn.Conv2d]:
        """Branch name → its convolution; empty once deployed."""
        if self.deploy:
            return {}
        given = self.submodules()
        found: Any = zip(given.layout.slots, given.convs, strict=True)
        return {slot.name: conv for slot, conv in found if conv is not None}

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """(weight K×C/groups×rows×columns, bias K) of the convolution that the block is in eval; differentiable.

        Raises:
            ValueError: a batch norm keeps no running statistics, so no fixed convolution equals the block.
        """
        if self.deploy:
            assert self.fused.bias is not None
            return self.fused.weight, self.fused.bias
        return fold(self.fold_step())

    def fold_step(self) -> Step:
        """The step in eval, for folding: it is one fixed convolution.

        Raises:
            ValueError: the block is deployed, a batch norm keeps no running statistics, or what a submodule
                computes is not known to fold; names the submodule and its class.
        """
        if self.deploy:
            raise ValueError("cannot fold: the block is deployed, its convolution is folded already")
        return read_for_fold(self.submodules())

    def append_fold(self, a: Arguments) -> None:
        """Appends the block's tensors to the fold operator's lists: what `fold_step` gives, in less time.

        Raises:
            ValueError: as `fold_step`; a is then as it was.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and lanes.append_fold(self, a):
            return
        given = None if self.deploy else self.submodules()
        geometry = "" if given is None else speaks_for(given)
        found: list[FoldEntry] = []
        if given is not None and not isinstance(geometry, str) and given.total is None:
            for slot, conv, norm in zip(self._layout.slots, given.convs, given.norms, strict=True):
                if norm is None:
                    break
                affine, buffers = norm._parameters, norm._buffers
                mean, var = buffers.get("running_mean"), buffers.get("running_var")
                if mean is None or var is None or "weight" not in affine:
                    break
                kernel = (None, None) if conv is None else kernel_of(conv)
                found.append((slot.taps, *kernel, affine["weight"], affine["bias"], mean, var, norm.eps))
        if given is not None and not isinstance(geometry, str) and len(found) == len(self._layout.slots):
            append_branches(a, geometry.kernel, geometry.groups, found)
            if not compiling:
                lanes.learn_fold(self, given, geometry.kernel, geometry.groups, found)
        else:  # a batch norm after the sum, a frozen one, one without statistics, or none
            append_step(a, self.fold_step())

    def switch_to_deploy(self) -> None:
        """Replaces the branches by their one folded convolution, in place; a second call does nothing.

        Device, dtype, memory layout, training flag and requires_grad are kept (the folded convolution needs a
        gradient where any parameter did). Warns in training mode: the batch's statistics are lost.

        Raises:
            ValueError: as `fold_step`; the block is then as it was.
        """
        if self.deploy:
            return
        if self.training:
            warnings.warn(
                f"folding this {type(self).__name__} in train mode: the folded convolution uses the running "
                "statistics, not the batch's; call eval() first to see its output",
                stacklevel=2,
            )
        # Normal tensors are wanted even under inference_mode, so that the result can be trained on.
        with torch.inference_mode(False), torch.no_grad():
            self.become(*self.get_equivalent_kernel_bias())

    def reparameterize(self) -> None:
        """`switch_to_deploy` by the name that timm's `reparameterize_model` calls."""
        self.switch_to_deploy()

    def become(self, weight: Tensor, bias: Tensor) -> None:
        """Replaces the branches by a convolution with this weight (K×C/groups×rows×columns) and bias (K)."""
        conv = self.folded_conv(weight, bias)
        for name in self._branch_modules():
            delattr(self, name)
        setattr(self, self.FUSED, conv)
        self.deploy = True

    def _branch_modules(self) -> list[str]:
        """The names of the children that fold away."""
        layout = self._layout
        paths = [path for slot in layout.slots for path in (slot.conv, slot.norm) if path is not None]
        return list(dict.fromkeys([*(path[0] for path in paths), *([layout.total] if layout.total else [])]))

    def folded_conv(self, weight: Tensor, bias: Tensor) -> nn.Conv2d:
        """The nn.Conv2d of this weight and bias (as `become`) where the block is, trained as it is."""
        trained = any(p.requires_grad for p in self.parameters())
        return as_conv(self.geometry, weight, bias, self._kernel(), trained).train(self.training)

    def train(self, mode: bool = True) -> RepBlock:
        """As nn.Module.train; warns when a deployed block is set to train: its batch norms are gone."""
        if mode and self.deploy and not self.training:
            warnings.warn(
                f"train() on a deployed {type(self).__name__}: it is one convolution with a bias now and trains "
                "without batch norm; train the undeployed block instead",
                stacklevel=2,
            )
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        g = self.geometry
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={g.stride}"]
        for name, default in (
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            if getattr(g, name) != default:
                parts.append(f"{name}={getattr(g, name)!r}")
        parts += self._own_repr()
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.deploy:
            parts.append("deploy=True")
        return ", ".join(parts)

    def _own_repr(self) -> list[str]:
        return []
