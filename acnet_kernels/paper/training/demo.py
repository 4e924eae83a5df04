"""`python -m acnet_kernels demo`: plain against asymmetric convolutions on data that is here, in two minutes."""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...arguments import choose_device, make_directory
from ...conversion import blocks_of
from ...errors import UserError, require
from ...explanation import explain
from . import interrupt, measure, report
from .command import add_machine_arguments, finish
from .data import Batch, Data, find_fashion_mnist, open_data
from .folding import FoldCheck
from .loop import Recipe, Trainer
from .report import FOLDED_LABELS, LABELS

if TYPE_CHECKING:
    from rich.console import Console

COMPARED = ("plain", "acb")
ROUNDS = 15


class Run(NamedTuple):
    """One finished training."""

    trainer: Trainer
    folded: nn.Module
    check: FoldCheck | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    out = Path("runs/demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="overwritten (%(default)s)")
    add_machine_arguments(parser)


def recipe(block: str, fashion: bool) -> Recipe:
    """What fits into two minutes on two cores."""
    if fashion:
        return Recipe(data="fashion-mnist", net="resnet8", block=block, epochs=2, limit=20_000)
    return Recipe(data="digits", net="resnet8", block=block)


def main(arguments: argparse.Namespace) -> int:
    """Trains, measures and prints the table; 0, or 128 + the signal that stopped it."""
    require("the demo", rich="rich", matplotlib="matplotlib")
    from rich.console import Console

    began = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    fashion = find_fashion_mnist(arguments.data_dir) is not None
    if arguments.data_dir is not None and not fashion:
        raise UserError(f"--data-dir {arguments.data_dir} holds none of Fashion-MNIST's files")
    settings = recipe("plain", fashion)
    data = open_data(settings.data, device, folder=arguments.data_dir, limit=settings.limit)
    out = make_directory(arguments.out)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"{settings.net}, plain and ACNet, {settings.epochs} epochs on {data.train_images:,} images of {data.name} "
        f"({data.source}); on {device}, threads {torch.get_num_threads()}"
    )
    runs: dict[str, Run] = {}
    with interrupt.catching() as stopping:
        for block in COMPARED:
            run = _train(recipe(block, fashion), data, device, out, console, stopping)
            if run is None:
                console.print("stopped; the demo begins anew when it is run again")
                return stopping.exit_code
            runs[block] = run
    batch = next(data.train_batches(0, 0, settings.batch_size))
    measured = measure_steps(runs, batch)
    _plot(runs, out)
    report.write_json({"machine": report.machine(device), "rows": table(runs, measured)}, out / "demo.json")
    _print_table(table(runs, measured), settings.batch_size, console)
    console.print(f"{time.perf_counter() - began:.0f} s in all; checkpoints, reports and plots are in {out}")
    return 0


def _train(
    settings: Recipe, data: Data, device: torch.device, out: Path, console: Console, stopping: interrupt.StopRequest
) -> Run | None:
    from .progress import ConsoleObserver

    trainer, folder = Trainer(settings, data, device), make_directory(out / settings.block)
    with ConsoleObserver(console, f"{LABELS[settings.block]:5}") as observer:
        if not trainer.run(folder, observer, stopping):
            return None
    folded, check, _ = finish(trainer, folder)
    return Run(trainer, folded, check)


def measure_steps(runs: dict[str, Run], batch: Batch) -> dict[str, dict[str, float]]:
    """Column of the table → step_ms, inference_ms, saved_bytes, on copies of the trained networks.

    Where other backends than eager compute the ACNet's training step, an eager ACNet is measured beside it.
    """
    images, labels = batch
    networks = {LABELS[block]: copy.deepcopy(run.trainer.model).train() for block, run in runs.items()}
    backends = sorted({block.backend for block in explain(networks["ACNet"], images).blocks})
    if backends != ["eager"]:
        networks["ACNet, eager"] = copy.deepcopy(networks["ACNet"])
        for block in blocks_of(networks["ACNet, eager"]).values():
            block.backend = "eager"
    steps = {label: measure.training_step(model, images, labels) for label, model in networks.items()}
    seconds = measure.interleaved_medians(steps, ROUNDS)
    saved = {label: measure.saved_activation_bytes(model, images, labels) for label, model in networks.items()}
    networks["folded"] = copy.deepcopy(runs["acb"].folded)
    forward = measure.interleaved_medians(
        {label: measure.inference(model, images) for label, model in networks.items()}, ROUNDS
    )
    return {
        label: {
            "inference_ms": forward[label] * 1e3,
            **({"step_ms": seconds[label] * 1e3, "saved_bytes": saved[label]} if label in steps else {}),
        }
        for label in networks
    }


def table(runs: dict[str, Run], measured: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Column → its figures: parameters, test accuracy, time, memory, and what folding changed."""
    columns: dict[str, dict[str, Any]] = {label: dict(figures) for label, figures in measured.items()}
    for block, label in ((block, LABELS[block]) for block in COMPARED):
        trainer = runs[block].trainer
        columns[label]["parameters"] = report.parameters(trainer.model)
        columns[label]["test_accuracy"] = trainer.history[-1]["test_accuracy"]
    check = runs["acb"].check
    assert check is not None
    columns["folded"]["parameters"] = report.parameters(runs["acb"].folded)
    columns["folded"]["test_accuracy"] = check.accuracy_folded
    columns["folded"].update(check._asdict())
    return columns


def _print_table(columns: dict[str, dict[str, Any]], batch_size: int, console: Console) -> None:
    from rich import box
    from rich.table import Table

    rows = (
        ("test accuracy", "test_accuracy", "{:.2%}".format),
        ("parameters", "parameters", "{:,}".format),
        (f"training step of {batch_size}, ms", "step_ms", "{:.1f}".format),
        ("activations saved, MiB", "saved_bytes", lambda n: f"{n / 2**20:.1f}"),
        (f"inference of {batch_size}, ms", "inference_ms", "{:.1f}".format),
        ("largest relative difference of logits", "max_relative_difference", "{:.1e}".format),
        ("differing predictions", "differing_predictions", lambda n: f"{n} of {columns['folded']['images']:,}"),
    )
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    view.add_column("")
    for label in columns:
        view.add_column(label, justify="right")
    for title, key, show in rows:
        view.add_row(title, *(show(figures[key]) if key in figures else "" for figures in columns.values()))
    console.print(view)
    console.print(
        "Times are medians of interleaved runs. Folded is the trained ACNet with every block made one convolution; "
        "its last two rows compare it with the unfolded network."
    )


def _plot(runs: dict[str, Run], out: Path) -> None:
    trainer = runs["plain"].trainer
    title = f"{trainer.recipe.net} on {trainer.data.train_images:,} images of {trainer.data.name}"
    report.plot_curves(
        {LABELS[block]: run.trainer.history for block, run in runs.items()}, title, out / "curves.png"
    )
    matrices = {
        FOLDED_LABELS[block]: report.mean_magnitude(report.kernel_magnitudes(run.folded))
        for block, run in runs.items()
    }
    report.plot_kernels(matrices, f"kernel magnitude, {title}", out / "kernels.png")
