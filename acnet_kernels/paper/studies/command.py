"""`python -m acnet_kernels study`: the paper's experiments, measured, tabulated, plotted and put on one page."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...arguments import choose_device, make_directory, number
from ...backends import planner
from ...errors import UserError, require
from ..training import interrupt, report
from ..training.command import add_machine_arguments
from ..training.loop import AMP_DTYPES
from . import ablation, accuracy, magnitudes, page, pruning, rotation, shifted
from .config import StudyConfig, make
from .lab import Lab
from .store import Store, merged, write_csv, writing
from .study import Cell, Network, Study, setting

if TYPE_CHECKING:
    from rich.console import Console

STUDIES = {
    module.STUDY.name: module.STUDY for module in (ablation, rotation, pruning, magnitudes, shifted, accuracy)
}
PLANNING = (
    *("data", "net", "nets", "epochs", "lr", "batch_size", "weight_decay", "amp", "backend", "image_size"),
    *("limit", "test_limit", "seeds", "prunings"),
)
NETWORKS = "networks"
PAGE = "report.html"
PROGRAM = "python -m acnet_kernels study"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("study", choices=(*STUDIES, "all"), help="which one; they share their trained networks")
    add("--quick", action="store_true", help="minutes on two cores, on scikit-learn's digits; else as in the paper")
    add("--data", metavar="SET", help="train and test on this instead (a set's name or a directory of images)")
    add("--net", metavar="NET", help="the network of all but the accuracy table")
    add("--nets", nargs="+", metavar="NET", help="the networks of the accuracy table")
    add("--epochs", type=number(int), metavar="N", help="train all networks for so long")
    add("--lr", type=number(float), help="train all networks with this first learning rate")
    add("--batch-size", type=number(int), metavar="N", help="train all networks with it")
    add("--weight-decay", type=number(float, zero=True), metavar="WD", help="train all networks with it")
    add("--limit", type=number(int), metavar="N", help="train on N images only")
    add("--test-limit", type=number(int), metavar="N", help="test on N images only")
    add("--seeds", type=number(int), metavar="N", help="trainings a row of a table")
    add("--prunings", type=number(int), metavar="N", help="random prunings a point of a curve")
    add("--amp", choices=tuple(AMP_DTYPES), help="mixed precision in training")
    add("--backend", choices=planner.CHOICES, help="how ACBlocks compute a training step (auto)")
    add("--image-size", type=number(int), metavar="N", help="of a directory of images (224)")
    readers = "processes that read a directory of images (%(default)s)"
    add("--workers", type=number(int, zero=True), default=2, metavar="N", help=readers)
    out = Path("runs/study")
    add("--out", type=Path, default=out, metavar="DIR", help="for networks, results and the page (%(default)s)")
    add("--resume", action="store_true", help="go on with the results in --out")
    shards = "do the I-th of N parts of the work; --resume without --shard merges them"
    add("--shard", type=shard, metavar="I/N", help=shards)
    add("--plot-only", action="store_true", help="tables, figures and page anew from the results in --out")
    add_machine_arguments(parser)


def shard(text: str) -> tuple[int, int]:
    """An argparse type: 'I/N' with 1 ≤ I ≤ N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= of:
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, as 1/4, got {text!r}")
    return part, of


def main(arguments: argparse.Namespace) -> int:
    """Runs the command; 0, or 128 + the signal that stopped it."""
    require("a study", rich="rich", matplotlib="matplotlib")
    from rich.console import Console

    # A pipe has no width: leave lines whole there.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    out = arguments.out
    studies = list(STUDIES.values()) if arguments.study == "all" else [STUDIES[arguments.study]]
    if arguments.plot_only and arguments.shard:
        raise UserError("--shard is a part of the work and --plot-only does none: give one of them")
    with writing(out):
        if not arguments.plot_only:
            code = _measure(studies, config_of(arguments), arguments, console)
            if code or arguments.shard:
                return code
        for study in studies:
            show(study, out, console)
        write_page(out, console)
    return 0


def config_of(arguments: argparse.Namespace) -> StudyConfig:
    """The plan that the options ask for."""
    return make(arguments.quick, **{name: getattr(arguments, name) for name in PLANNING})


def command_line(arguments: argparse.Namespace) -> str:
    """The command that made these results, without what only says where to compute or that it was resumed."""
    words = [arguments.study, *(["--quick"] if arguments.quick else [])]
    for name in PLANNING:
        value = getattr(arguments, name)
        if value is not None:
            option = "--" + name.replace("_", "-")
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    if arguments.shard:
        words += ["--shard", "{}/{}".format(*arguments.shard)]
    return f"{PROGRAM} {shlex.join([*words, '--out', str(arguments.out)])}"


