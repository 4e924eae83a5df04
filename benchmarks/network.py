"""A training step of whole networks: plain, ACNet in eager, compiled, and by this package.

A step is forward, loss, backward and an SGD update on random images, channels_last; half precision is autocast.
Writes network-<dtype>.csv; of other libraries' networks, as they are and accelerated, also what a step keeps for
backward, to accelerated-<dtype>.csv. These are in PyTorch's usual layout: in channels_last the CPU library's weight
gradient of a 1×1 convolution of 3 channels and stride 2, as RepVGG's and MobileOne's stems have it, writes outside
its memory (torch 2.14.1, AVX-512).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acnet_kernels import ACBlock, accelerate
from acnet_kernels.paper import models

from . import harness, libraries
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
OURS_COMPILED = {"auto-compile": "auto"}  # contender → the backend of what torch.compile gets
COMPILING = (*COMPILED, *OURS_COMPILED)
TIMED = ("plain", "eager", *COMPILED, "auto", *OURS_COMPILED, "memory_saver")
OF_LIBRARIES = ("eager", *COMPILED, "auto", *OURS_COMPILED, "memory_saver")  # eager: the library's own
MEASURED = ("plain", "eager", "compile", "checkpoint", *OURS)  # in bytes


def with_blocks(model: nn.Module, made_of: Callable[[ACBlock], nn.Module]) -> nn.Module:
    """model with every ACBlock replaced by what is made of it, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ACBlock):
                setattr(parent, name, made_of(child))
    return model


def build(network: str, contender: str, device: torch.device) -> nn.Module:
    """The contender's network in training mode and its layout, from the same seed as all others."""
    torch.manual_seed(0)
    found = libraries.parse(network)
    backend = OURS_COMPILED.get(contender, contender)
    if found is not None:
        model = libraries.build(found, CLASSES)
        if backend in OURS:
            accelerate(model, backend=backend)
    elif contender == "plain":
        model = models.build(network, CLASSES, block="plain")
    else:
        model = models.build(network, CLASSES, backend=backend if backend in OURS else "eager")
    model = model.to(device, memory_format=layout_of(network))
    if contender == "eager":
        return with_blocks(model, Modules)  # a library's network has none
    if contender == "checkpoint":
        return with_blocks(model, lambda block: Checkpointed(Modules(block)))
    if contender in COMPILING:
        torch.compiler.reset()
        model.compile(mode=COMPILED.get(contender, "default"))
    return model


def layout_of(name: str) -> torch.memory_format:
    """The memory layout a network is measured in."""
    return torch.channels_last if libraries.parse(name) is None else torch.contiguous_format


def batch_of(network: Network, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images, in the network's layout, and labels."""
    images = torch.randn(batch, 3, network.size, network.size, device=device)
    return images.to(memory_format=layout_of(network.name)), torch.randint(CLASSES, (batch,), device=device)


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
    compiles = not options.quick and (cuda or network.name in COMPILED_NETWORKS)
    chosen = set(COMPILING if cuda else ("compile", *OURS_COMPILED)) if compiles else set()
    return [name for name in among if name not in COMPILING or name in chosen]


def find(name: str) -> Network | None:
    """The network of this name, the paper's or another library's, or None."""
    found = libraries.parse(name)
    return NETWORKS.get(name) if found is None else Network(name, libraries.image_size(found), 4, 64)


# What the contenders of a file's networks are.
LEGEND = {
    "network": "plain: no ACNet blocks; eager: with them, as PyTorch modules; auto…, memory_saver: by this package",
    "accelerated": "eager: the library's own; auto…, memory_saver: accelerated by this package",
}


def kind_of(name: str) -> str:
    """Of LEGEND: which file the rows of the network of this name go to."""
    return "network" if libraries.parse(name) is None else "accelerated"


def run(options: argparse.Namespace) -> list[Path]:
    """Times all networks in all dtypes; returns the files written."""
    written = []
    for kind in dict.fromkeys(map(kind_of, options.networks)):
        print(LEGEND[kind], flush=True)
    for dtype in options.dtype:
        reports: dict[str, harness.Report] = {}
        for network in [network for name in options.networks if (network := find(name)) is not None]:
            report = reports.setdefault(kind_of(network.name), harness.Report(options.device))
            line = measure(network, dtype, options, report)
            print(f"{network.name} {harness.dtype_name(dtype)}: {line}", flush=True)
        for kind, report in reports.items():
            written.append(options.out / f"{kind}-{harness.dtype_name(dtype)}.csv")
            report.write_csv(written[-1])
    return written


def measure(network: Network, dtype: torch.dtype, options: argparse.Namespace, report: harness.Report) -> str:
    """Times one network's contenders and adds their rows; returns its line of the log."""
    batch, shape = network.batch(options.device), network.shape(network.batch(options.device))
    images, labels = batch_of(network, batch, options.device)
    of_library = libraries.parse(network.name) is not None
    layout = "nchw" if of_library else "channels_last"
    models = {
        name: build(network.name, name, options.device)
        for name in names_for(network, options, OF_LIBRARIES if of_library else TIMED)
    }
    if of_library:
        for name, model in models.items():
            known = [*model.parameters(), *model.buffers()]
            kept = harness.saved_bytes(lambda model=model: loss_of(model, images, labels, dtype), known)
            report.add(name, "step", shape, dtype, layout, "saved_bytes", float(kept))
    calls = {name: [training_step(model, images, labels, dtype)] for name, model in models.items()}
    samples = harness.measure(calls, options.device, warm_up=0.02, seconds=4 * options.seconds, least=options.least)
    for name, found in samples.items():
        report.add(name, "step", shape, dtype, layout, "time_ms", found)
    told = ", ".join(f"{name} {found.p50:.1f}" for name, found in samples.items()) + " ms a step"
    if not {"eager", "auto"} <= samples.keys():
        return told
    return f"{told}; auto is {samples['eager'].p50 / samples['auto'].p50:.2f} times as fast as eager"
