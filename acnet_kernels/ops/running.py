"""Running statistics of several batch norms in one call, as nn.BatchNorm2d keeps them (csrc/running.cpp, CPU).

    update_running_(running_means, running_vars, counters, means, variances, momenta, count) -> ()

Every counter grows by one; with count > 0, r ← (1 − f)·r + f·v in float64 for each norm's running mean, v its entry
of `means`, and running variance, v = variance·count/(count − 1), the unbiased one. f is the norm's momentum, or
where that is NaN one over its counter: the cumulative average, one norm a call.

Arguments: `running_means` and `running_vars`, a (K,) tensor a norm, any float dtype; `counters`, int64 tensors of
one element, of any number of norms; `means`, `variances` (biased), (norms, K) float64; `momenta`, a float a norm;
`count`, elements a channel, 0 or more than 1.
There is no such operator without the extension, nor on other devices: backends/batchnorm.py does the same there.
"""

from __future__ import annotations

from typing import Any

import torch

from ._extension import MISSING

if MISSING is None:
    update_running_ = torch.ops.acnet_kernels.update_running_.default

    @torch.library.register_fake("acnet_kernels::update_running_")
    def _(*_: Any) -> None:
        return None
