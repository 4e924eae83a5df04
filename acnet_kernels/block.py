"""ACBlock: the asymmetric convolution block as an nn.Module (arXiv 1908.03930)."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from .geometry import Geometry, IntOrPair, PaddingMode, Taps, as_int, as_pair
from .ops.epilogue import activate
from .rep import RepBlock
from .steps.epilogue import check_activation
from .submodules import Slot

BRANCHES = ("square", "hor", "ver")


def taps_of(
    kernel_size: IntOrPair, shift: IntOrPair = (0, 0), line_size: SupportsIndex | None = None
) -> dict[str, Taps]:
    """Branch name → its taps of the k×k kernel: all, the row and the column through the centre.

    Args:
        kernel_size: odd k, or (k, k).
        shift: (rows hor moves down, columns ver moves right) from the centre (paper Fig. 6c).
        line_size: how many taps hor and ver have, odd; k where None.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """
    k, columns = as_pair("kernel_size", kernel_size, 1)
    if k != columns or k % 2 == 0:
        raise ValueError(
            "kernel_size must be odd and square: hor and ver need one centre row and column to share, "
            f"got {kernel_size!r}"
        )
    half = k // 2
    down, right = shift_by = as_pair("shift", shift, -half)
    if max(shift_by) > half:
        raise ValueError(
            f"shift must keep hor and ver inside the {k}×{k} kernel: from {-half} to {half}, got {shift_by}"
        )
    line = k if line_size is None else as_int(line_size, "line_size must be an int")
    if not (1 <= line <= k and line % 2):
        raise ValueError(f"line_size must be odd and at most kernel_size {k}, got {line_size!r}")
    start = (k - line) // 2
    return {
        "square": Taps(0, 0, k, k),
        "hor": Taps(half + down, start, 1, line),
        "ver": Taps(start, half + right, line, 1),
    }


class ACBlock(RepBlock):
    """Drop-in for nn.Conv2d + nn.BatchNorm2d: k×k, 1×k and k×1 convolutions, each with its batch norm, summed.

    Training normalises each branch by the batch's statistics, exactly as three eager batch norms do, so the
    output of `train()` differs from that of `eval()`, which uses the running statistics and is one folded
    convolution. `switch_to_deploy()` makes that convolution permanent.

    State-dict names and order are the original code's: `square_conv.weight`, `square_bn.*`, `ver_conv.weight`,
    `hor_conv.weight`, `ver_bn.*`, `hor_bn.*`; deployed: `fused_conv.weight`, `fused_conv.bias`. With `norm='sum'`
    there is one `bn.*` after the convolutions.

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
        reduce_gamma: start every γ at 1/3 (the authors' later setting for CIFAR).
        gamma_init: start every γ at this value.
        branches: which branches to build; 'square' must be one (paper Table 4).
        norm: 'branch', or 'sum' for one batch norm after the sum.
        shift: (rows hor moves down, columns ver moves right) from the centre (paper Fig. 6c).
        line_size: the taps of hor and ver where they are not k: 3 for the 1×3 and 3×1 branches of the paper's 5×5
            layers (§4.1).
        eps, momentum: of every batch norm.
        activation: what is taken of the sum, and of the residual where forward() gets one: 'relu', 'relu6',
            'hardswish', 'silu', or None.
        backend: how training steps are computed: 'auto' or one of `planner.CHOICES`; 'memory_saver' needs the
            least memory (see `memory_saver`).
        device, dtype: of parameters and buffers.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    square_conv: nn.Conv2d
    square_bn: nn.BatchNorm2d
    eps: float
    activation: str | None = None

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
        line_size: SupportsIndex | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        taps = taps_of(kernel_size, shift, line_size)
        geometry = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode)
        if isinstance(branches, str) or not set(branches) <= set(BRANCHES) or "square" not in branches:
            raise ValueError(f"branches must be a subset of {BRANCHES} with 'square', got {branches!r}")
        if norm not in ("branch", "sum"):
            raise ValueError(f"norm must be 'branch' or 'sum', got {norm!r}")
        if reduce_gamma and gamma_init is not None:
            raise ValueError(f"give reduce_gamma or gamma_init, not both (gamma_init={gamma_init})")
        if not use_affine and (reduce_gamma or gamma_init is not None):
            raise ValueError("reduce_gamma and gamma_init need use_affine=True: there is no γ to set")
        self.branches = tuple(name for name in BRANCHES if name in branches)
        self.norm = norm
        self.eps = eps
        self.activation = check_activation(activation) or None
        self.shift = as_pair("shift", shift, -geometry.kernel[0])
        own = norm == "branch"
        slots = [Slot(n, taps[n], (f"{n}_conv",), (f"{n}_bn",) if own else None) for n in self.branches]
        self._lay_out(geometry, in_channels, out_channels, slots, None if own else "bn", deploy, backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if deploy:
            self.fused_conv = self._fused_conv(factory)
            return

        def batch_norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(self._layout.channels[1], eps, momentum, use_affine, **factory)

        # The original's order: square, ver, hor.
        order = sorted(range(len(slots)), key=lambda i: ("square", "ver", "hor").index(slots[i].name))
        for i in order:
            setattr(self, f"{slots[i].name}_conv", self._conv(i, factory))
            if own and slots[i].name == "square":
                self.square_bn = batch_norm()
        if not own:
            self.bn = batch_norm()
        for i in order:
            if own and slots[i].name != "square":
                setattr(self, f"{slots[i].name}_bn", batch_norm())
        if reduce_gamma:
            self.init_gamma(1.0 / 3)
        elif gamma_init is not None:
            self.init_gamma(gamma_init)

    def finish(self, out: Tensor) -> Tensor:
        """The activation, where there is one."""
        return activate(out, self.finishing())

    def finishing(self) -> str:
        """The activation, '' for none."""
        return self.activation or ""

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

    def _own_repr(self) -> list[str]:
        parts = []
        if self.branches != BRANCHES:
            parts.append(f"branches={self.branches}")
        if self.norm != "branch":
            parts.append(f"norm={self.norm!r}")
        if self.shift != (0, 0):
            parts.append(f"shift={self.shift}")
        line = next(
            (max(slot.taps[2:4]) for slot in self._layout.slots if slot.name != "square"), self.kernel_size[0]
        )
        if line != self.kernel_size[0]:
            parts.append(f"line_size={line}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return parts
