"""Trained networks and data sets that the studies share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ...arguments import make_directory
from ...conversion import fuse
from ..training import checkpoints
from ..training.data import Data, open_data
from ..training.loop import LAST, Observer, Recipe, Trainer, build_model
from .config import StudyConfig
from .study import Cell, Network

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

CALIBRATION = 50  # batches that give an untrained network its running statistics


class Lab:
    """Trains each network once, keeps it on disk, and hands it to whichever study asks.

    Args:
        config: what to train and how.
        folder: for the networks' checkpoints, one directory each; made where missing.
        device: where to compute.
        data_dir: where the data set's files are.
        workers: processes that read a directory of images.
    """

    def __init__(
        self, config: StudyConfig, folder: Path, device: torch.device, data_dir: Path | None, workers: int
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self._data_dir, self._workers = data_dir, workers
        self._open = lru_cache(maxsize=None)(self._open_data)
        self._load = lru_cache(maxsize=2)(self._load_network)
        self._fold = lru_cache(maxsize=2)(lambda network: fuse(self._load(network)))

    def check(self, recipe: Recipe) -> None:
        """UserError where the data cannot be opened, or the network is unknown or not made for the data."""
        data = self._open(recipe.data)
        with torch.device("meta"):
            build_model(recipe, data)

    def data(self, cell: Cell) -> Data:
        """The cell's data set."""
        return self._open(str(cell["data"]))

    def network(self, cell: Cell) -> nn.Module:
        """The cell's trained network in eval mode; shared, so not to be changed."""
        return self._load(Network.of(cell))

    def folded(self, cell: Cell) -> nn.Module:
        """`network` with its blocks folded; shared, so not to be changed."""
        return self._fold(Network.of(cell))

    @torch.no_grad()
    def untrained(self, cell: Cell) -> nn.Module:
        """The cell's network as its training begins, folded by statistics of the training images."""
        trainer = self._new_trainer(Network.of(cell))
        batches = trainer.data.train_batches(trainer.recipe.seed, 0, trainer.recipe.batch_size)
        update_bn((images for images, _ in islice(batches, CALIBRATION)), trainer.model)
        return fuse(trainer.model.eval())

    def epochs(self, network: Network) -> int:
        """How many its training has."""
        return self._recipe(network).epochs

    def train(
        self, network: Network, watch: AbstractContextManager[Observer], stopping: Callable[[], bool]
    ) -> bool:
        """Trains the network where it is not yet, from where an earlier call was stopped.

        Args:
            network: which one.
            watch: around a training; gives its observer.
            stopping: asked after every step.

        Returns:
            Whether it is trained.
        """
        trainer = self._trainer(network)
        if trainer.epoch == trainer.recipe.epochs:
            return True
        out = make_directory(self._place(network))
        with watch as observer:
            return trainer.run(out, observer, stopping)

    def _place(self, network: Network) -> Path:
        of = network._replace(net="", block="", seed=0)
        code = f"{zlib.crc32(repr(tuple(of)).encode()):08x}"  # of what a file's name cannot say
        return self.folder / f"{Path(of.data).name}-{network.net}-{network.block}-seed{network.seed}-{code}"

    def _trainer(self, network: Network) -> Trainer:
        """The network's run, where its checkpoint left it."""
        trainer, last = self._new_trainer(network), self._place(network) / LAST
        if last.exists():
            trainer.load_state_dict(checkpoints.load(last))
        return trainer

    def _new_trainer(self, network: Network) -> Trainer:
        recipe = self._recipe(network)
        return Trainer(recipe, self._open(recipe.data), self.device)

    def _recipe(self, network: Network) -> Recipe:
        recipe = self.config.find(network.data, network.net, network.recipe, network.backend)
        return replace(recipe, block=network.block, seed=network.seed)

    def _open_data(self, name: str) -> Data:
        return open_data(
            name,
            self.device,
            folder=self._data_dir,
            limit=self.config.recipe.limit,  # every recipe of a configuration has the same limit and image size
            test_limit=self.config.test_limit,
            image_size=self.config.recipe.image_size,
            workers=self._workers,
        )

    def _load_network(self, network: Network) -> nn.Module:
        trainer = self._trainer(network)
        assert trainer.epoch == trainer.recipe.epochs, f"{self._place(network)} is not trained"
        return trainer.model.eval()
