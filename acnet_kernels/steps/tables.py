"""Small tensors that follow from sizes alone, kept on their device from one step to the next."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Table = TypeVar("_Table")
_lock = threading.Lock()
_kept: dict[Any, dict[tuple[Any, ...], Any]] = {}  # of every function its tables, by its arguments
_in_graphs: list[Any] = []  # which read them at every replay


def kept(most: int) -> Callable[[Callable[..., _Table]], Callable[..., _Table]]:
    """Decorates a function of hashable arguments, a device the last, that makes a table: the last `most` are kept.

    RuntimeError where a CUDA graph's capture wants one that is not there: the copy that makes it cannot be
    captured, and what a capture allocates is filled by the graph's replays alone.
    """

    def decorate(make: Callable[..., _Table]) -> Callable[..., _Table]:
        @functools.wraps(make)
        def table(*args: Any) -> _Table:
            capturing = args[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
            with _lock:
                tables = _kept.setdefault(make, {})
                if args in tables:
                    if capturing:
                        _in_graphs.append(tables[args])
                    return tables[args]
            if capturing:
                raise RuntimeError("a first step of these sizes cannot be captured in a CUDA graph: run one before")
            with torch.inference_mode(False):  # it outlives the call
                made = make(*args)
            with _lock:
                while len(tables) >= most:
                    del tables[next(iter(tables))]
                return tables.setdefault(args, made)

        return table

    return decorate
