"""The private names of PyTorch that this package needs, all in one place, bound once.

A release without one of them fails here, as the package is imported, by an ImportError that says which: nothing
falls back in silence. (nn.Module's own dictionaries, `_parameters`, `_buffers`, `_modules` and those of hooks, are
read where they are needed, as whoever subclasses it does.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._prims_common  # not by `import torch` in every release
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor
from torch.autograd import forward_ad

# Every name, and what would go wrong without it: docs/torch.md shows them.
NAMES: dict[str, str] = {}


def _private(name: str, without: str) -> Any:
    """torch.name; ImportError where this torch has none, which says what would go wrong without it."""
    NAMES[name] = without
    try:
        return functools.reduce(getattr, name.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"torch {torch.__version__} has no torch.{name}, which acnet_kernels needs ({without}): "
            "it knows torch 2.10 to 2.15"
        ) from None


# --- The dispatcher and autograd

# Calls within it skip the autograd layer: for what is not differentiated, and for an operator's own Autograd
# kernel, which would else call itself.
below_autograd = _private("_C._AutoDispatchBelowAutograd", "an operator's own autograd rule would call itself")
# True → the hooks that save tensors for backward, or None: only without them is a saved map nobody else's.
top_saved_tensors_hooks = _private(
    "_C._autograd._top_saved_tensors_default_hooks", "a map that a hook has kept would be written over"
)
# Within a backward: whether its graph is kept, so that what it saved must not be written over.
keeps_graph = _private(
    "_C._autograd._get_current_graph_task_keep_graph", "a retained graph's maps would be written over"
)
# -1 outside a backward, where alone the device may be waited for.
graph_task_id = _private(
    "_C._current_graph_task_id", "a candidate could be timed inside a backward, which waits for the device"
)
# How many modes see every operator now.
dispatch_modes = _private(
    "_C._len_torch_dispatch_stack", "a mode that counts or traces operators would miss those of one C++ call"
)
# Base classes: of a mode that sees every operator; of an operator, for annotations.
TorchDispatchMode = _private("utils._python_dispatch.TorchDispatchMode", "no run on an example could be observed")
OpOverload = _private("_ops.OpOverload", "operators could not be told from other calls")
# The leaves of nested containers, as a model takes and returns them.
tree_leaves = _private("utils._pytree.tree_leaves", "tensors within a model's containers would not be found")
# One launch for many small tensors: the public optimizers' own way.
foreach_add_ = _private("_foreach_add_", "running statistics and counters would take a launch a tensor")
foreach_mul_ = _private("_foreach_mul_", "running statistics would take a launch a tensor")


def schema_of(operator: Any) -> Any:
    """The operator's schema: its name, and which arguments it writes."""
    return operator._schema


def base_of(t: Tensor) -> Tensor | None:
    """What t is a view of, or t itself."""
    return t._base if t._is_view() else t


# --- Transforms

# None outside torch.func's transforms, which cannot have buffers written behind their backs.
transform_stack = _private(
    "_C._functorch.peek_interpreter_stack", "a transform would have buffers written behind its back"
)
is_wrapped_by_transform = _private(
    "_C._functorch.is_functorch_wrapped_tensor", "tensors of a transform would reach a kernel as plain ones"
)
is_batched = _private("_C._functorch.is_batchedtensor", "a batch of gradients would be taken for one gradient")
is_legacy_batched = _private(
    "_C._functorch.is_legacy_batchedtensor", "a batch of gradients would be taken for one gradient"
)  # by autograd.grad(is_grads_batched=True)
is_differentiated_by_transform = _private(
    "_C._functorch.is_gradtrackingtensor", "a transform's derivative would be lost"
)
_private("autograd.forward_ad._current_level", "a tangent would be dropped")


def in_forward_mode() -> bool:
    """Whether a forward-mode level is entered: without it no tensor need be asked for a tangent."""
    return forward_ad._current_level >= 0


# --- Layout, modules, machine

# torch.channels_last or torch.contiguous_format, for maps whose sizes are symbols, too.
suggest_memory_format = _private(
    "_prims_common.suggest_memory_format", "the layout of maps with symbolic sizes would be unknown"
)
# True where a hook is registered for all modules: then a block calls its own.
has_global_hooks = _private("nn.modules.module._has_any_global_hook", "hooks for all modules would be passed by")
# The base of all batch norms, SyncBatchNorm and the lazy ones included.
BatchNormBase = _private(
    "nn.modules.batchnorm._BatchNorm", "SyncBatchNorm and lazy batch norms would not be known as batch norms"
)
# What the processor computes fast in half precision: without the answer, the steps might take twice as long.
has_amx = _private("cpu._is_amx_tile_supported", "half-precision steps might take twice as long")
has_amx_fp16 = _private("cpu._is_amx_fp16_supported", "float16 steps might take twice as long")
# Whether convolutions may go to oneDNN: the switch of torch.backends.mkldnn.flags.
mkldnn_enabled = _private("_C._get_mkldnn_enabled", "oneDNN would be used where it is switched off")
# Cycles → keeps a CUDA stream busy, so that a timing is of full queues.
cuda_sleep = _private("cuda._sleep", "GPU timings would be of empty queues")


@functools.cache
def mkldnn_accumulates() -> bool:
    """Whether this build has oneDNN's convolution that adds to its output, torch.compile's own."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


@functools.cache
def mkldnn_has_float16() -> bool:
    """Whether oneDNN's convolutions take float16 on this processor; asked only where `mkldnn_accumulates`."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def mkldnn_add_convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """out += conv2d(x, weight) at stride 1, in one pass; only where `mkldnn_accumulates`."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, weight, None, padding, (1, 1), dilation, groups, "add", 1.0, None, [], ""
    )
