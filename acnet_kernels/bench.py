"""`python -m acnet_kernels bench`: the options of the repository's benchmarks, which are no part of the wheel."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from .arguments import choose_device, make_directory, number
from .errors import UserError, require

PARTS = ("block", "network", "fusion", "host", "memory", "codegen", "report", "all")
ROOT = Path(__file__).parents[1]
QUICK_SECONDS, SECONDS = 0.2, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    parts = "what to measure: %(choices)s; all is everything but codegen, which compiles and measures nothing"
    add("parts", nargs="*", choices=PARTS, default="all", metavar="PART", help=parts)
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    shapes = "of block: 'targets', parts of layers' names, or NxCxHxW->K [k5] [/2] [g32] [d2] (all)"
    add("--shapes", nargs="+", metavar="SHAPE", help=shapes)
    networks = "of network, memory and fusion (all); of network also timm:NAME and transformers:NAME"
    add("--networks", nargs="+", metavar="NET", help=networks)
    contenders = (
        "eager, compile, 3k, checkpoint, conv+bn, plain, a backend's name, … (all; on a CPU compile runs on few)"
    )
    add("--contenders", nargs="+", default=[], metavar="NAME", help=contenders)
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:N")
    add("--threads", type=number(int), metavar="N", help="CPU threads (default: torch's choice)")
    add("--tf32", action="store_true", help="let float32 products on CUDA use TF32, every contender's")
    seconds = f"timed part of one shape, all contenders together ({SECONDS}; {QUICK_SECONDS} with --quick)"
    add("--seconds", type=number(float), help=seconds)
    add(
        "--quick",
        action="store_true",
        help="a minute: the target shapes, ResNet-56 and few samples, no compilation",
    )
    budget = "bytes for the largest batch on a CPU (%(default)s)"
    add("--budget", type=number(int), default=2**30, metavar="BYTES", help=budget)
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="for CSVs and report (%(default)s)")
    baseline = "CSVs to compare with (default: the committed ones of this kind of machine)"
    add("--baseline", type=Path, metavar="DIR", help=baseline)
    codegen = parser.add_argument_group("codegen")
    codegen.add_argument("--arch", type=int, nargs="+", metavar="SM", help="compile for these alone (80 90 100)")
    codegen.add_argument("--kernel", metavar="NAME", help="compile this kernel alone")
    codegen.add_argument(
        "--variation", metavar="NAME", help="compile this variation alone; '' is the plain problem"
    )
    jobs = "compilations at once (%(default)s)"
    codegen.add_argument("--jobs", type=number(int), default=os.cpu_count(), metavar="N", help=jobs)


def main(options: argparse.Namespace) -> int:
    """Runs the command from a source checkout; UserError from an installed wheel, which has no benchmarks."""
    if not (ROOT / "benchmarks" / "command.py").is_file():
        raise UserError(
            f"the benchmarks live in the repository, not in the installed package ({Path(__file__).parent}): "
            "run the command from a source checkout"
        )
    options.parts = [options.parts] if isinstance(options.parts, str) else options.parts
    if set(options.parts) != {"codegen"}:  # it draws nothing
        require("bench", matplotlib="matplotlib")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = choose_device(options.device)
    options.dtype = [getattr(torch, name) for name in options.dtype]
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    make_directory(options.out)
    return importlib.import_module("benchmarks.command").main(options)
