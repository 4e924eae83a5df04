"""ACBlock: the asymmetric convolution block as an nn.Module (arXiv 1908.03930)."""

from __future__ import annotations

import warnings
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn

from .backends import planner
from .functional import plan, run
from .geometry import BRANCHES, Geometry, IntOrPair, PaddingMode, Pair, as_int
from .ops.fuse_blocks import Arguments
from .ops.fusion import FoldEntry, append_branches, append_step, fold
from .spec import Problem, Step, listed, prefers_channels_last, taps_of
from .submodules import agreed_geometry, kernel_of, read, read_for_fold, speaks_for

_MODULES = {name: (f"{name}_conv", f"{name}_bn") for name in BRANCHES}


class ACBlock(nn.Module):
    """Drop-in for nn.Conv2d + nn.BatchNorm2d: k×k, 1×k and k×1 convolutions, each with its batch norm, summed.

    Training normalises each branch by the batch's statistics, exactly as three eager batch norms do, so the
    output of `train()` differs from that of `eval()`, which uses the running statistics and is one folded
    convolution. `switch_to_deploy()` makes that convolution permanent.

    State-dict names and order are the original code's: square_conv.weight, square_bn.*, ver_conv.weight,
    hor_conv.weight, ver_bn.*, hor_bn.*; deployed: fused_conv.weight, fused_conv.bias. With `norm='sum'` there
    is one `bn.*` after the convolutions.

    Args:
        in_channels: C of the input, N×C×H×W.
        out_channels: K of the output.
        kernel_size: odd k, or (k, k).
        stride, dilation: int or (rows, columns).
        padding: int, (rows, columns), 'same' or 'valid'.
        groups: as nn.Conv2d.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        deploy: build the folded form.
        use_affine: give the batch norms γ and β.
        reduce_gamma: start every γ at 1/3 (the paper's CIFAR setting).
        gamma_init: start every γ at this value.
        branches: which branches to build; 'square' must be one (paper Table 4).
        norm: 'branch', or 'sum' for one batch norm after the sum.
        shift: (rows hor moves down, columns ver moves right) from the centre (paper Fig. 6c).
        eps, momentum: of every batch norm.
        backend: how training steps are computed: 'auto' or one of `planner.CHOICES`; 'memory_saver' keeps the
            fewest bytes for backward (see `memory_saver`).
        device, dtype: of parameters and buffers.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: SupportsIndex,
        out_channels: SupportsIndex,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: SupportsIndex = 1,
        padding_mode: PaddingMode = "zeros",
        deploy: bool = False,
        use_affine: bool = True,
        reduce_gamma: bool = False,
        gamma_init: float | None = None,
        *,
        branches: tuple[str, ...] = BRANCHES,
        norm: str = "branch",
        shift: IntOrPair = (0, 0),
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._built = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode, shift)
        in_channels = as_int(in_channels, "in_channels must be an int")
        out_channels = as_int(out_channels, "out_channels must be an int")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1 or channels % self._built.groups:
                raise ValueError(f"{name} must be a positive multiple of groups={groups}, got {channels}")
        if isinstance(branches, str) or not set(branches) <= set(BRANCHES) or "square" not in branches:
            raise ValueError(f"branches must be a subset of {BRANCHES} with 'square', got {branches!r}")
        if norm not in ("branch", "sum"):
            raise ValueError(f"norm must be 'branch' or 'sum', got {norm!r}")
        if reduce_gamma and gamma_init is not None:
            raise ValueError(f"give reduce_gamma or gamma_init, not both (gamma_init={gamma_init})")
        if not use_affine and (reduce_gamma or gamma_init is not None):
            raise ValueError("reduce_gamma and gamma_init need use_affine=True: there is no γ to set")
        self._channels = in_channels, out_channels
        self.branches = tuple(name for name in BRANCHES if name in branches)
        self.norm = norm
        self.eps = eps
        self.deploy = deploy
        self.backend = planner.check_choice(backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if deploy:
            self.fused_conv = self._fused_conv(factory)
            return

        def batch_norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(out_channels, eps, momentum, use_affine, **factory)

        self.square_conv = self._branch_conv("square", factory)
        if norm == "branch":
            self.square_bn = batch_norm()
        for name in ("ver", "hor"):
            if name in self.branches:
                setattr(self, f"{name}_conv", self._branch_conv(name, factory))
        if norm == "sum":
            self.bn = batch_norm()
        else:
            for name in ("ver", "hor"):
                if name in self.branches:
                    setattr(self, f"{name}_bn", batch_norm())
        if reduce_gamma:
            self.init_gamma(1.0 / 3)
        elif gamma_init is not None:
            self.init_gamma(gamma_init)

    def _branch_conv(self, name: str, factory: dict[str, Any]) -> nn.Conv2d:
        return self._conv(name, *self._channels, False, self._built, factory)

    def _fused_conv(self, factory: dict[str, Any]) -> nn.Conv2d:
        return self._conv("square", *self._channels, True, self._built, factory)

    @staticmethod
    def _conv(
        name: str, in_channels: int, out_channels: int, bias: bool, geometry: Geometry, factory: dict[str, Any]
    ) -> nn.Conv2d:
        place = geometry.placement(name)
        return nn.Conv2d(
            in_channels,
            out_channels,
            place.kernel,
            geometry.stride,
            place.padding,
            place.dilation,
            geometry.groups,
            bias,
            geometry.padding_mode,
            **factory,
        )

    @property
    def geometry(self) -> Geometry:
        """Where the branches sit: as the convolutions' attributes say now where they agree, else as built."""
        convs = {"square": self.fused_conv} if self.deploy else self.convs()
        if not all(isinstance(conv, nn.Conv2d) for conv in convs.values()):
            return self._built
        found = agreed_geometry(convs, self._built)
        return self._built if isinstance(found, str) else found

    def _place(self, **settings: Any) -> None:
        """Moves every convolution to where a block of these settings has it."""
        was = self.geometry
        names = ("stride", "padding", "dilation", "padding_mode")
        new = {name: getattr(was, name) for name in names} | settings
        geometry = Geometry.make(was.kernel, groups=was.groups, shift=was.shift, **new)
        for name, conv in {"square": self.fused_conv}.items() if self.deploy else self.convs().items():
            placed = self._conv(name, was.groups, was.groups, False, geometry, {"device": "meta"})
            for attribute in (*names, "_reversed_padding_repeated_twice"):
                setattr(conv, attribute, getattr(placed, attribute))
        self._built = geometry

    # nn.Conv2d's attributes. Setting one moves all branches.
    @property
    def in_channels(self) -> int:
        """C, as the convolutions' weights have it now."""
        weight = self._kernel()
        return self._channels[0] if weight is None else weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """K, as the convolutions' weights have it now."""
        weight = self._kernel()
        return self._channels[1] if weight is None else weight.shape[0]

    def _kernel(self) -> Tensor | None:
        weight = getattr(self.fused_conv if self.deploy else self.square_conv, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.dim() == 4 else None

    @property
    def kernel_size(self) -> Pair:
        """(k, k)."""
        return self._built.kernel, self._built.kernel

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
    def shift(self) -> Pair:
        """(rows hor moves down, columns ver moves right)."""
        return self._built.shift

    def norms(self) -> dict[str, nn.BatchNorm2d]:
        """Branch name, or 'sum', → its batch norm; empty once deployed."""
        if self.deploy:
            return {}
        modules = self._modules
        if self.norm == "sum":
            return {"sum": modules["bn"]}  # type: ignore[dict-item]
        return {name: modules[_MODULES[name][1]] for name in self.branches}  # type: ignore[misc]

    def convs(self) -> dict[str, nn.Conv2d]:
        """Branch name → its convolution; empty once deployed."""
        modules = self._modules
        return {} if self.deploy else {name: modules[_MODULES[name][0]] for name in self.branches}  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        """N×C×H×W → N×K×H'×W', as nn.Conv2d."""
        if self.deploy:
            return self.fused_conv(input)
        # Tracers record the submodules' calls: right in both modes, and PyTorch's operators alone.
        if isinstance(input, fx.Proxy) or torch.jit.is_tracing():
            return self._forward_modules(input)
        step = self._read()
        return self._forward_modules(input) if isinstance(step, str) else run(input, step, self.backend)

    def _read(self) -> Step | str:
        return read(self.convs(), self.norms(), self._built)

    def step(self) -> Step:
        """The tensors and settings one step computes with, read from the submodules as they are now.

        Raises:
            ValueError: only calling the submodules can tell (see `module_path_reason`).
        """
        step = self._read()
        if isinstance(step, str):
            raise ValueError(f"the block runs through its submodules: {step}")
        return step

    def plan(self, x: Tensor) -> tuple[Problem, planner.Plan]:
        """What forward(x) runs, and why; x may be a meta tensor.

        Raises:
            ValueError: as `step`, or x does not fit.
        """
        return plan(x, self.step(), self.backend)

    def module_path_reason(self) -> str | None:
        """Why the step must go through the submodules' own forward (always eager), or None."""
        step = None if self.deploy else self._read()
        return step if isinstance(step, str) else None

    def _forward_modules(self, x: Tensor) -> Tensor:
        out = None
        norms, geometry = self.norms(), self.geometry
        for name, conv in self.convs().items():
            y = conv(geometry.placement(name).apply(x, geometry.padding_mode))
            if name in norms:
                y = norms[name](y)
            # A sum would broadcast, or raise without a name. What is traced has no shapes to compare.
            if isinstance(out, Tensor) and not torch.jit.is_tracing() and out.shape != y.shape:
                raise ValueError(
                    f"the branches' maps must have one shape to be summed: square's is {tuple(out.shape)}, "
                    f"{name}'s {tuple(y.shape)}"
                )
            out = y if out is None else out + y
        assert out is not None
        return norms["sum"](out) if "sum" in norms else out

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """(weight K×C/groups×k×k, bias K) of the convolution that equals the block in eval; differentiable.

        Raises:
            ValueError: a batch norm keeps no running statistics, so no fixed convolution equals the block.
        """
        if self.deploy:
            assert self.fused_conv.bias is not None
            return self.fused_conv.weight, self.fused_conv.bias
        return fold(listed(self.fold_step()))

    def fold_step(self) -> Step:
        """The step in eval, for folding: it is one fixed convolution.

        Raises:
            ValueError: the block is deployed, a batch norm keeps no running statistics, or what a submodule
                computes is not known to fold; names the submodule and its class.
        """
        if self.deploy:
            raise ValueError("cannot fold: the block is deployed, its convolution is folded already")
        return read_for_fold(self.convs(), self.norms(), self._built)

    def append_fold(self, a: Arguments) -> None:
        """Appends the block's tensors to the fold operator's lists: what `fold_step` gives, in less time.

        Raises:
            ValueError: as `fold_step`; a is then as it was.
        """
        convs, norms = self.convs(), self.norms()
        if self.deploy or isinstance(speaks_for(convs, norms, self._built), str):
            append_step(a, listed(self.fold_step()))
            return
        found: list[FoldEntry] = []
        for name in convs if self.norm == "branch" else ():
            affine, buffers = norms[name]._parameters, norms[name]._buffers
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            if mean is None or var is None or "weight" not in affine:
                break
            found.append((taps_of(self._built, name), *kernel_of(convs[name]), affine["weight"], affine["bias"], mean, var, norms[name].eps))
        if len(found) == len(convs):
            append_branches(a, self.kernel_size, self._built.groups, found)
        else:  # one norm after the sum, a frozen one, or one without statistics
            append_step(a, listed(self.fold_step()))

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
                "folding an ACBlock in train mode: the folded convolution uses the running statistics, not the "
                "batch's; call eval() first to see its output",
                stacklevel=2,
            )
        # Normal tensors are wanted even under inference_mode, so that the result can be trained on.
        with torch.inference_mode(False), torch.no_grad():
            self.become(*self.get_equivalent_kernel_bias())

    def become(self, weight: Tensor, bias: Tensor) -> None:
        """Replaces the branches by a convolution with this weight (K×C/groups×k×k) and bias (K)."""
        conv = self.folded_conv(weight, bias)
        for name in self.branches:
            delattr(self, f"{name}_conv")
            if self.norm == "branch":
                delattr(self, f"{name}_bn")
        if self.norm == "sum":
            del self.bn
        self.fused_conv = conv
        self.deploy = True

    def folded_conv(self, weight: Tensor, bias: Tensor) -> nn.Conv2d:
        """The nn.Conv2d of this weight (K×C/groups×k×k) and bias (K) where the block is, trained as it is."""
        channels = weight.shape[1] * self.groups, weight.shape[0]
        conv = self._conv("square", *channels, True, self.geometry, {"device": "meta"})
        square = self.square_conv.weight
        if prefers_channels_last(square, square):
            weight = weight.contiguous(memory_format=torch.channels_last)
        trained = any(p.requires_grad for p in self.parameters())
        conv.weight = nn.Parameter(weight.detach(), trained)
        conv.bias = nn.Parameter(bias.detach(), trained)
        return conv.train(self.training)

    def init_gamma(self, value: float) -> None:
        """Sets every γ to value."""
        for bn in self._affine_norms().values():
            nn.init.constant_(bn.weight, value)

    def single_init(self) -> None:
        """γ = 1 for square, 0 for hor and ver: the block starts as its square convolution with batch norm."""
        for name, bn in self._affine_norms().items():
            nn.init.constant_(bn.weight, 1.0 if name in ("square", "sum") else 0.0)

    def _affine_norms(self) -> dict[str, nn.BatchNorm2d]:
        norms = self.norms()
        if not norms or any(not bn.affine for bn in norms.values()):
            raise ValueError("there is no γ to set: the block is deployed or has use_affine=False")
        return norms

    def train(self, mode: bool = True) -> ACBlock:
        """As nn.Module.train; warns when a deployed block is set to train: its batch norms are gone."""
        if mode and self.deploy and not self.training:
            warnings.warn(
                "train() on a deployed ACBlock: it is one convolution with a bias now and trains without batch "
                "norm; train the undeployed block instead",
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
        if self.branches != BRANCHES:
            parts.append(f"branches={self.branches}")
        if self.norm != "branch":
            parts.append(f"norm={self.norm!r}")
        if g.shift != (0, 0):
            parts.append(f"shift={g.shift}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.deploy:
            parts.append("deploy=True")
        return ", ".join(parts)
