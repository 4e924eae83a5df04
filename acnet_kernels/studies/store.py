"""A study's results on disk: JSON with everything, rewritten after each cell, and CSV with one record a row."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .study import Cell, Measured


class Store:
    """The cells measured so far, in the order of measurement.

    Args:
        path: of the JSON file; read if it is there.
        about: what is written beside the results. Its 'training' says how each network was trained; where an
            earlier file has the same network, it must have it trained alike, or numbers of two would be mixed.

    Raises:
        UserError: the file is no study's, or has a network that was trained otherwise.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self._values: dict[str, Measured] = {}
        if path.exists():
            earlier, results = read(path)
            for name, value in about["training"].items():
                if earlier["training"].get(name, value) != value:
                    raise UserError(
                        f"{path} holds results with {name}: {earlier['training'][name]}, got {value}: "
                        "give the same options, or another --out"
                    )
            self.about = {**about, "training": {**earlier["training"], **about["training"]}}
            self._values = {_key(result.cell): result for result in results}

    def __contains__(self, cell: Cell) -> bool:
        return _key(cell) in self._values

    def add(self, cell: Cell, values: dict[str, Any]) -> None:
        """Keeps what was measured; on disk when this returns, whole even if the process is killed meanwhile."""
        self._values[_key(cell)] = Measured(cell, values)
        head = json.dumps(self.about, indent=2, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n".join(json.dumps(r._asdict(), ensure_ascii=False) for r in self._values.values())
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(f'{head},\n  "results": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
        os.replace(temporary, self.path)


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """What a results file says beside the results, and the results."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        results = [Measured(entry["cell"], entry["values"]) for entry in about.pop("results")]
        if not results or "training" not in about:
            raise ValueError("it has no results or does not say of which networks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of a study: {error}") from None
    return about, results


def write_csv(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a record, under the names of the first one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
