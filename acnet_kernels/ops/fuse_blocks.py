"""The operators acnet_kernels::fuse_blocks and fuse_blocks_out: what is not C++ about them.

Both take L blocks as flat lists: `blocks` has four numbers a block (its entries, k_h, k_w, groups), `branches` has
six an entry (present, row, column, rows, columns, step), eps one. `present` says which tensors an entry has, as a
sum of the constants below; the lists weight, gamma, beta, mean, var and conv_bias hold these alone, entry after
entry, and no None for the others: `register_autograd` does not see into a list with None. An entry is

- a branch: its weight (K×C/groups×rows×columns) has taps `step` apart in the k_h×k_w kernel, from (row, column) on;
- the identity, where there is no weight: a diagonal of ones at the tap (row, column), from each input channel of a
  group to the output channel of the same number, where K == C;
- SUM, only as a block's last entry: the batch norm after the sum of the entries before it; its taps mean nothing.

Branches may cover the same taps, and leave some uncovered. A block has from 1 to 64, one with a weight at least.
`fuse_blocks` returns L weights (K×C/groups×k_h×k_w, channels_last where one of the block's weights is that and
not contiguous, else contiguous) and L biases (K,), in the dtype that all weights of the block have;
`fuse_blocks_out` writes into L given ones, which must share no memory with the inputs, and records no gradient.

A block's result is W = Σ_b s_b·embed(W_b), bias = Σ_b (β_b + s_b·(conv_bias_b − μ_b)), s_b = γ_b/√(σ²_b + ε_b)
(arXiv 1908.03930 §3.3), and of a SUM s·W, β + s·(bias + conv_bias − μ), computed in float32, or in float64 for
float64 weights. γ, β, μ, σ², conv_bias are (K,); an absent μ, β or conv_bias counts as 0, an absent γ, or σ² with
its ε, as 1.

CPU and CUDA kernels are C++ where the extension is built. Everywhere else, and on other devices, the operators are
the PyTorch code below. Variances are checked on the CPU, but for those of entries with ANY_VARIANCE; elsewhere
reading them would wait for the device, so a negative one makes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import check as checks
from ._extension import LOADED

ERROR = "acnet_kernels::fuse_blocks: "  # what the C++ operators' messages begin with
_INPUTS = (
    "Tensor[] weight, Tensor[] gamma, Tensor[] beta, Tensor[] mean, Tensor[] var, Tensor[] conv_bias, "
    "int[] blocks, int[] branches, float[] eps"
)
SCHEMAS = (  # as in csrc/fuse_cpu.cpp
    f"fuse_blocks({_INPUTS}) -> (Tensor[], Tensor[])",
    f"fuse_blocks_out({_INPUTS}, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out) -> ()",
)
# In `present`.
WEIGHT, GAMMA, BETA, MEAN, VAR, CONV_BIAS, ANY_VARIANCE, SUM = 1, 2, 4, 8, 16, 32, 64, 128
MOST_BRANCHES = 64  # of a block
_BITS = {"weight": WEIGHT, "gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR, "conv_bias": CONV_BIAS}
_Factor = Tensor | float  # (K,), or the same for every channel


class Arguments(NamedTuple):
    """The operators' inputs, in the schema's order."""

    weight: list[Tensor]
    gamma: list[Tensor]
    beta: list[Tensor]
    mean: list[Tensor]
    var: list[Tensor]
    conv_bias: list[Tensor]
    blocks: list[int]
    branches: list[int]
    eps: list[float]

    @classmethod
    def empty(cls) -> Arguments:
        """No blocks yet."""
        return cls([], [], [], [], [], [], [], [], [])


# No named tuples: torch.compile traces no property of one (torch 2.10).
@dataclass(frozen=True)
class _Entry:
    """One entry of a block: its tensors by their lists' names, and their places in these lists."""

    name: str  # "branch 1", or "the sum"
    present: int
    taps: list[int]  # row, column, rows, columns, step
    eps: float
    tensors: dict[str, Tensor]
    positions: dict[str, int]

    @property
    def region(self) -> tuple[slice, slice]:
        """The rows and columns of the kernel that it covers."""
        row, column, rows, columns, step = self.taps
        return slice(row, row + step * (rows - 1) + 1, step), slice(column, column + step * (columns - 1) + 1, step)


