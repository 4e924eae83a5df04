"""Checkpoint files that are whole or absent, and the random generators' states in them."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ... import checkpoint
from ...atomic import replacing
from ...errors import UserError

_LENGTH_BYTES = 2  # at the end of a zip archive: how long the comment after them is


def save(state: dict[str, Any], path: Path) -> None:
    """Writes state to path so that a kill or a full disk leaves the old file or the new one.

    The file is torch.save's, with a checksum of all of it as the archive's comment, which torch.load passes over.

    Raises:
        OSError: it cannot be written; names path.
    """
    with replacing(path) as file:
        torch.save(state, file)
        end = file.seek(-_LENGTH_BYTES, os.SEEK_END)
        file.write(_comment(file, end))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU; UserError where the file is something else, or a single bit is another."""
    try:
        with path.open("rb") as file:
            end = max(0, file.seek(0, os.SEEK_END) - len(_comment(file, 0)))
            intact = _comment(file, end) == file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not intact:
        raise UserError(f"{path} is no intact checkpoint: it does not end in the checksum of the rest of it")
    try:
        state = checkpoint.read(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of a training run: it holds a {type(state).__name__}")
    return state


def _comment(file: BinaryIO, end: int) -> bytes:
    """The length and the text of the archive's comment for what is in the file up to end, where it then stands."""
    digest, left = hashlib.sha256(), end
    file.seek(0)
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    text = f"sha256:{digest.hexdigest()}".encode()
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def require_alike(theirs: Any, mine: Any, where: str) -> None:
    """UserError unless theirs is made as mine is: types, keys, lengths, shapes and dtypes, whatever the values.

    Args:
        where: what theirs is, for the message.
    """
    if isinstance(mine, Tensor):
        fits = isinstance(theirs, Tensor) and _make(theirs) == _make(mine)
    elif isinstance(mine, dict):
        fits = isinstance(theirs, dict) and theirs.keys() == mine.keys()
    elif isinstance(mine, (list, tuple)):
        fits = isinstance(theirs, (list, tuple)) and len(theirs) == len(mine)
    else:
        fits = type(theirs) in ((int, float) if type(mine) is float else (type(mine),))
    if not fits:
        raise UserError(f"its {where} is {_make(theirs)}, not {_make(mine)}")
    if isinstance(mine, dict):
        for key, value in mine.items():
            require_alike(theirs[key], value, f"{where} {key}")
    elif isinstance(mine, (list, tuple)):
        for i, value in enumerate(mine):
            require_alike(theirs[i], value, f"{where} {i}")


def _make(value: Any) -> str:
    if isinstance(value, Tensor):
        place = " on meta" if value.is_meta else ""
        return f"a tensor of {tuple(value.shape)} {value.dtype} in {value.layout}{place}"
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple)) else ""
    return f"a {type(value).__name__}{size}"


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's global generators, in types that weights_only loading takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts `random_state()` back; GPU generators where the machine has as many.

    Raises:
        UserError: state is none of these; the generators are then as they were.
    """
    before = random_state()
    try:
        _set_random_state(state)
    except Exception as error:  # every generator has errors of its own
        _set_random_state(before)
        raise UserError(f"its states of the random generators are none: {error}") from None


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, position, *rest = state["numpy"]
    # What the generators themselves would find out when they draw, or not at all.
    if not 0 <= position <= len(keys) or not isinstance(state["python"][2], (float, type(None))):
        raise ValueError(f"NumPy's is at {position} of {len(keys)}, Python's next is {state['python'][2]}")
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
