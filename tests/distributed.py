"""Runs a function in several processes on this machine and returns what each of them returned."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported these, and no more: each alone would take seconds to.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "torchvision", "acnet_kernels", "pytest", "oracle"]


def _worker(rank: int, world: int, folder: str, function: Callable[..., Any], backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False  # the tests' bounds are float32's
    store = f"file://{folder}/store"
    dist.init_process_group(backend, store, timedelta(seconds=60), world, rank)
    args = torch.load(Path(folder, "args.pt"), weights_only=False)
    try:
        torch.save(function(rank, world, *args), Path(folder, f"{rank}.pt"))
        dist.barrier()  # a process that leaves while others still talk to it can abort them
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this process's collectives take their tensors from."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def run(world: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a process of its own: with NCCL, on its own GPU."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder, "args.pt"))  # a process's own arguments would be shared memory, not copies
        multiprocessing.set_forkserver_preload(PRELOADED)
        mp.start_processes(_worker, (world, folder, function, backend), world, start_method="forkserver")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
