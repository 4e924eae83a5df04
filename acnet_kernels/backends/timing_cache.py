"""Step times measured on this machine: those of `tune()`, and of this process.

`tune()` keeps what it measures in the user's cache directory ($ACNET_KERNELS_CACHE, or acnet_kernels in
$XDG_CACHE_HOME, or in ~/.cache): a JSON file a device, thread count, instruction set and set of versions. It is
read once, when first asked for; one that is damaged, or not of this device and these versions, is ignored with a
warning naming it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic import replacing
from ..geometry import Geometry, Taps
from ..spec import BRANCH, MIXED, Problem
from .device_info import Machine, instructions

FORMAT = 1
TUNED, FIRST_SIGHT = "tune()", "first sight"

Times = dict[str, dict[str, float]]  # problem → backend → milliseconds


class Measured(NamedTuple):
    """Backend → milliseconds of a step, and who measured them."""

    milliseconds: Mapping[str, float]
    source: str


_known: dict[Machine, dict[str, Measured]] = {}
_version = 0


def version() -> int:
    """Changes whenever something new is known."""
    return _version


def key(problem: Problem) -> str:
    """What a problem's times are filed under: everything about it that they depend on."""
    g = problem.geometry
    n, c, h, w = problem.shape
    parts = [
        "step" if problem.grad else "forward",
        str(problem.dtype).removeprefix("torch."),
        "channels_last" if problem.channels_last else "nchw",
        f"{n}x{c}x{h}x{w}->{problem.out_channels}",
        "k" + "x".join(map(str, dict.fromkeys(g.kernel))),
    ]
    same = g.kernel[0] // 2, g.kernel[1] // 2
    for letter, pair, usual in (("s", g.stride, (1, 1)), ("p", g.padding, same), ("d", g.dilation, (1, 1))):
        if pair != usual:
            parts.append(f"{letter}{pair[0]}x{pair[1]}")
    if g.groups != 1:
        parts.append(f"g{g.groups}")
    if g.padding_mode != "zeros":
        parts.append(g.padding_mode)
    if problem.branches != _cross(g):
        parts.append("+".join(map(_label, problem.branches, problem.convolved)))
    if problem.norm != BRANCH:
        parts.append(problem.norm)
    if problem.norm == MIXED:
        parts.append(
            "".join("bn" if normed else "-" for normed in problem.normed) + ("+bn" if problem.total else "")
        )
    return " ".join(parts)


def _cross(g: Geometry) -> tuple[Taps, ...]:
    (rows, columns), (row, column) = g.kernel, (g.kernel[0] // 2, g.kernel[1] // 2)
    return g.whole, Taps(row, 0, 1, columns), Taps(0, column, rows, 1)


def _label(taps: Taps, convolved: bool) -> str:
    at = f"{taps.rows}x{taps.columns}@{taps.row},{taps.column}"
    return (at if taps.step == 1 else f"{at}/{taps.step}") if convolved else "identity"


def lookup(problem: Problem, machine: Machine) -> Measured | None:
    """The times measured for problem on machine: the newest of its kind, or None."""
    known = _known.get(machine)
    if known is None:
        known = _known[machine] = {k: Measured(times, TUNED) for k, times in load(machine).items()}
    return known.get(key(problem))


def remember(problem: Problem, machine: Machine, times: Mapping[str, float], source: str) -> Measured:
    """Keeps times for the rest of this process."""
    global _version
    lookup(problem, machine)  # loads what is known already: it must not come over this later
    _version += 1
    measured = _known[machine][key(problem)] = Measured(times, source)
    return measured


def cache_dir() -> Path:
    """Where tuned times are kept, whether it exists or not.

    Raises:
        FileNotFoundError: the environment names no place, and this user has no home directory.
    """
    own = os.environ.get("ACNET_KERNELS_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acnet_kernels"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error} Set ACNET_KERNELS_CACHE to a directory for tuned times") from None


def identity(machine: Machine) -> dict[str, str]:
    """What tuned times hold for: other versions and other vector instructions have other kernels."""
    from .. import __version__

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": machine.name,
        "instructions": "" if machine.device == "cuda" else instructions(),
        "torch": torch.__version__,
        "triton": triton,
        "acnet_kernels": __version__,
    }


def cache_path(machine: Machine) -> Path:
    """The file of machine's tuned times."""
    digest = hashlib.sha256(json.dumps(identity(machine)).encode()).hexdigest()
    return cache_dir() / f"tuned-{digest[:16]}.json"


def load(machine: Machine) -> Times:
    """machine's tuned times; none, with a warning, where the file is damaged or of another machine or version."""
    try:
        path = cache_path(machine)
        content = json.loads(path.read_text(encoding="utf-8"))
        return _checked(content, identity(machine))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"ignoring the tuned times in {path}: {error}", stacklevel=2)
        return {}


def _checked(content: Any, wanted: dict[str, str]) -> Times:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not a file of format {FORMAT}")
    if content.get("identity") != wanted:
        raise ValueError(f"it is of {content.get('identity')}, this is {wanted}")
    times: Any = content.get("milliseconds")
    sound = isinstance(times, dict) and all(
        isinstance(row, dict) and row and all(isinstance(ms, float) and 0 < ms < math.inf for ms in row.values())
        for row in times.values()
    )
    if not sound:
        raise ValueError("its times are not finite positive numbers by problem and backend")
    return times


def store(machine: Machine, times: Times) -> Path:
    """Adds times to machine's file, over those of the same problems, and returns its path.

    Readers see the old file or the new one, never a part; what other processes store meanwhile is kept.

    Raises:
        OSError: there is no place for it, or the directory cannot be made or written to.
    """
    path = cache_path(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        content = {"format": FORMAT, "identity": identity(machine), "milliseconds": load(machine) | times}
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the system has flock: without it two that store at once may lose the one's."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing releases it
        yield
