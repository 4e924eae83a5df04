"""The asymmetric convolution block's definition in plain PyTorch: what every other path is tested against.

out = Σ_b BN_b(W_b * x), b ∈ {square k×k, hor 1×k, ver k×1} (arXiv 1908.03930 §3.2). Here each branch's kernel is
laid into an empty k×k one, so the geometry follows from one convolution's rules and nothing else. Any float dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(weight: Tensor, k: int, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """A branch's kernel (K×C×k×k, K×C×1×k or K×C×k×1) laid into a k×k kernel of zeros."""
    rows, columns = weight.shape[2:]
    top = 0 if rows == k else k // 2 + shift[0]
    left = 0 if columns == k else k // 2 + shift[1]
    return F.pad(weight, (left, k - columns - left, top, k - rows - top))


def acblock(
    x: Tensor,
    weights: Mapping[str, Tensor],
    affine: Mapping[str, tuple[Tensor | None, Tensor | None]],
    *,
    stats: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    shift: tuple[int, int] = (0, 0),
    eps: Mapping[str, float] | float = 1e-5,
    norm: str = "branch",
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The block's output and the (mean, biased variance) each batch norm used.

    Args:
        x: input, N×C×H×W.
        weights: branch name → kernel; 'square' must be there.
        affine: branch name (or 'sum') → (γ, β), each (K,) or None.
        stats: branch name (or 'sum') → (mean, variance) to normalise by; None takes the batch's own.
        eps: one ε, or one a batch norm.
        norm: 'branch', or 'sum' for one batch norm after the sum of the branches.
    """
    k = weights["square"].shape[-1]
    x = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2, "constant" if padding_mode == "zeros" else padding_mode)
    maps = {b: F.conv2d(x, embed(w, k, shift), None, stride, 0, dilation, groups) for b, w in weights.items()}
    if norm == "sum":
        maps = {"sum": torch.stack(list(maps.values())).sum(0)}
    out, used = torch.zeros((), dtype=x.dtype, device=x.device), {}
    for name, y in maps.items():
        mean, var = stats[name] if stats else (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False))
        gamma, beta = (
            t if t is not None else t0
            for t, t0 in zip(affine[name], (torch.ones_like(mean), 0 * mean), strict=True)
        )
        scale = gamma / torch.sqrt(var + (eps if isinstance(eps, float) else eps[name]))
        out = out + y * scale[:, None, None] + (beta - mean * scale)[:, None, None]
        used[name] = (mean, var)
    return out, used
