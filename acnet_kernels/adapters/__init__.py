"""What is known of other libraries' blocks: ADAPTERS, and `recognise`, which finds a module's among them."""

from __future__ import annotations

from torch import nn

from . import original, timm, transformers, yolo
from .adapter import Adapter, NotKnownError, Part, branch_in, branches_in, find, has, identity, reads
from .proof import prove

__all__ = [
    "ADAPTERS",
    "Adapter",
    "NotKnownError",
    "Part",
    "branch_in",
    "branches_in",
    "find",
    "has",
    "identity",
    "prove",
    "recognise",
]

ADAPTERS: list[Adapter] = [*original.ADAPTERS, *timm.ADAPTERS, *transformers.ADAPTERS, *yolo.ADAPTERS]


def recognise(cls: type[nn.Module]) -> Adapter | str | None:
    """The adapter of a module's class, or why there is none although the name is known, or None.

    The class that counts is the one that defines the forward: one derived from it may be the user's, or FSDP's.
    """
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    named = [adapter for adapter in ADAPTERS if adapter.is_for(owner.__name__)]
    if not named:
        return None
    words = reads(owner)
    for adapter in named:
        if adapter.reads == words:
            return adapter
    nearest = min(named, key=lambda adapter: len(adapter.reads ^ words))
    parts = []
    if more := sorted(words - nearest.reads):
        parts.append(f"reads {', '.join(more)}")
    if less := sorted(nearest.reads - words):
        parts.append(f"does not read {', '.join(less)}")
    return f"its forward is not a known {owner.__name__}'s: it {' and '.join(parts)}"