@dataclass(frozen=True)
class _Block:
    kernel: list[int]  # k_h, k_w
    groups: int
    branches: list[_Entry]
    total: _Entry | None  # the batch norm after the sum

    @property
    def entries(self) -> list[_Entry]:
        return self.branches if self.total is None else [*self.branches, self.total]

    @property
    def weights(self) -> list[Tensor]:
        return [branch.tensors["weight"] for branch in self.branches if branch.present & WEIGHT]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.weights[0].shape[:2], *self.kernel)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the fused weight."""
        _, c, h, w = self.shape
        last = (w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in self.weights)
        return (h * w * c, 1, w * c, c) if any(last) else (c * h * w, h * w, w, 1)

    def weight(self, branch: _Entry, dtype: torch.dtype) -> Tensor:
        """The branch's kernel (K×C/groups×rows×columns)."""
        if branch.present & WEIGHT:
            return branch.tensors["weight"].to(dtype)
        one = torch.eye(self.shape[1], dtype=dtype, device=self.weights[0].device)
        return one.repeat(self.groups, 1)[:, :, None, None]


def _blocks(a: Arguments) -> list[_Block]:
    """The lists' lengths and numbers must have been checked."""
    used = dict.fromkeys(_BITS, 0)
    at, found = 0, []
    for count, rows, columns, groups in zip(*[iter(a.blocks)] * 4, strict=True):
        entries = []
        for index in range(count):
            present, *taps = a.branches[6 * at : 6 * at + 6]
            positions = {name: used[name] for name, bit in _BITS.items() if present & bit}
            for name in positions:
                used[name] += 1
            tensors = {name: getattr(a, name)[position] for name, position in positions.items()}
            name = "the sum" if present & SUM else f"branch {index}"
            entries.append(_Entry(name, present, taps, a.eps[at], tensors, positions))
            at += 1
        total = entries.pop() if entries[-1].present & SUM else None
        found.append(_Block([rows, columns], groups, entries, total))
    return found


def _scale(entry: _Entry, dtype: torch.dtype) -> tuple[_Factor, _Factor]:
    """(s, 1/√(σ²+ε))."""
    var, gamma = entry.tensors.get("var"), entry.tensors.get("gamma")
    rstd = 1.0 if var is None else (var.to(dtype) + entry.eps).rsqrt()
    return (rstd if gamma is None else gamma.to(dtype) * rstd), rstd


def _centre(entry: _Entry, dtype: torch.dtype) -> _Factor:
    """conv_bias − μ."""
    mean, bias = entry.tensors.get("mean"), entry.tensors.get("conv_bias")
    return (0.0 if bias is None else bias.to(dtype)) - (0.0 if mean is None else mean.to(dtype))


def _scaled(weight: Tensor, scale: _Factor) -> Tensor:
    return weight * (scale[:, None, None, None] if isinstance(scale, Tensor) else scale)


def _normed(entry: _Entry, weight: Tensor, bias: _Factor) -> tuple[Tensor, _Factor]:
    """A kernel and a bias with the entry's conv_bias and batch norm behind them."""
    scale = _scale(entry, weight.dtype)[0]
    bias = scale * (bias + _centre(entry, weight.dtype))
    beta = entry.tensors.get("beta")
    return _scaled(weight, scale), (bias if beta is None else beta.to(weight.dtype) + bias)


