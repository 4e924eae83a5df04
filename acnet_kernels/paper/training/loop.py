"""The training loop: the authors' recipe, resumable before any step with bit-identical results."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .. import models
from . import checkpoints
from .data import Data, used_images
from .distributed import ALONE, World

AMP_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LAST, BEST = "last.pt", "best.pt"
# How a row of the history is made.
ROW = {"epoch": 0} | dict.fromkeys(
    ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_second"), 0.0
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's weights on one machine; a resumed run must have the same.

    SGD with momentum 0.9, the weight decay on every parameter (arXiv 1908.03930 §4); the learning rate falls to
    zero along a cosine over all steps, as in the authors' later README, where the paper lowers it in steps.
    `bias_lr_factor` scales the rate of all biases, batch norms' β included (the authors' code: 2).
    """

    data: str = "digits"
    net: str = "resnet20"
    block: str = "acb"
    epochs: int = 30
    lr: float = 0.1
    batch_size: int = 128
    weight_decay: float = 1e-4
    bias_lr_factor: float = 1.0
    amp: str = "no"
    backend: str = "auto"
    seed: int = 0
    limit: int | None = None
    image_size: int = 224


class Observer(Protocol):
    """Is told how a run goes."""

    def start(self, epochs: int, steps: int, epoch: int, step: int) -> None:
        """The run has `epochs` of `steps` steps, and begins at this place."""

    def step(self, images: int) -> None:
        """A step over so many images is done."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch is done and evaluated; row is its entry in the history."""


