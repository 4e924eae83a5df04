"""Runs a function in several gloo processes on this machine and returns what each of them returned."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world: int, folder: str, function: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world, rank)
    args = torch.load(Path(folder, "args.pt"), weights_only=False)
    try:
        torch.save(function(rank, world, *args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a process of its own."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder, "args.pt"))  # spawn's own arguments would be shared memory, not copies
        mp.spawn(_worker, (world, folder, function), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