def _sum_branches(block: _Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight, bias) without the batch norm after the sum."""
    device = block.weights[0].device
    weight = torch.empty_strided(block.shape, block.strides, dtype=dtype, device=device).zero_()
    bias = torch.zeros(block.shape[0], dtype=dtype, device=device)
    for branch in block.branches:
        own, offset = _normed(branch, block.weight(branch, dtype), 0.0)
        rows, columns = branch.region
        weight[:, :, rows, columns] += own
        bias += offset
    return weight, bias


def _fold_block(block: _Block) -> tuple[Tensor, Tensor]:
    kept = block.weights[0].dtype
    weight, bias = _sum_branches(block, torch.promote_types(kept, torch.float32))
    if block.total is not None:
        weight, bias = _normed(block.total, weight, bias)  # type: ignore[assignment]
    return weight.to(kept), bias.to(kept)


def check(
    a: Arguments, weight_out: Sequence[Tensor] | None = None, bias_out: Sequence[Tensor] | None = None
) -> None:
    """ValueError naming block, branch and argument for whatever does not fit; reads no data."""
    _check_numbers(a, weight_out, bias_out)
    for i, block in enumerate(_blocks(a)):
        _check_block(a.weight[0], i, block)
        if weight_out is not None and bias_out is not None:
            _check_out(a.weight[0], i, block, weight_out[i], bias_out[i])


def _check_numbers(a: Arguments, weight_out: Sequence[Tensor] | None, bias_out: Sequence[Tensor] | None) -> None:
    """The lengths of all lists, and what the numbers among them may be."""

    def length(name: str, given: Sequence[Any], expected: int) -> None:
        if len(given) != expected:
            raise ValueError(f"{name} must have {expected} entries, got {len(given)}")

    length("blocks", a.blocks, len(a.blocks) // 4 * 4)
    blocks = list(zip(*[iter(a.blocks)] * 4, strict=True))
    for i, (count, rows, columns, _) in enumerate(blocks):
        if not 1 <= count <= MOST_BRANCHES + 1:
            raise ValueError(f"block {i} must have from 1 to {MOST_BRANCHES} branches, got {count}")
        if min(rows, columns) < 1 or max(rows, columns) > checks.MOST_TAPS:
            raise ValueError(
                f"block {i}: kernel must be from 1 to {checks.MOST_TAPS} a side, got ({rows}, {columns})"
            )
    entries = sum(count for count, *_ in blocks)
    length("branches", a.branches, 6 * entries)
    length("eps", a.eps, entries)
    at = 0
    for i, (count, *kernel, _) in enumerate(blocks):
        present = a.branches[6 * at : 6 * (at + count) : 6]
        for index, bits in enumerate(present):
            total = bits & SUM
            if not 0 <= bits < 2 * SUM or (total and (bits & WEIGHT or index + 1 < count)):
                raise ValueError(f"block {i}: present of branch {index} cannot be {bits}")
            if index == MOST_BRANCHES and not total:
                raise ValueError(f"block {i} must have from 1 to {MOST_BRANCHES} branches, got {count}")
            if not 0 <= a.eps[at] < float("inf"):
                name = "the sum" if total else f"branch {index}"
                raise ValueError(f"block {i}: eps of {name} must be finite and not negative, got {a.eps[at]:g}")
            if not total:
                _check_taps(f"block {i}: taps of branch {index}", a.branches[6 * at + 1 : 6 * at + 6], kernel, bits)
            at += 1
        if not any(bits & WEIGHT for bits in present):
            raise ValueError(f"block {i} must have a branch with a weight")
    for name, bit in _BITS.items():
        length(name, getattr(a, name), sum(bool(present & bit) for present in a.branches[::6]))
    if weight_out is not None and bias_out is not None:
        length("weight_out", weight_out, len(blocks))
        length("bias_out", bias_out, len(blocks))


def _check_taps(name: str, taps: Sequence[int], kernel: Sequence[int], present: int) -> None:
    *origin, step = taps
    sides = zip(origin[:2], origin[2:], kernel, strict=True)
    inside = step in range(1, checks.MOST_TAPS + 1) and all(
        first >= 0 and count >= 1 and first + (count - 1) * step < most for first, count, most in sides
    )
    single = bool(present & WEIGHT) or taps[2] == taps[3] == 1
    if not (inside and single):
        what = "a rectangle" if present & WEIGHT else "a rectangle of one tap"
        raise ValueError(
            f"{name} (row, column, rows, columns, step) must be {what} inside the kernel of "
            f"{kernel[0]}×{kernel[1]}, got {tuple(taps)}"
        )


def _check_block(first: Tensor, i: int, block: _Block) -> None:
    own = block.weights[0]
    for branch in block.branches:
        if "weight" not in branch.tensors:
            continue
        weight, label = branch.tensors["weight"], f"block {i}: weight of {branch.name}"
        if weight is own and (weight.dim() != 4 or min(weight.shape[:2]) < 1):
            shape = tuple(weight.shape)
            raise ValueError(f"{label} must have shape (K, C, rows, columns) with K, C > 0, got {shape}")
        checks.floats(**{label: weight})
        checks.shape((*own.shape[:2], *branch.taps[2:4]), **{label: weight})
        if weight.dtype != own.dtype:
            raise ValueError(f"{label} must have the dtype of the block's first weight")
        _check_device(first, weight, label)
    channels, inputs = own.shape[:2]
    if block.groups < 1 or channels % block.groups:
        raise ValueError(f"block {i}: groups must divide its {channels} channels, got {block.groups}")
    for entry in block.entries:
        if not entry.present & (WEIGHT | SUM) and channels != block.groups * inputs:
            raise ValueError(
                f"block {i}: {entry.name}, without weight, is the identity: it needs as many channels as inputs, "
                f"got {channels} and {block.groups * inputs}"
            )
        for name, tensor in entry.tensors.items():
            if name == "weight":
                continue
            label = f"block {i}: {name} of {entry.name}"
            checks.shape((channels,), **{label: tensor})
            _check_device(first, tensor, label)
            checks.floats(**{label: tensor})


def _check_device(first: Tensor, tensor: Tensor, label: str) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{label} must be on the device of the first weight")
    if tensor.layout != torch.strided:
        raise ValueError(f"{label} must be strided, got {tensor.layout}")


def _check_out(first: Tensor, i: int, block: _Block, weight: Tensor, bias: Tensor) -> None:
    checks.shape(block.shape, **{f"block {i}: weight_out": weight})
    checks.shape(block.shape[:1], **{f"block {i}: bias_out": bias})
    for name, tensor in (("weight_out", weight), ("bias_out", bias)):
        if tensor.dtype != block.weights[0].dtype:
            raise ValueError(f"block {i}: {name} must have the dtype of the block's first weight")
        _check_device(first, tensor, f"block {i}: {name}")
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"block {i}: weight_out must be contiguous or channels_last")
    if not bias.is_contiguous():
        raise ValueError(f"block {i}: bias_out must be contiguous")


def _check_apart(a: Arguments, weight_out: Sequence[Tensor], bias_out: Sequence[Tensor]) -> None:
    def named(**lists: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        return [(f"{name}[{i}]", t) for name, tensors in lists.items() for i, t in enumerate(tensors)]

    read = dict(zip(_BITS, a[:6], strict=True))
    checks.apart(named(weight_out=weight_out, bias_out=bias_out), named(**read))


def _check_variances(blocks: list[_Block]) -> None:
    for i, block in enumerate(blocks):
        for entry in block.entries:
            var = entry.tensors.get("var")
            if var is None or var.device.type != "cpu" or entry.present & ANY_VARIANCE:
                continue
            good = torch.isfinite(var) & (var >= 0) & (var + entry.eps > 0)
            if not bool(good.all()):
                o = int((~good).nonzero()[0])
                raise ValueError(
                    f"block {i}: var of {entry.name} must be finite, not negative, and positive with eps added, "
                    f"got {float(var[o]):f} in channel {o}"
                )


def fuse_blocks(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The functional operator in PyTorch."""
    a = Arguments(*inputs)
    check(a)
    _check_variances(_blocks(a))
    return decomposed(a)


