"""Cuts a run's CSVs to what is committed, some 300 KB a machine: `python -m benchmarks.keep runs/bench`.

Of single blocks the times of a step and the bytes it keeps, every contender in its better layout; of networks,
memory and folding everything; the report without its figures. What is left out `make bench` measures again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from . import analysis, harness
from .harness import Row

BLOCK = ("block", "compiled")
OF_BLOCKS = (("step", "time_ms"), ("forward", "saved_bytes"))
WHOLE = ("network", "memory", "fusion", "accelerated", "moments_error")
OTHER = ("host", "depthwise", "digits")  # of columns of their own: as they are
DIGITS = 5


def medians(rows: list[Row], kinds: Iterable[tuple[str, str]]) -> list[Row]:
    """The rows of these modes and metrics, of each contender's better layout."""
    found = (analysis.steps(rows, metric, mode) for mode, metric in kinds)
    return [rounded(row) for steps in found for contenders in steps.values() for row in contenders.values()]


def rounded(row: Row) -> Row:
    """To DIGITS significant digits."""
    return replace(row, **{name: float(f"{getattr(row, name):.{DIGITS}g}") for name in ("p20", "p50", "p80")})


def keep(source: Path, target: Path) -> list[Path]:
    """Writes what is kept of the run in `source` into `target`; the paths."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(source.iterdir()):
        kind, to = path.stem.partition("-")[0], target / path.name
        if path.suffix == ".csv" and kind in (*BLOCK, *WHOLE):
            rows = harness.read_csv(path)
            harness.write_csv(medians(rows, OF_BLOCKS) if kind in BLOCK else map(rounded, rows), to)
        elif path.suffix == ".csv" and kind in OTHER:
            shutil.copy(path, to)
        elif path.name == "report.md":
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            to.write_text("".join(line for line in lines if not line.startswith("![")), encoding="utf-8")
        else:
            continue
        written.append(to)
    return written


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's directory, as `bench all --out` fills it")
    parser.add_argument("--device", default="cpu", help="whose class of machine names the directory")
    options = parser.parse_args()
    print(*keep(options.source, harness.results_dir(options.device)), sep="\n")


if __name__ == "__main__":
    main()
