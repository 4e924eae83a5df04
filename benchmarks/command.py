"""Runs the parts of `python -m acnet_kernels bench`, then reports on everything in the output directory."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from acnet_kernels.errors import UserError

from . import block, contenders, fusion, harness, host, libraries, memory, network, report, shapes

PARTS: dict[str, Callable[[argparse.Namespace], list[Path]]] = {
    "block": block.run,
    "network": network.run,
    "fusion": fusion.run,
    "host": host.run,
    "memory": memory.run,
}
LEAST, QUICK_LEAST = 3, 2  # timed calls of a contender that is slow


def main(options: argparse.Namespace) -> int:
    """Runs the command with checked options; 0."""
    check(options)
    parts = [*PARTS, "report"] if "all" in options.parts else [part for part in options.parts if part != "report"]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options.tf32
    before = report.read(options.baseline)  # now: the run may overwrite it
    for part in parts:
        if part in PARTS:
            began = time.monotonic()
            written = PARTS[part](options)
            print(f"{', '.join(map(str, written))}: {time.monotonic() - began:.0f} s\n", flush=True)
        elif part == "codegen":
            from . import codegen  # it needs Triton

            print(*codegen.run(options))
    if set(options.parts) != {"codegen"}:
        print(*report.write(options.out, before), sep="\n")
    return 0


def check(options: argparse.Namespace) -> None:
    """Fills in what was not given; UserError naming the option where a shape, network or contender is unknown."""
    quick = options.quick
    options.least = QUICK_LEAST if quick else LEAST
    options.baseline = options.baseline or harness.results_dir(options.device)
    among = shapes.of_device(options.device)
    try:
        wanted = options.shapes or (["targets"] if quick else None)
        options.shapes = list(among) if wanted is None else shapes.select(wanted, among)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    networks = list(dict.fromkeys((*network.NETWORKS, *fusion.NETWORKS)))
    options.networks = options.networks or (["resnet56"] if quick else networks)
    of_libraries = {name: found for name in options.networks if (found := libraries.parse(name)) is not None}
    for found in of_libraries.values():
        libraries.check(found)
    known = dict.fromkeys((*contenders.names(options.device), *network.TIMED, *network.MEASURED))
    for option, accepted in (("networks", [*networks, *of_libraries]), ("contenders", list(known))):
        for name in getattr(options, option):
            if name not in accepted:
                raise UserError(f"--{option} must be of {', '.join(accepted)}, got {name!r}")
