"""Time and memory of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, backward and SGD update on one fixed batch, as a call that has ended on the device on return."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        _wait(images.device)

    model.train()
    return step


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """The network's forward in eval, as a call that has ended on the device on return."""

    @torch.inference_mode()
    def run() -> None:
        model(images)
        _wait(images.device)

    model.eval()
    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians(calls: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Label → median seconds; the calls take turns, so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(warm_up + rounds):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[label].append(time.perf_counter() - start)
    return {label: median(values) for label, values in times.items()}


def saved_activation_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps between the forward and backward of one training step.

    Each storage counts once, however many operations save it; parameters and buffers do not count.
    Updates running statistics as any forward does.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)  # alive until counted, so no address is used twice
    total = sum(storages.values())
    del loss
    return total
