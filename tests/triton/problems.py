"""Problems the kernels are tested on, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from acnet_kernels import reference
from acnet_kernels.geometry import Geometry
from acnet_kernels.kernels.configs import Config
from acnet_kernels.ops import triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import Window

BRANCHES = ("square", "hor", "ver")
SMALL = Config(32, 16, 16, 4, 1)  # several tiles along every axis of a small problem
# Relative error a float32 tensor may have where products are TF32's: each operand is cut to 10 bits of mantissa.
TF32_FLOOR = 2.0**-9


@dataclass(frozen=True)
class Problem:
    """x of N×C×H×W to K channels; geometry's arguments; branches present."""

    name: str
    shape: tuple[int, int, int, int]
    K: int
    k: int = 3
    branches: tuple[str, ...] = BRANCHES
    channels_last: bool = True  # the weights
    geometry: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("primes", (2, 5, 7, 3), 7, geometry={"padding": 1}),
    Problem("several_tiles", (1, 19, 7, 5), 18, channels_last=False, geometry={"padding": 1}),
    Problem("one_pixel", (2, 3, 1, 1), 4, geometry={"padding": 1}),
    Problem("one_row", (2, 4, 1, 6), 3, geometry={"padding": 1, "stride": 2}),
    Problem("stride", (2, 4, 7, 9), 6, geometry={"padding": 1, "stride": 2}),
    Problem("stride_mixed", (1, 3, 6, 7), 5, channels_last=False, geometry={"padding": (1, 2), "stride": (3, 1)}),
    Problem("dilation", (1, 4, 7, 6), 5, geometry={"padding": 2, "dilation": 2}),
    Problem("dilation_stride", (2, 3, 8, 9), 4, geometry={"padding": 2, "dilation": (2, 3), "stride": 2}),
    Problem("kernel_5", (1, 4, 6, 5), 5, 5, geometry={"padding": 2}),
    Problem("crop", (2, 3, 6, 5), 4, geometry={"padding": 0}),
    Problem("crop_5", (1, 3, 7, 6), 4, 5, channels_last=False, geometry={"padding": 1, "stride": 2}),
    Problem("shift", (1, 4, 5, 6), 3, geometry={"padding": 1, "shift": (1, -1)}),
    Problem("groups", (2, 6, 5, 4), 8, geometry={"padding": 1, "groups": 2}),
    Problem("kernel_1", (2, 3, 4, 3), 5, 1),
    Problem("no_hor", (1, 3, 5, 4), 4, branches=("square", "ver"), geometry={"padding": 1}),
    Problem("no_ver", (1, 3, 5, 4), 4, branches=("square", "hor"), geometry={"padding": 1, "stride": 2}),
    Problem("square_alone", (1, 3, 5, 4), 4, branches=("square",), geometry={"padding": 1}),
]

# One input channel a group: kernels of their own.
DEPTHWISE = [
    Problem("depthwise", (2, 19, 7, 5), 19, geometry={"padding": 1, "groups": 19}),
    Problem("depthwise_contiguous", (1, 5, 6, 5), 5, channels_last=False, geometry={"padding": 1, "groups": 5}),
    Problem("depthwise_stride", (2, 3, 7, 8), 3, geometry={"padding": 1, "groups": 3, "stride": (2, 3)}),
    Problem("depthwise_dilation", (1, 4, 9, 8), 4, geometry={"padding": (3, 2), "groups": 4, "dilation": (3, 2)}),
    Problem(
        "depthwise_5", (1, 3, 9, 8), 3, 5, geometry={"padding": 1, "groups": 3, "stride": 2, "dilation": (1, 2)}
    ),
    Problem("depthwise_shift", (1, 4, 5, 6), 4, geometry={"padding": 0, "groups": 4, "shift": (-1, 1)}),
    Problem("depthwise_multiplier", (2, 7, 5, 6), 21, geometry={"padding": 1, "groups": 7, "stride": (1, 2)}),
    Problem("depthwise_row", (3, 2, 1, 4), 4, geometry={"padding": 1, "groups": 2}),
    Problem("one_channel", (1, 1, 6, 7), 5, geometry={"padding": 1}),
    Problem("depthwise_no_hor", (1, 3, 5, 4), 3, branches=("square", "ver"), geometry={"padding": 1, "groups": 3}),
    Problem("depthwise_no_ver", (1, 3, 5, 4), 3, branches=("square", "hor"), geometry={"padding": 1, "groups": 3}),
    Problem("depthwise_alone", (1, 3, 5, 4), 3, branches=("square",), geometry={"padding": 1, "groups": 3}),
]


