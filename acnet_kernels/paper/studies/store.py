"""A study's results on disk: JSON with everything, rewritten after each cell, and CSV with one record a row."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UserError
from .study import Cell, Measured, Network

# What a disk answers that is full, read-only, over its quota, broken or not one's own.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes one sentence of a disk's refusal, also where torch reports it as its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in REFUSALS):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"--out {out} cannot be written: {cause.strerror}; whatever was finished before is kept, and --resume "
            "goes on from there"
        ) from None


class Store:
    """The cells measured so far, in the order of measurement.

    Args:
        path: of the JSON file; read if it is there.
        merge: other files of the study, whose cells are taken over where this one has none such.
        run: the command and machine of what will be added; kept beside it, as every earlier run's is.

    Raises:
        UserError: the file is no study's.
    """

    def __init__(self, path: Path, run: dict[str, Any], merge: Sequence[Path] = ()) -> None:
        self.path, self._run = path, run
        self._values = {_key(result.cell): result for result in merged([path, *merge])}
        if merge and self._values:
            self._write()

    def __contains__(self, cell: Cell) -> bool:
        return _key(cell) in self._values

    def add(self, cell: Cell, values: dict[str, Any]) -> None:
        """Keeps what was measured; on disk when this returns, whole even if the process is killed meanwhile."""
        self._values[_key(cell)] = Measured(cell, values, self._run)
        self._write()

    def _write(self) -> None:
        runs: list[Any] = []
        lines = []
        for result in self._values.values():
            if result.run not in runs:
                runs.append(result.run)
            entry = {"cell": result.cell, "values": result.values, "run": runs.index(result.run)}
            lines.append(json.dumps(entry, ensure_ascii=False))
        head = json.dumps({"runs": runs}, indent=2, ensure_ascii=False).removesuffix("\n}")
        temporary = self.path.with_suffix(".json.tmp")
        try:
            temporary.write_text(head + ',\n  "results": [\n' + ",\n".join(lines) + "\n  ]\n}\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def read(path: Path) -> list[Measured]:
    """The results in a file, with the runs that made them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = [Measured(e["cell"], e["values"], content["runs"][e["run"]]) for e in content["results"]]
        if not results:
            raise ValueError("it has no results")
        for result in results:
            Network.of(result.cell)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of a study: {type(error).__name__}: {error}") from None
    return results


def merged(paths: Iterable[Path]) -> list[Measured]:
    """The results of those files that exist, each cell from the first that has it."""
    found: dict[str, Measured] = {}
    for result in (result for path in paths if path.exists() for result in read(path)):
        found.setdefault(_key(result.cell), result)
    return list(found.values())


def write_csv(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a record, under all names that occur."""
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