def decomposed(a: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """The functional operator as plain PyTorch operators, data unread: for graphs that run without this package."""
    check(a)
    folded = [_fold_block(block) for block in _blocks(a)]
    return [weight for weight, _ in folded], [bias for _, bias in folded]


def fuse_blocks_out(*inputs: Any) -> None:
    """The writing operator in PyTorch."""
    a, weight_out, bias_out = Arguments(*inputs[:-2]), inputs[-2], inputs[-1]
    check(a, weight_out, bias_out)
    _check_apart(a, weight_out, bias_out)
    blocks = _blocks(a)
    _check_variances(blocks)
    for block, weight, bias in zip(blocks, weight_out, bias_out, strict=True):
        folded = _fold_block(block)
        weight.copy_(folded[0])
        bias.copy_(folded[1])


def _fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    a = Arguments(*inputs)
    check(a)
    firsts = [(block, block.weights[0]) for block in _blocks(a)]
    weights = [torch.empty_strided(b.shape, b.strides, dtype=w.dtype, device=w.device) for b, w in firsts]
    return weights, [w.new_empty(w.shape[0]) for _, w in firsts]


def _fake_out(*inputs: Any) -> None:
    check(Arguments(*inputs[:-2]), inputs[-2], inputs[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(*(t for tensors in a[:6] for t in tensors))
    ctx.lengths, ctx.rest = [len(tensors) for tensors in a[:6]], a[6:]


def _backward(ctx: Any, weight_grads: Sequence[Tensor], bias_grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """Plain PyTorch, so twice differentiable. With D = ∂L/∂W on the branch's taps and d = ∂L/∂bias, per channel:

    ∂W_b = s_b·D, ∂s_b = ⟨W_b, D⟩ + d·(conv_bias_b − μ_b), ∂β_b = d, ∂conv_bias_b = −∂μ_b = s_b·d,
    ∂γ_b = ∂s_b/√(σ²_b+ε_b), ∂σ²_b = −∂s_b·s_b/(2(σ²_b+ε_b)). The batch norm after the sum is one more such step, of
    the kernel and the bias that the branches give.
    """
    saved = iter(ctx.saved_tensors)
    a = Arguments(*([next(saved) for _ in range(length)] for length in ctx.lengths), *ctx.rest)
    # needs_input_grad has the inputs' structure: a list of flags for a list of tensors.
    needs = dict(zip(_BITS, ctx.needs_input_grad, strict=False))
    grads: dict[str, list[Tensor | None]] = {
        name: [None] * length for name, length in zip(_BITS, ctx.lengths, strict=True)
    }

    def note(entry: _Entry, weight: Tensor, bias: _Factor, dw: Tensor, db: Tensor) -> None:
        wanted = {name for name, at in entry.positions.items() if needs[name][at]}
        for name, grad in _entry_backward(entry, wanted, weight, bias, dw, db):
            grads[name][entry.positions[name]] = grad.to(entry.tensors[name].dtype)

    for i, block in enumerate(_blocks(a)):
        dtype = torch.promote_types(block.weights[0].dtype, torch.float32)
        dw, db = weight_grads[i].to(dtype), bias_grads[i].to(dtype)
        if block.total is not None:
            note(block.total, *_sum_branches(block, dtype), dw, db)
            scale = _scale(block.total, dtype)[0]
            dw, db = _scaled(dw, scale), scale * db
        for branch in block.branches:
            rows, columns = branch.region
            whole = branch.taps[2:4] == block.kernel
            own = dw if whole else dw[:, :, rows, columns]  # batched grads have no rule for [:]
            note(branch, block.weight(branch, dtype), 0.0, own, db)
    return (*grads.values(), None, None, None)


def _entry_backward(
    entry: _Entry, wanted: set[str], weight: Tensor, bias: _Factor, dw: Tensor, db: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The wanted gradients of _normed(entry, weight, bias), by name."""
    scale, rstd = _scale(entry, dw.dtype)
    if "weight" in wanted:
        yield "weight", _scaled(dw, scale)
    if "beta" in wanted:
        yield "beta", db
    if "conv_bias" in wanted:
        yield "conv_bias", scale * db
    if "mean" in wanted:
        yield "mean", -scale * db
    if wanted & {"gamma", "var"}:
        dscale = (weight * dw).sum((1, 2, 3)) + db * (bias + _centre(entry, dw.dtype))
        if "gamma" in wanted:
            yield "gamma", dscale * rstd
        if "var" in wanted:
            yield "var", -0.5 * dscale * scale * rstd * rstd


_library = torch.library.Library("acnet_kernels", "FRAGMENT")
if not LOADED:
    for schema in SCHEMAS:
        _library.define(schema)
# Below autograd, on every device that has no kernel of its own.
_library.impl("fuse_blocks", fuse_blocks, "CompositeExplicitAutograd")
_library.impl("fuse_blocks_out", fuse_blocks_out, "CompositeExplicitAutograd")
torch.library.register_fake("acnet_kernels::fuse_blocks", _fake, lib=_library)
torch.library.register_fake("acnet_kernels::fuse_blocks_out", _fake_out, lib=_library)
torch.library.register_autograd("acnet_kernels::fuse_blocks", _backward, setup_context=_setup_context, lib=_library)
checks.refuse_leaves(_library, torch.ops.acnet_kernels.fuse_blocks_out.default)
