"""ACBlock: the asymmetric convolution block as an nn.Module (arXiv 1908.03930)."""

from __future__ import annotations

import warnings
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize, prune

from .backends import planner
from .functional import plan, run
from .geometry import BRANCHES, Geometry, IntOrPair, PaddingMode, Pair, as_int
from .ops.fuse_blocks import Arguments
from .ops.fusion import FoldBranch, append_branches, append_step, fold
from .spec import Branch, Norm, Problem, Step, prefers_channels_last

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
        self.geometry = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode, shift)
        in_channels = as_int(in_channels, "in_channels must be an int")
        out_channels = as_int(out_channels, "out_channels must be an int")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1 or channels % self.geometry.groups:
                raise ValueError(f"{name} must be a positive multiple of groups={groups}, got {channels}")
        if isinstance(branches, str) or not set(branches) <= set(BRANCHES) or "square" not in branches:
            raise ValueError(f"branches must be a subset of {BRANCHES} with 'square', got {branches!r}")
        if norm not in ("branch", "sum"):
            raise ValueError(f"norm must be 'branch' or 'sum', got {norm!r}")
        if reduce_gamma and gamma_init is not None:
            raise ValueError(f"give reduce_gamma or gamma_init, not both (gamma_init={gamma_init})")
        if not use_affine and (reduce_gamma or gamma_init is not None):
            raise ValueError("reduce_gamma and gamma_init need use_affine=True: there is no γ to set")
        self.in_channels, self.out_channels = in_channels, out_channels
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
        g, place = self.geometry, self.geometry.placement(name)
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            place.kernel,
            g.stride,
            place.padding,
            place.dilation,
            g.groups,
            bias=False,
            padding_mode=g.padding_mode,
            **factory,
        )

    def _fused_conv(self, factory: dict[str, Any]) -> nn.Conv2d:
        g = self.geometry
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            g.kernel,
            g.stride,
            g.padding,
            g.placement("square").dilation,
            g.groups,
            bias=True,
            padding_mode=g.padding_mode,
            **factory,
        )

    # nn.Conv2d's readable attributes.
    @property
    def kernel_size(self) -> Pair:
        """(k, k)."""
        return self.geometry.kernel, self.geometry.kernel

    @property
    def stride(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.stride

    @property
    def padding(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.padding

    @property
    def dilation(self) -> Pair:
        """(rows, columns)."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """As nn.Conv2d's."""
        return self.geometry.groups

    @property
    def padding_mode(self) -> PaddingMode:
        """As nn.Conv2d's."""
        return self.geometry.padding_mode

    @property
    def shift(self) -> Pair:
        """(rows hor moves down, columns ver moves right)."""
        return self.geometry.shift

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
        convs, bns = self.convs(), self.norms()
        # Tracers record the submodules' calls: right in both modes, and PyTorch's operators alone.
        traced = isinstance(input, fx.Proxy) or torch.jit.is_tracing()
        if traced or _module_path_reason(convs, bns) is not None:
            return self._forward_modules(input)
        return run(input, self._step(convs, bns), self.backend)

    def step(self) -> Step:
        """The tensors and settings one step computes with, read from the submodules as they are now."""
        return self._step(self.convs(), self.norms())

    def _step(self, convs: dict[str, nn.Conv2d], bns: dict[str, nn.BatchNorm2d]) -> Step:
        norms = {name: _norm_of(bn) for name, bn in bns.items()}
        branches = {}
        for name, conv in convs.items():
            own = conv._parameters
            if "weight" not in own or "bias" not in own:  # as in _norm_of
                branches[name] = Branch(conv.weight, conv.bias, norms.get(name))
                continue
            branches[name] = Branch(own["weight"], own["bias"], norms.get(name))  # type: ignore[arg-type]
        return Step(self.geometry, branches, norms.get("sum"))

    def plan(self, x: Tensor) -> tuple[Problem, planner.Plan]:
        """What forward(x) would run outside the module path, and why; x may be a meta tensor."""
        return plan(x, self.step(), self.backend)

    def module_path_reason(self) -> str | None:
        """Why the step must go through the submodules' own forward (always eager), or None."""
        return _module_path_reason(self.convs(), self.norms())

    def _forward_modules(self, x: Tensor) -> Tensor:
        out = None
        norms = self.norms()
        for name, conv in self.convs().items():
            y = conv(self.geometry.placement(name).apply(x, self.padding_mode))
            if name in norms:
                y = norms[name](y)
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
        return fold(self.fold_step())

    def fold_step(self) -> Step:
        """step(), for folding: checks that one fixed convolution equals the block in eval.

        Raises:
            ValueError: the block is deployed, a batch norm keeps no running statistics, or a submodule was
                replaced by a class whose eval arithmetic is not known.
        """
        if self.deploy:
            raise ValueError("cannot fold: the block is deployed, its convolution is folded already")
        for name, conv in self.convs().items():
            if type(conv) is not nn.Conv2d and not parametrize.is_parametrized(conv):
                raise ValueError(f"cannot fold: {name}_conv is a {type(conv).__name__}, not an nn.Conv2d")
            for hook in conv._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(conv, None)  # pruning refreshes the weight in the hook, not when the optimizer steps
        for name, bn in self.norms().items():
            if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                raise ValueError(f"cannot fold: the {name} batch norm is a {type(bn).__name__}")
            if bn.running_mean is None:
                raise ValueError(
                    f"cannot fold: the {name} batch norm has track_running_stats=False, so it always normalises by "
                    "the batch and no fixed convolution equals it"
                )
        return self.step()

    def append_fold(self, a: Arguments) -> None:
        """Appends the block's tensors to the fold operator's lists: what `fold_step` gives, in a fifth of its time.

        Raises:
            ValueError: as `fold_step`; a is then as it was.
        """
        found: list[FoldBranch | None] = []
        modules = self._modules
        for conv_name, bn_name in _MODULES.values() if self.norm == "branch" else ():
            conv, bn = modules.get(conv_name), modules.get(bn_name)
            if conv is None and bn is None and found:
                found.append(None)
                continue
            if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or conv._forward_pre_hooks:
                break
            own, affine, buffers = conv._parameters, bn._parameters, bn._buffers
            weight, mean, var = own.get("weight"), buffers.get("running_mean"), buffers.get("running_var")
            if weight is None or mean is None or var is None:
                break
            found.append((weight, own["bias"], affine["weight"], affine["bias"], mean, var, bn.eps))
        if len(found) != len(BRANCHES):  # something special, or wrong: fold_step knows
            append_step(a, self.fold_step())
            return
        append_branches(a, found, (self.geometry.hor_row, self.geometry.ver_column))

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
        conv = self._fused_conv({"device": "meta"})
        square = self.square_conv.weight
        if prefers_channels_last(square, square):
            weight = weight.contiguous(memory_format=torch.channels_last)
        trained = any(p.requires_grad for p in self.parameters())
        conv.weight = nn.Parameter(weight.detach(), trained)
        conv.bias = nn.Parameter(bias.detach(), trained)
        conv.train(self.training)
        for name in self.branches:
            delattr(self, f"{name}_conv")
            if self.norm == "branch":
                delattr(self, f"{name}_bn")
        if self.norm == "sum":
            del self.bn
        self.fused_conv = conv
        self.deploy = True

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


def _module_path_reason(convs: dict[str, nn.Conv2d], bns: dict[str, nn.BatchNorm2d]) -> str | None:
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "a global module hook is registered"
    for name, conv in convs.items():
        if type(conv) is not nn.Conv2d or _has_hooks(conv):
            return _why_special(f"{name}_conv", conv, nn.Conv2d)
    group = None
    for name, bn in bns.items():
        kind = type(bn)
        if kind not in (nn.BatchNorm2d, nn.SyncBatchNorm) or _has_hooks(bn):
            return _why_special("bn" if name == "sum" else f"{name}_bn", bn, nn.BatchNorm2d)
        if kind is nn.SyncBatchNorm and (its := _group_of(bn)) is not None:
            if group is not None and its is not group:
                return "its batch norms synchronise over different process groups"
            group = its
    return None


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks)


def _why_special(label: str, module: nn.Module, expected: type[nn.Module]) -> str:
    if type(module) in (expected, nn.SyncBatchNorm):
        return f"{label} has hooks"
    return f"{label} is a {type(module).__name__}, not nn.{expected.__name__}"


def _norm_of(bn: nn.BatchNorm2d) -> Norm:
    # nn.BatchNorm2d.forward's own rules: it normalises by the batch in training, or without buffers, and
    # touches the buffers in training only if it tracks them.
    # nn.Module.__getattr__ costs five times a dictionary's look-up, and folding a network reads thousands of
    # attributes. Whatever is no plain parameter or buffer (parametrised, replaced) goes through it.
    own, buffers = bn._parameters, bn._buffers
    if "weight" in own and "bias" in own and "running_mean" in buffers and "running_var" in buffers:
        gamma, beta = own["weight"], own["bias"]
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers.get("num_batches_tracked")
    else:
        gamma, beta = bn.weight, bn.bias
        mean, var, counter = bn.running_mean, bn.running_var, bn.num_batches_tracked
    batch_stats = bn.training or (mean is None and var is None)
    if bn.training and not bn.track_running_stats:
        mean = var = counter = None
    return Norm(gamma, beta, mean, var, counter, bn.eps, bn.momentum, batch_stats, _group_of(bn))


def _group_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The process group that bn's batch statistics span now, by nn.SyncBatchNorm.forward's own rules, or None."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
