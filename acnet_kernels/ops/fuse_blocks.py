"""The operators acnet_kernels::fuse_blocks and fuse_blocks_out: what is not C++ about them.

Both take L blocks as lists, block after block and square, hor, ver within a block: weights square (K×C×k×k), hor
(K×C×1×k), ver (K×C×k×1), and gamma, beta, mean, var, conv_bias, each (K,). These lists hold the tensors that are
there, and no None for those that are not: `register_autograd` does not see into a list with None. `present` (3L)
says which are there, as a sum of the constants below; eps has 3L entries; place 2L: hor's row and ver's column.
`fuse_blocks` returns L weights (K×C×k×k, contiguous or channels_last as square) and L biases (K,) in square's
dtype; `fuse_blocks_out` writes into L given ones, which must share no memory with the inputs, and records no
gradient.

A block's result is W = Σ_b s_b·embed(W_b), bias = Σ_b (β_b + s_b·(conv_bias_b − μ_b)), s_b = γ_b/√(σ²_b + ε_b)
(arXiv 1908.03930 §3.3), computed in float32, or in float64 for float64 weights. An absent μ or β counts as 0, an
absent γ as 1. So a batch norm after the sum of the branches is its four tensors for square, and γ, σ² and ε alone
for hor and ver.

CPU and CUDA kernels are C++ where the extension is built. Everywhere else, and on other devices, the operators are
the PyTorch code below. Variances are checked on the CPU, but for those of entries with ANY_VARIANCE; elsewhere
reading them would wait for the device, so a negative one makes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import check as checks
from ._extension import MISSING

ERROR = "acnet_kernels::fuse_blocks: "  # what the C++ operators' messages begin with
_INPUTS = (
    "Tensor[] square, Tensor[] hor, Tensor[] ver, Tensor[] gamma, Tensor[] beta, Tensor[] mean, "
    "Tensor[] var, Tensor[] conv_bias, int[] present, float[] eps, int[] place"
)
SCHEMAS = (  # as in csrc/fuse_cpu.cpp
    f"fuse_blocks({_INPUTS}) -> (Tensor[], Tensor[])",
    f"fuse_blocks_out({_INPUTS}, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out) -> ()",
)
SLOTS = ("square", "hor", "ver")
PARAMS = ("gamma", "beta", "mean", "var", "conv_bias")
# In `present`; BRANCH stands for weight and var.
BRANCH, GAMMA, BETA, MEAN, CONV_BIAS, ANY_VARIANCE = 1, 2, 4, 8, 16, 32
_BITS = {"gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": BRANCH, "conv_bias": CONV_BIAS}


class Arguments(NamedTuple):
    """The operators' inputs, in the schema's order."""

    square: list[Tensor]
    hor: list[Tensor]
    ver: list[Tensor]
    gamma: list[Tensor]
    beta: list[Tensor]
    mean: list[Tensor]
    var: list[Tensor]
    conv_bias: list[Tensor]
    present: list[int]
    eps: list[float]
    place: list[int]

    @classmethod
    def empty(cls) -> Arguments:
        """No blocks yet."""
        return cls([], [], [], [], [], [], [], [], [], [], [])


class _Branch(NamedTuple):
    """One branch of one block. `region` is the rows and columns of the k×k kernel that it covers.

    `tensors` and `positions` are by name (slot or parameter): the tensor, and its place in the schema's list.
    `any_variance` says that the variance is taken as it is.
    """

    block: int
    slot: str
    region: tuple[slice, slice]
    eps: float
    tensors: dict[str, Tensor]
    positions: dict[str, int]
    any_variance: bool


def _weight(branch: _Branch) -> Tensor:
    return branch.tensors[branch.slot]


def _scale(branch: _Branch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s, 1/√(σ²+ε)), each (K,)."""
    rstd = (branch.tensors["var"].to(dtype) + branch.eps).rsqrt()
    gamma = branch.tensors.get("gamma")
    return (rstd if gamma is None else gamma.to(dtype) * rstd), rstd


def _centre(branch: _Branch, dtype: torch.dtype) -> Tensor | float:
    """conv_bias − μ."""
    mean, bias = branch.tensors.get("mean"), branch.tensors.get("conv_bias")
    return (0.0 if bias is None else bias.to(dtype)) - (0.0 if mean is None else mean.to(dtype))


