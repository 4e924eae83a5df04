"""Trained networks and data sets that the studies share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..surgery import fuse
from ..training import checkpoints
from ..training.command import make_directory
from ..training.data import Data, open_data
from ..training.loop import LAST, Observer, Trainer
from ..training.report import LABELS
from .plan import Plan
from .study import Cell

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# A training's label → the context in which it is watched.
Watch = Callable[[str], "AbstractContextManager[Observer]"]


class Lab:
    """Trains each network once, keeps it on disk, and hands it to whichever study asks.

    Args:
        plan: what to train and how.
        folder: for the networks' checkpoints, one directory each; made where missing.
        device: where to compute.
        data_dir: where the data set's files are.
        workers: processes that read a directory of images.
    """

    def __init__(self, plan: Plan, folder: Path, device: torch.device, data_dir: Path | None, workers: int) -> None:
        self.plan, self.folder, self.device = plan, folder, device
        self._data_dir, self._workers = data_dir, workers
        self._open = lru_cache(maxsize=None)(self._open_data)
        self._load = lru_cache(maxsize=2)(self._load_network)
        self._fold = lru_cache(maxsize=2)(lambda key: fuse(self._load(key)))

    def data(self, cell: Cell) -> Data:
        """The cell's data set."""
        return self._open(str(cell["data"]))

    def network(self, cell: Cell) -> nn.Module:
        """The cell's trained network in eval mode; shared, so not to be changed."""
        return self._load(_key(cell))

    def folded(self, cell: Cell) -> nn.Module:
        """`network` with its blocks folded; shared, so not to be changed."""
        return self._fold(_key(cell))

    def train(self, cells: Iterable[Cell], watch: Watch, stopping: Callable[[], bool]) -> bool:
        """Trains the cells' networks that are not yet trained, from where an earlier call was stopped.

        Args:
            cells: whose networks.
            watch: makes the observer of one training from its label.
            stopping: asked after every step.

        Returns:
            Whether all of them are trained.
        """
        keys = dict.fromkeys(_key(cell) for cell in cells)
        for number, key in enumerate(keys, 1):
            trainer = self._trainer(key)
            if trainer.epoch == trainer.recipe.epochs:
                continue
            _, net, block, seed = key
            out = make_directory(self._place(key))
            with watch(f"{number:>2}/{len(keys)} {net} {LABELS[block]:<21} seed {seed}") as observer:
                if not trainer.run(out, observer, stopping) or stopping():
                    return False
        return True

    def _place(self, key: _Key) -> Path:
        data, net, block, seed = key
        return self.folder / f"{Path(data).name}-{net}-{block}-seed{seed}"

    def _trainer(self, key: _Key) -> Trainer:
        """The network's run, where its checkpoint left it."""
        data, net, block, seed = key
        recipe = replace(self.plan.find(data, net), block=block, seed=seed)
        trainer, last = Trainer(recipe, self._open(data), self.device), self._place(key) / LAST
        if last.exists():
            trainer.load_state_dict(checkpoints.load(last))
        return trainer

    def _open_data(self, name: str) -> Data:
        return open_data(
            name,
            self.device,
            folder=self._data_dir,
            limit=self.plan.recipe.limit,  # every recipe of a plan has the same limit and image size
            test_limit=self.plan.test_limit,
            image_size=self.plan.recipe.image_size,
            workers=self._workers,
        )

    def _load_network(self, key: _Key) -> nn.Module:
        trainer = self._trainer(key)
        assert trainer.epoch == trainer.recipe.epochs, f"{self._place(key)} is not trained"
        return trainer.model.eval()


_Key = tuple[str, str, str, int]


def _key(cell: Cell) -> _Key:
    return str(cell["data"]), str(cell["net"]), str(cell["block"]), int(cell["seed"])
