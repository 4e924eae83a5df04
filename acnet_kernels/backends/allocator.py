"""The C library's allocator, as far as the speed of a step on the CPU depends on it."""

from __future__ import annotations

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Has glibc keep freed maps for the next step, up to 64 MiB, where it would hand them back to the system.

    Its thresholds follow the largest block ever freed: one of just under 32 MiB, never touched, raises them to
    their maximum for good, as freeing a map of that size would. Otherwise a step of a few 8 MB maps faults in
    thousands of fresh pages, which costs as much as its arithmetic.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)