def _branches(a: Arguments) -> list[list[_Branch]]:
    """Every block's branches; the lists' lengths must have been checked."""
    lists: dict[str, Any] = dict(zip(Arguments._fields, a, strict=True))
    used = dict.fromkeys((*SLOTS, *PARAMS), 0)
    everything, blocks = slice(None), []
    for i in range(len(a.square)):
        row, column = a.place[2 * i : 2 * i + 2]
        regions = (
            (everything, everything),
            (slice(row, row + 1), everything),
            (everything, slice(column, column + 1)),
        )
        block = []
        for entry, slot, region in zip(range(3 * i, 3 * i + 3), SLOTS, regions, strict=True):
            present = a.present[entry]
            if not present:
                continue
            names = [slot, *(name for name in PARAMS if present & _BITS[name])]
            positions = {name: used[name] for name in names}
            for name in names:
                used[name] += 1
            tensors = {name: lists[name][at] for name, at in positions.items()}
            block.append(_Branch(i, slot, region, a.eps[entry], tensors, positions, bool(present & ANY_VARIANCE)))
        blocks.append(block)
    return blocks


def _fold_block(branches: list[_Branch]) -> tuple[Tensor, Tensor]:
    square = _weight(branches[0])
    dtype = torch.promote_types(square.dtype, torch.float32)
    weight = torch.empty_strided(square.shape, _strides(square), dtype=dtype, device=square.device)
    bias = torch.zeros(square.shape[0], dtype=dtype, device=square.device)
    for branch in branches:
        scale = _scale(branch, dtype)[0]
        rows, columns = branch.region
        scaled = _weight(branch).to(dtype) * scale[:, None, None, None]
        if branch.slot == "square":
            weight.copy_(scaled)
        else:
            weight[:, :, rows, columns] += scaled
        bias += scale * _centre(branch, dtype)
        if "beta" in branch.tensors:
            bias += branch.tensors["beta"]
    return weight.to(square.dtype), bias.to(square.dtype)


def _strides(square: Tensor) -> tuple[int, ...]:
    """Of the fused weight: channels_last if square is that and not contiguous, else contiguous."""
    _, c, h, w = square.shape
    if square.is_contiguous(memory_format=torch.channels_last) and not square.is_contiguous():
        return h * w * c, 1, w * c, c
    return c * h * w, h * w, w, 1


def check(
    a: Arguments, weight_out: Sequence[Tensor] | None = None, bias_out: Sequence[Tensor] | None = None
) -> None:
    """ValueError naming block and argument for whatever does not fit; reads no data."""
    count = len(a.square)
    _check_lengths(a, count, weight_out, bias_out)
    for i, branches in enumerate(_branches(a)):
        square = a.square[i]
        _check_square(a.square[0], i, square, a.place[2 * i : 2 * i + 2])
        for branch in branches:
            _check_branch(a.square[0], square, branch)
        if weight_out is not None and bias_out is not None:
            _check_out(i, square, weight_out[i], bias_out[i])


def _check_lengths(
    a: Arguments, count: int, weight_out: Sequence[Tensor] | None, bias_out: Sequence[Tensor] | None
) -> None:
    def length(name: str, given: Sequence[Any], expected: int) -> None:
        if len(given) != expected:
            raise ValueError(f"{name} must have {expected} entries, got {len(given)}")

    length("present", a.present, 3 * count)
    length("eps", a.eps, 3 * count)
    length("place", a.place, 2 * count)
    for entry, present in enumerate(a.present):
        if not 0 <= present < 64 or not (present & BRANCH or (present == 0 and entry % 3)):
            raise ValueError(f"block {entry // 3}: present of {SLOTS[entry % 3]} cannot be {present}")
    for slot, name in enumerate(SLOTS[1:], 1):
        length(name, getattr(a, name), sum(present & BRANCH for present in a.present[slot::3]))
    for name in PARAMS:
        length(name, getattr(a, name), sum(bool(present & _BITS[name]) for present in a.present))
    if weight_out is not None and bias_out is not None:
        length("weight_out", weight_out, count)
        length("bias_out", bias_out, count)