def _measure(studies: list[Study], config: StudyConfig, arguments: argparse.Namespace, console: Console) -> int:
    """Trains what is missing, then measures what is missing; 0, or the exit code of an interruption."""
    from .watch import Forecast

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out, device = arguments.out, choose_device(arguments.device)
    run = {"command": command_line(arguments), "machine": report.machine(device)}
    lab = Lab(config, out / NETWORKS, device, arguments.data_dir, arguments.workers)
    for study in studies:
        for recipe in config.accuracy if study.compares_networks else (config.recipe,):
            lab.check(recipe)
    make_directory(out)
    stores = {study.name: _store(study, run, arguments) for study in studies}
    mine = _networks(config, arguments.shard)
    work: dict[Network, list[tuple[Study, Cell]]] = {}
    for study in studies:
        cells = [cell for cell in study.cells(config) if Network.of(cell) in mine]
        missing = [cell for cell in cells if cell not in stores[study.name]]
        console.print(f"{study.name}: {len(missing)} of {len(cells)} cells are to be measured")
        for cell in missing:
            work.setdefault(Network.of(cell), []).append((study, cell))
    forecast = Forecast({network: lab.epochs(network) for network in work}, console)
    with interrupt.catching() as stopping:
        for place, (network, todo) in enumerate(work.items(), 1):
            label = f"{place:>2}/{len(work)} {network.net} {report.LABELS[network.block]:<21} seed {network.seed}"
            if not lab.train(network, forecast.training(network, label), stopping):
                break
            with forecast.measuring(f"{label}  measuring", len(todo)) as advance:
                for study, cell in todo:
                    if not stopping():
                        stores[study.name].add(cell, study.measure(lab, cell))
                        advance()
            if stopping():
                break
            forecast.done(network)
    if stopping():
        console.print("stopped; the same command with --resume goes on from there")
        return stopping.exit_code
    if arguments.shard:
        part, of = arguments.shard
        console.print(f"part {part} of {of} is done; --resume without --shard merges the parts that are in {out}")
    return 0


def _networks(config: StudyConfig, shard: tuple[int, int] | None) -> set[Network]:
    """The shard's networks of a configuration: the same for all of its studies, which share them."""
    found = dict.fromkeys(Network.of(cell) for study in STUDIES.values() for cell in study.cells(config))
    recipes, blocks = list(dict.fromkeys(map(_recipe, found))), list(report.LABELS)
    # In this order a study's are next to each other, so that every shard gets about as many of them.
    order = sorted(found, key=lambda n: (recipes.index(_recipe(n)), blocks.index(n.block), n.seed))
    part, of = shard or (1, 1)
    return set(order[part - 1 :: of])


def _recipe(network: Network) -> Network:
    return network._replace(block="", seed=0)


def _store(study: Study, run: dict[str, Any], arguments: argparse.Namespace) -> Store:
    """Where the study's results go: a file for the whole, which takes over shards', or one for a shard."""
    out = arguments.out
    if arguments.shard:
        path = out / "{}.shard-{}-of-{}.json".format(study.name, *arguments.shard)
        others = [_results(out, study)]
    else:
        path, *others = _files(out, study)
    present = [file for file in (path, *others) if file.exists()]
    if present and not arguments.resume:
        raise UserError(f"{present[0]} already holds results: go on with --resume, or give another --out")
    return Store(path, run, present)


def _files(out: Path, study: Study) -> list[Path]:
    """Where the study's results are: its file, which may be missing, and its shards'."""
    return [_results(out, study), *sorted(out.glob(f"{study.name}.shard-*-of-*.json"))]


def _results(out: Path, study: Study) -> Path:
    return out / f"{study.name}.json"


def parts(study: Study, out: Path) -> list[page.Part]:
    """The study's results in out, one part a group that belongs into one table, with the figures' paths."""
    found = []
    for place, results in enumerate(study.groups(merged(_files(out, study))), 1):
        names = [Path(name) for name in study.plots]
        figures = [out / (name if place == 1 else f"{name.stem}-{place}{name.suffix}") for name in names]
        found.append(page.Part(setting(results), study.finding(results), study.table(results), figures, results))
    return found


def write_page(out: Path, console: Console) -> None:
    """Writes the page of all studies in out that have their figures: one without is unfinished."""
    sections = []
    for study in STUDIES.values():
        found = parts(study, out)
        if found and all(figure.exists() for part in found for figure in part.figures):
            sections.append((study, found))
    page.write_page(sections, out / PAGE)
    console.print(f"\n{out / PAGE}: {', '.join(study.name for study, _ in sections)}")


def show(study: Study, out: Path, console: Console) -> None:
    """Prints the study's tables, and writes its CSV and figures beside the JSON file."""
    from rich import box
    from rich.table import Table

    results = merged(_files(out, study))
    if not results:
        raise UserError(f"{_results(out, study)} is missing: run the study before --plot-only")
    write_csv(study.records(results), out / f"{study.name}.csv")
    for part in parts(study, out):
        for figure, plot in zip(part.figures, study.plots.values(), strict=True):
            plot(part.results, figure)
        header, rows = part.table
        title = f"{study.title}\n{part.setting}"
        view = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        for column in view.columns[1:]:
            column.justify = "right"
        for row in rows:
            view.add_row(*row)
        console.print(view)
        console.print(part.finding)
