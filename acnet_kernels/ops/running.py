"""Running statistics of several batch norms in one call, as nn.BatchNorm2d keeps them (csrc/running.cpp, CPU).

    update_running_(running_means, running_vars, counters, means, variances, momenta, count) -> ()

Every counter grows by one; with count > 0, r ← (1 − f)·r + f·v in float64 for each norm's running mean, v its entry
of `means`, and running variance, v = variance·count/(count − 1), the unbiased one. f is the norm's momentum, or
where that is NaN one over its counter: the cumulative average, one norm a call.

Arguments: `running_means` and `running_vars`, a (K,) tensor a norm, any float dtype; `counters`, tensors of one
element, of a dtype in COUNTERS, of any number of norms; `means`, `variances` (biased), (norms, K) float64;
`momenta`, a float a norm; `count`, elements a channel, 0 or more than 1. Running statistics may be strided.
There is no such operator without the extension, nor on other devices: steps/batchnorm.py does the same there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import check
from ._extension import LOADED

COUNTERS = (*check.FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Running(NamedTuple):
    """Running statistics of batch norms, as Triton's kernels move them: a list has an entry a norm, or none.

    Means and variances are contiguous (K,) tensors, counters of one element; no two share memory. `shifts` (K,) are
    added to the batch's means, [] for none. A momentum of None is the cumulative average.
    """

    means: Sequence[Tensor] = ()
    variances: Sequence[Tensor] = ()
    counters: Sequence[Tensor] = ()
    shifts: Sequence[Tensor] = ()
    momenta: Sequence[float | None] = ()

    @classmethod
    def of(cls, *lists: Any) -> Running:
        """As operators take it: the lists in order, with NaN for None."""
        means, variances, counters, shifts, momenta = lists
        return cls(means, variances, counters, shifts, [None if math.isnan(f) else f for f in momenta])

    def lists(self) -> tuple[Any, ...]:
        """What `of` takes."""
        return (*self[:4], [math.nan if momentum is None else momentum for momentum in self.momenta])


NONE = Running()

if LOADED:
    update_running_ = torch.ops.acnet_kernels.update_running_.default
    _LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")

    @torch.library.register_fake("acnet_kernels::update_running_")
    def _(running_means: Any, running_vars: Any, counters: Any, means: Any, variances: Any, *_: Any) -> None:
        check.one_device(
            means=means,
            variances=variances,
            running_means=running_means,
            running_vars=running_vars,
            counters=counters,
        )

    check.refuse_leaves(_LIBRARY, update_running_)
