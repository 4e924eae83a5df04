"""Problems the kernels are tested on, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from acnet_kernels.geometry import Pair, Taps, as_pair
from acnet_kernels.kernels.configs import Config
from acnet_kernels.ops import triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import Window

SMALL = Config(32, 16, 16, 4, 1)  # several tiles along every axis of a small problem
# Relative error a float32 tensor may have where products are TF32's: each operand is cut to 10 bits of mantissa.
TF32_FLOOR = 2.0**-9


def acnet(k: int = 3, shift: Pair = (0, 0)) -> tuple[Taps, ...]:
    """ACNet's branches: all taps of a k×k kernel, a row of them and a column of them."""
    return Taps(0, 0, k, k), Taps(k // 2 + shift[0], 0, 1, k), Taps(0, k // 2 + shift[1], k, 1)


ALL, ROW, COLUMN = acnet()


@dataclass(frozen=True)
class Problem:
    """x of N×C×H×W to K channels by a kernel's branches; conv: F.conv2d's stride, padding, dilation and groups."""

    name: str
    shape: tuple[int, int, int, int]
    K: int
    kernel: Pair = (3, 3)
    branches: tuple[Taps, ...] = (ALL, ROW, COLUMN)
    channels_last: bool = True  # the weights
    conv: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def pair(self, name: str) -> Pair:
        """One of conv's settings for rows and columns."""
        return as_pair(name, self.conv.get(name, int(name != "padding")), 0)

    @property
    def groups(self) -> int:
        """conv's groups."""
        return self.conv.get("groups", 1)

    @property
    def window(self) -> Window:
        """What the kernels take of it."""
        pairs = (*self.kernel, *self.pair("stride"), *self.pair("padding"), *self.pair("dilation"))
        return Window(*pairs, self.groups, self.branches)


PROBLEMS = [
    Problem("primes", (2, 5, 7, 3), 7, conv={"padding": 1}),
    Problem("several_tiles", (1, 19, 7, 5), 18, channels_last=False, conv={"padding": 1}),
    Problem("one_pixel", (2, 3, 1, 1), 4, conv={"padding": 1}),
    Problem("one_row", (2, 4, 1, 6), 3, conv={"padding": 1, "stride": 2}),
    Problem("stride", (2, 4, 7, 9), 6, conv={"padding": 1, "stride": 2}),
    Problem("stride_mixed", (1, 3, 6, 7), 5, channels_last=False, conv={"padding": (1, 2), "stride": (3, 1)}),
    Problem("dilation", (1, 4, 7, 6), 5, conv={"padding": 2, "dilation": 2}),
    Problem("dilation_stride", (2, 3, 8, 9), 4, conv={"padding": 2, "dilation": (2, 3), "stride": 2}),
    Problem("kernel_5", (1, 4, 6, 5), 5, (5, 5), acnet(5), conv={"padding": 2}),
    Problem("crop", (2, 3, 6, 5), 4, conv={"padding": 0}),
    Problem("crop_5", (1, 3, 7, 6), 4, (5, 5), acnet(5), channels_last=False, conv={"padding": 1, "stride": 2}),
    Problem("shift", (1, 4, 5, 6), 3, branches=acnet(3, (1, -1)), conv={"padding": 1}),
    Problem("groups", (2, 6, 5, 4), 8, conv={"padding": 1, "groups": 2}),
    Problem("kernel_1", (2, 3, 4, 3), 5, (1, 1), acnet(1)),
    Problem("no_row", (1, 3, 5, 4), 4, branches=(ALL, COLUMN), conv={"padding": 1}),
    Problem("no_column", (1, 3, 5, 4), 4, branches=(ALL, ROW), conv={"padding": 1, "stride": 2}),
    Problem("alone", (1, 3, 5, 4), 4, branches=(ALL,), conv={"padding": 1}),
    Problem("row_alone", (1, 3, 5, 4), 4, branches=(ROW,), conv={"padding": 1, "stride": 2}),
    Problem("lines", (2, 4, 6, 5), 5, (5, 5), acnet(5, (-2, 1))[1:], conv={"padding": 1}),
]

# One input channel a group: kernels of their own.
DEPTHWISE = [
    Problem("depthwise", (2, 19, 7, 5), 19, conv={"padding": 1, "groups": 19}),
    Problem("depthwise_contiguous", (1, 5, 6, 5), 5, channels_last=False, conv={"padding": 1, "groups": 5}),
    Problem("depthwise_stride", (2, 3, 7, 8), 3, conv={"padding": 1, "groups": 3, "stride": (2, 3)}),
    Problem("depthwise_dilation", (1, 4, 9, 8), 4, conv={"padding": (3, 2), "groups": 4, "dilation": (3, 2)}),
    Problem(
        "depthwise_5",
        (1, 3, 9, 8),
        3,
        (5, 5),
        acnet(5),
        conv={"padding": 1, "groups": 3, "stride": 2, "dilation": (1, 2)},
    ),
    Problem("depthwise_shift", (1, 4, 5, 6), 4, branches=acnet(3, (-1, 1)), conv={"padding": 0, "groups": 4}),
    Problem("depthwise_multiplier", (2, 7, 5, 6), 21, conv={"padding": 1, "groups": 7, "stride": (1, 2)}),
    Problem("depthwise_line", (3, 2, 1, 4), 4, conv={"padding": 1, "groups": 2}),
    Problem("one_channel", (1, 1, 6, 7), 5, conv={"padding": 1}),
    Problem("depthwise_no_row", (1, 3, 5, 4), 3, branches=(ALL, COLUMN), conv={"padding": 1, "groups": 3}),
    Problem("depthwise_no_column", (1, 3, 5, 4), 3, branches=(ALL, ROW), conv={"padding": 1, "groups": 3}),
    Problem("depthwise_alone", (1, 3, 5, 4), 3, branches=(ALL,), conv={"padding": 1, "groups": 3}),
    Problem("depthwise_row", (1, 3, 5, 4), 3, branches=(ROW,), conv={"padding": 1, "groups": 3, "stride": 2}),
]

# Kernel, branches and padding of other blocks.
SHAPES: dict[str, tuple[Pair, tuple[Taps, ...], Pair]] = {
    "repvgg": ((3, 3), (ALL, Taps(1, 1, 1, 1)), (1, 1)),
    "mobileone": ((3, 3), (ALL, ALL, Taps(1, 1, 1, 1)), (1, 1)),
    "rectangular": ((3, 5), (Taps(0, 0, 3, 5), Taps(1, 0, 1, 5)), (1, 2)),
    "dilated": ((5, 5), (Taps(0, 0, 5, 5), Taps(0, 0, 3, 3, 2)), (2, 2)),
    "two_dilated": ((7, 7), (Taps(0, 0, 3, 3, 3), Taps(1, 1, 5, 5), Taps(1, 1, 3, 3, 2)), (3, 2)),
    "border": ((3, 3), (ALL, Taps(0, 0, 1, 3), Taps(0, 2, 3, 1)), (1, 1)),
    "even": ((4, 2), (Taps(0, 0, 4, 2), Taps(1, 0, 2, 2), Taps(3, 1, 1, 1)), (2, 1)),
    "apart": ((3, 6), (Taps(0, 0, 2, 2), Taps(2, 3, 1, 2, 2), Taps(1, 5, 2, 1)), (0, 1)),
}
SHAPED = [
    Problem(
        f"{name}_{kind}",
        shape,
        K,
        kernel,
        branches,
        stride == 1,
        {"padding": padding, "stride": stride, "groups": groups},
    )
    for name, (kernel, branches, padding) in SHAPES.items()
    for kind, shape, K, groups, stride in (
        ("dense", (1, 5, 7, 9), 6, 1, 1),
        ("groups_stride", (1, 6, 8, 7), 4, 2, 2),
        ("depthwise", (1, 3, 7, 9), 6, 3, 1),
        ("depthwise_stride", (2, 3, 8, 9), 3, 3, 2),
    )
]


class Tensors:
    """A problem's tensors: x, weights, γ, β, and the gradient of its output, in one dtype; γ and β in fp32."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.problem, self.window, self.eps = problem, problem.window, [1e-5, 1e-3, 1e-4][: len(problem.branches)]
        N, C, H, W = problem.shape
        self.layout = torch.channels_last if problem.channels_last else torch.contiguous_format

        def random(*shape: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
            return (torch.randn(shape) + 0.3).to(device, dtype).contiguous(memory_format=layout)

        self.x = random(N, C, H, W)
        self.weights = [
            random(problem.K, C // problem.groups, taps.rows, taps.columns, layout=self.layout)
            for taps in problem.branches
        ]
        self.gammas = [(torch.rand(problem.K) + 0.5).to(device) for _ in problem.branches]
        self.betas = [torch.randn(problem.K).to(device) for _ in problem.branches]
        self.grad = random(N, problem.K, *self.window.output_size(H, W))

    def maps(self, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Every branch's map by F.conv2d, its weight a whole kernel with zeros for the taps that it lacks."""
        p, found = self.problem, []
        for taps, w in zip(p.branches, weights, strict=True):
            whole = w.new_zeros((*w.shape[:2], *p.kernel))
            rows = slice(taps.row, taps.row + taps.rows * taps.step, taps.step)
            whole[:, :, rows, taps.column : taps.column + taps.columns * taps.step : taps.step] = w
            settings = (p.pair("stride"), p.pair("padding"), p.pair("dilation"), p.groups)
            found.append(F.conv2d(x, whole.contiguous(memory_format=self.layout), None, *settings))
        return found

    def convolutions(self, dys: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The branches' maps, and x's and the weights' gradients where the maps' are dys, by F.conv2d in dtype."""
        x, *weights = (t.to(dtype).detach().requires_grad_() for t in (self.x, *self.weights))
        ys = self.maps(x, weights)
        dx, *dws = torch.autograd.grad(ys, [x, *weights], [dy.to(dtype) for dy in dys])
        named = {"y": [y.detach() for y in ys], "w": dws}
        return {"out": sum(named["y"]), "x": dx} | {
            f"{name}{b}": t for name, tensors in named.items() for b, t in enumerate(tensors)
        }

    def eager(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output, branch maps and every gradient by F.conv2d and F.batch_norm in dtype (x's by default)."""
        params = torch.float64 if dtype == torch.float64 else torch.float32
        dtype = dtype or self.x.dtype
        x = self.x.to(dtype).detach().requires_grad_()
        weights = [w.to(dtype).detach().requires_grad_() for w in self.weights]
        gammas = [t.to(params).detach().requires_grad_() for t in self.gammas]
        betas = [t.to(params).detach().requires_grad_() for t in self.betas]
        found, out = {}, torch.zeros((), dtype=dtype, device=x.device)
        norms = zip(self.maps(x, weights), gammas, betas, self.eps, strict=True)
        for b, (y, gamma, beta, eps) in enumerate(norms):
            found[f"y{b}"] = y.detach()
            out = out + F.batch_norm(y, None, None, gamma, beta, True, 0.0, eps)
        out.backward(self.grad.to(dtype))
        found |= {"out": out.detach(), "x": x.grad}
        for name, tensors in (("w", weights), ("gamma", gammas), ("beta", betas)):
            found |= {f"{name}{b}": t.grad for b, t in enumerate(tensors)}
        return found

    def truth(self) -> dict[str, Tensor]:
        """eager() in float64."""
        return self.eager(torch.float64)


def step(t: Tensors, config: Config | None = SMALL) -> dict[str, Tensor]:
    """Everything Tensors.eager gives, all phases by Triton."""
    H, W = t.x.shape[2:]
    ys, moments = triton_conv.conv_forward(t.x, t.weights, t.window, config=config)
    norms = triton_bn_sum.merge_statistics(moments, t.gammas, t.betas, t.eps)
    out = triton_bn_sum.apply(ys, norms)
    found = {"out": out} | {f"y{b}": y.clone() for b, y in enumerate(ys)}
    rest = (norms.means, norms.rstds, t.gammas, [True] * len(ys))
    dgamma, dbeta = triton_bn_sum.bn_sum_backward_(t.grad, ys, *rest, ys)  # the ys are their gradients by now
    found["x"] = triton_conv.input_grad(ys, t.weights, t.window, (H, W), config=config)
    dws = triton_conv.weight_grads(t.x, ys, t.weights, t.window, config=config)
    for b, (dw, w) in enumerate(zip(dws, t.weights, strict=True)):
        assert dw.stride() == w.stride()
        found |= {f"w{b}": dw, f"gamma{b}": dgamma[b], f"beta{b}": dbeta}
    return found