class Tensors:
    """A problem's tensors: x, weights, γ, β, and the gradient of its output, in one dtype; γ and β in fp32."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry = Geometry.make(problem.k, **problem.geometry)
        self.window = Window.of(self.geometry)
        self.branches, self.eps = problem.branches, [1e-5, 1e-3, 1e-4][: len(problem.branches)]
        N, C, H, W = problem.shape
        lines = {"square": (problem.k, problem.k), "hor": (1, problem.k), "ver": (problem.k, 1)}
        layout = torch.channels_last if problem.channels_last else torch.contiguous_format

        def random(*shape: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
            return (torch.randn(shape) + 0.3).to(device, dtype).contiguous(memory_format=layout)

        self.x = random(N, C, H, W)
        self.weights = {
            b: random(problem.K, C // self.geometry.groups, *lines[b], layout=layout) for b in problem.branches
        }
        self.gammas = [(torch.rand(problem.K) + 0.5).to(device) for _ in problem.branches]
        self.betas = [torch.randn(problem.K).to(device) for _ in problem.branches]
        self.grad = random(N, problem.K, *self.geometry.output_size(H, W))

    def by_branch(self, values: dict[str, Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """(square, hor, ver) of the weights, or of what is given, None where absent."""
        return tuple((self.weights if values is None else values).get(b) for b in BRANCHES)

    def eager(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output, branch maps and every gradient by F.conv2d and F.batch_norm in dtype (x's by default)."""
        g, params = self.geometry, torch.float64 if dtype == torch.float64 else torch.float32
        dtype = dtype or self.x.dtype
        x = self.x.to(dtype).detach().requires_grad_()
        weights = {b: w.to(dtype).detach().requires_grad_() for b, w in self.weights.items()}
        gammas = [t.to(params).detach().requires_grad_() for t in self.gammas]
        betas = [t.to(params).detach().requires_grad_() for t in self.betas]
        padded = F.pad(x, (g.padding[1],) * 2 + (g.padding[0],) * 2)
        found, out = {}, torch.zeros((), dtype=dtype, device=x.device)
        for (b, w), gamma, beta, eps in zip(weights.items(), gammas, betas, self.eps, strict=True):
            whole = reference.embed(w, g.kernel, g.shift)
            y = F.conv2d(padded, whole, None, g.stride, 0, g.dilation, g.groups)
            found[f"y_{b}"] = y.detach()
            out = out + F.batch_norm(y, None, None, gamma, beta, True, 0.0, eps)
        out.backward(self.grad.to(dtype))
        found |= {"out": out.detach(), "x": x.grad} | {b: w.grad for b, w in weights.items()}
        return (
            found
            | {f"gamma_{b}": t.grad for b, t in zip(weights, gammas, strict=True)}
            | {f"beta_{b}": t.grad for b, t in zip(weights, betas, strict=True)}
        )

    def truth(self) -> dict[str, Tensor]:
        """eager() in float64."""
        return self.eager(torch.float64)


def step(t: Tensors, config: Config | None = SMALL) -> dict[str, Tensor]:
    """Everything Tensors.eager gives, all phases by Triton."""
    weights, (H, W) = t.by_branch(), t.x.shape[2:]
    maps, moments = triton_conv.conv_forward(t.x, weights, t.window, config=config)
    norms = triton_bn_sum.merge_statistics(moments, t.gammas, t.betas, t.eps)
    ys = [y for y in maps if y is not None]
    out = triton_bn_sum.apply(ys, norms)
    found = {"out": out} | {f"y_{b}": y.clone() for b, y in zip(t.branches, ys, strict=True)}
    rest = (norms.means, norms.rstds, t.gammas, [True] * len(ys))
    dgamma, dbeta = triton_bn_sum.bn_sum_backward_(t.grad, ys, *rest, ys)
    by_branch = t.by_branch(dict(zip(t.branches, ys, strict=True)))  # dy_b by now
    found["x"] = triton_conv.input_grad(by_branch, weights, t.window, (H, W), config=config)
    dws = triton_conv.weight_grads(t.x, by_branch, weights, t.window, config=config)
    for i, b in enumerate(t.branches):
        dw = dws[BRANCHES.index(b)]
        assert dw is not None
        assert dw.stride() == t.weights[b].stride()
        found |= {b: dw, f"gamma_{b}": dgamma[i], f"beta_{b}": dbeta}
    return found
