"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


def number(kind: type, zero: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind above zero, or from zero on."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf") or (value == 0 and not zero):
            what = f"{'an' if kind is int else 'a'} {kind.__name__} {'from 0 on' if zero else 'above 0'}"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


def choose_device(name: str) -> torch.device:
    """The device of that name, made ready; UserError where the machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels that are launched by hand go to the current device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def make_directory(path: Path) -> Path:
    """path, made where missing; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be a directory: {error.strerror}") from None
    return path
