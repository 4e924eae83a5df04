"""The operators acnet_kernels::fuse_blocks and fuse_blocks_out: what is not C++ about them.

Both take L blocks as lists: square L × (K×C×k×k), hor and ver L × (K×C×1×k, K×C×k×1, or None where absent);
gamma, beta, mean, var, conv_bias and eps 3L, block after block and square, hor, ver within a block, each (K,) or
None; place 2L: the row of hor and the column of ver. `fuse_blocks` returns L weights (K×C×k×k, contiguous or
channels_last as square) and L biases (K,) in square's dtype; `fuse_blocks_out` writes into L given ones, which
must share no memory with the inputs, and records no gradient.

A block's result is W = Σ_b s_b·embed(W_b), bias = Σ_b (β_b + s_b·(conv_bias_b − μ_b)), s_b = γ_b/√(σ²_b + ε_b)
(arXiv 1908.03930 §3.3), computed in float32, or in float64 for float64 weights. An absent μ or β counts as 0, an
absent γ as 1. So a batch norm after the sum of the branches is its four tensors for square, and γ, σ² and ε alone
for hor and ver.

CPU and CUDA kernels are C++ where the extension is built. Everywhere else, and on other devices, the operators are
the PyTorch code below. Variances are checked on the CPU; elsewhere reading them would wait for the device, so a
negative one makes NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._extension import MISSING

ERROR = "acnet_kernels::fuse_blocks: "  # what the C++ operators' messages begin with
_INPUTS = (
    "Tensor[] square, Tensor?[] hor, Tensor?[] ver, Tensor?[] gamma, Tensor?[] beta, Tensor?[] mean, "
    "Tensor?[] var, Tensor?[] conv_bias, float[] eps, int[] place"
)
SCHEMAS = (  # as in csrc/fuse_cpu.cpp
    f"fuse_blocks({_INPUTS}) -> (Tensor[], Tensor[])",
    f"fuse_blocks_out({_INPUTS}, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out) -> ()",
)
SLOTS = ("square", "hor", "ver")

OptionalTensors = Sequence[Tensor | None]


class Arguments(NamedTuple):
    """The operators' inputs, in the schema's order."""

    square: Sequence[Tensor]
    hor: OptionalTensors
    ver: OptionalTensors
    gamma: OptionalTensors
    beta: OptionalTensors
    mean: OptionalTensors
    var: OptionalTensors
    conv_bias: OptionalTensors
    eps: Sequence[float]
    place: Sequence[int]

    def kernels(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Block i's square, hor and ver."""
        return self.square[i], self.hor[i], self.ver[i]

    def region(self, i: int, slot: int) -> tuple[slice, slice]:
        """Rows and columns of the k×k kernel that a branch covers."""
        row, column = self.place[2 * i : 2 * i + 2]
        everything = slice(None)
        return (
            (everything, everything),
            (slice(row, row + 1), everything),
            (everything, slice(column, column + 1)),
        )[slot]