def build_model(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's network for the data, on the CPU; UserError where there is none such, or none of that size."""
    options = {"backend": recipe.backend} if recipe.block != "plain" else {}
    try:
        models.check_size(recipe.net, data.size)
        return models.build(recipe.net, data.classes, data.channels, recipe.block, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups: everything but biases, and biases, each with the factor on its learning rate."""
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    ids = {id(p) for p in biases}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": others, "factor": 1.0}, {"params": biases, "factor": recipe.bias_lr_factor}]


class Trainer:
    """One run: network, optimizer and its place in the epochs.

    Several processes share a run when each is given its `world`: gradients are those of the whole batch, batch
    statistics those of each process's part. The main process writes and observes.

    Attributes:
        epoch, step: the next step's place.
        history: one row an epoch: lr, train_loss, train_accuracy, test_loss, test_accuracy, images_per_second.
        best: the best test accuracy so far and its epoch.
    """

    def __init__(self, recipe: Recipe, data: Data, device: torch.device, world: World = ALONE) -> None:
        if recipe.batch_size % world.part.size:
            raise UserError(
                f"--batch-size must be a multiple of the {world.part.size} processes, got {recipe.batch_size}"
            )
        self.recipe, self.data, self.device, self.world = recipe, data, device, world
        random.seed(recipe.seed)
        np.random.seed(recipe.seed % 2**32)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, data).to(device)
        self.model.to(memory_format=torch.channels_last)
        self._replica = world.replica(self.model, device)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, recipe), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self._used_images = used_images(data.train_images, recipe.batch_size, world.part)
        self.steps = math.ceil(self._used_images / recipe.batch_size)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        self.best = {"accuracy": -1.0, "epoch": -1}
        self._totals = self._zero_totals()

    def _zero_totals(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64, device=self.device)  # Σ loss, correct

    def learning_rate(self) -> float:
        """The cosine's value at the next step."""
        done = (self.epoch * self.steps + self.step) / (self.recipe.epochs * self.steps)
        return self.recipe.lr * 0.5 * (1 + math.cos(math.pi * done))

    def autocast(self) -> torch.autocast:
        """The context that computes in the recipe's dtype."""
        dtype = AMP_DTYPES[self.recipe.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward and update on this process's part of one batch; adds to the epoch's totals."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with self.autocast():
            logits = self._replica(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss * self._weight(len(labels))).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        self._totals += torch.stack((loss.detach().double() * len(labels), correct.double()))
        self.step += 1

    def _weight(self, images: int) -> float:
        """What makes the processes' mean of mean losses the batch's mean loss, even where parts differ by one."""
        size = min(self.recipe.batch_size, self._used_images - self.step * self.recipe.batch_size)
        return images * self.world.part.size / size

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """(mean loss, accuracy) on the test images."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in self.data.test_batches(self.recipe.batch_size, self.world.part):
            with self.autocast():
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            totals += torch.stack((loss.double(), (logits.argmax(1) == labels).sum().double()))
        loss, correct = (self.world.sum(totals) / self.data.test_images).tolist()
        return loss, correct

    def run(self, out: Path, observer: Observer, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the end from wherever the run is, with a checkpoint after every epoch.

        Args:
            out: existing directory for last.pt (everything) and best.pt (the network with the best test accuracy).
            observer: is told of every step and epoch.
            stopping: asked after every step and epoch; true leaves a checkpoint there and ends.

        Returns:
            Whether the run is complete.

        Raises:
            UserError: the training loss of an epoch is not finite.
            OSError: a checkpoint cannot be written; the last one is still there.
        """
        self._save(out)
        observer.start(self.recipe.epochs, self.steps, self.epoch, self.step)
        while self.epoch < self.recipe.epochs and not self.world.any(stopping()):
            if not self._run_epoch(observer, stopping):
                self._save(out)
                break
            row = self._finish_epoch()
            # best.pt first: killed between the two, the run repeats this epoch and writes both.
            if self.world.is_main and self.best["epoch"] == self.epoch - 1:
                state = {"recipe": asdict(self.recipe), "model": self.model.state_dict(), **self.best}
                checkpoints.save(state, out / BEST)
            self._save(out)
            observer.epoch(row)
        return self.epoch == self.recipe.epochs

    def _save(self, out: Path) -> None:
        state = self.state_dict()
        if self.world.is_main:
            checkpoints.save(state, out / LAST)

    def _run_epoch(self, observer: Observer, stopping: Callable[[], bool]) -> bool:
        self.model.train()
        start = time.perf_counter()
        recipe, part = self.recipe, self.world.part
        for images, labels in self.data.train_batches(recipe.seed, self.epoch, recipe.batch_size, self.step, part):
            self.train_step(images, labels)
            observer.step(len(labels) * part.size)
            if self.world.any(stopping()):
                break
        self.seconds += time.perf_counter() - start
        return self.step == self.steps

    def _finish_epoch(self) -> dict[str, float]:
        (loss, correct), images = self.world.sum(self._totals).tolist(), self._used_images
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss of epoch {self.epoch + 1} is {loss}: --lr {self.recipe.lr} is too high"
            )
        test_loss, test_accuracy = self.evaluate()
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_second": images / self.seconds,
        }
        self.history.append(row)
        if test_accuracy > self.best["accuracy"]:
            self.best = {"accuracy": test_accuracy, "epoch": self.epoch}
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self._totals = self._zero_totals()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly; several processes must ask together."""
        return {
            "recipe": asdict(self.recipe),
            "train_images": self.data.train_images,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoints.random_state(),
            "place": (self.epoch, self.step, self.seconds),
            "totals": self.world.sum(self._totals.clone()),
            "history": self.history,
            "best": self.best,
        }

    def resume(self, path: Path) -> None:
        """Goes on from the checkpoint at path.

        Raises:
            UserError: it is damaged, or of another run; names path.
        """
        state = checkpoints.load(path)
        try:
            self.load_state_dict(state)
        except UserError as error:
            raise UserError(f"{path} cannot be resumed: {error}") from None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken.

        Raises:
            UserError: the state belongs to a run with another recipe or other data, or to none; nothing is changed
                then.
        """
        self._check(state)
        checkpoints.set_random_state(state["random"])
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(
            {
                "state": state["optimizer"]["state"],
                "param_groups": [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
            }
        )
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds = state["place"]
        # The sum over all processes so far: one of them carries it on.
        self._totals = state["totals"].to(self.device) if self.world.is_main else self._zero_totals()
        self.history, self.best = state["history"], state["best"]

    def _check(self, state: dict[str, Any]) -> None:
        """UserError unless state is one that this run could have left."""
        parts = ("recipe", "train_images", "optimizer", "random", "history")
        mine = {
            "model": self.model.state_dict(),
            "scaler": self.scaler.state_dict(),
            "place": (0, 0, 0.0),
            "totals": self._totals,
            "best": self.best,
        }
        dicts = all(isinstance(state.get(name), dict) for name in ("recipe", "random"))
        if not dicts or state.keys() != {*parts, *mine}:
            raise UserError("the checkpoint is not one of a training run")
        settings = {**asdict(self.recipe), "train_images": self.data.train_images}
        theirs = {**state["recipe"], "train_images": state["train_images"]}
        for name in {**settings, **theirs}:
            found, value = theirs.get(name), settings.get(name)
            if type(found) is not type(value) or found != value:
                shown = repr(found) if isinstance(found, (int, float, str, type(None))) else type(found).__name__
                raise UserError(
                    f"the run to resume has {name} {shown}, got {value!r}: give the same, or another --out"
                )
        for name, value in mine.items():
            checkpoints.require_alike(state[name], value, name)
        epoch, step, seconds = state["place"]
        if not (0 <= epoch <= self.recipe.epochs and 0 <= step < self.steps and seconds >= 0):
            raise UserError(
                f"it is at epoch {epoch}, step {step} of {self.recipe.epochs} epochs of {self.steps} steps"
            )
        checkpoints.require_alike(state["history"], [ROW] * epoch, "history")
        self._check_optimizer(state["optimizer"])

    def _check_optimizer(self, state: Any) -> None:
        # Of the groups only the rates count: the rest is the recipe's, and not the same in all versions of PyTorch.
        if not isinstance(state, dict) or state.keys() != {"state", "param_groups"}:
            raise UserError("its optimizer is not one of a training run")
        momenta, rates = state["state"], state["param_groups"]
        if isinstance(rates, list):
            rates = [group.get("lr") if isinstance(group, dict) else None for group in rates]
        checkpoints.require_alike(rates, [0.0] * len(self.optimizer.param_groups), "optimizer's rates")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        known = [i for i in range(len(parameters)) if not isinstance(momenta, dict) or i in momenta]
        checkpoints.require_alike(
            momenta, {i: {"momentum_buffer": parameters[i]} for i in known}, "optimizer's state"
        )