def _check_square(first: Tensor, i: int, square: Tensor, place: Sequence[int]) -> None:
    shape = tuple(square.shape)
    if square.dim() != 4 or min(shape) < 1 or shape[2] != shape[3] or shape[2] % 2 == 0 or shape[2] > 255:
        raise ValueError(
            f"block {i}: square must have shape (K, C, k, k) with K, C > 0 and odd k < 256, got {shape}"
        )
    if square.dtype not in checks.FLOATS:
        raise ValueError(f"block {i}: square must be float32, float64, float16 or bfloat16")
    _check_device(first, square, f"block {i}: square")
    row, column = place
    if not (0 <= row < shape[2] and 0 <= column < shape[2]):
        raise ValueError(
            f"block {i}: place (hor's row, ver's column) must be within the kernel of {shape[2]}, "
            f"got ({row}, {column})"
        )


def _check_branch(first: Tensor, square: Tensor, branch: _Branch) -> None:
    i, slot, kernel = branch.block, branch.slot, _weight(branch)
    channels, inputs, k = square.shape[:3]
    wanted = (channels, inputs, 1 if slot == "hor" else k, 1 if slot == "ver" else k)
    if tuple(kernel.shape) != wanted:
        raise ValueError(f"block {i}: {slot} must have shape {wanted} to go with square, got {tuple(kernel.shape)}")
    if kernel.dtype != square.dtype:
        raise ValueError(f"block {i}: {slot} must have square's dtype")
    _check_device(first, kernel, f"block {i}: {slot}")
    if not 0 <= branch.eps < float("inf"):
        raise ValueError(f"block {i}: eps of {slot} must be finite and not negative, got {branch.eps:g}")
    for name, tensor in branch.tensors.items():
        if name == slot:
            continue
        if tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"block {i}: {name} of {slot} must have shape ({channels},), got {tuple(tensor.shape)}"
            )
        _check_device(first, tensor, f"block {i}: {name}")
        if tensor.dtype not in checks.FLOATS:
            raise ValueError(f"block {i}: {name} must be float32, float64, float16 or bfloat16")


def _check_device(first: Tensor, tensor: Tensor, label: str) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{label} must be on the device of block 0's square")


def _check_out(i: int, square: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.shape != square.shape:
        raise ValueError(
            f"block {i}: weight_out must have square's shape {tuple(square.shape)}, got {tuple(weight.shape)}"
        )
    if tuple(bias.shape) != (square.shape[0],):
        raise ValueError(f"block {i}: bias_out must have shape ({square.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight_out", weight), ("bias_out", bias)):
        if tensor.dtype != square.dtype:
            raise ValueError(f"block {i}: {name} must have square's dtype")
        _check_device(square, tensor, f"block {i}: {name}")
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"block {i}: weight_out must be contiguous or channels_last")
    if not bias.is_contiguous():
        raise ValueError(f"block {i}: bias_out must be contiguous")