def _scale(a: Arguments, entry: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(s, 1/√(σ²+ε)) of one branch."""
    var, gamma = a.var[entry], a.gamma[entry]
    assert var is not None
    rstd = (var.to(dtype) + a.eps[entry]).rsqrt()
    return (rstd if gamma is None else gamma.to(dtype) * rstd), rstd


def _centre(a: Arguments, entry: int, dtype: torch.dtype) -> Tensor | float:
    """conv_bias − μ."""
    mean, bias = a.mean[entry], a.conv_bias[entry]
    return (0.0 if bias is None else bias.to(dtype)) - (0.0 if mean is None else mean.to(dtype))


def _fold_block(a: Arguments, i: int) -> tuple[Tensor, Tensor]:
    square = a.square[i]
    dtype = torch.promote_types(square.dtype, torch.float32)
    weight = torch.empty_strided(square.shape, _strides(square), dtype=dtype, device=square.device)
    bias = torch.zeros(square.shape[0], dtype=dtype, device=square.device)
    for slot, kernel in enumerate(a.kernels(i)):
        if kernel is None:
            continue
        scale = _scale(a, 3 * i + slot, dtype)[0]
        rows, columns = a.region(i, slot)
        scaled = kernel.to(dtype) * scale[:, None, None, None]
        if slot == 0:
            weight.copy_(scaled)
        else:
            weight[:, :, rows, columns] += scaled
        bias += scale * _centre(a, 3 * i + slot, dtype)
        beta = a.beta[3 * i + slot]
        if beta is not None:
            bias += beta
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
    lengths = [("hor", a.hor, 1), ("ver", a.ver, 1)]
    lengths += [(name, getattr(a, name), 3) for name in ("gamma", "beta", "mean", "var", "conv_bias")]
    lengths += [("eps", a.eps, 3), ("place", a.place, 2), ("weight_out", weight_out, 1), ("bias_out", bias_out, 1)]  # type: ignore[list-item]
    for name, given, each in lengths:
        if given is not None and len(given) != each * count:
            raise ValueError(f"{name} must have {each * count} entries, got {len(given)}")
    for i, square in enumerate(a.square):
        _check_block(a, i, square)
        if weight_out is not None and bias_out is not None:
            _check_out(i, square, weight_out[i], bias_out[i])


def _check_block(a: Arguments, i: int, square: Tensor) -> None:
    shape = tuple(square.shape)
    if square.dim() != 4 or min(shape) < 1 or shape[2] != shape[3] or shape[2] % 2 == 0 or shape[2] > 255:
        raise ValueError(
            f"block {i}: square must have shape (K, C, k, k) with K, C > 0 and odd k < 256, got {shape}"
        )
    if square.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"block {i}: square must be float32, float64, float16 or bfloat16")
    channels, k = square.shape[0], square.shape[2]
    _check_device(a.square[0], square, f"block {i}: square")
    for name, kernel, window in (("hor", a.hor[i], (1, k)), ("ver", a.ver[i], (k, 1))):
        if kernel is None:
            continue
        wanted = (*square.shape[:2], *window)
        if tuple(kernel.shape) != wanted:
            raise ValueError(
                f"block {i}: {name} must have shape {tuple(wanted)} to go with square, got {tuple(kernel.shape)}"
            )
        if kernel.dtype != square.dtype:
            raise ValueError(f"block {i}: {name} must have square's dtype")
        _check_device(a.square[0], kernel, f"block {i}: {name}")
    row, column = a.place[2 * i : 2 * i + 2]
    if not (0 <= row < k and 0 <= column < k):
        raise ValueError(
            f"block {i}: place (hor's row, ver's column) must be within the kernel of {k}, got ({row}, {column})"
        )
    for slot, kernel in enumerate(a.kernels(i)):
        _check_norm(a, i, slot, kernel is not None, channels)


def _check_norm(a: Arguments, i: int, slot: int, present: bool, channels: int) -> None:
    entry, name = 3 * i + slot, SLOTS[slot]
    if (a.var[entry] is not None) != present:
        why = (
            "is missing: without running statistics there is no folded form"
            if present
            else "is given, but the branch is absent"
        )
        raise ValueError(f"block {i}: var of {name} {why}")
    if not present:
        return
    if not 0 <= a.eps[entry] < float("inf"):
        raise ValueError(f"block {i}: eps of {name} must be finite and not negative, got {a.eps[entry]:g}")
    for param in ("gamma", "beta", "mean", "var", "conv_bias"):
        tensor = getattr(a, param)[entry]
        if tensor is None:
            continue
        if tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"block {i}: {param} of {name} must have shape ({channels},), got {tuple(tensor.shape)}"
            )
        _check_device(a.square[0], tensor, f"block {i}: {param}")


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


def _check_variances(a: Arguments) -> None:
    for entry, var in enumerate(a.var):
        if var is None or var.device.type != "cpu":
            continue
        good = torch.isfinite(var) & (var >= 0) & (var + a.eps[entry] > 0)
        if not bool(good.all()):
            o = int((~good).nonzero()[0])
            raise ValueError(
                f"block {entry // 3}: var of {SLOTS[entry % 3]} must be finite, not negative, and positive with "
                f"eps added, got {float(var[o]):f} in channel {o}"
            )


def fuse_blocks(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The functional operator in PyTorch."""
    a = Arguments(*inputs)
    check(a)
    _check_variances(a)
    folded = [_fold_block(a, i) for i in range(len(a.square))]
    return [weight for weight, _ in folded], [bias for _, bias in folded]


def fuse_blocks_out(*inputs: Any) -> None:
    """The writing operator in PyTorch."""
    a, weight_out, bias_out = Arguments(*inputs[:-2]), inputs[-2], inputs[-1]
    check(a, weight_out, bias_out)
    _check_variances(a)
    for i, (weight, bias) in enumerate(zip(weight_out, bias_out, strict=True)):
        folded = _fold_block(a, i)
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
    ctx.lengths, ctx.eps, ctx.place = [len(tensors) for tensors in a[:8]], a.eps, a.place


def _backward(ctx: Any, weight_grads: Sequence[Tensor], bias_grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """Plain PyTorch, so twice differentiable. With D = ∂L/∂W on the branch's taps and d = ∂L/∂bias, per channel:

    ∂W_b = s_b·D, ∂s_b = ⟨W_b, D⟩ + d·(conv_bias_b − μ_b), ∂β_b = d, ∂conv_bias_b = −∂μ_b = s_b·d,
    ∂γ_b = ∂s_b/√(σ²_b+ε_b), ∂σ²_b = −∂s_b·s_b/(2(σ²_b+ε_b)).
    """
    saved, lists = iter(ctx.saved_tensors), []
    for length in ctx.lengths:
        lists.append([next(saved) for _ in range(length)])
    a = Arguments(*lists, ctx.eps, ctx.place)
    grads: list[list[Tensor | None]] = [[None] * length for length in ctx.lengths]
    # needs_input_grad has the inputs' structure: a list of flags for a list of tensors.
    needs = Arguments(*ctx.needs_input_grad)
    for i, square in enumerate(a.square):
        dtype = torch.promote_types(square.dtype, torch.float32)
        dw, db = weight_grads[i].to(dtype), bias_grads[i].to(dtype)
        for slot, kernel in enumerate(a.kernels(i)):
            if kernel is not None:
                _branch_backward(a, needs, grads, i, slot, kernel, dw[(slice(None),) * 2 + a.region(i, slot)], db)
    return (*grads, None, None)


def _branch_backward(
    a: Arguments,
    needs: Arguments,
    grads: list[list[Tensor | None]],
    i: int,
    slot: int,
    kernel: Tensor,
    dw: Tensor,
    db: Tensor,
) -> None:
    entry, out = 3 * i + slot, Arguments(*grads, (), ())
    scale, rstd = _scale(a, entry, dw.dtype)
    if needs[slot][i]:
        grads[slot][i] = (dw * scale[:, None, None, None]).to(kernel.dtype)

    def put(name: str, value: Tensor) -> None:
        getattr(out, name)[entry] = value.to(getattr(a, name)[entry].dtype)

    if needs.beta[entry]:
        put("beta", db)
    if needs.conv_bias[entry]:
        put("conv_bias", scale * db)
    if needs.mean[entry]:
        put("mean", -scale * db)
    if needs.gamma[entry] or needs.var[entry]:
        dscale = (kernel.to(dw.dtype) * dw).sum((1, 2, 3)) + db * _centre(a, entry, dw.dtype)
        if needs.gamma[entry]:
            put("gamma", dscale * rstd)
        if needs.var[entry]:
            put("var", -0.5 * dscale * scale * rstd * rstd)


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
