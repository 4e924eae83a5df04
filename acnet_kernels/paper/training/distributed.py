"""Training by several processes that torchrun started, each on its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import UserError
from .data import WHOLE, Part


@dataclass(frozen=True)
class World:
    """This process among those of the run; alone unless torchrun says otherwise.

    Attributes:
        part: which of the processes this one is, and of how many.
        local_rank: its number on its machine, and of its GPU.
        control: the group that agrees on stopping: over gloo, so that it waits for no GPU.
    """

    part: Part = WHOLE
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that evaluates, prints and writes."""
        return self.part.rank == 0

    def device(self, name: str) -> str:
        """The name of this process's device: its own GPU where several processes ask for one."""
        wants_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local_rank}" if self.part.size > 1 and wants_gpu else name

    def replica(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward averages gradients over the processes: model itself when alone."""
        if self.part.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def sum(self, totals: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.part.size > 1:
            dist.all_reduce(totals)
        return totals

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all processes must ask together."""
        if self.part.size == 1:
            return flag
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes, group=self.control)
        return bool(votes)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun's environment variables name, connected while the context lasts.

    Raises:
        UserError: the environment names several processes, but not how to meet them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    try:
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {size}, but the processes cannot meet: {error}; start with torchrun"
        ) from None
    try:
        part = Part(dist.get_rank(), size)
        yield World(part, int(os.environ.get("LOCAL_RANK", part.rank)), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