def _check_apart(a: Arguments, weight_out: Sequence[Tensor], bias_out: Sequence[Tensor]) -> None:
    def named(**lists: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        return [(f"{name}[{i}]", t) for name, tensors in lists.items() for i, t in enumerate(tensors)]

    read = dict(zip(Arguments._fields[:8], a[:8], strict=True))
    checks.apart(named(weight_out=weight_out, bias_out=bias_out), named(**read))


def _check_variances(blocks: list[list[_Branch]]) -> None:
    for branch in (branch for branches in blocks for branch in branches):
        var = branch.tensors["var"]
        if var.device.type != "cpu" or branch.any_variance:
            continue
        good = torch.isfinite(var) & (var >= 0) & (var + branch.eps > 0)
        if not bool(good.all()):
            o = int((~good).nonzero()[0])
            raise ValueError(
                f"block {branch.block}: var of {branch.slot} must be finite, not negative, and positive with eps "
                f"added, got {float(var[o]):f} in channel {o}"
            )


def fuse_blocks(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The functional operator in PyTorch."""
    a = Arguments(*inputs)
    check(a)
    _check_variances(_branches(a))
    return decomposed(a)


def decomposed(a: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """The functional operator as plain PyTorch operators, data unread: for graphs that run without this package."""
    check(a)
    folded = [_fold_block(branches) for branches in _branches(a)]
    return [weight for weight, _ in folded], [bias for _, bias in folded]


def fuse_blocks_out(*inputs: Any) -> None:
    """The writing operator in PyTorch."""
    a, weight_out, bias_out = Arguments(*inputs[:-2]), inputs[-2], inputs[-1]
    check(a, weight_out, bias_out)
    _check_apart(a, weight_out, bias_out)
    blocks = _branches(a)
    _check_variances(blocks)
    for branches, weight, bias in zip(blocks, weight_out, bias_out, strict=True):
        folded = _fold_block(branches)
        weight.copy_(folded[0])
        bias.copy_(folded[1])


def _fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    a = Arguments(*inputs)
    check(a)
    weights = [torch.empty_strided(w.shape, _strides(w), dtype=w.dtype, device=w.device) for w in a.square]
    return weights, [w.new_empty(w.shape[0]) for w in a.square]


def _fake_out(*inputs: Any) -> None:
    check(Arguments(*inputs[:-2]), inputs[-2], inputs[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(*(t for tensors in a[:8] for t in tensors))
    ctx.lengths, ctx.rest = [len(tensors) for tensors in a[:8]], a[8:]


def _backward(ctx: Any, weight_grads: Sequence[Tensor], bias_grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """Plain PyTorch, so twice differentiable. With D = ∂L/∂W on the branch's taps and d = ∂L/∂bias, per channel:

    ∂W_b = s_b·D, ∂s_b = ⟨W_b, D⟩ + d·(conv_bias_b − μ_b), ∂β_b = d, ∂conv_bias_b = −∂μ_b = s_b·d,
    ∂γ_b = ∂s_b/√(σ²_b+ε_b), ∂σ²_b = −∂s_b·s_b/(2(σ²_b+ε_b)).
    """
    saved = iter(ctx.saved_tensors)
    a = Arguments(*([next(saved) for _ in range(length)] for length in ctx.lengths), *ctx.rest)
    # needs_input_grad has the inputs' structure: a list of flags for a list of tensors.
    needs = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=True))
    grads: dict[str, list[Tensor | None]] = {
        name: [None] * length for name, length in zip(Arguments._fields, ctx.lengths, strict=False)
    }
    for i, branches in enumerate(_branches(a)):
        dtype = torch.promote_types(a.square[i].dtype, torch.float32)
        dw, db = weight_grads[i].to(dtype), bias_grads[i].to(dtype)
        for branch in branches:
            rows, columns = branch.region
            own = dw if branch.slot == "square" else dw[:, :, rows, columns]  # batched grads have no rule for [:]
            wanted = {name for name, at in branch.positions.items() if needs[name][at]}
            for name, grad in _branch_backward(branch, wanted, own, db):
                grads[name][branch.positions[name]] = grad.to(branch.tensors[name].dtype)
    return (*grads.values(), None, None, None)


def _branch_backward(branch: _Branch, wanted: set[str], dw: Tensor, db: Tensor) -> Iterator[tuple[str, Tensor]]:
    scale, rstd = _scale(branch, dw.dtype)
    if branch.slot in wanted:
        yield branch.slot, dw * scale[:, None, None, None]
    if "beta" in wanted:
        yield "beta", db
    if "conv_bias" in wanted:
        yield "conv_bias", scale * db
    if "mean" in wanted:
        yield "mean", -scale * db
    if wanted & {"gamma", "var"}:
        dscale = (_weight(branch).to(dw.dtype) * dw).sum((1, 2, 3)) + db * _centre(branch, dw.dtype)
        if "gamma" in wanted:
            yield "gamma", dscale * rstd
        if "var" in wanted:
            yield "var", -0.5 * dscale * scale * rstd * rstd


_library = torch.library.Library("acnet_kernels", "FRAGMENT")
if MISSING is not None:
    for schema in SCHEMAS:
        _library.define(schema)
# Below autograd, on every device that has no kernel of its own.
_library.impl("fuse_blocks", fuse_blocks, "CompositeExplicitAutograd")
_library.impl("fuse_blocks_out", fuse_blocks_out, "CompositeExplicitAutograd")
torch.library.register_fake("acnet_kernels::fuse_blocks", _fake, lib=_library)
torch.library.register_fake("acnet_kernels::fuse_blocks_out", _fake_out, lib=_library)
torch.library.register_autograd("acnet_kernels::fuse_blocks", _backward, setup_context=_setup_context, lib=_library)
checks.refuse_leaves(_library, torch.ops.acnet_kernels.fuse_blocks_out.default)
