"""Lists of branches to fold, and their fold in float64 from the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from acnet_kernels.geometry import Taps
from acnet_kernels.ops.fuse_blocks import Arguments
from acnet_kernels.ops.fusion import append_step
from acnet_kernels.spec import Branch, Norm


class Geometry(NamedTuple):
    """What of a step's geometry a fold depends on."""

    kernel: tuple[int, int]
    groups: int


class Step(NamedTuple):
    """As spec.Step."""

    geometry: Geometry
    branches: tuple[Branch, ...]
    norm: Norm | None


class Config(NamedTuple):
    """K, C/groups, the kernel, each branch's taps (None: the identity); `bare` are the branches without a norm."""

    out: int
    inputs: int
    kernel: tuple[int, int]
    taps: tuple[Taps | None, ...]
    groups: int = 1
    bare: tuple[int, ...] = ()
    total: bool = False  # a batch norm after the sum
    affine: bool = True
    eps: float = 1e-5


def whole(rows: int, columns: int | None = None) -> Taps:
    return Taps(0, 0, rows, columns or rows)


def cross(k: int, row: int | None = None, column: int | None = None) -> tuple[Taps, ...]:
    """A k×k kernel's taps, those of one row, and those of one column."""
    row, column = (k // 2 if at is None else at for at in (row, column))
    return whole(k), Taps(row, 0, 1, k), Taps(0, column, k, 1)


# One list for every test: shapes that differ, with primes, groups, and all that may be absent.
CONFIGS = {
    "cross": Config(16, 16, (3, 3), cross(3)),
    "shifted": Config(5, 7, (3, 3), cross(3, 2, 0)),
    "5x5 in groups": Config(12, 2, (5, 5), cross(5), groups=4),
    "7x7": Config(3, 23, (7, 7), cross(7, 0, 5)),
    "depthwise": Config(6, 1, (3, 3), cross(3), groups=6),
    "1x1": Config(5, 3, (1, 1), cross(1)),
    "9x9": Config(4, 5, (9, 9), cross(9)),
    "long rows": Config(2, 300, (3, 3), cross(3)),
    "no affine": Config(4, 9, (3, 3), cross(3), affine=False),
    "two": Config(4, 9, (3, 3), cross(3)[:2], eps=1e-2),
    "column": Config(4, 9, (5, 5), cross(5)[::2]),
    "one": Config(4, 9, (3, 3), cross(3)[:1]),
    "norm of the sum": Config(4, 9, (3, 3), cross(3, 0), bare=(0, 1, 2), total=True),
    "RepVGG": Config(16, 16, (3, 3), (whole(3), Taps(1, 1, 1, 1), None)),
    "RepVGG in groups": Config(8, 4, (3, 3), (whole(3), Taps(1, 1, 1, 1), None), groups=2),
    "MobileOne": Config(12, 12, (3, 3), (None, *[whole(3)] * 4, Taps(1, 1, 1, 1))),
    "depthwise MobileOne": Config(12, 1, (3, 3), (None, *[whole(3)] * 2, Taps(1, 1, 1, 1)), groups=12),
    "nested": Config(6, 6, (3, 3), (whole(3), Taps(1, 1, 1, 1), None), bare=(1, 2), total=True),
    "all bare": Config(6, 6, (3, 3), (whole(3), None), bare=(0, 1)),
    "3x5": Config(5, 7, (3, 5), (whole(3, 5), Taps(0, 1, 3, 2), Taps(1, 0, 1, 5))),
    "even": Config(3, 3, (2, 4), (Taps(1, 0, 1, 4), None), total=True),
    "dilated": Config(5, 3, (7, 7), (whole(7), Taps(0, 0, 3, 3, 3), Taps(1, 1, 3, 3, 2), Taps(1, 1, 5, 5))),
    "holes": Config(5, 7, (3, 3), (Taps(0, 0, 2, 2), Taps(1, 1, 2, 2))),
    "31x31": Config(3, 3, (31, 31), (whole(31), Taps(13, 13, 5, 5), None)),
    "47x47": Config(2, 3, (47, 47), (whole(47), Taps(23, 0, 1, 47))),
    "1x255": Config(2, 3, (1, 255), (whole(1, 255), Taps(0, 0, 1, 2, 254))),
    "eight": Config(9, 9, (3, 3), (*cross(3), *cross(3, 0, 2), None, Taps(0, 0, 2, 2, 2))),
    "sixty-four": Config(3, 2, (3, 3), (*[whole(3)] * 32, *[Taps(0, 0, 2, 2)] * 32), total=True),
}
ORDINARY = [CONFIGS[name] for name in ("cross", "shifted", "5x5 in groups", "7x7")]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_step(config: Config, dtype=torch.float32, norm_dtype=None, conv_bias=False, layout=None) -> Step:
    """A step of random tensors; conv_bias gives each branch a convolution bias."""

    def norm(index: int) -> Norm:
        gamma, beta = torch.rand(config.out) * 3 - 1.5, torch.randn(config.out)
        mean, var = torch.randn(config.out), torch.rand(config.out) * 1.8 + 0.2
        tensors = [t.to(norm_dtype or dtype) for t in (gamma, beta, mean, var)]
        affine = tensors[:2] if config.affine else (None, None)
        return Norm(*affine, *tensors[2:], None, config.eps * (1 + index), 0.1, False)  # one ε a branch

    branches = []
    for i, taps in enumerate(config.taps):
        weight = None if taps is None else torch.randn(config.out, config.inputs, taps.rows, taps.columns)
        if weight is not None:
            weight = weight.to(dtype).contiguous(memory_format=layout or torch.contiguous_format)
        bias = torch.randn(config.out).to(dtype) if conv_bias else None
        branches.append(Branch(taps, weight, bias, None if i in config.bare else norm(i)))
    total = norm(len(branches)) if config.total else None
    return Step(Geometry(config.kernel, config.groups), tuple(branches), total)


def first_weight(step) -> torch.Tensor:
    return next(branch.weight for branch in step.branches if branch.weight is not None)


def mapped(value: Any, function) -> Any:
    """A step with every tensor replaced by what function makes of it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [mapped(v, function) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _norm(norm: Norm | None, weight, bias) -> Any:
    if norm is None:
        return weight, bias
    gamma = 1.0 if norm.gamma is None else norm.gamma
    beta = 0.0 if norm.beta is None else norm.beta
    scale = gamma / torch.sqrt(norm.running_var + norm.eps)
    return weight * scale[:, None, None, None], beta + scale * (bias - norm.running_mean)


def truth(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The fold in float64, from the definition."""
    step = mapped(step, lambda t: t.detach().cpu().double())
    (k_h, k_w), groups = step.geometry
    out, inputs = first_weight(step).shape[:2]
    weight = torch.zeros(out, inputs, k_h, k_w, dtype=torch.float64)
    bias = torch.zeros(out, dtype=torch.float64)
    for taps, kernel, conv_bias, norm, _ in step.branches:
        embedded = torch.zeros_like(weight)
        if kernel is None:
            for o in range(out):
                embedded[o, o - inputs * (o // (out // groups)), k_h // 2, k_w // 2] = 1
        else:
            for i in range(taps.rows):
                for j in range(taps.columns):
                    place = taps.row + i * taps.step, taps.column + j * taps.step
                    embedded[:, :, place[0], place[1]] = kernel[:, :, i, j]
        own = torch.zeros_like(bias) if conv_bias is None else conv_bias
        own_weight, own_bias = _norm(norm, embedded, own)
        weight, bias = weight + own_weight, bias + own_bias
    return _norm(step.norm, weight, bias)


def summed_maps(step: Step, x: torch.Tensor) -> torch.Tensor:
    """The maps of all branches on x (N×C×H×W), unpadded, each through its batch norm, summed."""

    def normed(norm: Norm | None, y: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return y
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.gamma, norm.beta, False, 0.0, norm.eps)

    (k_h, k_w), groups = step.geometry
    height, width = x.shape[2] - k_h + 1, x.shape[3] - k_w + 1
    total = torch.zeros((), dtype=x.dtype)
    for taps, kernel, conv_bias, norm, _ in step.branches:
        row, column, rows, columns, dilation = taps or Taps(k_h // 2, k_w // 2, 1, 1)
        seen = x[
            :, :, row : row + height + (rows - 1) * dilation, column : column + width + (columns - 1) * dilation
        ]
        y = seen if kernel is None else F.conv2d(seen, kernel, None, 1, 0, dilation, groups)
        total = total + normed(norm, y if conv_bias is None else y + conv_bias[:, None, None])
    return normed(step.norm, total)


def assert_close(got, expected, dtype) -> None:
    floor = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for g, e, what in zip(got, expected, ("weight", "bias"), strict=True):
        g = g.detach().cpu()
        assert g.dtype == dtype
        # A bias is a sum of terms around 1 that may cancel: its error is measured against them.
        size = e.norm() if what == "weight" else max(e.norm().item(), len(e) ** 0.5)
        error = float((g.double() - e).norm() / size)
        assert error <= floor, f"{what}: relative error {error:.1e} > {floor:.0e}"
        assert (g.double() - e).abs().max() <= 4 * floor * max(e.abs().max().item(), what == "bias"), what


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values at every second place of a larger tensor, every dimension."""
    larger = torch.full([2 * n + 1 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def arguments(steps) -> Arguments:
    """The fold operator's lists."""
    lists = Arguments.empty()
    for step in steps:
        append_step(lists, step)
    return lists
