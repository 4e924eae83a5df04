"""`python -m acnet_kernels train`: one network, trained, folded, checked and reported."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..backends import planner
from ..errors import UserError, require
from ..surgery import fuse
from . import checkpoints, interrupt, report
from .data import NAMES, open_data
from .folding import FoldCheck, check_fold
from .loop import AMP_DTYPES, LAST, Recipe, Trainer

HELP = "train a network, fold it, check the folded one and report"
FOLDED = "folded.pt"


def number(kind: type, zero: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind above zero, or from zero on."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf") or (value == 0 and not zero):
            what = f"{'an' if kind is int else 'a'} {kind.__name__} {'from 0 on' if zero else 'above 0'}"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where to compute; they change no weights beyond rounding."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set's files are")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=number(int), metavar="N", help="CPU threads (default: torch's choice)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add, usual = parser.add_argument, "(%(default)s)"
    add("--data", metavar="SET", help=f"{', '.join(NAMES)} or a directory of images {usual}")
    add("--net", help=f"resnet8, resnet20, resnet32, resnet56, any 6n+2 {usual}")
    add("--block", choices=models.BLOCKS, help=f"what the 3×3 layers are {usual}")
    add("--epochs", type=number(int), metavar="N", help=usual)
    add("--lr", type=number(float), help=f"first learning rate of the cosine {usual}")
    add("--batch-size", type=number(int), metavar="N", help=usual)
    add("--weight-decay", type=number(float, zero=True), metavar="WD", help=usual)
    add("--bias-lr-factor", type=number(float), metavar="F", help=f"times --lr for biases; the authors: 2 {usual}")
    add("--amp", choices=tuple(AMP_DTYPES), help=f"mixed precision {usual}")
    add("--backend", choices=planner.CHOICES, help=f"how ACBlocks compute a step {usual}")
    add("--seed", type=number(int, zero=True), metavar="N", help=usual)
    add("--limit", type=number(int), metavar="N", help="train on N images only")
    add("--image-size", type=number(int), metavar="N", help=f"of a directory of images {usual}")
    parser.set_defaults(**dataclasses.asdict(Recipe()))
    readers = "processes that read a directory of images"
    add("--workers", type=number(int, zero=True), default=2, metavar="N", help=f"{readers} {usual}")
    add("--out", type=Path, default=Path("runs/train"), metavar="DIR", help=f"for what the run writes {usual}")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add_machine_arguments(parser)


def choose_device(name: str) -> torch.device:
    """The device of that name, made ready; UserError where the machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def make_directory(path: Path) -> Path:
    """path, made where missing; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be a directory: {error.strerror}") from None
    return path


def finish(trainer: Trainer, out: Path) -> tuple[nn.Module, FoldCheck | None, dict[str, Any]]:
    """Folds the trained network, checks it, and writes folded.pt, report.json and the plots to out."""
    folded = fuse(trainer.model.eval())
    check = _check(trainer, folded)
    checkpoints.save(folded.state_dict(), out / FOLDED)
    content = report.run_report(trainer, folded, check)
    report.write_json(content, out / "report.json")
    title = f"{trainer.recipe.net} on {trainer.data.name}"
    report.plot_curves({report.LABELS[trainer.recipe.block]: trainer.history}, title, out / "curves.png")
    layers = report.kernel_magnitudes(folded)
    if layers:
        matrix = {report.FOLDED_LABELS[trainer.recipe.block]: report.mean_magnitude(layers)}
        report.plot_kernels(matrix, f"{title}\nkernel magnitude, {len(layers)} layers", out / "kernels.png")
    return folded, check, content


def _check(trainer: Trainer, folded: nn.Module) -> FoldCheck | None:
    if trainer.recipe.block == "plain":
        return None
    return check_fold(trainer.model, folded, trainer.data, trainer.recipe.batch_size)


def resume(trainer: Trainer, out: Path, wanted: bool) -> str:
    """Puts the trainer where out's last checkpoint left off, if wanted, and says where that is.

    Raises:
        UserError: out holds a run that was not asked to be resumed, or one that is not this one.
    """
    path = out / LAST
    if not path.exists():
        return "no checkpoint to resume yet, starting" if wanted else "starting"
    if not wanted:
        raise UserError(f"{out} already holds a run: continue it with --resume, or give another --out")
    trainer.load_state_dict(checkpoints.load(path))
    return f"resuming at epoch {trainer.epoch + 1}, step {trainer.step}"


def main(arguments: argparse.Namespace) -> int:
    """Runs the command; 0, or 128 + the signal that stopped it."""
    require("train", rich="rich", matplotlib="matplotlib")
    from rich.console import Console

    from .progress import ConsoleObserver

    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
    if recipe.block == "plain" and recipe.backend != "auto":
        raise UserError(f"--backend chooses how ACBlocks compute; --block plain has none, got {recipe.backend}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    data = open_data(
        recipe.data,
        device,
        folder=arguments.data_dir,
        limit=recipe.limit,
        image_size=recipe.image_size,
        workers=arguments.workers,
    )
    trainer = Trainer(recipe, data, device)
    out = make_directory(arguments.out)
    how = resume(trainer, out, arguments.resume)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(describe(trainer, how))
    with interrupt.catching() as stopping, ConsoleObserver(console, recipe.net) as observer:
        complete = trainer.run(out, observer, stopping)
    if not complete:
        place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
        console.print(f"stopped after {place}; the same command with --resume goes on from there")
        return stopping.exit_code
    _, check, _ = finish(trainer, out)
    console.print(summary(trainer, check, out))
    return 0


def describe(trainer: Trainer, how: str) -> str:
    """The run's first lines."""
    recipe, data = trainer.recipe, trainer.data
    return (
        f"{how}: {recipe.net} ({recipe.block}, {report.parameters(trainer.model):,} parameters) on {data.name}\n"
        f"data: {data.source}: {data.train_images:,} training and {data.test_images:,} test images, "
        f"{data.channels}×{data.size[0]}×{data.size[1]}, {data.classes} classes\n"
        f"on {trainer.device}, threads {torch.get_num_threads()}, amp {recipe.amp}, seed {recipe.seed}"
    )


def summary(trainer: Trainer, check: FoldCheck | None, out: Path) -> str:
    """The run's last lines."""
    final, best = trainer.history[-1], trainer.best
    lines = [
        f"test accuracy {final['test_accuracy']:.2%} after the last epoch, "
        f"best {best['accuracy']:.2%} after epoch {best['epoch'] + 1:.0f}"
    ]
    if check is not None:
        lines.append(
            f"folded: logits differ by at most {check.max_relative_difference:.1e} (relative), "
            f"{check.differing_predictions} of {check.images:,} predictions differ"
        )
    files = ", ".join(sorted(path.name for path in out.iterdir() if not path.name.startswith(".")))
    return "\n".join([*lines, f"{out}: {files}"])
