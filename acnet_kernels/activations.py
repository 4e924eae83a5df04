"""Which activation a module is, where its class and attributes say it all."""

from __future__ import annotations

from torch import nn

from ._torch_compat import has_global_hooks

_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Identity: "",
}


def activation_of(module: nn.Module | None) -> str | None:
    """The name of the activation that calling the module is ('' for nn.Identity), None for anything else.

    A module with hooks, or with a forward of its own, is something else; so is any while global hooks are there.
    """
    name = None if module is None else _NAMES.get(type(module))
    if name is None or module is None or has_global_hooks():
        return None
    hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return None if hooks or "forward" in module.__dict__ else name


def activation_after(first: nn.Module | None, last: nn.Module | None) -> str | None:
    """The activation that calling one module and then the other is, where the first does nothing, else None."""
    return activation_of(last) if activation_of(first) == "" else None
