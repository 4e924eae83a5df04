"""Folding all blocks of a network: ours against the per-block PyTorch way, torch._foreach_* and torch.compile.

Contenders with fresh results allocate them; "out" ones write into given tensors. `copy_fraction` is the time of a
Tensor.copy_ that moves as many bytes as a fold must (every input read once, every result written once) over the
contender's time, both from this run. Writes fusion.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import acnet_kernels as ak

from . import harness

Block = tuple[int, int]  # input and output channels; all kernels are 3×3

NETWORKS: dict[str, list[Block]] = {
    "resnet56": [(16, 16)] * 19 + [(16, 32)] + [(32, 32)] * 17 + [(32, 64)] + [(64, 64)] * 17,
    "densenet121": [(128, 32)] * 58,
    "resnet18": [(64, 64)] * 4 + [(64, 128)] + [(128, 128)] * 3 + [(128, 256)] + [(256, 256)] * 3
    + [(256, 512)] + [(512, 512)] * 3,
    "resnet50": [(64, 64)] * 3 + [(128, 128)] * 4 + [(256, 256)] * 6 + [(512, 512)] * 3,
    "vgg16": [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)] + [(256, 256)] * 2 + [(256, 512)]
    + [(512, 512)] * 5,
}  # fmt: skip
# What compiles in ten seconds on two cores, as an example: all five take minutes.
COMPILED_NETWORKS = ("resnet50",)
BRANCHES = ("square", "hor", "ver")


def network(blocks: list[Block]) -> nn.ModuleList:
    """Blocks with random statistics."""
    modules = nn.ModuleList(ak.ACBlock(c, k, 3, padding=1) for c, k in blocks).eval()
    for bn in modules.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for tensor in (bn.running_var, bn.weight):
                nn.init.uniform_(tensor, 0.3, 2)
            for tensor in (bn.running_mean, bn.bias):
                nn.init.normal_(tensor)
    return modules


def per_block(blocks: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    """As the original code folds: scale each branch, add into the centre row and column."""

    def scaled(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        std = (bn.running_var + bn.eps).sqrt()
        factor = (bn.weight / std).reshape(-1, 1, 1, 1)
        return conv.weight * factor, bn.bias - bn.running_mean * bn.weight / std

    out = []
    for b in blocks:
        weight, bias = scaled(b.square_conv, b.square_bn)
        hor, hor_bias = scaled(b.hor_conv, b.hor_bn)
        ver, ver_bias = scaled(b.ver_conv, b.ver_bn)
        weight[:, :, 1:2] += hor
        weight[:, :, :, 1:2] += ver
        out.append((weight, bias + hor_bias + ver_bias))
    return out


def foreach(blocks: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    """The same with every elementwise step done for all branches of all blocks by one torch._foreach_* call."""
    convs = [getattr(b, f"{name}_conv") for name in BRANCHES for b in blocks]
    norms = [getattr(b, f"{name}_bn") for name in BRANCHES for b in blocks]
    scale = torch._foreach_add([bn.running_var for bn in norms], [bn.eps for bn in norms])
    torch._foreach_rsqrt_(scale)
    torch._foreach_mul_(scale, [bn.weight for bn in norms])
    bias = torch._foreach_mul([bn.running_mean for bn in norms], scale)
    bias = torch._foreach_sub([bn.bias for bn in norms], bias)
    weight = torch._foreach_mul([conv.weight for conv in convs], [s.reshape(-1, 1, 1, 1) for s in scale])
    n = len(blocks)
    torch._foreach_add_([w[:, :, 1:2] for w in weight[:n]], weight[n : 2 * n])
    torch._foreach_add_([w[:, :, :, 1:2] for w in weight[:n]], weight[2 * n :])
    torch._foreach_add_(bias[:n], bias[n : 2 * n])
    torch._foreach_add_(bias[:n], bias[2 * n :])
    return list(zip(weight[:n], bias[:n], strict=True))


def moved_bytes(blocks: nn.ModuleList) -> int:
    """Every input once and every result once."""
    read = sum(p.nbytes for p in blocks.parameters()) + 4 * sum(2 * 3 * b.out_channels for b in blocks)
    return read + sum(b.square_conv.weight.nbytes + 4 * b.out_channels for b in blocks)


def kernels(call, device: torch.device) -> int:
    """CUDA kernels, or on the CPU operator calls, that one call makes."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as run:
        call()
    if device.type == "cuda":
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in run.events())
    return sum(e.cpu_parent is None for e in run.events())


def relative_error(blocks: nn.ModuleList) -> float:
    """The largest of our results' relative errors against the same fold in float64."""
    ours = ak.fold(blocks)
    doubles = nn.ModuleList(network([(b.in_channels, b.out_channels)])[0] for b in blocks).double()
    doubles.load_state_dict(blocks.state_dict())
    truth = per_block(doubles.to(next(blocks.parameters()).device))
    pairs = [(o, t) for ours_, truth_ in zip(ours, truth, strict=True) for o, t in zip(ours_, truth_, strict=True)]
    return max(((o.double() - t).norm() / t.norm()).item() for o, t in pairs)


def run(options: argparse.Namespace) -> list[Path]:
    """Folds every network by every contender; returns the file written. float32, as checkpoints are."""
    report, lines = harness.Report(options.device), []
    for name in [name for name in options.networks if name in NETWORKS]:
        lines += measure(name, options, report)
    header = ("network", "contender", "p20 ms", "p50 ms", "p80 ms", "× per block", "of copy speed", "calls")
    print(harness.table(header, lines), flush=True)
    path = options.out / "fusion.csv"
    report.write_csv(path)
    return [path]


@torch.no_grad()
def measure(name: str, options: argparse.Namespace, report: harness.Report) -> list[tuple[object, ...]]:
    """Measures one network and adds its rows; returns the table's lines."""
    device = options.device
    nbytes = moved_bytes(network(NETWORKS[name]))
    sets = harness.sets_beyond_cache(nbytes, device)
    nets = [network(NETWORKS[name]).to(device) for _ in range(sets)]
    outs = [ak.fold(net) for net in nets]
    contenders: dict[str, harness.Calls] = {
        "per block": [lambda net=net: per_block(net) for net in nets],
        "torch._foreach": [lambda net=net: foreach(net) for net in nets],
        "ours": [lambda net=net: ak.fold(net) for net in nets],
        "ours out": [lambda net=net, out=out: ak.fold(net, out=out) for net, out in zip(nets, outs, strict=True)],
        "copy": harness.copy_calls(nbytes, device, sets),
    }
    if "compile" in options.contenders or (name in COMPILED_NETWORKS and not options.quick):
        torch.compiler.reset()
        function = torch.compile(per_block)
        contenders["compile"] = [lambda: function(nets[0])]  # a graph a set would measure compilation
    samples = harness.measure(contenders, device, warm_up=0.05, seconds=2 * options.seconds, least=options.least)
    lines: list[tuple[object, ...]] = []
    base, copy = samples["per block"].p50, samples["copy"].p50
    for contender, s in samples.items():
        mode = "out" if contender in ("ours out", "copy") else "fresh"
        calls = kernels(contenders[contender][0], device)
        for metric, value in (("time_ms", s), ("copy_fraction", copy / s.p50), ("calls", float(calls))):
            report.add(contender, mode, name, torch.float32, "contiguous", metric, value)
        times = [s.quantile(q) for q in (0.2, 0.5, 0.8)]
        lines.append((name, contender, *times, base / s.p50, copy / s.p50, calls))
    error = relative_error(nets[0])
    report.add("ours", "fresh", name, torch.float32, "contiguous", "relative_error", error)
    return lines
