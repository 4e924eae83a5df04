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


def _private(name: str) -> Any:
    try:
        return functools.reduce(getattr, name.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"torch {torch.__version__} has no torch.{name}, which acnet_kernels needs: it knows 2.10 to 2.14"
        ) from None


# --- The dispatcher and autograd

# Calls within it skip the autograd layer: for what is not differentiated, and for an operator's own Autograd
# kernel, which would else call itself.
below_autograd = _private("_C._AutoDispatchBelowAutograd")
# True → the hooks that save tensors for backward, or None: only without them is a saved map nobody else's.
top_saved_tensors_hooks = _private("_C._autograd._top_saved_tensors_default_hooks")
# Within a backward: whether its graph is kept, so that what it saved must not be written over.
keeps_graph = _private("_C._autograd._get_current_graph_task_keep_graph")
# -1 outside a backward, where alone the device may be waited for.
graph_task_id = _private("_C._current_graph_task_id")
# How many modes see every operator now.
dispatch_modes = _private("_C._len_torch_dispatch_stack")
# Base classes: of a mode that sees every operator; of an operator, for annotations.
TorchDispatchMode = _private("utils._python_dispatch.TorchDispatchMode")
OpOverload = _private("_ops.OpOverload")
# The leaves of nested containers, as a model takes and returns them.
tree_leaves = _private("utils._pytree.tree_leaves")
# One launch for many small tensors: the public optimizers' own way.
foreach_add_ = _private("_foreach_add_")
foreach_mul_ = _private("_foreach_mul_")


def schema_of(operator: Any) -> Any:
    """The operator's schema: its name, and which arguments it writes."""
    return operator._schema


def base_of(t: Tensor) -> Tensor | None:
    """What t is a view of, or t itself."""
    return t._base if t._is_view() else t


# --- Transforms

# None outside torch.func's transforms, which cannot have buffers written behind their backs.
transform_stack = _private("_C._functorch.peek_interpreter_stack")
is_wrapped_by_transform = _private("_C._functorch.is_functorch_wrapped_tensor")
is_batched = _private("_C._functorch.is_batchedtensor")
is_legacy_batched = _private("_C._functorch.is_legacy_batchedtensor")  # by autograd.grad(is_grads_batched=True)
is_differentiated_by_transform = _private("_C._functorch.is_gradtrackingtensor")
_private("autograd.forward_ad._current_level")


def in_forward_mode() -> bool:
    """Whether a forward-mode level is entered: without it no tensor need be asked for a tangent."""
    return forward_ad._current_level >= 0


# --- Layout, modules, machine

# torch.channels_last or torch.contiguous_format, for maps whose sizes are symbols, too.
suggest_memory_format = _private("_prims_common.suggest_memory_format")
# True where a hook is registered for all modules: then a block calls its own.
has_global_hooks = _private("nn.modules.module._has_any_global_hook")
# The base of all batch norms, SyncBatchNorm and the lazy ones included.
BatchNormBase = _private("nn.modules.batchnorm._BatchNorm")
# What the processor computes fast in half precision: without the answer, the steps might take twice as long.
has_amx = _private("cpu._is_amx_tile_supported")
has_amx_fp16 = _private("cpu._is_amx_fp16_supported")
# Whether convolutions may go to oneDNN: the switch of torch.backends.mkldnn.flags.
mkldnn_enabled = _private("_C._get_mkldnn_enabled")
# Cycles → keeps a CUDA stream busy, so that a timing is of full queues.
cuda_sleep = _private("cuda._sleep")


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
