"""`python -m acnet_kernels train`: one network, trained, folded, checked and reported."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...arguments import choose_device, make_directory, number
from ...backends import planner
from ...conversion import fuse
from ...errors import UserError, require
from .. import models
from . import checkpoints, distributed, interrupt, report
from .data import NAMES, open_data
from .distributed import World
from .folding import FoldCheck, check_fold
from .loop import AMP_DTYPES, LAST, Recipe, Trainer
from .presets import PRESETS

FOLDED = "folded.pt"
RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where to compute; they change no weights beyond rounding."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set's files are")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=number(int), metavar="N", help="CPU threads (default: torch's choice)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    usual = Recipe()
    add(
        "--preset",
        choices=tuple(PRESETS),
        help="the authors' later recipe of this network of the paper; other options change it",
    )

    def option(name: str, text: str = "", **settings: Any) -> None:
        # What is not given comes from the preset, or from Recipe: only what is given reaches the namespace.
        default = getattr(usual, name.removeprefix("--").replace("-", "_"))
        shown = text if default is None else f"{text} ({default})".lstrip()
        add(name, default=argparse.SUPPRESS, help=shown, **settings)

    option("--data", f"{', '.join(NAMES)} or a directory of images", metavar="SET")
    option("--net", models.EXAMPLES)
    option("--block", "what the k×k layers are", choices=models.BLOCKS)
    option("--epochs", type=number(int), metavar="N")
    option("--lr", "first learning rate of the cosine", type=number(float))
    option("--batch-size", type=number(int), metavar="N")
    option("--weight-decay", type=number(float, zero=True), metavar="WD")
    option("--bias-lr-factor", "times --lr for biases; the authors: 2", type=number(float), metavar="F")
    option("--amp", "mixed precision", choices=tuple(AMP_DTYPES))
    option("--backend", "how ACBlocks compute a step", choices=planner.CHOICES)
    option("--seed", type=number(int, zero=True), metavar="N")
    option("--limit", "train on N images only", type=number(int), metavar="N")
    option("--image-size", "of a directory of images", type=number(int), metavar="N")
    readers = "processes that read a directory of images (%(default)s)"
    add("--workers", type=number(int, zero=True), default=2, metavar="N", help=readers)
    out = Path("runs/train")
    add("--out", type=Path, default=out, metavar="DIR", help="for what the run writes (%(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add_machine_arguments(parser)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for: those of Recipe that were given, on top of the preset."""
    given = {name: getattr(arguments, name) for name in RECIPE_FIELDS if hasattr(arguments, name)}
    return dataclasses.replace(PRESETS[arguments.preset] if arguments.preset else Recipe(), **given)


def finish(trainer: Trainer, out: Path) -> tuple[nn.Module, FoldCheck | None, dict[str, Any]]:
    """Folds the trained network, checks it, and writes folded.pt, report.json and the plots to out."""
    folded = fuse(trainer.model.eval(), keep_blocks=True)  # the original code reads these names
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
        UserError: out holds a run that was not asked to be resumed, or a damaged one, or another than this.
    """
    path = out / LAST
    if not path.exists():
        return "no checkpoint to resume yet, starting" if wanted else "starting"
    if not wanted:
        raise UserError(f"{out} already holds a run: continue it with --resume, or give another --out")
    trainer.resume(path)
    return f"resuming at epoch {trainer.epoch + 1}, step {trainer.step}"


def main(arguments: argparse.Namespace) -> int:
    """Runs the command, alone or as one of torchrun's processes; 0, or 128 + the signal that stopped it."""
    require("train", rich="rich", matplotlib="matplotlib")
    with distributed.joined() as world:
        return run(arguments, world)


def run(arguments: argparse.Namespace, world: World) -> int:
    """`main` in this process of the world."""
    from rich.console import Console

    from .progress import ConsoleObserver

    recipe = recipe_of(arguments)
    if recipe.block == "plain" and recipe.backend != "auto":
        raise UserError(f"--backend chooses how ACBlocks compute; --block plain has none, got {recipe.backend}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(world.device(arguments.device))
    data = open_data(
        recipe.data,
        device,
        folder=arguments.data_dir,
        limit=recipe.limit,
        image_size=recipe.image_size,
        workers=arguments.workers,
    )
    trainer = Trainer(recipe, data, device, world)
    out = make_directory(arguments.out)
    how = resume(trainer, out, arguments.resume)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not world.is_main)
    console.print(describe(trainer, how))
    with interrupt.catching() as stopping, ConsoleObserver(console, recipe.net) as observer:
        complete = trainer.run(out, observer, stopping)
    if not complete:
        place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
        console.print(f"stopped after {place}; the same command with --resume goes on from there")
        return stopping.exit_code
    if not world.is_main:
        return 0
    _, check, _ = finish(trainer, out)
    console.print(summary(trainer, check, out))
    return 0


def describe(trainer: Trainer, how: str) -> str:
    """The run's first lines."""
    recipe, data, size = trainer.recipe, trainer.data, trainer.world.part.size
    processes = f", processes {size}" if size > 1 else ""
    return (
        f"{how}: {recipe.net} ({recipe.block}, {report.parameters(trainer.model):,} parameters) on {data.name}\n"
        f"data: {data.source}: {data.train_images:,} training and {data.test_images:,} test images, "
        f"{data.channels}×{data.size[0]}×{data.size[1]}, {data.classes} classes\n"
        f"on {trainer.device}{processes}, threads {torch.get_num_threads()}, amp {recipe.amp}, seed {recipe.seed}"
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
