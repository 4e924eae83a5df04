"""A training step of whole networks: plain, ACNet in eager, compiled, and by this package.

A step is forward, loss, backward and an SGD update on random images, channels_last; half precision is autocast.
Writes network-<dtype>.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acnet_kernels import ACBlock
from acnet_kernels.paper import models

from . import harness
from .contenders import COMPILED, Checkpointed, Modules

CLASSES = 10


class Network(NamedTuple):
    """A name of `acnet_kernels.paper.models`, the size of its images, and the batch on a CPU and on a GPU."""

    name: str
    size: int
    cpu_batch: int
    cuda_batch: int

    def batch(self, device: torch.device) -> int:
        """On this kind of device."""
        return self.cuda_batch if device.type == "cuda" else self.cpu_batch

    def shape(self, batch: int) -> str:
        """As rows name it."""
        return f"{self.name} {batch}x3x{self.size}x{self.size}"


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet56", 32, 16, 128),
        Network("resnet18", 224, 2, 128),
        Network("vgg16", 32, 16, 128),
        Network("densenet40", 32, 4, 64),
    )
}
# A whole network compiles for a minute on two cores: on a CPU, unless it is asked for, this one alone.
COMPILED_NETWORKS = ("resnet18",)
OURS = ("auto", "recompute", "memory_saver")
TIMED = ("plain", "eager", *COMPILED, "auto", "memory_saver")
MEASURED = ("plain", "eager", "compile", "checkpoint", *OURS)  # in bytes


def with_blocks(model: nn.Module, made_of: Callable[[ACBlock], nn.Module]) -> nn.Module:
    """model with every ACBlock replaced by what is made of it, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ACBlock):
                setattr(parent, name, made_of(child))
    return model


def build(network: str, contender: str, device: torch.device) -> nn.Module:
    """The contender's network in training mode, channels_last, from the same seed as all others."""
    torch.manual_seed(0)
    if contender == "plain":
        model = models.build(network, CLASSES, block="plain")
    else:
        model = models.build(network, CLASSES, backend=contender if contender in OURS else "eager")
    model = model.to(device, memory_format=torch.channels_last)
    if contender == "eager":
        return with_blocks(model, Modules)
    if contender == "checkpoint":
        return with_blocks(model, lambda block: Checkpointed(Modules(block)))
    if contender in COMPILED:
        torch.compiler.reset()
        model.compile(mode=COMPILED[contender])
    return model


def batch_of(network: Network, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images, channels_last, and labels."""
    images = torch.randn(batch, 3, network.size, network.size, device=device)
    return images.to(memory_format=torch.channels_last), torch.randint(CLASSES, (batch,), device=device)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss with its graph; autocast to dtype unless that is float32."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images), labels)


def training_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One step on this batch, as a call."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, images, labels, dtype).backward()
        optimizer.step()

    return step


def names_for(network: Network, options: argparse.Namespace, among: tuple[str, ...]) -> list[str]:
    """The contenders of a network: those asked for of `among`, or all but compilations that take too long."""
    if options.contenders:
        return [name for name in among if name in options.contenders]
    cuda = options.device.type == "cuda"
    compiled = [] if options.quick or not (cuda or network.name in COMPILED_NETWORKS) else [*COMPILED]
    return [name for name in among if name not in COMPILED or (name in compiled and (cuda or name == "compile"))]


def run(options: argparse.Namespace) -> list[Path]:
    """Times all networks in all dtypes; returns the files written."""
    written = []
    for dtype in options.dtype:
        report = harness.Report(options.device)
        for name in [name for name in options.networks if name in NETWORKS]:
            line = measure(NETWORKS[name], dtype, options, report)
            print(f"{name} {harness.dtype_name(dtype)}: {line}", flush=True)
        written.append(options.out / f"network-{harness.dtype_name(dtype)}.csv")
        report.write_csv(written[-1])
    return written


def measure(network: Network, dtype: torch.dtype, options: argparse.Namespace, report: harness.Report) -> str:
    """Times one network's contenders and adds their rows; returns its line of the log."""
    batch = network.batch(options.device)
    images, labels = batch_of(network, batch, options.device)
    calls = {
        name: [training_step(build(network.name, name, options.device), images, labels, dtype)]
        for name in names_for(network, options, TIMED)
    }
    samples = harness.measure(calls, options.device, warm_up=0.02, seconds=4 * options.seconds, least=options.least)
    for name, found in samples.items():
        report.add(name, "step", network.shape(batch), dtype, "channels_last", "time_ms", found)
    return ", ".join(f"{name} {found.p50:.1f}" for name, found in samples.items())
